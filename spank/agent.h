/*
 * Client of the node agent: one connection, one request, one reply (see bootseer_slurm/agentapi/protocol.py).
 *
 * A message is a run of KEY=VALUE strings, each with its NUL; descriptors come as SCM_RIGHTS. Everything has a
 * deadline on CLOCK_MONOTONIC. The peer must be root; its reply is still read as if it were hostile.
 */
#ifndef BOOTSEER_AGENT_H
#define BOOTSEER_AGENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define AGENT_MESSAGE_MAX_BYTES ((size_t)1 << 20)
#define AGENT_FDS_MAX 64
/* What an agent may ask for with WAIT; a step starts without it after that. */
#define AGENT_WAIT_MAX_MS 60000

struct agent_message {
	char *data;
	size_t size_bytes;
	bool failed; /* out of memory or too long: not to be sent */
};

struct agent_reply {
	char *data; /* ends with a NUL of our own */
	size_t size_bytes;
	int fds[AGENT_FDS_MAX];
	size_t fd_count;
};

/* Nanoseconds of CLOCK_MONOTONIC, the clock of all deadlines here. */
int64_t agent_now_ns(void);

/* Milliseconds left until deadline_ns, rounded up, 0 when it has passed: what poll(2) wants. */
int agent_left_ms(int64_t deadline_ns);

/* Appends KEY=VALUE. A failure is kept in message->failed, so that calls need no check each. */
void agent_add(struct agent_message *message, const char *key, const char *value);
void agent_addf(struct agent_message *message, const char *key, const char *format, ...)
	__attribute__((format(printf, 3, 4)));
void agent_message_free(struct agent_message *message);

/*
 * Sends the request and reads the whole reply. Returns 0, or -errno: -ENOENT or -ECONNREFUSED without an agent,
 * -ETIMEDOUT at the deadline (or at the later one that a reply beginning with WAIT=milliseconds sets), -EPERM when the peer is not root, -EBADMSG when the reply is none. After 0, and only
 * then, agent_reply_free is due.
 */
int agent_call(const char *socket_path, const struct agent_message *request, int64_t deadline_ns,
	       struct agent_reply *reply);

/* Sends the request and does not wait for a reply. Returns 0 or -errno. */
int agent_tell(const char *socket_path, const struct agent_message *request, int64_t deadline_ns);

/* Walks the strings of a reply: NULL for the first, then the one before. Returns NULL at the end. */
const char *agent_reply_next(const struct agent_reply *reply, const char *previous);

/* The value of the first KEY=VALUE of that key, or NULL. */
const char *agent_reply_get(const struct agent_reply *reply, const char *key);

/* Closes the descriptors and frees the text. */
void agent_reply_free(struct agent_reply *reply);

#endif
