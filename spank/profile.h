/*
 * The job profile named with --bootseer=FILE.toml: reading it, and having it checked by `bootseer profile check`.
 */
#ifndef BOOTSEER_PROFILE_H
#define BOOTSEER_PROFILE_H

#include <stddef.h>

/* Reads a profile of at most max_bytes. Returns malloc'd text, or NULL with the reason in `reason`. */
char *profile_read(const char *path, size_t max_bytes, char *reason, size_t reason_size);

enum profile_verdict { PROFILE_VALID, PROFILE_INVALID, PROFILE_UNCHECKED };

/*
 * Runs `checker profile check path` for at most timeout_ms. Exit 0 is valid, 2 is invalid (message: first line of its
 * stderr); anything else means that the check itself failed (message: how).
 */
enum profile_verdict profile_check(const char *checker, const char *path, int timeout_ms, char *message,
				   size_t message_size);

#endif
