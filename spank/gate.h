/*
 * One mount namespace for the tasks of a step: the first task that comes makes it, the others enter it.
 *
 * Slurm may put each task into a namespace of the job's (job_container/tmpfs, namespace/tmpfs), after the tasks were
 * forked. So the tasks meet at a gate that was opened before: a socket with one message in it. Who has taken the
 * message has the turn. It goes back with the namespace, and so to the next task. A task that dies with it costs the
 * others their wait and the shadow, and nothing else.
 */
#ifndef BOOTSEER_GATE_H
#define BOOTSEER_GATE_H

#include <stdint.h>

struct gate {
	int take, put; /* ends of one socket, inherited by the tasks, closed in what they execute */
};

enum gate_turn {
	GATE_FIRST,   /* this task makes the namespace, and owes a gate_pass */
	GATE_ENTERED, /* this task is in the first one's namespace now */
	GATE_NOTHING, /* the first one had nothing to share */
};

/* Opens the gate, before the tasks are forked. Returns 0 or -errno. */
int gate_open(struct gate *gate);

/* In a task, as root: waits for its turn. Returns an enum gate_turn, or -errno: -ETIMEDOUT at the deadline. */
int gate_enter(const struct gate *gate, int64_t deadline_ns);

/* In the first task: lets the others into its mount namespace. With shared = 0 they go on in theirs. 0 or -errno. */
int gate_pass(const struct gate *gate, int shared);

void gate_close(struct gate *gate);

#endif
