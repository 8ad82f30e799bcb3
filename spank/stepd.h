/*
 * The remote context: a step in slurmstepd asks the agent what to show it, once, shows it to the tasks, and stamps
 * their starts. Nothing here may fail the step: every function reports and returns.
 *
 * Nothing is shown to slurmstepd itself. It would have to leave the namespace in which Slurm finds that of the job
 * (the kernel does not copy binds of namespaces), and what it does for the step at the end, such as pyxis's
 * --container-save, would meet the copies in the place of the files that it is to replace.
 */
#ifndef BOOTSEER_STEPD_H
#define BOOTSEER_STEPD_H

#include <slurm/spank.h>

/* Attaches the step to the agent: takes its mounts, and sets the environment. From init_post_opt. */
void stepd_attach(spank_t spank);

/* In a task, as root, in the namespace that Slurm put it in: shows it what the agent gave. From task_init_privileged. */
void stepd_task_show(spank_t spank);

/* Tells the agent that a task was started. From task_post_fork; does nothing unless attached. */
void stepd_task_start(spank_t spank);

/* Lets go of the mounts. From exit. */
void stepd_end(void);

#endif
