/* Calls the plugin's parts from the command line, outside Slurm. See test_plugin_parts.py. */
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent.h"
#include "attach.h"
#include "gate.h"
#include "options.h"
#include "profile.h"
#include "text.h"

static int count_fds(void)
{
	DIR *dir = opendir("/proc/self/fd");
	int count = 0;
	while (readdir(dir) != NULL)
		count++;
	closedir(dir);
	return count;
}

static int canonical(char **av)
{
	const char *reason = NULL;
	char *text = options_canonical(av[0], strcmp(av[1], "uri") == 0, av[2][0] == '\0' ? NULL : av[2], &reason);
	printf("%s%s\n", text == NULL ? "refused: " : "", text == NULL ? reason : text);
	free(text);
	return 0;
}

static int parse_bind(char **av)
{
	struct attach_bind bind;
	if (!attach_parse_bind(av[0], (size_t)atoi(av[1]), &bind))
		puts("refused");
	else
		printf("%zu %llu %llu %s\n", bind.fd_index, (unsigned long long)bind.dev,
		       (unsigned long long)bind.ino, bind.target);
	return 0;
}

static int read_profile(char **av)
{
	char reason[200] = "";
	char *text = profile_read(av[0], (size_t)atoi(av[1]), reason, sizeof(reason));
	printf("%s%s", text == NULL ? "refused: " : "", text == NULL ? reason : text);
	free(text);
	return 0;
}

static int check_profile(char **av)
{
	static const char *const words[] = { "valid", "invalid", "unchecked" };
	char message[200] = "";
	enum profile_verdict verdict = profile_check(av[0], av[1], atoi(av[2]), message, sizeof(message));
	printf("%s: %s\n", words[verdict], verdict == PROFILE_VALID ? "" : message);
	return 0;
}

static int call(int ac, char **av, struct agent_reply *reply)
{
	struct agent_message request = { 0 };
	int error;

	for (int i = 2; i < ac; i++) {
		char *equals = strchr(av[i], '=');
		*equals = '\0';
		agent_add(&request, av[i], equals + 1);
	}
	error = agent_call(av[0], &request, agent_now_ns() + (int64_t)atoi(av[1]) * 1000000, reply);
	agent_message_free(&request);
	return error;
}

static int call_and_print(int ac, char **av)
{
	struct agent_reply reply;
	int fds_before = count_fds();
	int error = call(ac, av, &reply);

	if (error != 0) {
		printf("%s\n", strerrorname_np(-error));
	} else {
		for (const char *s = agent_reply_next(&reply, NULL); s != NULL; s = agent_reply_next(&reply, s))
			puts(s);
		printf("%zu descriptors\n", reply.fd_count);
		agent_reply_free(&reply);
	}
	if (count_fds() != fds_before)
		puts("descriptors are left");
	return 0;
}

static int tell(char **av)
{
	struct agent_message request = { 0 };
	int error;

	agent_add(&request, "OP", "stage");
	error = agent_tell(av[0], &request, agent_now_ns() + (int64_t)atoi(av[1]) * 1000000);
	printf("%s\n", error == 0 ? "told" : strerrorname_np(-error));
	agent_message_free(&request);
	return 0;
}

/* Whose the opener's memory is: root's where the process's user may not trace it. It has answered before. */
static void print_owner(pid_t pid)
{
	char path[64];
	struct stat st;

	snprintf(path, sizeof(path), "/proc/%d/mem", (int)pid);
	printf("the opener is %s\n", stat(path, &st) == 0 && st.st_uid == 0 ? "root's" : "the user's");
}

/* SOCKET TIMEOUT_MS UID stop|owner|go COMMAND: shows what the agent gives, then runs the command there. */
static int attach(char **av)
{
	char operation[] = "OP=attach";
	char *request[] = { av[0], av[1], operation };
	int64_t deadline_ns = agent_now_ns() + (int64_t)atoi(av[1]) * 1000000;
	gid_t gids[] = { (gid_t)atoi(av[2]) };
	struct attach_user user = { (uid_t)atoi(av[2]), gids[0], gids, 1 };
	struct attach_bind binds[AGENT_FDS_MAX];
	struct attach_opener opener;
	struct agent_reply reply;
	size_t count = 0;

	if (call(3, request, &reply) != 0 || attach_private_namespace() != 0)
		return 1;
	for (const char *s = agent_reply_next(&reply, NULL); s != NULL; s = agent_reply_next(&reply, s))
		if (strncmp(s, "BIND=", 5) == 0 && attach_parse_bind(s + 5, reply.fd_count, &binds[count]))
			count++;
	if (attach_opener_start(&opener, &user, binds, count) != 0)
		return 1;
	if (strcmp(av[3], "stop") == 0)
		kill(opener.pid, SIGSTOP);
	for (size_t i = 0; i < count; i++) {
		char reason[ATTACH_REASON_MAX_BYTES];
		if (attach_show(&opener, i, reply.fds[binds[i].fd_index], deadline_ns, reason))
			printf("shown %s\n", binds[i].target);
		else
			printf("not shown %s: %s\n", binds[i].target, reason);
	}
	if (strcmp(av[3], "owner") == 0)
		print_owner(opener.pid);
	attach_opener_stop(&opener);
	agent_reply_free(&reply);
	printf("%s\n", waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD ? "no child is left" : "a child is left");
	fflush(stdout);
	return system(av[4]) == 0 ? 0 : 1;
}

/* TEXT SIZE */
static int show_text(char **av)
{
	char *shown = malloc((size_t)atoi(av[1])); /* on the heap: the sanitizer knows its end */
	puts(text_show(av[0], shown, (size_t)atoi(av[1])));
	free(shown);
	return 0;
}

/* What a task does at the gate, from which it comes out in some namespace. */
static void task(const struct gate *gate, int timeout_ms, const char *first)
{
	static const char *const words[] = { "first", "entered", "nothing" };
	char namespace[64] = "", cwd[4096];
	int turn = gate_enter(gate, agent_now_ns() + (int64_t)timeout_ms * 1000000), error = 0;

	if (turn == GATE_FIRST && strcmp(first, "dies") == 0)
		_exit(0);
	if (turn == GATE_FIRST && strcmp(first, "shares") == 0)
		error = attach_private_namespace();
	if (turn == GATE_FIRST && error == 0)
		error = gate_pass(gate, strcmp(first, "shares") == 0);
	if (readlink("/proc/self/ns/mnt", namespace, sizeof(namespace) - 1) < 0 || getcwd(cwd, sizeof(cwd)) == NULL)
		error = -errno;
	printf("%s %s %s\n", turn < 0 ? strerrorname_np(-turn) : words[turn],
	       error == 0 ? namespace : strerrorname_np(-error), cwd);
	fflush(stdout);
	_exit(0);
}

/* TASKS TIMEOUT_MS shares|keeps|dies: tasks that were forked when the gate was open. */
static int meet(char **av)
{
	struct gate gate;
	int fds_before = count_fds();

	if (gate_open(&gate) != 0)
		return 1;
	for (int i = 0; i < atoi(av[0]); i++)
		if (fork() == 0)
			task(&gate, atoi(av[1]), av[2]);
	gate_close(&gate);
	while (wait(NULL) > 0)
		;
	if (count_fds() != fds_before)
		puts("descriptors are left");
	return 0;
}

int main(int ac, char **av)
{
	if (ac == 5 && strcmp(av[1], "canonical") == 0)
		return canonical(av + 2);
	if (ac == 4 && strcmp(av[1], "parse-bind") == 0)
		return parse_bind(av + 2);
	if (ac == 4 && strcmp(av[1], "read-profile") == 0)
		return read_profile(av + 2);
	if (ac == 5 && strcmp(av[1], "check-profile") == 0)
		return check_profile(av + 2);
	if (ac >= 4 && strcmp(av[1], "call") == 0)
		return call_and_print(ac - 2, av + 2);
	if (ac == 4 && strcmp(av[1], "tell") == 0)
		return tell(av + 2);
	if (ac == 7 && strcmp(av[1], "attach") == 0)
		return attach(av + 2);
	if (ac == 4 && strcmp(av[1], "show") == 0)
		return show_text(av + 2);
	if (ac == 5 && strcmp(av[1], "gate") == 0)
		return meet(av + 2);
	return 2;
}
