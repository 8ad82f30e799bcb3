/*
 * clock.so: a clock of its own for a process that has it in LD_PRELOAD. The file that BOOTSEER_CLOCK names holds an
 * int64_t in this machine's byte order: the nanoseconds by which the time of day differs from the machine's. Whoever
 * writes to it makes the clock jump. All other clocks stay as they are.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const int64_t nothing;
static const volatile int64_t *offset_ns = &nothing;

__attribute__((constructor)) static void map_offset(void)
{
	const char *path = getenv("BOOTSEER_CLOCK");
	int fd = path == NULL ? -1 : open(path, O_RDONLY | O_CLOEXEC);
	void *mapped;

	if (fd < 0)
		return;
	mapped = mmap(NULL, sizeof(*offset_ns), PROT_READ, MAP_SHARED, fd, 0);
	if (mapped != MAP_FAILED)
		offset_ns = mapped;
	close(fd);
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
	int64_t shifted_ns;

	if (syscall(SYS_clock_gettime, clock, now) != 0)
		return -1;
	if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) {
		shifted_ns = now->tv_nsec + *offset_ns % 1000000000;
		now->tv_sec += *offset_ns / 1000000000 + (shifted_ns < 0 ? -1 : shifted_ns >= 1000000000);
		now->tv_nsec = (shifted_ns + 1000000000) % 1000000000;
	}
	return 0;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
	struct timespec precise;

	(void)zone;
	if (clock_gettime(CLOCK_REALTIME, &precise) != 0)
		return -1;
	*now = (struct timeval){ precise.tv_sec, precise.tv_nsec / 1000 };
	return 0;
}

time_t time(time_t *where)
{
	struct timespec precise;

	if (clock_gettime(CLOCK_REALTIME, &precise) != 0)
		return -1;
	if (where != NULL)
		*where = precise.tv_sec;
	return precise.tv_sec;
}
