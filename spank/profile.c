#include "profile.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

/* Bytes that a profile cannot have: it is text, and it travels in an environment variable. */
static bool is_text(const char *data, size_t size)
{
	for (size_t i = 0; i < size; i++) {
		unsigned char c = (unsigned char)data[i];
		if ((c < 0x20 && c != '\n' && c != '\t' && c != '\r') || c == 0x7f)
			return false;
	}
	return true;
}

char *profile_read(const char *path, size_t max_bytes, char *reason, size_t reason_size)
{
	struct stat st;
	char *text = NULL;
	size_t size = 0;
	/* O_NONBLOCK: opening a pipe by mistake must not wait for a writer. */
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);

	if (fd < 0 || fstat(fd, &st) != 0) {
		snprintf(reason, reason_size, "%s", strerror(errno));
	} else if (!S_ISREG(st.st_mode)) {
		snprintf(reason, reason_size, "it is not a regular file");
	} else if ((text = malloc(max_bytes + 2)) == NULL) {
		snprintf(reason, reason_size, "out of memory");
	} else {
		ssize_t got = 0;
		/* One byte more than allowed: the file may have grown since fstat. */
		while (size <= max_bytes && (got = read(fd, text + size, max_bytes + 1 - size)) > 0)
			size += (size_t)got;
		text[size] = '\0';
		if (got >= 0 && size <= max_bytes && is_text(text, size)) {
			close(fd);
			return text;
		}
		if (got < 0)
			snprintf(reason, reason_size, "%s", strerror(errno));
		else if (size > max_bytes)
			snprintf(reason, reason_size, "it is larger than %zu KiB", max_bytes / 1024);
		else
			snprintf(reason, reason_size, "it is not a text file");
	}
	free(text);
	if (fd >= 0)
		close(fd);
	return NULL;
}

/* In the child: becomes the checker, with its stderr in `err_fd`. Only async-signal-safe calls. */
static void become_checker(const char *checker, const char *path, int err_fd)
{
	const char *const args[] = { checker, "profile", "check", path, NULL };
	int null_fd = open("/dev/null", O_RDWR);
	sigset_t none;

	/* srun blocks signals before it reads options, and a blocked mask outlives exec. */
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	setpgid(0, 0);
	if (null_fd < 0 || dup2(null_fd, STDIN_FILENO) < 0 || dup2(null_fd, STDOUT_FILENO) < 0 ||
	    dup2(err_fd, STDERR_FILENO) < 0)
		_exit(126);
	execv(checker, (char *const *)args);
	_exit(127);
}

/* Reads until the writers are gone; keeps the first line, without control characters. False at the deadline. */
static bool read_first_line(int fd, int64_t deadline_ns, char *line, size_t line_size)
{
	size_t length = 0;
	bool complete = false;
	char chunk[512];

	line[0] = '\0';
	for (;;) {
		struct pollfd wait = { .fd = fd, .events = POLLIN };
		int left_ms = agent_left_ms(deadline_ns);
		if (left_ms == 0)
			return false;
		if (poll(&wait, 1, left_ms) <= 0)
			continue;
		ssize_t got = read(fd, chunk, sizeof(chunk));
		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return true;
		for (ssize_t i = 0; i < got && !complete; i++) {
			unsigned char c = (unsigned char)chunk[i];
			if (c == '\n')
				complete = length > 0;
			else if (length + 1 < line_size)
				line[length++] = c < 0x20 || c == 0x7f ? '?' : (char)c;
		}
		line[length] = '\0';
	}
}

/* Waits for the child until the deadline, then kills its process group. Returns false when it had to, or could not
 * learn the status (a caller that ignores SIGCHLD). */
static bool reap(pid_t pid, int64_t deadline_ns, int *status)
{
	const struct timespec pause = { .tv_nsec = 5 * 1000 * 1000 };

	for (;;) {
		pid_t reaped = waitpid(pid, status, WNOHANG);
		if (reaped == pid)
			return true;
		if (reaped < 0 && errno != EINTR)
			return false;
		if (agent_left_ms(deadline_ns) == 0)
			break;
		nanosleep(&pause, NULL);
	}
	kill(-pid, SIGKILL);
	kill(pid, SIGKILL); /* when it has not come to its setpgid yet */
	waitpid(pid, status, 0);
	return false;
}

enum profile_verdict profile_check(const char *checker, const char *path, int timeout_ms, char *message,
				   size_t message_size)
{
	int64_t deadline_ns = agent_now_ns() + (int64_t)timeout_ms * 1000000;
	int pipe_fds[2], status = 0;
	bool ended;
	pid_t pid;

	if (pipe2(pipe_fds, O_CLOEXEC) != 0) {
		snprintf(message, message_size, "pipe: %s", strerror(errno));
		return PROFILE_UNCHECKED;
	}
	pid = fork();
	if (pid == 0)
		become_checker(checker, path, pipe_fds[1]);
	close(pipe_fds[1]);
	if (pid < 0) {
		snprintf(message, message_size, "fork: %s", strerror(errno));
		close(pipe_fds[0]);
		return PROFILE_UNCHECKED;
	}
	ended = read_first_line(pipe_fds[0], deadline_ns, message, message_size);
	close(pipe_fds[0]);
	if (!reap(pid, deadline_ns, &status)) {
		snprintf(message, message_size, ended ? "%s did not end" : "%s took longer than %d ms", checker,
			 timeout_ms);
		return PROFILE_UNCHECKED;
	}
	if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
		return PROFILE_VALID;
	if (WIFEXITED(status) && WEXITSTATUS(status) == 2) {
		if (message[0] == '\0')
			snprintf(message, message_size, "the profile %s is invalid", path);
		return PROFILE_INVALID;
	}
	if (WIFEXITED(status))
		snprintf(message, message_size, "%s ended with %d", checker, WEXITSTATUS(status));
	else
		snprintf(message, message_size, "%s was killed by signal %d", checker, WTERMSIG(status));
	return PROFILE_UNCHECKED;
}
