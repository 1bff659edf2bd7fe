// SPDX-License-Identifier: GPL-2.0-only
/*
 * client SCENARIO WAY BACKING VCPUS HOPS: boots a guest in QEMU and migrates it
 * from one QEMU process to the next, HOPS times, by postcopy from the first
 * page on.  WAY is how the destination's vCPUs get missing pages: "exits",
 * "uffd", or "plain", i.e. userfaultfd by a QEMU without the patches.  The
 * other scenarios do something while the migration is on its way.
 *
 * The guest writes and sums memory all the time, see guest.c, and all its sums
 * are verified here.  The exit status says whether everything went well.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>

#include "workload.h"

#define ARRAY_SIZE(a)	(sizeof(a) / sizeof(*(a)))

#define MAX_VCPUS	8
#define GUEST_MB	128
#define WORK_MB		40
#define STEP_SECONDS	300	/* for what takes seconds, if the host does nothing else */
#define PROMPT_SECONDS	10	/* for what must not wait for a page */

struct vm {
	int id;
	pid_t pid;
	int qmp;
	bool lives;
	FILE *serial;		/* what the guest has printed in this process */
	char line[512];
	size_t len;
	int rounds[MAX_VCPUS];	/* seen here */
	long pages;		/* of each thread, from its first line */
};

#ifdef __aarch64__
#define MACHINE		"virt,gic-version=3,memory-backend=ram"
#define CONSOLE		"console=ttyAMA0"
#define CPU		"host"
#define CPU_PLAIN	"host,kvm-steal-time=off"
#else
/*
 * Whoever reads an HPET leaves KVM with a lock held, which with four vCPUs on one CPU
 * means that the others spin for it most of the time.
 */
#define MACHINE		"pc,hpet=off,memory-backend=ram"
#define CONSOLE		"console=ttyS0 no_timer_check tsc=reliable"
#define CPU		"qemu64"
#define CPU_PLAIN	"qemu64,kvm=off"
#endif

static const char *way, *backing, *cpu = CPU;
static int vcpus;
static long guest_pages;
static double started;

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

static void __attribute__((format(printf, 1, 2))) say(const char *fmt, ...)
{
	va_list ap;

	printf("%6.1f ", now() - started);
	va_start(ap, fmt);
	vprintf(fmt, ap);
	va_end(ap);
	printf("\n");
	fflush(stdout);
}

/* The last lines of a file, for whoever wonders why something failed. */
static void show_tail(const char *path)
{
	char buf[3000];
	int fd = open(path, O_RDONLY);
	ssize_t n;

	if (fd < 0)
		return;
	if (lseek(fd, -(off_t)sizeof(buf) + 1, SEEK_END) < 0)
		lseek(fd, 0, SEEK_SET);
	n = read(fd, buf, sizeof(buf) - 1);
	close(fd);
	if (n > 0) {
		buf[n] = '\0';
		printf("--- %s\n%s\n", path, buf);
	}
}

static void __attribute__((format(printf, 1, 2), noreturn)) fail(const char *fmt, ...)
{
	char path[64];
	va_list ap;

	printf("%6.1f failed: ", now() - started);
	va_start(ap, fmt);
	vprintf(fmt, ap);
	va_end(ap);
	printf("\n");
	for (int id = 0; id < 20; id++) {
		snprintf(path, sizeof(path), "/tmp/serial.%d", id);
		show_tail(path);
		snprintf(path, sizeof(path), "/tmp/log.%d", id);
		show_tail(path);
	}
	exit(1);
}

#define CHECK(cond, ...) do { if (!(cond)) fail(__VA_ARGS__); } while (0)

static void start_vm(struct vm *vm, int id, bool incoming)
{
	struct sockaddr_un addr = { .sun_family = AF_UNIX };
	char ram[160], qmp[64], serial[64], smp[16], append[200], log[64];
	/* Debian's QEMU comes with its libraries. */
	const char *debian[] = { "/debian/ld.so", "--library-path", "/debian/lib", "/debian/qemu" };
	const char *patched[] = { "/qemu/qemu" };
	const char *options[] = {
		"-L", "/qemu/firmware", "-machine", MACHINE, "-cpu", cpu, "-accel", "kvm",
		"-smp", smp, "-m", "128M", "-object", ram, "-nodefaults", "-display", "none",
		"-no-reboot", "-serial", serial, "-qmp", qmp, "-kernel", "/guest/kernel",
		"-initrd", "/guest/initramfs", "-append", append,
		incoming ? "-incoming" : NULL, "defer", NULL
	};
	bool plain = !strcmp(way, "plain");
	size_t n = plain ? ARRAY_SIZE(debian) : ARRAY_SIZE(patched);
	const char *argv[ARRAY_SIZE(debian) + ARRAY_SIZE(options)];
	double deadline = now() + STEP_SECONDS;

	memcpy(argv, plain ? debian : patched, n * sizeof(*argv));
	memcpy(argv + n, options, sizeof(options));

	memset(vm, 0, sizeof(*vm));
	vm->id = id;
	vm->pages = guest_pages;
	snprintf(ram, sizeof(ram), "memory-backend-%s,id=ram,size=%dM%s",
		 strcmp(backing, "anon") ? "memfd" : "ram", GUEST_MB,
		 !strcmp(backing, "memfd") ? ",share=on" :
		 !strcmp(backing, "hugetlb") ? ",share=off,hugetlb=on,hugetlbsize=2M" : "");
	snprintf(qmp, sizeof(qmp), "unix:/tmp/qmp.%d,server=on,wait=off", id);
	snprintf(serial, sizeof(serial), "file:/tmp/serial.%d", id);
	snprintf(log, sizeof(log), "/tmp/log.%d", id);
	unlink(strchr(serial, ':') + 1);
	snprintf(smp, sizeof(smp), "%d", vcpus);

	snprintf(append, sizeof(append), CONSOLE " panic=-1 oops=panic loglevel=4 watchdog_thresh=60"
		 " rcupdate.rcu_cpu_stall_timeout=180 l2mb=%d", WORK_MB);

	vm->pid = fork();
	CHECK(vm->pid >= 0, "fork: %m");
	if (!vm->pid) {
		int fd = open(log, O_WRONLY | O_CREAT | O_TRUNC, 0600);

		prctl(PR_SET_PDEATHSIG, SIGKILL);
		dup2(fd, 1);
		dup2(fd, 2);
		execv(argv[0], (char **)argv);
		perror(argv[0]);
		_exit(127);
	}
	vm->lives = true;

	vm->qmp = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	snprintf(addr.sun_path, sizeof(addr.sun_path), "/tmp/qmp.%d", id);
	while (connect(vm->qmp, (struct sockaddr *)&addr, sizeof(addr))) {
		CHECK(waitpid(vm->pid, NULL, WNOHANG) == 0, "QEMU %d has ended", id);
		CHECK(now() < deadline, "QEMU %d has no QMP", id);
		usleep(50000);
	}
}

/* One line of QMP, or NULL if there's none in time. Valid until the next call. */
static char *read_qmp(struct vm *vm, double seconds)
{
	static char line[65536];
	double deadline = now() + seconds;
	size_t len = 0;

	for (;;) {
		struct pollfd pfd = { .fd = vm->qmp, .events = POLLIN };
		double left = deadline - now();

		if (left <= 0 || poll(&pfd, 1, left * 1000 + 1) <= 0)
			return NULL;
		/* A byte at a time, as the next line is for the next call. */
		if (len == sizeof(line) - 1 || read(vm->qmp, line + len, 1) != 1)
			return NULL;
		if (line[len++] == '\n') {
			line[len] = '\0';
			return line;
		}
	}
}

/* Returns the answer, an error included, or NULL if there's none in time. */
static char *try_command(struct vm *vm, double seconds, const char *command)
{
	char *line;

	if (dprintf(vm->qmp, "%s\n", command) < 0)
		return NULL;
	while ((line = read_qmp(vm, seconds)))
		if (!strncmp(line, "{\"return\"", 9) || !strncmp(line, "{\"error\"", 8))
			return line;
	return NULL;
}

static char *__attribute__((format(printf, 2, 3))) command(struct vm *vm, const char *fmt, ...)
{
	char text[1024];
	char *answer;
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	answer = try_command(vm, STEP_SECONDS, text);
	if (!answer) {
		int status, gone;

		usleep(500000);
		gone = waitpid(vm->pid, &status, WNOHANG) == vm->pid;
		CHECK(!gone, "QEMU %d has ended, status %#x, before it answered %s",
		      vm->id, status, text);
		fail("QEMU %d doesn't answer %s", vm->id, text);
	}
	CHECK(strncmp(answer, "{\"error\"", 8), "QEMU %d: %s: %s", vm->id, text, answer);
	return answer;
}

static void greet(struct vm *vm)
{
	CHECK(read_qmp(vm, STEP_SECONDS), "QEMU %d has no greeting", vm->id);
	command(vm, "{\"execute\":\"qmp_capabilities\"}");
}

/* The sum of all numbers with that key, 0 if there's none. */
static long number(const char *answer, const char *key)
{
	char pattern[64];
	long sum = 0;

	snprintf(pattern, sizeof(pattern), "\"%s\": ", key);
	while ((answer = strstr(answer, pattern))) {
		answer += strlen(pattern);
		if (*answer != '[') {
			sum += strtol(answer, NULL, 10);
			continue;
		}
		do
			sum += strtol(answer + 1, (char **)&answer, 10);
		while (*answer == ',');
	}
	return sum;
}

static bool has_status(const char *answer, const char *status)
{
	char pattern[64];

	snprintf(pattern, sizeof(pattern), "\"status\": \"%s\"", status);
	return strstr(answer, pattern);
}

static void wait_status(struct vm *vm, const char *status)
{
	double deadline = now() + STEP_SECONDS;
	char *answer;

	for (;;) {
		answer = command(vm, "{\"execute\":\"query-migrate\"}");
		if (has_status(answer, status))
			return;
		CHECK(!has_status(answer, "failed"), "QEMU %d: %s", vm->id, answer);
		CHECK(now() < deadline, "QEMU %d isn't %s: %s", vm->id, status, answer);
		usleep(20000);
	}
}

/* A whole line of the guest; a migration may have cut the first one. */
static void guest_line(struct vm *vm, const char *line)
{
	unsigned long long n, sum, want;
	int t, end = 0;
	char clock[32];

	if (sscanf(line, "L2: start %d %llu end%n", &t, &n, &end) == 2 && end) {
		CHECK(t == vcpus, "the guest has %d CPUs", t);
		guest_pages = vm->pages = n;
		return;
	}
	if (sscanf(line, "L2: clock %31s%n", clock, &end) == 1 && end) {
		say("the guest's clock is %s", clock);
		return;
	}
	if (sscanf(line, "L2: sum %d %llu %llx end%n", &t, &n, &sum, &end) == 3 && end) {
		CHECK(t >= 0 && t < vcpus && vm->pages, "odd line: %s", line);
		want = workload_sum(t, vm->pages, n);
		CHECK(sum == want, "wrong sum %llx of thread %d, round %llu, not %llx",
		      sum, t, n, want);
		vm->rounds[t]++;
		return;
	}
	CHECK(!strstr(line, "L2: bad") && !strstr(line, "L2: thread") &&
	      !strstr(line, "L2: no"), "guest: %s", line);
	CHECK(!strstr(line, "Oops") && !strstr(line, "BUG:") && !strstr(line, "WARNING:") &&
	      !strstr(line, "panic") && !strstr(line, "stall") && !strstr(line, "lockup"),
	      "guest: %s", line);
}

static void read_guest(struct vm *vm)
{
	char path[64];
	int c;

	if (!vm->serial) {
		snprintf(path, sizeof(path), "/tmp/serial.%d", vm->id);
		vm->serial = fopen(path, "re");
		if (!vm->serial)
			return;
	}
	clearerr(vm->serial);
	while ((c = getc(vm->serial)) != EOF) {
		if (c != '\n' && vm->len < sizeof(vm->line) - 1) {
			vm->line[vm->len++] = c;
			continue;
		}
		vm->line[vm->len] = '\0';
		vm->len = 0;
		guest_line(vm, vm->line);
	}
}

/*
 * Until each thread of the guest has printed so many more sums, i.e. for two,
 * until it has read all its memory at least once from now on.
 */
static void wait_rounds(struct vm *vm, int rounds, double seconds)
{
	double deadline = now() + seconds;
	int want[MAX_VCPUS];
	bool done;

	read_guest(vm);
	for (int t = 0; t < vcpus; t++)
		want[t] = vm->rounds[t] + rounds;
	do {
		usleep(20000);
		CHECK(waitpid(vm->pid, NULL, WNOHANG) == 0, "QEMU %d has ended", vm->id);
		read_guest(vm);
		done = true;
		for (int t = 0; t < vcpus; t++)
			done &= vm->rounds[t] >= want[t];
		CHECK(done || now() < deadline,
		      "the guest makes no progress in QEMU %d within %.0f s", vm->id, seconds);
	} while (!done);
}

static void end_vm(struct vm *vm)
{
	if (vm->lives) {
		kill(vm->pid, SIGKILL);
		waitpid(vm->pid, NULL, 0);
		close(vm->qmp);
		vm->lives = false;
	}
	if (vm->serial)
		fclose(vm->serial);
	vm->serial = NULL;
}

/* The kernel's own count of exits for missing pages, of all vCPUs of a VM. */
static long kernel_exits(struct vm *vm)
{
	char path[128];
	long exits = -1;
	glob_t g;
	FILE *f;

	snprintf(path, sizeof(path), "/sys/kernel/debug/kvm/%d-*/memory_fault_exits", vm->pid);
	if (glob(path, 0, NULL, &g))
		return -1;
	f = fopen(g.gl_pathv[0], "re");
	if (f && fscanf(f, "%ld", &exits) != 1)
		exits = -1;
	if (f)
		fclose(f);
	globfree(&g);
	return exits;
}

/*
 * Swap out the memory of a QEMU process. Where a slot has the flag, the guest's
 * next access to such a page exits.
 */
static void swap_out(struct vm *vm)
{
	int pidfd = syscall(SYS_pidfd_open, vm->pid, 0);
	unsigned long start, end;
	char path[64], line[256];
	FILE *f;

	CHECK(pidfd >= 0, "pidfd_open: %m");
	snprintf(path, sizeof(path), "/proc/%d/maps", vm->pid);
	f = fopen(path, "re");
	CHECK(f, "%s: %m", path);
	while (fgets(line, sizeof(line), f)) {
		struct iovec iov;

		if (sscanf(line, "%lx-%lx rw", &start, &end) != 2 || end - start < 1 << 16)
			continue;
		iov = (struct iovec){ (void *)start, end - start };
		/* Not every mapping can be swapped out. */
		syscall(SYS_process_madvise, pidfd, &iov, 1, MADV_PAGEOUT, 0);
	}
	fclose(f);
	close(pidfd);
}

/* A count of /proc/vmstat, in pages. */
static long vmstat(const char *key)
{
	char name[64];
	long count;
	FILE *f = fopen("/proc/vmstat", "re");

	CHECK(f, "/proc/vmstat: %m");
	while (fscanf(f, "%63s %ld", name, &count) == 2)
		if (!strcmp(name, key)) {
			fclose(f);
			return count;
		}
	fail("no %s in /proc/vmstat", key);
}

/* Kill the connections of a process on that Unix socket, as if the network did. */
static void kill_connection(struct vm *vm, const char *name)
{
	int pidfd = syscall(SYS_pidfd_open, vm->pid, 0), killed = 0;

	CHECK(pidfd >= 0, "pidfd_open: %m");
	for (int fd = 3; fd < 256; fd++) {
		struct sockaddr_un addr = {};
		socklen_t len = sizeof(addr), one = sizeof(int);
		int listens = 1, copy = syscall(SYS_pidfd_getfd, pidfd, fd, 0);

		if (copy < 0)
			continue;
		if (!getsockname(copy, (struct sockaddr *)&addr, &len) &&
		    !strcmp(addr.sun_path, name) &&
		    !getsockopt(copy, SOL_SOCKET, SO_ACCEPTCONN, &listens, &one) && !listens)
			killed += !shutdown(copy, SHUT_RDWR);
		close(copy);
	}
	close(pidfd);
	CHECK(killed, "QEMU %d has no connection on %s", vm->id, name);
}

#define SET "{\"execute\":\"migrate-set-capabilities\",\"arguments\":{\"capabilities\":" \
	    "[{\"capability\":\"%s\",\"state\":true}]}}"

static bool by_exits(void)
{
	return !strcmp(way, "exits");
}

/* Begin to migrate; with a limit, up to where the guest runs in the destination. */
static void start_migration(struct vm *from, struct vm *to, int id, long bytes_per_second)
{
	struct vm *ends[] = { from, to };

	start_vm(to, id, true);
	greet(to);
	for (int i = 0; i < 2; i++) {
		command(ends[i], SET, "postcopy-ram");
		command(ends[i], SET, "postcopy-blocktime");
	}
	if (by_exits())
		command(to, SET, "postcopy-vcpu-exits");
	command(from, "{\"execute\":\"migrate-set-parameters\",\"arguments\":"
		"{\"max-postcopy-bandwidth\":%ld}}", bytes_per_second);
	command(to, "{\"execute\":\"migrate-incoming\",\"arguments\":"
		"{\"uri\":\"unix:/tmp/migration.%d\"}}", id);
	command(from, "{\"execute\":\"migrate\",\"arguments\":"
		"{\"uri\":\"unix:/tmp/migration.%d\"}}", id);
	command(from, "{\"execute\":\"migrate-start-postcopy\"}");
	if (bytes_per_second)
		wait_status(to, "postcopy-active");
}

/*
 * Both ends have to agree that it's done.  QEMU's thread that receives pages frees
 * at the end what query-migrate copies in the main loop, without a lock, so that
 * asking the destination at that moment crashes it now and then.
 */
static void end_migration(struct vm *from, struct vm *to)
{
	wait_status(from, "completed");
	sleep(1);
	wait_status(to, "completed");
}

/* What was counted, as a line of the table, or of what doesn't belong there. */
static void report(struct vm *from, struct vm *to, const char *what)
{
	static char source[65536];
	const char *dest;
	long exits;

	snprintf(source, sizeof(source), "%s", command(from, "{\"execute\":\"query-migrate\"}"));
	dest = command(to, "{\"execute\":\"query-migrate\"}");
	exits = number(dest, "exits");
	say("%s: %s %s %d blocked_ms %ld requests %ld exits %ld userfaults %ld exit_us %ld"
	    " downtime_ms %ld total_ms %ld",
	    what, way, backing, vcpus, number(dest, "postcopy-vcpu-blocktime"),
	    number(source, "postcopy-requests"), exits, number(dest, "userfaults"),
	    number(dest, "exit-time"), number(source, "downtime"), number(source, "total-time"));
	if (by_exits())
		CHECK(exits > 0 && number(dest, "postcopy-vcpu-blocktime") >= 0,
		      "no exits: %s", dest);
	else
		CHECK(exits == 0 && kernel_exits(to) <= 0, "exits: %s", dest);
	if (strcmp(cpu, CPU))
		CHECK(!number(dest, "userfaults"), "not only exits: %s", dest);
}

/*
 * The flag is clear on all slots: when memory is swapped out, the kernel gets
 * it back without an exit. Of hugetlb memory, none can be swapped out.
 */
static void check_flag_is_clear(struct vm *vm)
{
	long exits = kernel_exits(vm), out = vmstat("pswpout"), in = vmstat("pswpin");
	long least = WORK_MB * 256 * 9 / 10;	/* of 4 KiB */

	if (!strcmp(backing, "hugetlb"))
		return;

	CHECK(exits > 0, "the kernel has counted no exits");
	swap_out(vm);
	out = vmstat("pswpout") - out;
	CHECK(out > least, "only %ld pages have been swapped out", out);
	wait_rounds(vm, 2, STEP_SECONDS);
	in = vmstat("pswpin") - in;
	CHECK(in > least, "only %ld pages have come back", in);
	CHECK(kernel_exits(vm) == exits, "%ld exits after the end of the migration",
	      kernel_exits(vm) - exits);
	say("flag: %ld exits before, none more with %ld pages swapped out, %ld in", exits, out, in);
}

static void scenario_migrate(struct vm vm[2], int hops)
{
	for (int hop = 1; hop <= hops; hop++) {
		struct vm *from = &vm[(hop + 1) % 2], *to = &vm[hop % 2];

		start_migration(from, to, hop, 0);
		end_migration(from, to);
		report(from, to, strcmp(cpu, CPU) ? "only exits" : "table");
		end_vm(from);
		wait_rounds(to, 2, STEP_SECONDS);
		if (by_exits())
			check_flag_is_clear(to);
		say("hop %d of %d, all sums right", hop, hops);
	}
}

/* Slow enough for something to be done meanwhile. */
#define SLOW	(1l << 20)

static void resume(struct vm *from, struct vm *to)
{
	wait_status(from, "postcopy-paused");
	wait_status(to, "postcopy-paused");
	command(to, "{\"execute\":\"migrate-recover\",\"arguments\":"
		"{\"uri\":\"unix:/tmp/recovery.%d\"}}", to->id);
	command(from, "{\"execute\":\"migrate-set-parameters\",\"arguments\":"
		"{\"max-postcopy-bandwidth\":0}}");
	command(from, "{\"execute\":\"migrate\",\"arguments\":"
		"{\"uri\":\"unix:/tmp/recovery.%d\",\"resume\":true}}", to->id);
}

static void finish(struct vm *from, struct vm *to)
{
	end_migration(from, to);
	report(from, to, "disturbed");
	end_vm(from);
	wait_rounds(to, 2, STEP_SECONDS);
	check_flag_is_clear(to);
}

/* migrate-pause on the destination, then recover. */
static void scenario_pause(struct vm vm[2], int hops)
{
	(void)hops;
	start_migration(&vm[0], &vm[1], 1, SLOW);
	sleep(2);
	command(&vm[1], "{\"execute\":\"migrate-pause\"}");
	resume(&vm[0], &vm[1]);
	finish(&vm[0], &vm[1]);
}

/* The connection breaks, at another moment each time. */
static void scenario_recover(struct vm vm[2], int hops)
{
	char name[64] = "/tmp/migration.1";

	(void)hops;
	start_migration(&vm[0], &vm[1], 1, SLOW);
	usleep(1500000);
	kill_connection(&vm[1], name);
	say("connection killed");
	resume(&vm[0], &vm[1]);
	finish(&vm[0], &vm[1]);
}

/* How long stop takes while no page arrives; -1 if it doesn't end in time. */
static double stop_time(struct vm *vm)
{
	double start = now();
	char *answer = try_command(vm, PROMPT_SECONDS, "{\"execute\":\"stop\"}");

	return answer && !strncmp(answer, "{\"return\"", 9) ? now() - start : -1;
}

/* stop and cont while pages arrive, and while the connection is broken. */
static void scenario_stop(struct vm vm[2], int hops)
{
	double took;

	(void)hops;
	start_migration(&vm[0], &vm[1], 1, SLOW);
	sleep(1);
	took = stop_time(&vm[1]);
	CHECK(took >= 0, "no stop within %d s", PROMPT_SECONDS);
	say("stop: %.3f s while pages arrive", took);
	command(&vm[1], "{\"execute\":\"cont\"}");
	sleep(1);

	kill_connection(&vm[1], "/tmp/migration.1");
	wait_status(&vm[1], "postcopy-paused");
	sleep(1);
	took = stop_time(&vm[1]);
	CHECK(took >= 0, "no stop within %d s while the connection is broken", PROMPT_SECONDS);
	say("stop: %.3f s while the connection is broken", took);
	command(&vm[1], "{\"execute\":\"cont\"}");
	sleep(1);
	resume(&vm[0], &vm[1]);
	finish(&vm[0], &vm[1]);
}

/* quit while the connection is broken. */
static void scenario_quit(struct vm vm[2], int hops)
{
	double start;
	int status;

	(void)hops;
	start_migration(&vm[0], &vm[1], 1, SLOW);
	sleep(1);
	kill_connection(&vm[1], "/tmp/migration.1");
	wait_status(&vm[1], "postcopy-paused");
	sleep(1);
	start = now();
	CHECK(dprintf(vm[1].qmp, "{\"execute\":\"quit\"}\n") > 0, "QEMU 1 has closed QMP");
	while (waitpid(vm[1].pid, &status, WNOHANG) == 0) {
		CHECK(now() - start < PROMPT_SECONDS, "no quit within %d s", PROMPT_SECONDS);
		usleep(10000);
	}
	vm[1].lives = false;
	CHECK(WIFEXITED(status) && !WEXITSTATUS(status), "quit: status %#x", status);
	say("quit: %.3f s while the connection is broken", now() - start);
}

/*
 * What the others are compared with: userfaultfd, and the connection broken.
 * Nothing can be wrong here, how long stop takes is only reported.
 */
static void scenario_hang(struct vm vm[2], int hops)
{
	double took;

	(void)hops;
	start_migration(&vm[0], &vm[1], 1, SLOW);
	sleep(1);
	kill_connection(&vm[1], "/tmp/migration.1");
	wait_status(&vm[1], "postcopy-paused");
	sleep(1);
	took = stop_time(&vm[1]);
	if (took < 0)
		say("stop: not within %d s while the connection is broken", PROMPT_SECONDS);
	else
		say("stop: %.3f s while the connection is broken", took);
}

static void refused(struct vm *vm, const char *why)
{
	char text[256], *answer;

	snprintf(text, sizeof(text), SET, "postcopy-vcpu-exits");
	answer = try_command(vm, STEP_SECONDS, text);
	CHECK(answer && strstr(answer, why), "not refused: %s", answer);
	say("refused: %.150s", answer);
}

/* The capability is refused without postcopy, and if the kernel lacks the feature. */
static void scenario_refuse(struct vm vm[2], int hops)
{
	(void)hops;
	refused(&vm[0], "require postcopy-ram");
	command(&vm[0], SET, "postcopy-ram");
	if (by_exits())
		command(&vm[0], SET, "postcopy-vcpu-exits");
	else
		refused(&vm[0], "KVM_CAP_EXIT_ON_MISSING");
}

static const struct {
	const char *name;
	void (*run)(struct vm vm[2], int hops);
} scenarios[] = {
	{ "migrate", scenario_migrate },
	{ "only", scenario_migrate },
	{ "pause", scenario_pause },
	{ "recover", scenario_recover },
	{ "stop", scenario_stop },
	{ "quit", scenario_quit },
	{ "hang", scenario_hang },
	{ "refuse", scenario_refuse },
};

int main(int argc, char **argv)
{
	struct vm vm[2] = {};
	FILE *f;

	started = now();
	signal(SIGPIPE, SIG_IGN);
	CHECK(argc == 6, "client SCENARIO WAY BACKING VCPUS HOPS");
	way = argv[2];
	backing = argv[3];
	vcpus = atoi(argv[4]);
	CHECK(vcpus >= 1 && vcpus <= MAX_VCPUS, "%d vCPUs", vcpus);

	f = fopen("/proc/sys/vm/nr_hugepages", "we");
	CHECK(f && fprintf(f, "%d\n", strcmp(backing, "hugetlb") ? 0 : GUEST_MB + 8) > 0 &&
	      !fclose(f), "nr_hugepages: %m");

	/* Without paravirtual features, vCPU threads use no userfaultfd at all. */
	if (!strcmp(argv[1], "only"))
		cpu = CPU_PLAIN;

	start_vm(&vm[0], 0, false);
	greet(&vm[0]);
	wait_rounds(&vm[0], 1, STEP_SECONDS);
	say("the guest runs");
	for (size_t i = 0; i < ARRAY_SIZE(scenarios); i++)
		if (!strcmp(argv[1], scenarios[i].name)) {
			scenarios[i].run(vm, atoi(argv[5]));
			end_vm(&vm[0]);
			end_vm(&vm[1]);
			say("done");
			return 0;
		}
	fail("there's no scenario %s", argv[1]);
}
