/*
 * spank_bootseer: options of a job's start, and its shadow in slurmstepd. This file only says which context does what.
 *
 * Every callback returns 0, also on failure: nothing of Bootseer may stop a job. Only an option's own callback
 * refuses, at submission (options.c).
 */
#include "options.h"
#include "stepd.h"

SPANK_PLUGIN(bootseer, 1)

int slurm_spank_init(spank_t spank, int ac, char **av)
{
	switch (spank_context()) {
	case S_CTX_LOCAL:
	case S_CTX_ALLOCATOR:
	case S_CTX_REMOTE:
		options_configure(ac, av);
		options_register(spank);
		break;
	default: /* slurmd, and prolog or epilog: the hook's business */
		break;
	}
	return 0;
}

int slurm_spank_init_post_opt(spank_t spank, int ac, char **av)
{
	(void)ac;
	(void)av;
	switch (spank_context()) {
	case S_CTX_LOCAL:
	case S_CTX_ALLOCATOR:
		options_publish(spank);
		break;
	case S_CTX_REMOTE:
		stepd_attach(spank);
		break;
	default:
		break;
	}
	return 0;
}

int slurm_spank_task_init_privileged(spank_t spank, int ac, char **av)
{
	(void)ac;
	(void)av;
	stepd_task_show(spank);
	return 0;
}

int slurm_spank_task_post_fork(spank_t spank, int ac, char **av)
{
	(void)ac;
	(void)av;
	stepd_task_start(spank);
	return 0;
}

int slurm_spank_exit(spank_t spank, int ac, char **av)
{
	(void)spank;
	(void)ac;
	(void)av;
	stepd_end();
	options_reset();
	return 0;
}
