// SPDX-License-Identifier: GPL-2.0-only
/*
 * PID 1 of the machine that the harness boots: run the tests of /tests.list one
 * after the other and report them as KTAP on the virtio-serial port "ktap".
 *
 * The last line, END_MARKER, is the only proof that the machine lived to the
 * end.  Whatever goes wrong here powers off without it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>

#include <linux/if.h>
#include <linux/kvm.h>

#include "../../kselftest.h"

#define END_MARKER	"# kvm-qemu: end"
#define MAX_TESTS	1024
#define MAX_ARGS	64
#define KILL_SECONDS	60	/* for a killed test to be gone */
#define MAX_RETRIES	2
#define TRACE_LINES	16	/* of a failed test's last exits */
#define SWAP_BYTES	(256u << 20)
#define ALIVE_SECONDS	10	/* between signs of life, see run.sh */

struct test {
	char *name;
	int limit;		/* seconds */
	char *argv[MAX_ARGS + 1];
};

static FILE *ktap;
static double reported;		/* when the last line of the report was written */

static void __noreturn power_off(void)
{
	sync();
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

static void __noreturn die(const char *what)
{
	fprintf(stderr, "init: %s: %s\n", what, strerror(errno));
	power_off();
}

static void check(bool ok, const char *what)
{
	if (!ok)
		die(what);
}

static void write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);

	check(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text), path);
	close(fd);
}

static void mount_filesystems(void)
{
	static const char * const mounts[][2] = {
		{ "devtmpfs",	"/dev" },
		{ "proc",	"/proc" },
		{ "sysfs",	"/sys" },
		{ "tmpfs",	"/tmp" },
		{ "tmpfs",	"/dev/shm" },
		{ "devpts",	"/dev/pts" },
		{ "hugetlbfs",	"/dev/hugepages" },
		{ "debugfs",	"/sys/kernel/debug" },
		{ "tracefs",	"/sys/kernel/tracing" },
		{ "cgroup2",	"/sys/fs/cgroup" },
	};

	for (size_t i = 0; i < ARRAY_SIZE(mounts); i++) {
		mkdir(mounts[i][1], 0755);
		check(!mount(mounts[i][0], mounts[i][1], mounts[i][0], 0, NULL),
		      mounts[i][1]);
	}
}

/* Write a swap header by hand, as there is no mkswap, and swap to zram. */
static void enable_swap(void)
{
	size_t size = getpagesize();
	char *page = calloc(1, size);
	uint32_t *info = (uint32_t *)(page + 1024);
	char bytes[16];
	int fd;

	snprintf(bytes, sizeof(bytes), "%u", SWAP_BYTES);
	write_file("/sys/block/zram0/disksize", bytes);

	info[0] = 1;				/* version */
	info[1] = SWAP_BYTES / size - 1;	/* last page */
	memcpy(page + size - 10, "SWAPSPACE2", 10);

	fd = open("/dev/zram0", O_WRONLY | O_CLOEXEC);
	check(fd >= 0 && write(fd, page, size) == (ssize_t)size, "/dev/zram0");
	close(fd);
	free(page);
	check(!swapon("/dev/zram0", 0), "swapon");
}

/* As on any machine; it's up to the tests to complain. */
static void enable_loopback(void)
{
	struct ifreq req = { .ifr_name = "lo", .ifr_flags = IFF_UP };
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &req))
		perror("lo");
	close(fd);
}

/*
 * KVM patches the scheduler when the first VM comes and when the last one goes,
 * i.e. many times a test.  With TCG on two CPUs, KVM now and then isn't told that
 * a vCPU is scheduled out, and is told when it's scheduled in: the kernel warns,
 * or a CPU hangs.  That isn't seen if the code is patched only once.
 */
static void keep_vm(void)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);

	/* It's up to the tests to complain. */
	if (kvm < 0 || ioctl(kvm, KVM_CREATE_VM, 0) < 0)
		perror("/dev/kvm");
}

/* Ports appear from a work item, i.e. possibly later than init. */
static FILE *open_port(const char *want)
{
	for (int tries = 0; tries < 100; tries++, usleep(100000)) {
		char name[64], dev[80];
		FILE *f = NULL;
		glob_t g;

		if (glob("/sys/class/virtio-ports/*/name", 0, NULL, &g))
			continue;

		for (size_t i = 0; i < g.gl_pathc && !f; i++) {
			FILE *attr = fopen(g.gl_pathv[i], "re");

			if (attr && fscanf(attr, "%63s", name) == 1 && !strcmp(name, want) &&
			    sscanf(g.gl_pathv[i], "/sys/class/virtio-ports/%63[^/]", name) == 1) {
				snprintf(dev, sizeof(dev), "/dev/%s", name);
				f = fopen(dev, "we");
			}
			if (attr)
				fclose(attr);
		}
		globfree(&g);
		if (f)
			return f;
	}

	errno = ENODEV;
	die(want);
}

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

/* One line, and one write to the port, a call. */
static void __printf(1, 2) report(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vfprintf(ktap, fmt, ap);
	va_end(ap);
	fputc('\n', ktap);
	check(!fflush(ktap), "ktap");
	reported = now();
}

/*
 * Memory that nothing points to and that was allocated since the first call
 * makes the second one's scan complain on the console.  An object has to be
 * some seconds old, and the same in two scans.
 */
static void find_leaks(bool complain)
{
	static const char path[] = "/sys/kernel/debug/kmemleak";
	char line[256];
	FILE *f;

	if (access(path, F_OK))
		return;

	write_file(path, "scan");
	if (!complain) {
		write_file(path, "clear");
		return;
	}

	sleep(6);
	report("# kvm-qemu: alive");
	write_file(path, "scan");
	f = fopen(path, "re");
	while (f && fgets(line, sizeof(line), f))
		fputs(line, stderr);
}

/* A detector of data races that is off, or has turned itself off, finds none. */
static void check_races(void)
{
	static const char path[] = "/sys/kernel/debug/kcsan";
	bool enabled = false;
	char line[256];
	FILE *f;

	if (access(path, F_OK))
		return;

	f = fopen(path, "re");
	check(f, path);
	while (fgets(line, sizeof(line), f)) {
		line[strcspn(line, "\n")] = '\0';
		if (!strcmp(line, "enabled: 1"))
			enabled = true;
		if (!strncmp(line, "setup_watchpoints:", 18) || !strncmp(line, "data_races:", 11))
			report("# kvm-qemu: kcsan %s", line);
	}
	fclose(f);
	errno = ENODEV;
	check(enabled, path);
}

/* A line of /tests.list is "name seconds binary [argument]...". */
static int read_tests(struct test *tests)
{
	FILE *f = fopen("/tests.list", "re");
	char *line = NULL, *word;
	size_t size = 0;
	int n = 0;

	check(f, "/tests.list");
	while (getline(&line, &size, f) > 0) {
		struct test *t = &tests[n++];
		int argc = 0;

		check(n <= MAX_TESTS, "too many tests");
		t->name = strtok(line, "\n ");
		word = strtok(NULL, "\n ");
		t->limit = word ? atoi(word) : 0;
		while (argc < MAX_ARGS && (word = strtok(NULL, "\n ")))
			t->argv[argc++] = word;
		check(argc && t->limit > 0, "bad line in /tests.list");
		line = NULL;	/* the test keeps it */
	}
	fclose(f);
	return n;
}

/*
 * Output goes to a pseudo-terminal, as stdio would keep much of what a
 * test wrote before it was killed to itself if that were a pipe.
 */
static pid_t start_test(struct test *t, int *out)
{
	int tty, pty = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
	struct termios raw;
	char path[256];
	pid_t pid;

	check(pty >= 0 && !unlockpt(pty), "pty");
	tty = open(ptsname(pty), O_RDWR | O_NOCTTY | O_CLOEXEC);
	check(tty >= 0 && !tcgetattr(tty, &raw), "tty");
	cfmakeraw(&raw);
	check(!tcsetattr(tty, TCSANOW, &raw), "tty");

	pid = fork();
	check(pid >= 0, "fork");
	if (!pid) {
		setpgid(0, 0);
		dup2(open("/dev/null", O_RDONLY), 0);
		dup2(tty, 1);
		dup2(tty, 2);
		snprintf(path, sizeof(path), "/tests/%s", t->argv[0]);
		t->argv[0] = path;	/* the library opens it, to load the guest */
		execv(path, t->argv);
		perror(path);
		_exit(127);
	}
	close(tty);
	*out = pty;
	return pid;
}

struct output {
	char line[1024];
	size_t len;
	bool rewind;
	char skip[256];		/* what the test said about skipping, if anything */
};

static void end_line(struct output *o)
{
	char *why;

	o->line[o->len] = '\0';
	o->len = 0;
	report("# %s", o->line);

	why = strstr(o->line, "SKIP ");
	why = why ? why + 5 : strstr(o->line, "skipping") ? o->line : NULL;
	if (why)
		snprintf(o->skip, sizeof(o->skip), "%s", why + strspn(why, "- "));
}

/* Pass on what the test has to say, line by line. */
static bool read_output(struct output *o, int fd)
{
	char buf[1024];
	ssize_t n = read(fd, buf, sizeof(buf));

	for (ssize_t i = 0; i < n; i++) {
		/* A progress indicator overwrites its line; a serial console doesn't. */
		if (o->rewind && buf[i] != '\n')
			o->len = 0;
		o->rewind = buf[i] == '\r';
		if (!strchr("\r\n", buf[i]))
			o->line[o->len++] = buf[i];
		if (buf[i] == '\n' || o->len == sizeof(o->line) - 1)
			end_line(o);
	}
	return n > 0;
}

/* The address of a function of the kernel, and of what follows it. */
static bool find_function(const char *name, unsigned long *start, unsigned long *end)
{
	FILE *f = fopen("/proc/kallsyms", "re");
	unsigned long address;
	char symbol[128];

	*start = *end = 0;
	while (f && !*end && fscanf(f, "%lx %*s %127s%*[^\n]", &address, symbol) == 2) {
		if (!strcmp(symbol, name))
			*start = address;
		else if (*start && address > *start)
			*end = address;
	}
	if (f)
		fclose(f);
	return *end;
}

/*
 * TCG's SVM now and then loses track of who is who: a guest's saved RIP is the
 * one at which its host goes on after VMRUN, where the guest faults for ever or
 * shuts down.  That happens with and without any change to KVM.  No guest of a
 * selftest has code at such an address, i.e. a single such exit tells.  The
 * exits are traced if the kernel's command line says so.
 */
static bool guest_is_lost(void)
{
	char lines[TRACE_LINES][512] = {};
	unsigned long start, end, rip;
	bool lost = false;
	char *field;
	int n = 0;
	FILE *f;

	if (!find_function("__svm_vcpu_run", &start, &end))
		return false;

	f = fopen("/sys/kernel/tracing/trace", "re");
	while (f && fgets(lines[n % TRACE_LINES], sizeof(lines[0]), f)) {
		field = strstr(lines[n++ % TRACE_LINES], " rip 0x");
		if (field && sscanf(field, " rip %lx", &rip) == 1 &&
		    rip >= start && rip < end)
			lost = true;
	}
	if (f)
		fclose(f);

	for (int i = n > TRACE_LINES ? n - TRACE_LINES : 0; i < n; i++)
		report("# %.*s", (int)strcspn(lines[i % TRACE_LINES], "\n"),
		       lines[i % TRACE_LINES]);
	return lost;
}

/* With CONFIG_LOCK_STAT: what was locked, and how often, since the test began. */
static void report_lock_stat(const char *name)
{
	FILE *f = fopen("/proc/lock_stat", "re");
	char line[512];

	/* Where it was locked comes without a colon. */
	while (f && fgets(line, sizeof(line), f)) {
		if (strchr(line, ':'))
			report("# lock_stat %s: %.*s", name, (int)strcspn(line, "\n"), line);
	}
	if (f)
		fclose(f);
}

/* Where in the kernel each thread of a test is that has run out of time. */
static void report_threads(void)
{
	char path[300], line[256], where[100], state, frame[64];
	glob_t tasks;
	FILE *f;

	if (glob("/proc/[0-9]*/task/[0-9]*", 0, NULL, &tasks))
		return;
	for (size_t i = 0; i < tasks.gl_pathc; i++) {
		/* Kernel threads have none. */
		snprintf(path, sizeof(path), "%s/exe", tasks.gl_pathv[i]);
		if (readlink(path, line, sizeof(line)) < 0 ||
		    !strncmp(tasks.gl_pathv[i], "/proc/1/", 8))
			continue;

		snprintf(path, sizeof(path), "%s/stat", tasks.gl_pathv[i]);
		f = fopen(path, "re");
		state = '?';
		if (f && fscanf(f, "%*d (%*[^)]) %c", &state) != 1)
			state = '?';
		if (f)
			fclose(f);

		snprintf(path, sizeof(path), "%s/stack", tasks.gl_pathv[i]);
		f = fopen(path, "re");
		where[0] = 0;
		while (f && fgets(line, sizeof(line), f)) {
			if (sscanf(line, "[<%*[^>]>] %63[^+\n]", frame) != 1)
				continue;
			if (strlen(where) + strlen(frame) + 2 > sizeof(where))
				break;
			sprintf(where + strlen(where), " %s", frame);
		}
		if (f)
			fclose(f);
		report("# thread %s %c%s", tasks.gl_pathv[i] + strlen("/proc/"), state, where);
	}
	globfree(&tasks);
}

/* Returns false, without a result, if the test is to be run once more. */
static bool run_test(struct test *t, int nr, bool may_retry)
{
	double start = now(), deadline = start + t->limit;
	struct output out = { .len = 0 };
	bool timed_out = false;
	struct pollfd fds[2];
	struct rusage ru;
	int status, fd;
	char msg[128];
	pid_t pid;

	/* For whoever reads the console log. */
	snprintf(msg, sizeof(msg), "kvm-qemu: test %d, %s\n", nr, t->name);
	write_file("/dev/kmsg", msg);

	truncate("/sys/kernel/tracing/trace", 0);
	if (!access("/proc/lock_stat", F_OK))
		write_file("/proc/lock_stat", "0");
	pid = start_test(t, &fd);
	fds[0] = (struct pollfd){ .fd = syscall(SYS_pidfd_open, pid, 0), .events = POLLIN };
	fds[1] = (struct pollfd){ .fd = fd, .events = POLLIN };
	check(fds[0].fd >= 0, "pidfd_open");

	while (!(fds[0].revents & POLLIN)) {
		double left = deadline - now();

		if (left <= 0) {
			if (timed_out) {
				report("Bail out! %s cannot be killed", t->name);
				power_off();
			}
			timed_out = true;
			report_threads();
			deadline = now() + KILL_SECONDS;
			kill(-pid, SIGKILL);
			continue;
		}
		left = left < ALIVE_SECONDS ? left : ALIVE_SECONDS;
		if (poll(fds, 2, left * 1000 + 1) > 0 && fds[1].revents &&
		    !read_output(&out, fd))
			fds[1].fd = -1;
		if (now() - reported >= ALIVE_SECONDS)
			report("# kvm-qemu: alive");
	}
	check(wait4(pid, &status, 0, &ru) == pid, "wait4");

	/*
	 * Nothing that a test started may outlive it.  From PID 1 this spares
	 * only PID 1.  A process that does not die is a hung task, which panics.
	 */
	kill(-1, SIGKILL);
	while (waitpid(-1, NULL, 0) > 0)
		;
	while (read_output(&out, fd))
		;
	if (out.len)
		end_line(&out);
	close(fds[0].fd);
	close(fd);

	report_lock_stat(t->name);
	timeradd(&ru.ru_utime, &ru.ru_stime, &ru.ru_utime);
	report("# %s: cpu_us=%lld wall_s=%.1f", t->name,
	       ru.ru_utime.tv_sec * 1000000LL + ru.ru_utime.tv_usec, now() - start);

	if (may_retry && status && (timed_out || WEXITSTATUS(status) != KSFT_SKIP) &&
	    guest_is_lost()) {
		report("# kvm-qemu: retry %s, QEMU has put its guest at its host's address",
		       t->name);
		return false;
	}

	if (timed_out)
		report("not ok %d %s # TIMEOUT after %d s", nr, t->name, t->limit);
	else if (WIFSIGNALED(status))
		report("not ok %d %s # signal=%d", nr, t->name, WTERMSIG(status));
	else if (WEXITSTATUS(status) == KSFT_SKIP)
		report("ok %d %s # SKIP %s", nr, t->name, out.skip);
	else if (WEXITSTATUS(status))
		report("not ok %d %s # exit=%d", nr, t->name, WEXITSTATUS(status));
	else
		report("ok %d %s", nr, t->name);
	return true;
}

int main(void)
{
	static struct test tests[MAX_TESTS + 1];
	int n;

	mount_filesystems();
	enable_swap();
	enable_loopback();
	keep_vm();
	find_leaks(false);
	setenv("PATH", "/tests", 1);
	check(!chdir("/tmp"), "/tmp");

	n = read_tests(tests);
	ktap = open_port("ktap");
	report("KTAP version 1");
	report("1..%d", n);
	for (int i = 0; i < n; i++) {
		for (int retries = 0; !run_test(&tests[i], i + 1, retries < MAX_RETRIES);)
			retries++;
	}
	find_leaks(true);
	check_races();
	report(END_MARKER);
	power_off();
}
