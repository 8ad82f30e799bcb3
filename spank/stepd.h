/*
 * The remote context: a step in slurmstepd asks the agent what to show it, once, and stamps its tasks' starts.
 * Nothing here may fail the step: every function reports and returns.
 */
#ifndef BOOTSEER_STEPD_H
#define BOOTSEER_STEPD_H

#include <slurm/spank.h>

/* Attaches the step to the agent: binds and environment. From init_post_opt. */
void stepd_attach(spank_t spank);

/* Tells the agent that a task was started. From task_post_fork; does nothing unless attached. */
void stepd_task_start(spank_t spank);

#endif
