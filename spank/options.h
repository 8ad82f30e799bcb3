/*
 * The options of the job: registering, checking, passing on.
 *
 * The values travel as job control variables (BOOTSEER_<KEY>; the prolog sees SPANK_BOOTSEER_<KEY>, the job and
 * every srun inside it SLURM_SPANK_BOOTSEER_<KEY>). Slurm's own option variables are dropped once they are read:
 * they hold what the user typed (a relative path, the name of a profile that may be gone by then), and they do
 * not survive --export=NONE, whereas variables that start with SLURM do.
 */
#ifndef BOOTSEER_OPTIONS_H
#define BOOTSEER_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>

#include <slurm/spank.h>

#define VALUE_MAX_BYTES 4096
#define PROFILE_MAX_BYTES 65536

enum request_key {
	REQUEST_MODE,
	REQUEST_PROFILE,
	REQUEST_IMAGE,
	REQUEST_ENV,
	REQUEST_CHECKPOINT,
	REQUEST_CONTAINER_IMAGE,
	REQUEST_JOB_NAME,
	REQUEST_KEYS
};

struct request_field {
	const char *control;  /* name of the job control variable */
	const char *job_env;  /* the same, as the job's environment has it */
	const char *wire;     /* key in a message to the agent */
	size_t max_bytes;
};

extern const struct request_field request_fields[REQUEST_KEYS];

/* Where the options' values come from when they are checked. */
struct plugin_config {
	const char *socket_path; /* of the agent */
	int timeout_ms;          /* for one attach, all in all */
	const char *checker;     /* the bootseer executable that checks profiles, or NULL */
	const char *libexec;     /* the folder of our squashfuse, or NULL */
};

extern struct plugin_config plugin_config;

/* Reads the arguments of the line in plugstack.conf; an unknown one is reported and ignored. */
void options_configure(int ac, char **av);

/* Registers the options. Only from slurm_spank_init (spank_option_register, spank.h). */
void options_register(spank_t spank);

/* Passes the request on to the prolog and to the job's steps. From init_post_opt of sbatch, salloc and srun. */
void options_publish(spank_t spank);

/* True when --no-bootseer was given to this step. In slurmstepd. */
bool options_refused(void);

/* Forgets everything. */
void options_reset(void);

/*
 * The canonical form of an image, env or checkpoint value: a URI as it is, a path made absolute with `cwd`.
 * Returns malloc'd text, or NULL with a reason (static text) in *reason.
 */
char *options_canonical(const char *value, bool uri_allowed, const char *cwd, const char **reason);

#endif
