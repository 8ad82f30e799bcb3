#include "attach.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent.h"
#include "kernel.h"

static bool parse_number(const char **text, uint64_t *number)
{
	char *end = NULL;

	if (**text < '0' || **text > '9')
		return false;
	errno = 0;
	*number = strtoull(*text, &end, 10);
	if (errno != 0 || *end != ':')
		return false;
	*text = end + 1;
	return true;
}

bool attach_parse_bind(const char *text, size_t fd_count, struct attach_bind *bind)
{
	uint64_t index;

	if (!parse_number(&text, &index) || !parse_number(&text, &bind->dev) || !parse_number(&text, &bind->ino))
		return false;
	bind->fd_index = (size_t)index;
	bind->target = text;
	return index < fd_count && text[0] == '/' && strlen(text) <= 4096;
}

int attach_private_namespace(void)
{
	if (unshare(CLONE_NEWNS) != 0)
		return -errno;
	/* Slave, not private: what is mounted on the host later (autofs, another file server) must still come. */
	if (mount("", "/", NULL, MS_REC | MS_SLAVE, NULL) != 0)
		return -errno;
	return 0;
}

/* In the child: becomes the user for good. By bare system calls, which concern this only thread. */
static int become_user(const struct attach_user *user)
{
	if (syscall(SYS_setgroups, user->gid_count, user->gids) != 0 ||
	    syscall(SYS_setresgid, user->gid, user->gid, user->gid) != 0 ||
	    syscall(SYS_setresuid, user->uid, user->uid, user->uid) != 0 ||
	    /* The user may not trace it, whatever fs.suid_dumpable says. */
	    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0)
		return -errno;
	return 0;
}

static void answer(int sock, int code, int fd)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int))];
	} control = { 0 };
	struct iovec part = { &code, sizeof(code) };
	struct msghdr header = { .msg_iov = &part, .msg_iovlen = 1 };

	if (fd >= 0) {
		struct cmsghdr *c;
		header.msg_control = &control;
		header.msg_controllen = sizeof(control);
		c = CMSG_FIRSTHDR(&header);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(c), &fd, sizeof(int));
	}
	if (sendmsg(sock, &header, MSG_NOSIGNAL) < 0)
		_exit(1);
}

/* Whether `fd` is what the agent saw. Asks no file server: the kernel knows the numbers of an open file. */
static bool is_what_was_seen(int fd, const struct attach_bind *bind)
{
	struct statx st;

	return statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_INO, &st) == 0 && st.stx_ino == bind->ino &&
	       makedev(st.stx_dev_major, st.stx_dev_minor) == bind->dev;
}

/* The child: opens targets[index] for each index it is sent, until the parent goes. Async-signal-safe calls only. */
static void serve_targets(int sock, const struct attach_user *user, const struct attach_bind *binds, size_t count)
{
	int failed = become_user(user);
	size_t index;

	while (recv(sock, &index, sizeof(index), 0) == (ssize_t)sizeof(index)) {
		int fd, code = -failed;

		if (failed != 0 || index >= count) {
			answer(sock, code == 0 ? EINVAL : code, -1);
			continue;
		}
		fd = kernel_open_place(binds[index].target);
		if (fd < 0)
			code = errno;
		answer(sock, code, code == 0 ? fd : -1);
		if (fd >= 0)
			close(fd);
	}
	_exit(0);
}

int attach_opener_start(struct attach_opener *opener, const struct attach_user *user,
			const struct attach_bind *binds, size_t bind_count)
{
	int socks[2];

	*opener = (struct attach_opener){ .pid = -1, .sock = -1, .binds = binds };
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, socks) != 0)
		return -errno;
	opener->pid = fork();
	if (opener->pid == 0) {
		close(socks[0]);
		serve_targets(socks[1], user, binds, bind_count);
	}
	close(socks[1]);
	if (opener->pid < 0) {
		int error = errno;
		close(socks[0]);
		return -error;
	}
	opener->sock = socks[0];
	return 0;
}

void attach_opener_stop(struct attach_opener *opener)
{
	if (opener->pid <= 0)
		return;
	if (opener->sock >= 0)
		close(opener->sock);
	kill(opener->pid, SIGKILL);
	/* Dead at once, unless a file server holds it; then it is left to the program that the task becomes. */
	for (int i = 0; i < 20 && waitpid(opener->pid, NULL, WNOHANG) == 0; i++)
		usleep(1000);
	opener->pid = -1;
}

/* The opener's answer for one target: an open place, or -1 with the reason. */
static int open_target(struct attach_opener *opener, size_t bind_index, int64_t deadline_ns, char *reason)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int))];
	} control;
	int code = EPIPE, fd = -1;
	struct iovec part = { &code, sizeof(code) };
	struct msghdr header = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
				 .msg_controllen = sizeof(control) };
	struct pollfd wait = { .fd = opener->sock, .events = POLLIN };
	struct cmsghdr *c;
	int ready;

	if (opener->sock < 0) {
		snprintf(reason, ATTACH_REASON_MAX_BYTES, "opening an earlier path took too long");
		return -1;
	}
	if (send(opener->sock, &bind_index, sizeof(bind_index), MSG_NOSIGNAL | MSG_DONTWAIT) < 0) {
		snprintf(reason, ATTACH_REASON_MAX_BYTES, "the opener is gone: %s", strerror(errno));
		return -1;
	}
	do
		ready = poll(&wait, 1, agent_left_ms(deadline_ns));
	while (ready < 0 && errno == EINTR);
	if (ready <= 0) {
		/* Its late answer must not be taken for that of the next target. */
		close(opener->sock);
		opener->sock = -1;
		snprintf(reason, ATTACH_REASON_MAX_BYTES, "opening the path took too long");
		return -1;
	}
	if (recvmsg(opener->sock, &header, MSG_CMSG_CLOEXEC | MSG_DONTWAIT) != (ssize_t)sizeof(code)) {
		snprintf(reason, ATTACH_REASON_MAX_BYTES, "the opener died");
		return -1;
	}
	c = CMSG_FIRSTHDR(&header);
	if (c != NULL && c->cmsg_type == SCM_RIGHTS && c->cmsg_len == CMSG_LEN(sizeof(int)))
		memcpy(&fd, CMSG_DATA(c), sizeof(int));
	if (code == ELOOP)
		snprintf(reason, ATTACH_REASON_MAX_BYTES, "a symbolic link is in the path");
	else if (code != 0 || fd < 0)
		snprintf(reason, ATTACH_REASON_MAX_BYTES, "opening the path: %s", strerror(code));
	else if (!is_what_was_seen(fd, &opener->binds[bind_index]))
		snprintf(reason, ATTACH_REASON_MAX_BYTES, "another file is there than the agent saw");
	else
		return fd;
	if (fd >= 0)
		close(fd);
	return -1;
}

bool attach_show(struct attach_opener *opener, size_t bind_index, int mount_fd, int64_t deadline_ns,
		 char reason[ATTACH_REASON_MAX_BYTES])
{
	int target_fd = open_target(opener, bind_index, deadline_ns, reason);
	bool shown = false;

	if (target_fd < 0)
		return false;
	if (kernel_make_harmless(mount_fd) != 0)
		snprintf(reason, ATTACH_REASON_MAX_BYTES, "mount_setattr: %s", strerror(errno));
	else if (kernel_move_mount(mount_fd, target_fd) != 0)
		snprintf(reason, ATTACH_REASON_MAX_BYTES, "move_mount: %s", strerror(errno));
	else
		shown = true;
	close(target_fd);
	return shown;
}
