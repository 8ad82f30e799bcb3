#include "gate.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <slurm/spank.h>

#include "agent.h"

/* What the one message says of the namespace. */
enum { NOT_YET, NONE, MADE };

union control {
	struct cmsghdr align;
	char bytes[CMSG_SPACE(sizeof(int))];
};

static int put(const struct gate *gate, char state, int namespace_fd)
{
	union control control = { 0 };
	struct iovec part = { &state, sizeof(state) };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };

	if (namespace_fd >= 0) {
		struct cmsghdr *c;
		message.msg_control = &control;
		message.msg_controllen = sizeof(control);
		c = CMSG_FIRSTHDR(&message);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(c), &namespace_fd, sizeof(int));
	}
	return sendmsg(gate->put, &message, MSG_NOSIGNAL | MSG_DONTWAIT) == sizeof(state) ? 0 : -errno;
}

/* The message's state, with a descriptor in *namespace_fd if there is one; or -errno. */
static int take(const struct gate *gate, int64_t deadline_ns, int *namespace_fd)
{
	for (;;) {
		union control control = { 0 };
		char state = NOT_YET;
		struct iovec part = { &state, sizeof(state) };
		struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
					  .msg_controllen = sizeof(control) };
		struct pollfd wait = { .fd = gate->take, .events = POLLIN };
		ssize_t got = recvmsg(gate->take, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
		struct cmsghdr *c = got > 0 ? CMSG_FIRSTHDR(&message) : NULL;
		int left_ms = agent_left_ms(deadline_ns);

		if (c != NULL && c->cmsg_type == SCM_RIGHTS && c->cmsg_len == CMSG_LEN(sizeof(int)))
			memcpy(namespace_fd, CMSG_DATA(c), sizeof(int));
		if (got > 0)
			return state;
		if (got == 0 || (errno != EAGAIN && errno != EINTR))
			return got == 0 ? -EPIPE : -errno;
		if (left_ms == 0)
			return -ETIMEDOUT;
		if (poll(&wait, 1, left_ms) < 0 && errno != EINTR)
			return -errno;
	}
}

int gate_open(struct gate *gate)
{
	int ends[2], error;

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0)
		return -errno;
	*gate = (struct gate){ .take = ends[0], .put = ends[1] };
	error = put(gate, NOT_YET, -1);
	if (error != 0)
		gate_close(gate);
	return error;
}

int gate_enter(const struct gate *gate, int64_t deadline_ns)
{
	int namespace_fd = -1, error = 0, folder_fd;
	int state = take(gate, deadline_ns, &namespace_fd);

	if (state < 0)
		return state;
	if (state == NOT_YET)
		return GATE_FIRST;
	error = put(gate, (char)state, namespace_fd); /* at once: the others wait for it */
	if (namespace_fd < 0)
		return error != 0 ? error : GATE_NOTHING;
	/* Entering goes to the root folder. Slurm goes to the task's folder afterwards, but not for srun --no-allocate. */
	folder_fd = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (setns(namespace_fd, CLONE_NEWNS) != 0)
		error = -errno;
	close(namespace_fd);
	if (folder_fd >= 0) {
		if (fchdir(folder_fd) != 0)
			slurm_debug("bootseer: a task starts in /: %s", strerror(errno));
		close(folder_fd);
	}
	return error != 0 ? error : GATE_ENTERED;
}

int gate_pass(const struct gate *gate, int shared)
{
	int namespace_fd = shared ? open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC) : -1;
	int error = shared && namespace_fd < 0 ? -errno : 0;
	int put_error = put(gate, namespace_fd < 0 ? NONE : MADE, namespace_fd);

	if (namespace_fd >= 0)
		close(namespace_fd);
	return error != 0 ? error : put_error;
}

void gate_close(struct gate *gate)
{
	close(gate->take);
	close(gate->put);
	*gate = (struct gate){ .take = -1, .put = -1 };
}
