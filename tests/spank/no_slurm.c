/* Slurm's functions that options.c and gate.c name, for the linker: nothing that driver.c calls comes to them. */
#include <stdlib.h>

#define NOT_CALLED(name)   \
	void name(void);   \
	void name(void)    \
	{                  \
		abort();   \
	}

NOT_CALLED(slurm_debug)
NOT_CALLED(slurm_error)
NOT_CALLED(slurm_info)
NOT_CALLED(spank_context)
NOT_CALLED(spank_job_control_setenv)
NOT_CALLED(spank_job_control_unsetenv)
NOT_CALLED(spank_option_register)
NOT_CALLED(spank_strerror)
