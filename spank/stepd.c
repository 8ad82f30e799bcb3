#include "stepd.h"

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <slurm/slurm.h>

#include "agent.h"
#include "attach.h"
#include "gate.h"
#include "options.h"
#include "text.h"

#define TELL_TIMEOUT_MS 50
/* A task waits for the first one as long as that may take to open all targets, and a little more. */
#define GATE_MARGIN_MS 500
#define SHOWN_MAX_BYTES 400

/* One slurmstepd is one step. */
static struct {
	bool attached;    /* the agent answered: it wants the stamps */
	bool tell_failed; /* it did not take one in time: no more of them, so that many tasks do not wait each */
	uint32_t job_id;
	char step_id[16];
	struct agent_reply reply; /* binds point into it */
	struct attach_bind binds[AGENT_FDS_MAX];
	size_t bind_count;
	struct gate gate; /* open when there are binds */
} step;

static void tell(const char *name, const char *detail, const uint32_t *task)
{
	struct agent_message message = { 0 };
	struct timespec now;
	int error;

	if (step.tell_failed)
		return;
	clock_gettime(CLOCK_REALTIME, &now);
	agent_add(&message, "OP", "stage");
	agent_addf(&message, "JOB_ID", "%" PRIu32, step.job_id);
	agent_add(&message, "STEP_ID", step.step_id);
	agent_add(&message, "NAME", name);
	agent_addf(&message, "TIME_NS", "%" PRId64, (int64_t)now.tv_sec * 1000000000 + now.tv_nsec);
	if (task != NULL)
		agent_addf(&message, "TASK", "%" PRIu32, *task);
	if (detail != NULL)
		agent_add(&message, "DETAIL", detail);
	error = agent_tell(plugin_config.socket_path, &message,
			   agent_now_ns() + (int64_t)TELL_TIMEOUT_MS * 1000000);
	agent_message_free(&message);
	if (error != 0) {
		step.tell_failed = true;
		slurm_verbose("bootseer: the agent takes no stamps: %s", strerror(-error));
	}
}

/* Finds out which step this is. False for one that has nothing to attach. */
static bool identify_step(spank_t spank)
{
	uint32_t step_id;

	if (spank_get_item(spank, S_JOB_ID, &step.job_id) != ESPANK_SUCCESS ||
	    spank_get_item(spank, S_JOB_STEPID, &step_id) != ESPANK_SUCCESS)
		return false;
	switch (step_id) {
	case SLURM_EXTERN_CONT: /* runs nothing of the job's */
		return false;
	case SLURM_BATCH_SCRIPT:
		strcpy(step.step_id, "batch");
		break;
	case SLURM_INTERACTIVE_STEP:
		strcpy(step.step_id, "interactive");
		break;
	default:
		snprintf(step.step_id, sizeof(step.step_id), "%" PRIu32, step_id);
		break;
	}
	return true;
}

/* What the job asked for, from its environment (options.h); false when it did not ask. */
static bool add_request(spank_t spank, struct agent_message *message)
{
	char *value = malloc(PROFILE_MAX_BYTES + 1);
	bool requested = false;

	if (value == NULL)
		return false;
	for (int key = 0; key < REQUEST_KEYS; key++) {
		const struct request_field *field = &request_fields[key];
		if (spank_getenv(spank, field->job_env, value, (int)field->max_bytes + 1) == ESPANK_SUCCESS) {
			agent_add(message, field->wire, value);
			requested = requested || key == REQUEST_MODE;
		}
	}
	free(value);
	return requested;
}

/* The agent has a session of this job all the same: the site has all jobs observed. */
static bool is_observed(void)
{
	const char *slash = strrchr(plugin_config.socket_path, '/');
	char path[PATH_MAX];

	if (slash == NULL)
		return false;
	snprintf(path, sizeof(path), "%.*s/jobs/%" PRIu32, (int)(slash - plugin_config.socket_path),
		 plugin_config.socket_path, step.job_id);
	return access(path, F_OK) == 0;
}

/* Without the restart count: Slurm 22.05 answers 0 to S_SLURM_RESTART_COUNT in every step. The agent knows it from the
 * prolog. */
static void add_identity(spank_t spank, const struct attach_user *user, struct agent_message *message)
{
	const char *node_name = getenv("SLURMD_NODENAME"); /* slurmstepd sets it for itself */
	uint64_t memory_mb; /* that the job has on this node; 0: Slurm does not limit it */
	char *list = NULL;
	size_t list_size = 0;
	FILE *out = open_memstream(&list, &list_size);

	agent_addf(message, "JOB_ID", "%" PRIu32, step.job_id);
	agent_add(message, "STEP_ID", step.step_id);
	agent_addf(message, "UID", "%u", (unsigned int)user->uid);
	agent_addf(message, "GID", "%u", (unsigned int)user->gid);
	if (out != NULL) {
		for (size_t i = 0; i < user->gid_count; i++)
			fprintf(out, "%s%u", i == 0 ? "" : ",", (unsigned int)user->gids[i]);
		if (fclose(out) == 0)
			agent_add(message, "GIDS", list);
		free(list);
	}
	if (node_name != NULL)
		agent_add(message, "NODENAME", node_name);
	if (spank_get_item(spank, S_JOB_ALLOC_MEM, &memory_mb) == ESPANK_SUCCESS)
		agent_addf(message, "MEMORY_MB", "%" PRIu64, memory_mb);
}

static void report_not_shown(const char *target, const char *reason)
{
	char path[SHOWN_MAX_BYTES], detail[SHOWN_MAX_BYTES + ATTACH_REASON_MAX_BYTES + 2];

	snprintf(detail, sizeof(detail), "%s: %s", text_show(target, path, sizeof(path)), reason);
	slurm_info("bootseer: the original stays at %s", detail);
	tell("shadow_failed", detail, NULL);
}

/* Keeps the reply's mounts for the tasks. */
static void keep_binds(struct agent_reply *reply)
{
	int error;

	for (const char *s = agent_reply_next(reply, NULL); s != NULL; s = agent_reply_next(reply, s)) {
		if (strncmp(s, "BIND=", 5) != 0)
			continue;
		if (step.bind_count == AGENT_FDS_MAX ||
		    !attach_parse_bind(s + 5, reply->fd_count, &step.binds[step.bind_count]))
			slurm_error("bootseer: the agent sent a bind that is none");
		else
			step.bind_count++;
	}
	error = step.bind_count == 0 ? 0 : gate_open(&step.gate);
	if (error != 0) {
		for (size_t i = 0; i < step.bind_count; i++)
			report_not_shown(step.binds[i].target, strerror(-error));
		step.bind_count = 0;
	}
	if (step.bind_count == 0) {
		agent_reply_free(reply);
		return;
	}
	step.reply = *reply;
}

/* SETENV=NAME=VALUE, for names that are ours. */
static void set_environment(spank_t spank, const struct agent_reply *reply)
{
	for (const char *s = agent_reply_next(reply, NULL); s != NULL; s = agent_reply_next(reply, s)) {
		char name[128];
		const char *equals;
		size_t name_bytes;

		if (strncmp(s, "SETENV=BOOTSEER_", 16) != 0 || (equals = strchr(s + 7, '=')) == NULL)
			continue;
		name_bytes = strspn(s + 7, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_");
		if (name_bytes >= sizeof(name) || s + 7 + name_bytes != equals)
			continue;
		memcpy(name, s + 7, name_bytes);
		name[name_bytes] = '\0';
		if (spank_setenv(spank, name, equals + 1, 1) != ESPANK_SUCCESS)
			slurm_error("bootseer: cannot set %s for the job", name);
	}
}

/* enroot, which pyxis runs as a child of this process, finds our squashfuse before the real one. Containers and tasks
 * have a PATH of their own. */
static void put_libexec_first(void)
{
	const char *path = getenv("PATH");
	char *longer = NULL;

	if (plugin_config.libexec == NULL)
		return;
	if (asprintf(&longer, "%s:%s", plugin_config.libexec,
		     path == NULL ? "/usr/local/bin:/usr/bin:/bin" : path) < 0)
		return;
	if (setenv("PATH", longer, 1) != 0)
		slurm_error("bootseer: cannot set PATH");
	free(longer);
}

static bool get_user(spank_t spank, struct attach_user *user)
{
	gid_t *gids = NULL;
	int gid_count = 0;

	if (spank_get_item(spank, S_JOB_UID, &user->uid) != ESPANK_SUCCESS ||
	    spank_get_item(spank, S_JOB_GID, &user->gid) != ESPANK_SUCCESS ||
	    spank_get_item(spank, S_JOB_SUPPLEMENTARY_GIDS, &gids, &gid_count) != ESPANK_SUCCESS)
		return false;
	user->gids = gids;
	user->gid_count = gids == NULL || gid_count < 0 ? 0 : (size_t)gid_count;
	return true;
}

/* Puts the mounts where they belong, each on its own: one that fails leaves the original there. True when there is
 * one in the task's new namespace. */
static bool show_binds(const struct attach_user *user, int64_t deadline_ns)
{
	struct attach_opener opener;
	char reason[ATTACH_REASON_MAX_BYTES];
	bool any = false;
	int error = attach_private_namespace();

	if (error == 0)
		error = attach_opener_start(&opener, user, step.binds, step.bind_count);
	if (error != 0) {
		snprintf(reason, sizeof(reason), "no mount namespace: %s", strerror(-error));
		for (size_t i = 0; i < step.bind_count; i++)
			report_not_shown(step.binds[i].target, reason);
		return false;
	}
	for (size_t i = 0; i < step.bind_count; i++) {
		if (attach_show(&opener, i, step.reply.fds[step.binds[i].fd_index], deadline_ns, reason))
			any = true;
		else
			report_not_shown(step.binds[i].target, reason);
	}
	attach_opener_stop(&opener);
	return any;
}

void stepd_task_show(spank_t spank)
{
	int64_t deadline_ns = agent_now_ns() + (int64_t)plugin_config.timeout_ms * 1000000;
	struct attach_user user;
	int turn, error = 0;

	if (step.bind_count == 0)
		return;
	turn = gate_enter(&step.gate, deadline_ns + (int64_t)GATE_MARGIN_MS * 1000000);
	if (turn == GATE_FIRST)
		error = gate_pass(&step.gate, get_user(spank, &user) && show_binds(&user, deadline_ns));
	else if (turn < 0)
		error = turn;
	if (error != 0)
		report_not_shown("all paths of a task",
				 error == -ETIMEDOUT ? "the task that shows them took too long" : strerror(-error));
}

void stepd_attach(spank_t spank)
{
	int64_t deadline_ns = agent_now_ns() + (int64_t)plugin_config.timeout_ms * 1000000;
	struct agent_message request = { 0 };
	struct agent_reply reply;
	struct attach_user user;
	const char *status;
	bool asked;
	int error;

	if (options_refused() || !identify_step(spank) || !get_user(spank, &user))
		return;
	agent_add(&request, "OP", "attach");
	asked = add_request(spank, &request);
	if (!asked && !is_observed()) {
		agent_message_free(&request);
		return;
	}
	add_identity(spank, &user, &request);
	error = agent_call(plugin_config.socket_path, &request, deadline_ns, &reply);
	agent_message_free(&request);
	if (error == -ENOENT || error == -ECONNREFUSED) {
		slurm_verbose("bootseer: no agent on this node, the step starts without it");
		return;
	}
	if (error != 0) {
		slurm_error("bootseer: the step starts without the agent: %s", strerror(-error));
		return;
	}
	status = agent_reply_get(&reply, "STATUS");
	if (status != NULL && strcmp(status, "ok") == 0) {
		step.attached = true;
		if (asked) /* containers of a job that is only observed start as without us */
			put_libexec_first();
		set_environment(spank, &reply);
		keep_binds(&reply);
	} else {
		const char *message = agent_reply_get(&reply, "MESSAGE");
		char text[SHOWN_MAX_BYTES];
		slurm_error("bootseer: the step starts without the agent: %s",
			    text_show(message == NULL ? "no message" : message, text, sizeof(text)));
		agent_reply_free(&reply);
	}
}

void stepd_task_start(spank_t spank)
{
	uint32_t task;

	/* Slurm calls this for the extern step too, without a task. */
	if (!step.attached || spank_get_item(spank, S_TASK_GLOBAL_ID, &task) != ESPANK_SUCCESS)
		return;
	tell("task_start", NULL, &task);
}

void stepd_end(void)
{
	if (step.bind_count == 0)
		return;
	agent_reply_free(&step.reply);
	gate_close(&step.gate);
	step.bind_count = 0;
}
