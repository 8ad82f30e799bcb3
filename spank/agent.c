#include "agent.h"

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define READ_BYTES 16384

int64_t agent_now_ns(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

int agent_left_ms(int64_t deadline_ns)
{
	int64_t left_ns = deadline_ns - agent_now_ns();
	return left_ns <= 0 ? 0 : (int)((left_ns + 999999) / 1000000);
}

void agent_add(struct agent_message *message, const char *key, const char *value)
{
	size_t key_bytes = strlen(key), value_bytes = strlen(value);
	size_t size_bytes = message->size_bytes + key_bytes + value_bytes + 2;
	char *data;

	if (message->failed)
		return;
	if (size_bytes > AGENT_MESSAGE_MAX_BYTES || (data = realloc(message->data, size_bytes)) == NULL) {
		message->failed = true;
		return;
	}
	message->data = data;
	data += message->size_bytes;
	memcpy(data, key, key_bytes);
	data[key_bytes] = '=';
	memcpy(data + key_bytes + 1, value, value_bytes + 1);
	message->size_bytes = size_bytes;
}

void agent_addf(struct agent_message *message, const char *key, const char *format, ...)
{
	char *value = NULL;
	va_list args;
	int length;

	va_start(args, format);
	length = vasprintf(&value, format, args);
	va_end(args);
	if (length < 0) {
		message->failed = true;
		return;
	}
	agent_add(message, key, value);
	free(value);
}

void agent_message_free(struct agent_message *message)
{
	free(message->data);
	*message = (struct agent_message){ 0 };
}

/* Waits for the events on the socket: 0, or -ETIMEDOUT, or -errno. */
static int wait_for(int sock, short events, int64_t deadline_ns)
{
	for (;;) {
		struct pollfd wait = { .fd = sock, .events = events };
		int left_ms = agent_left_ms(deadline_ns), ready;
		if (left_ms == 0)
			return -ETIMEDOUT;
		ready = poll(&wait, 1, left_ms);
		if (ready > 0)
			return 0;
		if (ready < 0 && errno != EINTR)
			return -errno;
	}
}

/* A connection to an agent that is root's. Returns the socket or -errno. */
static int agent_connect(const char *socket_path, int64_t deadline_ns)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	struct ucred peer = { .uid = (uid_t)-1 };
	socklen_t peer_size = sizeof(peer);
	int sock, error = 0;

	if (strlen(socket_path) >= sizeof(address.sun_path))
		return -ENAMETOOLONG;
	strcpy(address.sun_path, socket_path);
	sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (sock < 0)
		return -errno;
	/* With a full backlog a blocking connect waits as long as SO_SNDTIMEO says, and ends with EAGAIN; a
	 * non-blocking one would have to be tried again and again (unix(7)). */
	do {
		int64_t left_ms = agent_left_ms(deadline_ns);
		struct timeval timeout = { .tv_sec = left_ms / 1000, .tv_usec = left_ms % 1000 * 1000 };
		if (left_ms == 0)
			error = ETIMEDOUT;
		else if (setsockopt(sock, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout)) != 0)
			error = errno;
		else if (connect(sock, (const struct sockaddr *)&address, sizeof(address)) != 0)
			error = errno == EAGAIN ? ETIMEDOUT : errno;
		else
			error = 0;
	} while (error == EINTR);
	if (error == 0 && getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &peer, &peer_size) != 0)
		error = errno;
	if (error == 0 && peer.uid != 0)
		error = EPERM;
	if (error != 0) {
		close(sock);
		return -error;
	}
	return sock;
}

static int send_all(int sock, const struct agent_message *request, int64_t deadline_ns)
{
	size_t sent = 0;

	while (sent < request->size_bytes) {
		ssize_t n = send(sock, request->data + sent, request->size_bytes - sent,
				 MSG_NOSIGNAL | MSG_DONTWAIT);
		if (n >= 0) {
			sent += (size_t)n;
		} else if (errno == EAGAIN) {
			int error = wait_for(sock, POLLOUT, deadline_ns);
			if (error != 0)
				return error;
		} else if (errno != EINTR) {
			return -errno;
		}
	}
	return shutdown(sock, SHUT_WR) == 0 ? 0 : -errno;
}

/* Keeps the descriptors that came with one recvmsg; those beyond the limit are closed. False when there were any. */
static bool keep_fds(struct msghdr *header, struct agent_reply *reply)
{
	bool all_kept = (header->msg_flags & MSG_CTRUNC) == 0;

	for (struct cmsghdr *c = CMSG_FIRSTHDR(header); c != NULL; c = CMSG_NXTHDR(header, c)) {
		size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		for (size_t i = 0; i < count; i++) {
			int fd;
			memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
			if (reply->fd_count < AGENT_FDS_MAX) {
				reply->fds[reply->fd_count++] = fd;
			} else {
				close(fd);
				all_kept = false;
			}
		}
	}
	return all_kept;
}

/* An agent that is well but has to wait for a file system says so first: WAIT=milliseconds it may take in all. */
static int64_t extended_deadline_ns(const struct agent_reply *reply, int64_t start_ns, int64_t deadline_ns)
{
	long wait_ms = strncmp(reply->data, "WAIT=", 5) == 0 ? strtol(reply->data + 5, NULL, 10) : 0;

	if (wait_ms <= 0 || wait_ms > AGENT_WAIT_MAX_MS || start_ns + wait_ms * 1000000 < deadline_ns)
		return deadline_ns;
	return start_ns + wait_ms * 1000000;
}

/* Reads until the agent closes. */
static int receive_all(int sock, int64_t deadline_ns, struct agent_reply *reply)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(AGENT_FDS_MAX * sizeof(int))];
	} control;
	int64_t start_ns = agent_now_ns();

	for (;;) {
		char *data = realloc(reply->data, reply->size_bytes + READ_BYTES + 1);
		struct iovec part;
		struct msghdr header;
		ssize_t n;
		int error = wait_for(sock, POLLIN, deadline_ns);

		if (data == NULL)
			return -ENOMEM;
		reply->data = data;
		if (error != 0)
			return error;
		part = (struct iovec){ data + reply->size_bytes, READ_BYTES };
		header = (struct msghdr){ .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
					  .msg_controllen = sizeof(control) };
		n = recvmsg(sock, &header, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
		if (n < 0 && (errno == EINTR || errno == EAGAIN))
			continue;
		if (n < 0)
			return -errno;
		if (!keep_fds(&header, reply))
			return -EBADMSG;
		reply->size_bytes += (size_t)n;
		data[reply->size_bytes] = '\0';
		deadline_ns = extended_deadline_ns(reply, start_ns, deadline_ns);
		if (reply->size_bytes > AGENT_MESSAGE_MAX_BYTES)
			return -EBADMSG;
		if (n == 0)
			return reply->size_bytes > 0 && data[reply->size_bytes - 1] == '\0' ? 0 : -EBADMSG;
	}
}

/* The socket on which the whole request was sent, or -errno. */
static int connect_and_send(const char *socket_path, const struct agent_message *request, int64_t deadline_ns)
{
	int error, sock;

	if (request->failed)
		return -ENOMEM;
	sock = agent_connect(socket_path, deadline_ns);
	if (sock < 0)
		return sock;
	error = send_all(sock, request, deadline_ns);
	if (error != 0) {
		close(sock);
		return error;
	}
	return sock;
}

int agent_call(const char *socket_path, const struct agent_message *request, int64_t deadline_ns,
	       struct agent_reply *reply)
{
	int error, sock = connect_and_send(socket_path, request, deadline_ns);

	*reply = (struct agent_reply){ 0 };
	if (sock < 0)
		return sock;
	error = receive_all(sock, deadline_ns, reply);
	close(sock);
	if (error != 0)
		agent_reply_free(reply);
	return error;
}

int agent_tell(const char *socket_path, const struct agent_message *request, int64_t deadline_ns)
{
	int sock = connect_and_send(socket_path, request, deadline_ns);

	if (sock < 0)
		return sock;
	close(sock);
	return 0;
}

const char *agent_reply_next(const struct agent_reply *reply, const char *previous)
{
	const char *next = previous == NULL ? reply->data : previous + strlen(previous) + 1;
	return next < reply->data + reply->size_bytes ? next : NULL;
}

const char *agent_reply_get(const struct agent_reply *reply, const char *key)
{
	size_t key_bytes = strlen(key);

	for (const char *s = agent_reply_next(reply, NULL); s != NULL; s = agent_reply_next(reply, s))
		if (strncmp(s, key, key_bytes) == 0 && s[key_bytes] == '=')
			return s + key_bytes + 1;
	return NULL;
}

void agent_reply_free(struct agent_reply *reply)
{
	for (size_t i = 0; i < reply->fd_count; i++)
		if (reply->fds[i] >= 0)
			close(reply->fds[i]);
	free(reply->data);
	*reply = (struct agent_reply){ 0 };
}
