/*
 * A SPANK plugin that does what pyxis does with --container-image=FILE --container-save=FILE, without a container:
 * --save-over=FILE reads FILE in each task before it is executed, and replaces it in slurmstepd when the last task
 * has ended, as `enroot export -f` does. Slurm does not pass on the failure of slurm_spank_task_exit.
 */
#include <stdint.h>
#include <stdio.h>
#include <unistd.h>

#include <slurm/spank.h>

SPANK_PLUGIN(saver, 1)

static char path[4096];
static int ended;

static int take_path(int value, const char *argument, int remote)
{
	(void)value;
	(void)remote;
	snprintf(path, sizeof(path), "%s", argument);
	return 0;
}

static struct spank_option option = { (char *)"save-over", (char *)"FILE", (char *)"read this, and replace it", 1, 0,
				      take_path };

int slurm_spank_init(spank_t spank, int ac, char **av)
{
	(void)ac;
	(void)av;
	return spank_option_register(spank, &option) == ESPANK_SUCCESS ? 0 : -1;
}

/* As the user, in the task. */
int slurm_spank_task_init(spank_t spank, int ac, char **av)
{
	char text[100] = "";
	FILE *file = path[0] == '\0' ? NULL : fopen(path, "r");

	(void)ac;
	(void)av;
	if (file == NULL)
		return 0;
	spank_setenv(spank, "STARTED_FROM", fgets(text, sizeof(text), file) == NULL ? "nothing" : text, 1);
	fclose(file);
	return 0;
}

/* As root, in slurmstepd. */
int slurm_spank_task_exit(spank_t spank, int ac, char **av)
{
	uint32_t tasks = 0;
	FILE *file;

	(void)ac;
	(void)av;
	if (path[0] == '\0')
		return 0;
	spank_get_item(spank, S_JOB_LOCAL_TASK_COUNT, &tasks);
	if (++ended < (int)tasks)
		return 0;
	if (unlink(path) != 0 || (file = fopen(path, "w")) == NULL)
		return -1;
	fputs("saved", file);
	return fclose(file);
}
