/*
 * The shadow: detached mounts, given by the agent, put over the job's paths in a mount namespace of the step's own.
 *
 * Targets are opened by a child process that has become the job's user: that user's rights decide, a file server
 * that hangs can only hang the child, and no failure can leave a task with the wrong ids. What it opened is compared
 * here: it may be the user's by then.
 */
#ifndef BOOTSEER_ATTACH_H
#define BOOTSEER_ATTACH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define ATTACH_REASON_MAX_BYTES 160

struct attach_user {
	uid_t uid;
	gid_t gid;
	const gid_t *gids;
	size_t gid_count;
};

struct attach_bind {
	size_t fd_index; /* into the descriptors of the reply */
	uint64_t dev, ino;
	const char *target; /* absolute */
};

struct attach_opener {
	pid_t pid;
	int sock;
	const struct attach_bind *binds;
};

/* Reads "<index>:<dev>:<ino>:<absolute path>". Returns false when it is not that. */
bool attach_parse_bind(const char *text, size_t fd_count, struct attach_bind *bind);

/* Gives the process a mount namespace of its own that still receives the host's mounts. Returns 0 or -errno. */
int attach_private_namespace(void);

/* Starts the child that opens targets for `binds` as that user. After attach_private_namespace. 0 or -errno. */
int attach_opener_start(struct attach_opener *opener, const struct attach_user *user,
			const struct attach_bind *binds, size_t bind_count);

/*
 * Puts the mount `mount_fd` over the target of binds[bind_index], read-only, nosuid and nodev, when the target is
 * still the inode that the agent saw. Returns true, or false with a reason for people.
 */
bool attach_show(struct attach_opener *opener, size_t bind_index, int mount_fd, int64_t deadline_ns,
		 char reason[ATTACH_REASON_MAX_BYTES]);

/* Ends the child. */
void attach_opener_stop(struct attach_opener *opener);

#endif
