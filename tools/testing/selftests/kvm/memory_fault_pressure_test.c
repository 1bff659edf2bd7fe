// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test memory-fault exits if the host is short of memory: guest memory is larger
 * than what its memory cgroup may use, i.e. is swapped out all the time, the OOM
 * killer ends a process in KVM_RUN, and each single allocation in the paths that
 * are about exits and their memslot flag fails.
 *
 * The guest's code, stack and page tables are in slot 0, the slot under test has
 * nothing but data.
 */
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <linux/bitmap.h>
#include <linux/sizes.h>

#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "numaif.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"

#define TEST_SLOT		10
#define TEST_GPA		0xc0000000ul
#define TEST_GVA		TEST_GPA

#define SCRIBBLE		0xa5a5a5a5a5a5a5a5ul

#define ALL_ACCESSES		(KVM_MEMORY_EXIT_FLAG_READ |	\
				 KVM_MEMORY_EXIT_FLAG_WRITE |	\
				 KVM_MEMORY_EXIT_FLAG_EXEC)

static bool is_memory_fault(struct kvm_run *run, u64 gpa, u64 flags)
{
	return run->exit_reason == KVM_EXIT_MEMORY_FAULT &&
	       run->memory_fault.flags == flags && run->memory_fault.gpa == gpa &&
	       run->memory_fault.size == getpagesize();
}

static void scribble_on_run(struct kvm_run *run)
{
	/* On arm64, it's exit_reason that tells KVM to complete an access to MMIO. */
	if (run->exit_reason != KVM_EXIT_MMIO)
		run->exit_reason = (u32)SCRIBBLE;
	run->memory_fault.flags = SCRIBBLE;
	run->memory_fault.gpa = SCRIBBLE;
	run->memory_fault.size = SCRIBBLE;
}

static bool is_scribble(struct kvm_run *run)
{
	return run->memory_fault.flags == SCRIBBLE && run->memory_fault.gpa == SCRIBBLE &&
	       run->memory_fault.size == SCRIBBLE;
}

static void assert_run(bool as_expected, struct kvm_run *run, int error)
{
	TEST_ASSERT(as_expected,
		    "errno = %d, exit %u (%s), flags 0x%llx, gpa 0x%llx, size 0x%llx",
		    error, run->exit_reason, exit_reason_str(run->exit_reason),
		    run->memory_fault.flags, run->memory_fault.gpa, run->memory_fault.size);
}

static void *map_memory(size_t size, int fd)
{
	void *mem = kvm_mmap(size, PROT_READ | PROT_WRITE,
			     fd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS, fd);

	/* Whether this works doesn't matter, it makes pages go one by one. */
	madvise(mem, size, MADV_NOHUGEPAGE);
	return mem;
}

/*
 * A memory cgroup with a process that isn't allowed to use as much memory as its
 * guest has.
 */
#define MEMCG_ROOT		"/sys/fs/cgroup"
#define MEMCG_MAX		(5 * SZ_1M)
#define MEMCG_SLOT_SIZE		SZ_8M
#define MEMCG_MAX_VCPUS		2

/*
 * Reclaim may take a page away before the guest has accessed it, but not for ever,
 * and not often.  Usually, a page has one exit for reads and one for writes.
 */
#define MAX_EXITS_IN_A_ROW	16
#define MAX_EXITS_PER_PAGE	4

static u64 pass_content(u64 page, u64 pass)
{
	return pass ? pass << 32 | (page + 1) : 0;
}

/* In each pass, a page has the content of the last pass, and gets a new one. */
static void memcg_guest_code(u64 vcpu_id, u64 nr_vcpus, u64 page_size)
{
	u64 last_word = page_size / sizeof(u64) - 1;
	u64 nr_pages = MEMCG_SLOT_SIZE / page_size;
	u64 pass, page, old, new, *mem;

	for (pass = 1;; pass++) {
		for (page = vcpu_id; page < nr_pages; page += nr_vcpus) {
			mem = (u64 *)(TEST_GVA + page * page_size);
			old = pass_content(page, pass - 1);
			new = pass_content(page, pass);

			GUEST_ASSERT_EQ(READ_ONCE(mem[0]), old);
			GUEST_ASSERT_EQ(READ_ONCE(mem[last_word]), old);
			WRITE_ONCE(mem[0], new);
			WRITE_ONCE(mem[last_word], new);
		}
		GUEST_SYNC(pass);
	}
}

struct memcg_vm {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpus[MEMCG_MAX_VCPUS];
	int nr_vcpus;
	void *hva;
};

struct memcg_vcpu {
	struct memcg_vm *env;
	struct kvm_vcpu *vcpu;
	u64 nr_exits;
	u64 max_exits;
};

static void memcg_set_flag(struct memcg_vm *env, bool exit_on_missing)
{
	vm_set_user_memory_region(env->vm, TEST_SLOT,
				  exit_on_missing ? KVM_MEM_EXIT_ON_MISSING : 0,
				  TEST_GPA, MEMCG_SLOT_SIZE, env->hva);
}

static void memcg_create_vm(struct memcg_vm *env, int nr_vcpus, bool shmem)
{
	int fd = shmem ? kvm_memfd_alloc(MEMCG_SLOT_SIZE, false) : -1;
	int i;

	env->hva = map_memory(MEMCG_SLOT_SIZE, fd);
	if (shmem)
		close(fd);
	env->nr_vcpus = nr_vcpus;
	env->vm = vm_create_with_vcpus(nr_vcpus, memcg_guest_code, env->vcpus);
	for (i = 0; i < nr_vcpus; i++)
		vcpu_args_set(env->vcpus[i], 3, i, nr_vcpus, getpagesize());

	memcg_set_flag(env, false);
	virt_map(env->vm, TEST_GVA, TEST_GPA, MEMCG_SLOT_SIZE / env->vm->page_size);
}

static void *memcg_vcpu_fn(void *arg)
{
	struct memcg_vcpu *v = arg;
	struct kvm_run *run = v->vcpu->run;
	u64 last_gpa = -1ull, nr_same = 0, gpa, flags;
	struct ucall uc;
	bool write;

	v->nr_exits = 0;
	v->max_exits = 0;

	while (_vcpu_run(v->vcpu)) {
		gpa = run->memory_fault.gpa;
		write = run->memory_fault.flags == KVM_MEMORY_EXIT_FLAG_WRITE;
		flags = write ? KVM_MEMORY_EXIT_FLAG_WRITE : KVM_MEMORY_EXIT_FLAG_READ;
		assert_run(errno == EFAULT && gpa - TEST_GPA < MEMCG_SLOT_SIZE &&
			   is_memory_fault(run, gpa, flags), run, errno);

		nr_same = gpa == last_gpa ? nr_same + 1 : 1;
		last_gpa = gpa;
		v->nr_exits++;
		v->max_exits = max(v->max_exits, nr_same);
		TEST_ASSERT(nr_same <= MAX_EXITS_IN_A_ROW,
			    "%lu exits for the page at 0x%lx", nr_same, gpa);

		kvm_madvise(v->env->hva + (gpa - TEST_GPA), getpagesize(),
			    write ? MADV_POPULATE_WRITE : MADV_POPULATE_READ);
	}

	if (get_ucall(v->vcpu, &uc) == UCALL_ABORT)
		REPORT_GUEST_ASSERT(uc);
	TEST_ASSERT_EQ(uc.cmd, UCALL_SYNC);
	return NULL;
}

static u64 memcg_run_pass(struct memcg_vm *env)
{
	struct memcg_vcpu vcpus[MEMCG_MAX_VCPUS];
	pthread_t threads[MEMCG_MAX_VCPUS];
	u64 nr_pages = MEMCG_SLOT_SIZE / getpagesize();
	u64 nr_exits = 0, max_exits = 0;
	int i;

	for (i = 0; i < env->nr_vcpus; i++) {
		vcpus[i].env = env;
		vcpus[i].vcpu = env->vcpus[i];
		kvm_pthread_create(&threads[i], NULL, memcg_vcpu_fn, &vcpus[i]);
	}
	for (i = 0; i < env->nr_vcpus; i++) {
		kvm_pthread_join(threads[i], NULL);
		nr_exits += vcpus[i].nr_exits;
		max_exits = max(max_exits, vcpus[i].max_exits);
	}

	pr_info("%lu exits, at most %lu in a row for a page\n", nr_exits, max_exits);
	TEST_ASSERT(nr_exits <= MAX_EXITS_PER_PAGE * nr_pages, "%lu pages, but %lu exits",
		    nr_pages, nr_exits);
	return nr_exits;
}

static void memcg_check_content(struct memcg_vm *env, u64 pass)
{
	u64 last_word = getpagesize() / sizeof(u64) - 1;
	u64 page, *mem;

	for (page = 0; page < MEMCG_SLOT_SIZE / getpagesize(); page++) {
		mem = env->hva + page * getpagesize();
		TEST_ASSERT_EQ(READ_ONCE(mem[0]), pass_content(page, pass));
		TEST_ASSERT_EQ(READ_ONCE(mem[last_word]), pass_content(page, pass));
	}
}

static void memcg_swap_child(bool shmem)
{
	u64 nr_pages = MEMCG_SLOT_SIZE / getpagesize();
	/* Of these, at least, the cgroup's share can't be in memory. */
	u64 nr_swapped = (MEMCG_SLOT_SIZE - MEMCG_MAX) / getpagesize();
	struct memcg_vm env;
	u64 nr_exits;

	/* With another vCPU, TCG takes ten times as long for the TLB flushes. */
	memcg_create_vm(&env, 1, shmem);

	memcg_set_flag(&env, true);
	nr_exits = memcg_run_pass(&env);
	TEST_ASSERT(nr_exits >= nr_pages, "%lu pages, but %lu exits", nr_pages, nr_exits);

	/* Without the flag, KVM swaps pages in. */
	memcg_set_flag(&env, false);
	TEST_ASSERT_EQ(memcg_run_pass(&env), 0);

	memcg_set_flag(&env, true);
	nr_exits = memcg_run_pass(&env);
	TEST_ASSERT(nr_exits >= nr_swapped, "%lu swapped pages, but %lu exits",
		    nr_swapped, nr_exits);

	memcg_check_content(&env, 3);
	kvm_vm_free(env.vm);
}

static void memcg_oom_child(bool exit_on_missing)
{
	struct memcg_vm env;

	memcg_create_vm(&env, MEMCG_MAX_VCPUS, false);
	memcg_set_flag(&env, exit_on_missing);
	memcg_run_pass(&env);
}

FIXTURE(memcg) {
	char *path;
};

static int try_write_file(const char *dir, const char *name, const char *text)
{
	char path[256];
	int fd, r;

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return errno;

	r = write(fd, text, strlen(text)) == strlen(text) ? 0 : errno;
	close(fd);
	return r;
}

static void write_file(const char *dir, const char *name, const char *text)
{
	int r = try_write_file(dir, name, text);

	TEST_ASSERT(!r, "Can't write %s to %s/%s, errno = %d", text, dir, name, r);
}

/* The value of a line "key value" of a cgroup's file. */
static u64 memcg_read(const char *dir, const char *name, const char *key)
{
	char path[256], line[128];
	u64 value = -1ull;
	size_t len = strlen(key);
	FILE *f;

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	f = fopen(path, "re");
	TEST_ASSERT(f, "Can't open %s, errno = %d", path, errno);
	while (fgets(line, sizeof(line), f)) {
		if (!strncmp(line, key, len) && line[len] == ' ')
			value = strtoul(line + len, NULL, 10);
	}
	fclose(f);
	TEST_ASSERT(value != -1ull, "No %s in %s", key, path);
	return value;
}

static bool have_swap(void)
{
	FILE *f = fopen("/proc/swaps", "re");
	char line[256];
	int nr_lines = 0;

	while (f && fgets(line, sizeof(line), f))
		nr_lines++;
	if (f)
		fclose(f);
	/* The first one is a heading. */
	return nr_lines > 1;
}

static char memcg_path[128];

static void memcg_remove(void)
{
	rmdir(memcg_path);
}

FIXTURE_SETUP(memcg)
{
	char max[16];

	/* It may be enabled already; whether it is will be seen. */
	try_write_file(MEMCG_ROOT, "cgroup.subtree_control", "+memory");
	self->path = memcg_path;
	snprintf(memcg_path, sizeof(memcg_path), MEMCG_ROOT "/kvm_memory_fault.%d", getpid());
	if (mkdir(memcg_path, 0755))
		SKIP(return, "no cgroup2");
	/* A failed assertion calls exit(). */
	atexit(memcg_remove);

	snprintf(max, sizeof(max), "%u", MEMCG_MAX);
	if (try_write_file(memcg_path, "memory.max", max)) {
		memcg_remove();
		SKIP(return, "no memory cgroup");
	}
}

FIXTURE_TEARDOWN(memcg)
{
	memcg_remove();
}

/* Return the exit status of a process that calls the function in the cgroup. */
static int memcg_call(const char *path, void (*fn)(bool), bool arg)
{
	int status;
	pid_t child;

	child = fork();
	TEST_ASSERT(child >= 0, __KVM_SYSCALL_ERROR("fork()", child));
	if (!child) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		write_file(path, "cgroup.procs", "0");
		fn(arg);
		_exit(0);
	}

	TEST_ASSERT_EQ(waitpid(child, &status, 0), child);

	/* Nothing of the VM stays, or this never ends.  RCU frees page tables. */
	while (memcg_read(path, "memory.stat", "sec_pagetables") ||
	       memcg_read(path, "memory.stat", "anon"))
		usleep(1000);
	return status;
}

static void memcg_swap(const char *path, bool shmem)
{
	int status = memcg_call(path, memcg_swap_child, shmem);

	TEST_ASSERT(WIFEXITED(status) && !WEXITSTATUS(status), "Status 0x%x", status);
	TEST_ASSERT(memcg_read(path, "memory.events", "max"), "memory.max had no effect");
	TEST_ASSERT_EQ(memcg_read(path, "memory.events", "oom"), 0);
}

TEST_F(memcg, swap_anon)
{
	if (!have_swap())
		SKIP(return, "no swap");

	memcg_swap(self->path, false);
}

TEST_F(memcg, swap_shmem)
{
	if (!have_swap())
		SKIP(return, "no swap");

	memcg_swap(self->path, true);
}

static void memcg_oom(const char *path, bool exit_on_missing)
{
	int status;

	if (have_swap())
		write_file(path, "memory.swap.max", "0");
	status = memcg_call(path, memcg_oom_child, exit_on_missing);
	TEST_ASSERT(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "Status 0x%x", status);
	TEST_ASSERT_EQ(memcg_read(path, "memory.events", "oom_kill"), 1);
}

/* It is KVM that wants more memory. */
TEST_F(memcg, oom_in_kvm_run)
{
	memcg_oom(self->path, false);
}

/* It is the VMM, while another vCPU is in KVM_RUN. */
TEST_F(memcg, oom_after_exit)
{
	memcg_oom(self->path, true);
}

/*
 * Let the first, second, ... allocation of a system call fail, until the system
 * call has none left.  That needs CONFIG_FAILSLAB, CONFIG_FAIL_PAGE_ALLOC and
 * CONFIG_FAULT_INJECTION_DEBUG_FS.
 */
#define FAIL_MAX_VCPUS		128
#define FAIL_NR_PAGES		4

/* The slot is at one of these addresses. */
#define FAIL_MOVED_GPA		(TEST_GPA + SZ_2M)

static struct guest_cmd {
	u64 gva;
	/* The value to write, or the value read. */
	u64 val;
	bool write;
} guest_cmds[FAIL_MAX_VCPUS];

static void fail_guest_code(u64 vcpu_id)
{
	struct guest_cmd *cmd = &guest_cmds[vcpu_id];

	for (;; GUEST_SYNC(0)) {
		u64 *mem = (u64 *)READ_ONCE(cmd->gva);

		if (READ_ONCE(cmd->write))
			WRITE_ONCE(*mem, READ_ONCE(cmd->val));
		else
			WRITE_ONCE(cmd->val, READ_ONCE(*mem));
	}
}

struct fail_env {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpus[FAIL_MAX_VCPUS];
	struct guest_cmd *cmds;
	int nr_vcpus;
	/* The first one that hasn't run. */
	int next_vcpu;
	void *hva;
	size_t size;
	int fail_nth;
	/* Of the last KVM_RUN. */
	int run_errno;
	/* Of allocations that failed. */
	int nr_failed;
};

static void fail_create_vm(struct fail_env *env)
{
	struct userspace_mem_region *code;
	int i;

	env->vm = vm_create_with_vcpus(env->nr_vcpus, fail_guest_code, env->vcpus);
	/* Only the slot under test is to lack memory, no vCPU's stack. */
	code = vm_get_mem_region(env->vm, MEM_REGION_CODE);
	kvm_madvise(code->host_mem, code->region.memory_size, MADV_POPULATE_WRITE);
	env->cmds = addr_gva2hva(env->vm, (gva_t)guest_cmds);
	for (i = 0; i < env->nr_vcpus; i++) {
		vcpu_args_set(env->vcpus[i], 1, i);
		env->cmds[i].gva = TEST_GVA;
	}

	virt_map(env->vm, TEST_GVA, TEST_GPA, env->size / env->vm->page_size);
	virt_map(env->vm, FAIL_MOVED_GPA, FAIL_MOVED_GPA, env->size / env->vm->page_size);
}

/* Return NULL, or the reason why nothing can be made to fail. */
static const char *fail_env_create(struct fail_env *env, int nr_vcpus)
{
	static const char * const knobs[][3] = {
		{ "failslab", "verbose", "0" },
		{ "failslab", "cache-filter", "N" },
		{ "failslab", "ignore-gfp-wait", "N" },
		{ "fail_page_alloc", "verbose", "0" },
		{ "fail_page_alloc", "min-order", "0" },
		{ "fail_page_alloc", "ignore-gfp-wait", "N" },
		{ "fail_page_alloc", "ignore-gfp-highmem", "N" },
	};
	char dir[64];
	int i;

	env->fail_nth = open("/proc/thread-self/fail-nth", O_RDWR | O_CLOEXEC);
	if (env->fail_nth < 0)
		return "no fault injection";
	/* It counts all failures, including those that aren't for lack of memory. */
	if (!access("/sys/kernel/debug/fail_usercopy", F_OK))
		return "CONFIG_FAULT_INJECTION_USERCOPY is enabled";

	for (i = 0; i < ARRAY_SIZE(knobs); i++) {
		snprintf(dir, sizeof(dir), "/sys/kernel/debug/%s", knobs[i][0]);
		if (try_write_file(dir, knobs[i][1], knobs[i][2]))
			return "no failslab or fail_page_alloc";
	}

	env->size = FAIL_NR_PAGES * getpagesize();
	env->hva = map_memory(env->size, -1);
	env->nr_vcpus = min_t(int, nr_vcpus, kvm_check_cap(KVM_CAP_MAX_VCPUS));
	fail_create_vm(env);
	return NULL;
}

static void fail_env_destroy(struct fail_env *env)
{
	if (env->vm)
		kvm_vm_free(env->vm);
}

/* A test of failures that sees none proves nothing. */
static void expect_failures(struct fail_env *env)
{
	TEST_ASSERT(env->nr_failed, "No allocation failed");
	pr_info("%d allocations failed\n", env->nr_failed);
}

static void fail_nth_begin(struct fail_env *env, int nth)
{
	char buf[16];
	int len = snprintf(buf, sizeof(buf), "%d", nth);

	TEST_ASSERT_EQ(pwrite(env->fail_nth, buf, len, 0), len);
}

/* Return true if an allocation failed since fail_nth_begin(). */
static bool fail_nth_end(struct fail_env *env, int nth)
{
	char buf[16] = {};
	bool failed;

	TEST_ASSERT(pread(env->fail_nth, buf, sizeof(buf) - 1, 0) > 0, "Can't read fail-nth");
	failed = nth && !atoi(buf);
	TEST_ASSERT_EQ(pwrite(env->fail_nth, "0", 1, 0), 1);
	env->nr_failed += failed;
	return failed;
}

/* Return the errno of KVM_RUN, which is never one that kvm_run doesn't match. */
static int fail_run(struct fail_env *env, struct kvm_vcpu *vcpu, int nth, bool *failed)
{
	struct guest_cmd *cmd = &env->cmds[vcpu->id];
	struct kvm_run *run = vcpu->run;
	u64 nr_exits = vcpu_get_stat(vcpu, memory_fault_exits);
	bool reported;
	int r;

	scribble_on_run(run);
	fail_nth_begin(env, nth);
	r = __vcpu_run(vcpu) ? errno : 0;
	*failed = fail_nth_end(env, nth);
	env->run_errno = r;

	reported = r == EFAULT && run->exit_reason == KVM_EXIT_MEMORY_FAULT;
	if (reported)
		assert_run(is_memory_fault(run, cmd->gva,
					   cmd->write ? KVM_MEMORY_EXIT_FLAG_WRITE :
							KVM_MEMORY_EXIT_FLAG_READ), run, r);
	else if (r)
		assert_run(is_scribble(run), run, r);
	TEST_ASSERT_EQ(vcpu_get_stat(vcpu, memory_fault_exits), nr_exits + reported);
	return r;
}

enum outcome {
	DONE,
	MMIO,
	REPORTED,
	BARE,
	NO_MEMORY,
};

static enum outcome fail_try_access(struct fail_env *env, struct kvm_vcpu *vcpu, int nth,
				    bool *failed)
{
	struct kvm_run *run = vcpu->run;
	int r = fail_run(env, vcpu, nth, failed);

	switch (r) {
	case 0:
		if (run->exit_reason == KVM_EXIT_MMIO &&
		    run->mmio.phys_addr == env->cmds[vcpu->id].gva)
			return MMIO;
		TEST_ASSERT_EQ(get_ucall(vcpu, NULL), UCALL_SYNC);
		return DONE;
	case ENOMEM:
		return NO_MEMORY;
	default:
		assert_run(r == EFAULT, run, r);
		return run->exit_reason == KVM_EXIT_MEMORY_FAULT ? REPORTED : BARE;
	}
}

static void fail_expect(struct fail_env *env, struct kvm_vcpu *vcpu, enum outcome expected)
{
	enum outcome outcome;
	bool failed;

	outcome = fail_try_access(env, vcpu, 0, &failed);
	assert_run(outcome == expected, vcpu->run, env->run_errno);
}

FIXTURE(fail_memslot) {
	struct fail_env env;
};

struct fail_slot {
	u64 size;
	u64 gpa;
	u32 flags;
};

FIXTURE_VARIANT(fail_memslot) {
	struct fail_slot from;
	struct fail_slot to;
};

FIXTURE_VARIANT_ADD(fail_memslot, create) {
	.to = { FAIL_NR_PAGES, TEST_GPA, KVM_MEM_EXIT_ON_MISSING },
};

FIXTURE_VARIANT_ADD(fail_memslot, create_log_dirty) {
	.to = { FAIL_NR_PAGES, TEST_GPA, KVM_MEM_EXIT_ON_MISSING | KVM_MEM_LOG_DIRTY_PAGES },
};

FIXTURE_VARIANT_ADD(fail_memslot, set_flag) {
	.from = { FAIL_NR_PAGES, TEST_GPA, 0 },
	.to = { FAIL_NR_PAGES, TEST_GPA, KVM_MEM_EXIT_ON_MISSING },
};

FIXTURE_VARIANT_ADD(fail_memslot, clear_flag) {
	.from = { FAIL_NR_PAGES, TEST_GPA, KVM_MEM_EXIT_ON_MISSING },
	.to = { FAIL_NR_PAGES, TEST_GPA, 0 },
};

FIXTURE_VARIANT_ADD(fail_memslot, set_flag_log_dirty) {
	.from = { FAIL_NR_PAGES, TEST_GPA, 0 },
	.to = { FAIL_NR_PAGES, TEST_GPA, KVM_MEM_EXIT_ON_MISSING | KVM_MEM_LOG_DIRTY_PAGES },
};

FIXTURE_VARIANT_ADD(fail_memslot, clear_flag_log_dirty) {
	.from = { FAIL_NR_PAGES, TEST_GPA, KVM_MEM_EXIT_ON_MISSING },
	.to = { FAIL_NR_PAGES, TEST_GPA, KVM_MEM_LOG_DIRTY_PAGES },
};

FIXTURE_VARIANT_ADD(fail_memslot, move) {
	.from = { FAIL_NR_PAGES, TEST_GPA, KVM_MEM_EXIT_ON_MISSING },
	.to = { FAIL_NR_PAGES, FAIL_MOVED_GPA, KVM_MEM_EXIT_ON_MISSING },
};

FIXTURE_VARIANT_ADD(fail_memslot, delete) {
	.from = { FAIL_NR_PAGES, TEST_GPA, KVM_MEM_EXIT_ON_MISSING },
	.to = { 0, TEST_GPA, 0 },
};

FIXTURE_SETUP(fail_memslot)
{
	const char *reason = fail_env_create(&self->env, 1);

	if (reason)
		SKIP(return, "%s", reason);
}

FIXTURE_TEARDOWN(fail_memslot)
{
	fail_env_destroy(&self->env);
}

static int try_set_slot(struct fail_env *env, const struct fail_slot *slot)
{
	return __vm_set_user_memory_region(env->vm, TEST_SLOT, slot->flags, slot->gpa,
					   slot->size * getpagesize(), env->hva) ? errno : 0;
}

static void set_slot(struct fail_env *env, const struct fail_slot *slot)
{
	int r = try_set_slot(env, slot);

	TEST_ASSERT(!r, "KVM_SET_USER_MEMORY_REGION failed, errno = %d", r);
}

/* See by what the guest and userspace can do that the slot is as given. */
static void expect_slot(struct fail_env *env, const struct fail_slot *slot)
{
	static const u64 gpas[] = { TEST_GPA, FAIL_MOVED_GPA };
	unsigned long bitmap[1];
	struct kvm_dirty_log log = { .slot = TEST_SLOT, .dirty_bitmap = bitmap };
	struct kvm_vcpu *vcpu = env->vcpus[0];
	bool present;
	int i, r;
	u64 val;

	for (i = 0; i < ARRAY_SIZE(gpas); i++) {
		present = slot->size && slot->gpa == gpas[i];
		env->cmds[0].gva = gpas[i];
		kvm_madvise(env->hva, env->size, MADV_DONTNEED);

		if (!present) {
			/* What is scribbled on kvm_run is what the guest reads. */
			fail_expect(env, vcpu, MMIO);
			val = SCRIBBLE;
		} else if (slot->flags & KVM_MEM_EXIT_ON_MISSING) {
			fail_expect(env, vcpu, REPORTED);
			*(u64 *)env->hva = val = gpas[i];
		} else {
			val = 0;
		}
		fail_expect(env, vcpu, DONE);
		TEST_ASSERT_EQ(env->cmds[0].val, val);
	}

	r = __vm_ioctl(env->vm, KVM_GET_DIRTY_LOG, &log) ? errno : 0;
	TEST_ASSERT_EQ(r, slot->size && slot->flags & KVM_MEM_LOG_DIRTY_PAGES ? 0 : ENOENT);
}

TEST_F(fail_memslot, fail_nth)
{
	const struct fail_slot none = { 0, TEST_GPA, 0 };
	struct fail_env *env = &self->env;
	bool failed = true;
	int nth, r;

	if (variant->from.size)
		set_slot(env, &variant->from);

	for (nth = 1; failed; nth++) {
		fail_nth_begin(env, nth);
		r = try_set_slot(env, &variant->to);
		failed = fail_nth_end(env, nth);

		TEST_ASSERT(!r || (failed && r == ENOMEM),
			    "KVM_SET_USER_MEMORY_REGION, allocation %d %s: errno = %d",
			    nth, failed ? "failed" : "didn't fail", r);
		expect_slot(env, r ? &variant->from : &variant->to);

		/* Some failures are none, as there's another way to get memory. */
		if (!r && failed) {
			if (variant->to.size)
				set_slot(env, &none);
			if (variant->from.size)
				set_slot(env, &variant->from);
		}
	}

	expect_failures(env);
}

FIXTURE(fail_vcpu) {
	struct fail_env env;
};

FIXTURE_VARIANT(fail_vcpu) {
	u32 slot_flags;
	bool capability;
	bool present;
	bool write;
	/* What KVM_RUN does with enough memory, and what it may do without. */
	enum outcome outcome;
	enum outcome alternative;
};

FIXTURE_VARIANT_ADD(fail_vcpu, missing) {
	.slot_flags = KVM_MEM_EXIT_ON_MISSING,
	.outcome = REPORTED,
	.alternative = REPORTED,
};

/* If KVM lacks memory, that's no reason to say that the guest does. */
FIXTURE_VARIANT_ADD(fail_vcpu, present) {
	.slot_flags = KVM_MEM_EXIT_ON_MISSING,
	.present = true,
	.outcome = DONE,
	.alternative = DONE,
};

FIXTURE_VARIANT_ADD(fail_vcpu, write_log_dirty) {
	.slot_flags = KVM_MEM_EXIT_ON_MISSING | KVM_MEM_LOG_DIRTY_PAGES,
	.present = true,
	.write = true,
	.outcome = DONE,
	.alternative = DONE,
};

FIXTURE_VARIANT_ADD(fail_vcpu, faulted_in) {
	.outcome = DONE,
	.alternative = BARE,
};

FIXTURE_VARIANT_ADD(fail_vcpu, faulted_in_capability) {
	.capability = true,
	.outcome = DONE,
	.alternative = REPORTED,
};

static void fail_enable_cap(struct fail_env *env)
{
	int nr_failed = env->nr_failed, nth, r;
	bool failed = true;

	for (nth = 1; failed; nth++) {
		fail_nth_begin(env, nth);
		r = __vm_enable_cap(env->vm, KVM_CAP_MEMORY_FAULT_EXIT, ALL_ACCESSES) ? errno : 0;
		failed = fail_nth_end(env, nth);
		TEST_ASSERT(!r || (failed && r == ENOMEM), "KVM_ENABLE_CAP: errno = %d", r);
	}

	/* There is nothing to allocate today, don't count on that. */
	env->nr_failed = nr_failed;
}

/* Map what a guest needs to get to the access. */
static void fail_prepare_vm(struct fail_env *env, u32 slot_flags, bool capability)
{
	const struct fail_slot slot = { FAIL_NR_PAGES, TEST_GPA, slot_flags };

	set_slot(env, &slot);
	if (capability)
		fail_enable_cap(env);

	*(u64 *)env->hva = 1;
	fail_expect(env, env->vcpus[0], DONE);
	env->next_vcpu = 1;
}

FIXTURE_SETUP(fail_vcpu)
{
	const char *reason = fail_env_create(&self->env, FAIL_MAX_VCPUS);

	if (reason)
		SKIP(return, "%s", reason);

	fail_prepare_vm(&self->env, variant->slot_flags, variant->capability);
}

FIXTURE_TEARDOWN(fail_vcpu)
{
	fail_env_destroy(&self->env);
}

/* Take another one for each allocation, KVM keeps a stock of what a fault needs. */
static struct kvm_vcpu *fail_next_vcpu(struct fail_env *env, u32 slot_flags, bool capability)
{
	if (env->next_vcpu == env->nr_vcpus) {
		kvm_vm_free(env->vm);
		fail_create_vm(env);
		fail_prepare_vm(env, slot_flags, capability);
	}

	return env->vcpus[env->next_vcpu++];
}

static void fail_prepare_access(struct fail_env *env, struct kvm_vcpu *vcpu, bool present,
				bool write, u64 val)
{
	struct guest_cmd *cmd = &env->cmds[vcpu->id];

	kvm_madvise(env->hva, env->size, MADV_DONTNEED);
	if (present)
		*(u64 *)env->hva = write ? ~val : val;

	cmd->write = write;
	cmd->val = write ? val : 0;
}

static void fail_finish_access(struct fail_env *env, struct kvm_vcpu *vcpu, u64 val)
{
	struct guest_cmd *cmd = &env->cmds[vcpu->id];

	*(u64 *)env->hva = cmd->write ? ~val : val;
	fail_expect(env, vcpu, DONE);
	TEST_ASSERT_EQ(cmd->val, val);
}

/* What the guest has written is in memory, and in the dirty log. */
static void fail_check_access(struct fail_env *env, struct kvm_vcpu *vcpu, u32 slot_flags,
			      u64 val)
{
	unsigned long bitmap[1] = {};

	if (!env->cmds[vcpu->id].write)
		return;

	TEST_ASSERT_EQ(*(u64 *)env->hva, val);
	if (slot_flags & KVM_MEM_LOG_DIRTY_PAGES) {
		kvm_vm_get_dirty_log(env->vm, TEST_SLOT, bitmap);
		TEST_ASSERT_EQ(bitmap[0], 1);
	}
}

TEST_F(fail_vcpu, run)
{
	struct fail_env *env = &self->env;
	struct kvm_vcpu *vcpu;
	enum outcome outcome;
	bool failed = true, allowed;
	int nth;

	for (nth = 1; failed; nth++) {
		vcpu = fail_next_vcpu(env, variant->slot_flags, variant->capability);
		fail_prepare_access(env, vcpu, variant->present, variant->write, nth);

		outcome = fail_try_access(env, vcpu, nth, &failed);
		allowed = failed && (outcome == NO_MEMORY || outcome == variant->alternative);
		assert_run(outcome == variant->outcome || allowed, vcpu->run, env->run_errno);

		/* Memory is back, and with it what is to be expected. */
		if (outcome != DONE && variant->outcome == REPORTED)
			fail_expect(env, vcpu, REPORTED);
		if (outcome != DONE)
			fail_finish_access(env, vcpu, nth);
		else if (!variant->write)
			TEST_ASSERT_EQ(env->cmds[vcpu->id].val, variant->present ? nth : 0);
		fail_check_access(env, vcpu, variant->slot_flags, nth);
	}

	expect_failures(env);
}

#ifdef __x86_64__
TEST_F(fail_vcpu, pre_fault)
{
	struct fail_env *env = &self->env;
	int nth, r, expected = variant->outcome == DONE ? 0 : EFAULT;
	struct kvm_pre_fault_memory range;
	struct kvm_vcpu *vcpu;
	bool failed = true, allowed;

	if (!kvm_has_cap(KVM_CAP_PRE_FAULT_MEMORY))
		SKIP(return, "no KVM_PRE_FAULT_MEMORY");

	for (nth = 1; failed; nth++) {
		vcpu = fail_next_vcpu(env, variant->slot_flags, variant->capability);
		fail_prepare_access(env, vcpu, variant->present, variant->write, nth);
		range = (struct kvm_pre_fault_memory) { .gpa = TEST_GPA, .size = getpagesize() };

		scribble_on_run(vcpu->run);
		fail_nth_begin(env, nth);
		r = __vcpu_ioctl(vcpu, KVM_PRE_FAULT_MEMORY, &range) ? errno : 0;
		failed = fail_nth_end(env, nth);

		allowed = failed && (r == ENOMEM ||
				     (r == EFAULT && variant->alternative != DONE));
		TEST_ASSERT(r == expected || allowed,
			    "KVM_PRE_FAULT_MEMORY, allocation %d: errno = %d", nth, r);
		assert_run(vcpu->run->exit_reason == (u32)SCRIBBLE && is_scribble(vcpu->run),
			   vcpu->run, r);

		if (variant->outcome == REPORTED)
			fail_expect(env, vcpu, REPORTED);
		fail_finish_access(env, vcpu, nth);
		fail_check_access(env, vcpu, variant->slot_flags, nth);
	}

	expect_failures(env);
}
#endif

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_EXIT_ON_MISSING) == KVM_MEM_EXIT_ON_MISSING);
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_MEMORY_FAULT_EXIT) == ALL_ACCESSES);
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_BINARY_STATS_FD));

	disable_numa_balancing();

	return test_harness_run(argc, argv);
}
