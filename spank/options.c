#include "options.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "profile.h"
#include "text.h"

#define CHECK_TIMEOUT_MS 5000
#define SHOWN_MAX_BYTES 120

const struct request_field request_fields[REQUEST_KEYS] = {
	[REQUEST_MODE] = { "BOOTSEER_MODE", "SLURM_SPANK_BOOTSEER_MODE", "BOOTSEER", 16 },
	[REQUEST_PROFILE] = { "BOOTSEER_PROFILE", "SLURM_SPANK_BOOTSEER_PROFILE", "PROFILE", PROFILE_MAX_BYTES },
	[REQUEST_IMAGE] = { "BOOTSEER_IMAGE", "SLURM_SPANK_BOOTSEER_IMAGE", "IMAGE", VALUE_MAX_BYTES },
	[REQUEST_ENV] = { "BOOTSEER_ENV", "SLURM_SPANK_BOOTSEER_ENV", "ENV", VALUE_MAX_BYTES },
	[REQUEST_CHECKPOINT] = { "BOOTSEER_CHECKPOINT", "SLURM_SPANK_BOOTSEER_CHECKPOINT", "CHECKPOINT",
				 VALUE_MAX_BYTES },
	[REQUEST_CONTAINER_IMAGE] = { "BOOTSEER_CONTAINER_IMAGE", "SLURM_SPANK_BOOTSEER_CONTAINER_IMAGE",
				      "CONTAINER_IMAGE", VALUE_MAX_BYTES },
	[REQUEST_JOB_NAME] = { "BOOTSEER_JOB_NAME", "SLURM_SPANK_BOOTSEER_JOB_NAME", "JOB_NAME",
			       VALUE_MAX_BYTES },
};

struct plugin_config plugin_config = {
	.socket_path = "/run/bootseer/root.sock",
	.timeout_ms = 2000,
	.checker = NULL,
	.libexec = NULL,
};

/* What this command's own options asked for. Slurm calls the callbacks in this order, and the last one holds:
 * #SBATCH lines, environment, command line. */
static struct {
	char *values[REQUEST_KEYS];
	bool refused; /* --no-bootseer */
} asked;

static int mode_option(int key, const char *value, int remote);
static int value_option(int key, const char *value, int remote);
static int refuse_option(int key, const char *value, int remote);

static struct spank_option options[] = {
	{ (char *)"bootseer", (char *)"[FILE.toml|observe]",
	  (char *)"[bootseer] prefetch what this job starts from while its nodes are set up, and report the start "
		  "(bootseer report JOBID); FILE.toml: a job profile; observe: report only, prefetch nothing",
	  2, REQUEST_MODE, mode_option },
	{ (char *)"bootseer-image", (char *)"URI|PATH",
	  (char *)"[bootseer] prefetch this container image (implies --bootseer)", 1, REQUEST_IMAGE, value_option },
	{ (char *)"bootseer-env", (char *)"DIR",
	  (char *)"[bootseer] prefetch the environment saved from this folder and show it there, read-only "
		  "(implies --bootseer)",
	  1, REQUEST_ENV, value_option },
	{ (char *)"bootseer-checkpoint", (char *)"URI|PATH",
	  (char *)"[bootseer] prefetch this checkpoint file (implies --bootseer)", 1,
	  REQUEST_CHECKPOINT, value_option },
	{ (char *)"no-bootseer", NULL,
	  (char *)"[bootseer] start as without bootseer, whatever else asks for it", 0, 0, refuse_option },
	SPANK_OPTIONS_TABLE_END
};

/* Slurm's variables for these options, as it exports them for the remote side and for inner sruns. */
static const char *const option_variables[] = {
	"_SLURM_SPANK_OPTION_bootseer_bootseer",
	"_SLURM_SPANK_OPTION_bootseer_bootseer_image",
	"_SLURM_SPANK_OPTION_bootseer_bootseer_env",
	"_SLURM_SPANK_OPTION_bootseer_bootseer_checkpoint",
	"_SLURM_SPANK_OPTION_bootseer_no_bootseer",
};

static const char pyxis_image_variable[] = "_SLURM_SPANK_OPTION_pyxis_container_image";

/* A value as it can be shown in one line of a terminal. */
static const char *shown(const char *value)
{
	static char text[SHOWN_MAX_BYTES];
	return text_show(value, text, sizeof(text));
}

static int remember(enum request_key key, char *text)
{
	free(asked.values[key]);
	asked.values[key] = text;
	return 0;
}

static int remember_copy(enum request_key key, const char *text)
{
	char *copy = strdup(text);
	if (copy == NULL) {
		slurm_error("bootseer: out of memory, the option is ignored");
		return 0;
	}
	return remember(key, copy);
}

void options_configure(int ac, char **av)
{
	for (int i = 0; i < ac; i++) {
		if (strncmp(av[i], "socket=", 7) == 0 && av[i][7] == '/') {
			plugin_config.socket_path = av[i] + 7;
		} else if (strncmp(av[i], "bootseer=", 9) == 0 && av[i][9] == '/') {
			plugin_config.checker = av[i] + 9;
		} else if (strncmp(av[i], "libexec=", 8) == 0 && av[i][8] == '/') {
			plugin_config.libexec = av[i] + 8;
		} else if (strncmp(av[i], "timeout_ms=", 11) == 0) {
			char *end = NULL;
			long timeout_ms = strtol(av[i] + 11, &end, 10);
			if (end != av[i] + 11 && *end == '\0' && timeout_ms > 0 && timeout_ms <= 60000)
				plugin_config.timeout_ms = (int)timeout_ms;
			else
				slurm_error("bootseer: plugstack.conf: timeout_ms must be 1 to 60000, not %s",
					    shown(av[i] + 11));
		} else {
			slurm_error("bootseer: plugstack.conf: unknown argument %s", shown(av[i]));
		}
	}
}

void options_register(spank_t spank)
{
	for (struct spank_option *option = options; option->name != NULL; option++) {
		spank_err_t error = spank_option_register(spank, option);
		if (error != ESPANK_SUCCESS)
			slurm_error("bootseer: cannot register --%s: %s", option->name, spank_strerror(error));
	}
}

/* Text without "/./", "//" and a last "/". ".." stays: across a symbolic link it is not what it looks like. */
static void tidy_path(char *path)
{
	char *out = path;

	for (const char *in = path; *in != '\0';) {
		if (in[0] == '/' && in[1] == '/')
			in++;
		else if (in[0] == '/' && in[1] == '.' && (in[2] == '/' || in[2] == '\0'))
			in += 2;
		else
			*out++ = *in++;
	}
	while (out > path + 1 && out[-1] == '/')
		out--;
	if (out == path)
		*out++ = '/';
	*out = '\0';
}

/* True for "scheme://rest"; a reason is set when there is a "://" but no proper scheme before it. */
static bool is_uri(const char *value, const char **reason)
{
	const char *colon = strstr(value, "://");

	if (colon == NULL || value[0] == '/' || value[0] == '.')
		return false;
	if (value[0] < 'a' || value[0] > 'z' ||
	    strspn(value, "abcdefghijklmnopqrstuvwxyz0123456789+.-") != (size_t)(colon - value))
		*reason = "the scheme before :// must be lower-case letters, digits, + . -";
	else if (colon[3] == '\0')
		*reason = "nothing follows the ://";
	return true;
}

char *options_canonical(const char *value, bool uri_allowed, const char *cwd, const char **reason)
{
	size_t length = strlen(value);
	char *text;

	*reason = NULL;
	if (length == 0) {
		*reason = "it is empty";
	} else if (length > VALUE_MAX_BYTES) {
		*reason = "it is longer than 4096 bytes";
	} else {
		for (const char *c = value; *c != '\0'; c++)
			if ((unsigned char)*c < 0x20 || *c == 0x7f)
				*reason = "it has a control character in it";
	}
	if (*reason != NULL)
		return NULL;
	if (is_uri(value, reason)) {
		if (*reason == NULL && !uri_allowed)
			*reason = "it must be a folder, not a URI";
		text = *reason == NULL ? strdup(value) : NULL;
	} else {
		if (value[0] == '/')
			text = strdup(value);
		else if (cwd == NULL || asprintf(&text, "%s/%s", cwd, value) < 0)
			text = NULL;
		if (text != NULL)
			tidy_path(text);
		if (text != NULL && strlen(text) > VALUE_MAX_BYTES) {
			*reason = "it is longer than 4096 bytes when made absolute";
			free(text);
			text = NULL;
		}
	}
	if (text == NULL && *reason == NULL)
		*reason = cwd == NULL ? "it is relative, and the current folder is gone" : "out of memory";
	return text;
}

static bool ends_with(const char *text, const char *suffix)
{
	size_t length = strlen(text), suffix_length = strlen(suffix);
	return length > suffix_length && strcmp(text + length - suffix_length, suffix) == 0;
}

/* --bootseer=FILE.toml. The text is what travels: the file may be changed or gone when the job runs. */
static int take_profile(const char *value)
{
	char *cwd = getcwd(NULL, 0), *path, *text;
	const char *why = NULL;
	char reason[512] = "";

	path = options_canonical(value, false, cwd, &why);
	free(cwd);
	if (path == NULL) {
		slurm_error("bootseer: --bootseer=%s: %s", shown(value), why);
		return -1;
	}
	text = profile_read(path, PROFILE_MAX_BYTES, reason, sizeof(reason));
	if (text == NULL) {
		slurm_error("bootseer: cannot use the profile %s: %s", shown(path), reason);
		free(path);
		return -1;
	}
	if (plugin_config.checker != NULL &&
	    (asked.values[REQUEST_PROFILE] == NULL || strcmp(asked.values[REQUEST_PROFILE], text) != 0)) {
		switch (profile_check(plugin_config.checker, path, CHECK_TIMEOUT_MS, reason, sizeof(reason))) {
		case PROFILE_INVALID:
			slurm_error("bootseer: %s", reason);
			free(text);
			free(path);
			return -1;
		case PROFILE_UNCHECKED:
			slurm_info("bootseer: warning: the profile %s could not be checked: %s", shown(path), reason);
			break;
		case PROFILE_VALID:
			break;
		}
	}
	free(path);
	remember(REQUEST_PROFILE, text);
	return remember_copy(REQUEST_MODE, "1");
}

static int mode_option(int key, const char *value, int remote)
{
	(void)key;
	if (remote)
		return 0;
	/* An optional argument left out: NULL, "" or, by way of Slurm 22.05's environment, "(null)". */
	if (value == NULL || value[0] == '\0' || strcmp(value, "(null)") == 0) {
		remember(REQUEST_PROFILE, NULL);
		return remember_copy(REQUEST_MODE, "1");
	}
	if (strcmp(value, "observe") == 0) {
		remember(REQUEST_PROFILE, NULL);
		return remember_copy(REQUEST_MODE, "observe");
	}
	if (ends_with(value, ".toml"))
		return take_profile(value);
	slurm_error("bootseer: --bootseer=%s: it is neither observe nor a profile (FILE.toml)", shown(value));
	return -1;
}

static int value_option(int key, const char *value, int remote)
{
	const char *name = key == REQUEST_IMAGE ? "image" : key == REQUEST_ENV ? "env" : "checkpoint";
	const char *reason = NULL;
	char *cwd, *text;

	if (remote)
		return 0;
	cwd = getcwd(NULL, 0);
	text = options_canonical(value == NULL ? "" : value, key != REQUEST_ENV, cwd, &reason);
	free(cwd);
	if (text == NULL) {
		slurm_error("bootseer: --bootseer-%s=%s: %s", name, shown(value == NULL ? "" : value), reason);
		return -1;
	}
	return remember((enum request_key)key, text);
}

static int refuse_option(int key, const char *value, int remote)
{
	(void)key;
	(void)value;
	(void)remote;
	asked.refused = true;
	return 0;
}

bool options_refused(void)
{
	return asked.refused;
}

/* Sets a variable for the prolog and for the steps, or takes it away from both. */
static void publish(spank_t spank, const struct request_field *field, const char *value)
{
	if (value == NULL || value[0] == '\0') {
		spank_job_control_unsetenv(spank, field->control);
		unsetenv(field->job_env);
		return;
	}
	if (spank_job_control_setenv(spank, field->control, value, 1) != ESPANK_SUCCESS)
		slurm_error("bootseer: cannot pass %s on to the prolog", field->control);
	/* srun does not hand its job control variables to the steps by itself; sbatch and salloc do. */
	if (setenv(field->job_env, value, 1) != 0)
		slurm_error("bootseer: cannot pass %s on to the job", field->control);
}

void options_publish(spank_t spank)
{
	/* An srun inside a job adds to what the job asked for. A new job starts afresh, also one from inside a job. */
	bool inherits = spank_context() == S_CTX_LOCAL && getenv("SLURM_JOB_ID") != NULL;
	const char *wanted[REQUEST_KEYS];
	bool any = false;

	for (int key = 0; key < REQUEST_KEYS; key++) {
		wanted[key] = asked.values[key];
		if (wanted[key] == NULL && inherits)
			wanted[key] = getenv(request_fields[key].job_env);
		if (wanted[key] != NULL && strlen(wanted[key]) > request_fields[key].max_bytes)
			wanted[key] = NULL;
		any = any || wanted[key] != NULL;
	}
	if (getenv(pyxis_image_variable) != NULL && strlen(getenv(pyxis_image_variable)) <= VALUE_MAX_BYTES)
		wanted[REQUEST_CONTAINER_IMAGE] = getenv(pyxis_image_variable);
	if (getenv("SLURM_JOB_NAME") != NULL && strlen(getenv("SLURM_JOB_NAME")) <= VALUE_MAX_BYTES)
		wanted[REQUEST_JOB_NAME] = getenv("SLURM_JOB_NAME");
	if (wanted[REQUEST_MODE] == NULL)
		wanted[REQUEST_MODE] = "1";
	for (int key = 0; key < REQUEST_KEYS; key++)
		publish(spank, &request_fields[key], any && !asked.refused ? wanted[key] : NULL);
	for (size_t i = 0; i < sizeof(option_variables) / sizeof(option_variables[0]); i++) {
		char job_env[128];
		snprintf(job_env, sizeof(job_env), "SLURM_SPANK_%s", option_variables[i]);
		spank_job_control_unsetenv(spank, option_variables[i]);
		unsetenv(option_variables[i]);
		unsetenv(job_env);
	}
}

void options_reset(void)
{
	for (int key = 0; key < REQUEST_KEYS; key++)
		remember((enum request_key)key, NULL);
	asked.refused = false;
}
