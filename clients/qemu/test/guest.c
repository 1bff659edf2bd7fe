// SPDX-License-Identifier: GPL-2.0-only
/*
 * PID 1 of the guest that is migrated: a thread for each vCPU fills its part of
 * the memory, then reads, sums and changes it all the time.  Every eighth round
 * ends with a line on the console, which client.c compares with what the sum has
 * to be; with more lines, the guest would mostly wait for its serial port.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>

#include "workload.h"

#define STRIDE	7919	/* a prime, so that pages aren't touched in order */
#define SAY_EVERY	8	/* rounds */

static uint64_t pages;	/* of each thread */

/* One write, so that lines of different threads don't mix. */
static void __attribute__((format(printf, 1, 2))) say(const char *fmt, ...)
{
	char line[128];
	va_list ap;
	int n;

	va_start(ap, fmt);
	n = vsnprintf(line, sizeof(line), fmt, ap);
	va_end(ap);
	if (write(1, line, n) != n)
		_exit(1);
}

static void *work(void *arg)
{
	uint64_t t = (uintptr_t)arg, n, i, k, sum, bad;
	uint64_t (*page)[WORKLOAD_WORDS];
	cpu_set_t cpu;

	CPU_ZERO(&cpu);
	CPU_SET(t, &cpu);
	page = mmap(NULL, pages * WORKLOAD_PAGE, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (page == MAP_FAILED || sched_setaffinity(0, sizeof(cpu), &cpu)) {
		say("L2: thread %d can't work\n", (int)t);
		return NULL;
	}

	for (k = 0; k < pages; k++)
		for (i = 0; i < WORKLOAD_WORDS; i++)
			page[k][i] = workload_word(t, k, 0, i);

	for (n = 0; ; n++) {
		for (sum = 0, k = 0; k < pages; k++) {
			uint64_t p = k * STRIDE % pages;
			uint64_t this = workload_word(t, p, n, 0);
			uint64_t next = workload_word(t, p, n + 1, 0);

			for (bad = 0, i = 0; i < WORKLOAD_WORDS; i++) {
				sum += page[p][i];
				bad |= page[p][i] ^ (this + i);
				page[p][i] = next + i;
			}
			if (bad)
				say("L2: bad page %llu of thread %d\n",
				    (unsigned long long)p, (int)t);
		}
		if (n % SAY_EVERY == 0)
			say("L2: sum %d %llu %llx end\n", (int)t, (unsigned long long)n,
			    (unsigned long long)sum);
	}
}

static void say_clock(void)
{
	char name[32] = "unknown\n";
	FILE *file;

	mkdir("/sys", 0755);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	file = fopen("/sys/devices/system/clocksource/clocksource0/current_clocksource", "re");
	if (!file || !fgets(name, sizeof(name), file))
		perror("L2: no clock");
	say("L2: clock %s", name);
}

int main(void)
{
	const char *mb = getenv("l2mb");
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	pthread_t thread;

	pages = (mb ? atoi(mb) : 16) * (1ull << 20) / WORKLOAD_PAGE / cpus;
	while (pages % STRIDE == 0)
		pages--;
	say_clock();
	say("L2: start %d %llu end\n", (int)cpus, (unsigned long long)pages);
	for (long t = 0; t < cpus; t++)
		if (pthread_create(&thread, NULL, work, (void *)t))
			say("L2: no thread %d\n", (int)t);
	for (;;)
		pause();
}
