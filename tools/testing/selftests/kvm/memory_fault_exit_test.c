// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test KVM_CAP_MEMORY_FAULT_EXIT, i.e. that a KVM_RUN that fails because guest
 * memory can't be accessed tells userspace which memory, and how the guest
 * accessed it, if and only if userspace has asked for it.
 *
 * The guest's code, stack and page tables are in slot 0.  All holes are in slots
 * of their own.
 */
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <linux/sizes.h>
#include <linux/userfaultfd.h>

#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"

#define TEST_SLOT		10
#define TEST_GPA		0xc0000000ul
#define TEST_GVA		TEST_GPA
#define TEST_NR_PAGES		3

/* The slots of single tests are next to TEST_SLOT. */
#define OTHER_SLOT		(TEST_SLOT + 1)
#define OTHER_PAGE		TEST_NR_PAGES

#define ALL_ACCESSES		(KVM_MEMORY_EXIT_FLAG_READ |	\
				 KVM_MEMORY_EXIT_FLAG_WRITE |	\
				 KVM_MEMORY_EXIT_FLAG_EXEC)

#ifdef __x86_64__
#define RET_INSN		0xc3ul
#define UCALL_EXIT_NAME		"KVM_EXIT_IO (2)"
#elif defined(__aarch64__)
#define RET_INSN		0xd65f03c0ul
#define UCALL_EXIT_NAME		"KVM_EXIT_MMIO (6)"
#else
#error "Unsupported architecture"
#endif

#define SCRIBBLE		0xa5a5a5a5a5a5a5a5ul

enum guest_op {
	GUEST_READ,
	GUEST_WRITE,
	GUEST_EXEC,
	NR_ACCESSES,
	GUEST_FILL = NR_ACCESSES,
};

static const struct {
	const char *name;
	u64 flags;
	const char *flags_name;
} accesses[NR_ACCESSES] = {
	[GUEST_READ]  = { "read",  KVM_MEMORY_EXIT_FLAG_READ,  "READ" },
	[GUEST_WRITE] = { "write", KVM_MEMORY_EXIT_FLAG_WRITE, "WRITE" },
	[GUEST_EXEC]  = { "fetch", KVM_MEMORY_EXIT_FLAG_EXEC,  "EXEC" },
};

/* What the guest is to do, shared with the host. */
static struct guest_cmd {
	u64 op;
	u64 gva;
	/* The value to write, or the value read. */
	u64 val;
	/* Wait with the access until this is cleared. */
	bool spin;
	bool spinning;
} guest_cmd;

static void guest_code(u64 page_size)
{
	struct guest_cmd *cmd = &guest_cmd;
	u64 *mem;

	for (;; GUEST_SYNC(cmd->op)) {
		while (READ_ONCE(cmd->spin))
			WRITE_ONCE(cmd->spinning, true);

		mem = (u64 *)READ_ONCE(cmd->gva);

		switch (READ_ONCE(cmd->op)) {
		case GUEST_READ:
			WRITE_ONCE(cmd->val, READ_ONCE(*mem));
			break;
		case GUEST_WRITE:
			WRITE_ONCE(*mem, READ_ONCE(cmd->val));
			break;
		case GUEST_EXEC:
			((void (*)(void))mem)();
			break;
		case GUEST_FILL:
			/* Write to as many pages as userspace doesn't mind. */
			for (;;) {
				WRITE_ONCE(*mem, cmd->val);
				mem += page_size / sizeof(*mem);
			}
		default:
			GUEST_FAIL("Unknown operation %lu", cmd->op);
		}
	}
}

struct env {
	struct kvm_vm *vm;
	/* The vCPU under test has ID 1, vCPU 0 never runs. */
	struct kvm_vcpu *idle_vcpu;
	struct kvm_vcpu *vcpu;
	struct guest_cmd *cmd;
	void *hva;
	size_t size;
	int memfd;
	int uffd;
};

static size_t page_offset(int page)
{
	return page * getpagesize();
}

/* Access the end of a page, to see that KVM reports the start of the page. */
static size_t word_offset(int page)
{
	return page_offset(page + 1) - 3 * sizeof(u64);
}

static u64 *host_word(struct env *env, int page)
{
	return env->hva + word_offset(page);
}

/* Code that returns if it is called, and that differs from version to version. */
static u64 content(int version)
{
	return RET_INSN | (u64)version << 32;
}

static void env_create_vm(struct env *env)
{
	struct kvm_vcpu *vcpus[2];

	env->vm = vm_create_with_vcpus(ARRAY_SIZE(vcpus), guest_code, vcpus);
	env->idle_vcpu = vcpus[0];
	env->vcpu = vcpus[1];
	env->cmd = addr_gva2hva(env->vm, (gva_t)&guest_cmd);
	vcpu_args_set(env->vcpu, 1, env->vm->page_size);
}

static void env_map(struct env *env, int first_page, int nr_pages)
{
	virt_map(env->vm, TEST_GVA + page_offset(first_page), TEST_GPA + page_offset(first_page),
		 page_offset(nr_pages) / env->vm->page_size);
}

/* A VM with a slot of memory of a memfd, or of anonymous memory. */
static void env_create(struct env *env, bool memfd)
{
	env->size = page_offset(TEST_NR_PAGES);
	env->uffd = -1;
	env->memfd = memfd ? kvm_memfd_alloc(env->size, false) : -1;
	env->hva = kvm_mmap(env->size, PROT_READ | PROT_WRITE,
			    memfd ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS, env->memfd);
	/* Whether this works doesn't matter, holes have the size of a page. */
	madvise(env->hva, env->size, MADV_NOHUGEPAGE);

	env_create_vm(env);
	vm_set_user_memory_region(env->vm, TEST_SLOT, 0, TEST_GPA, env->size, env->hva);
	env_map(env, 0, TEST_NR_PAGES);
}

static void env_destroy(struct env *env)
{
	if (!env->vm)
		return;

	TEST_ASSERT_EQ(vcpu_get_stat(env->idle_vcpu, memory_fault_exits), 0);
	kvm_vm_free(env->vm);
}

static void enable_cap(struct env *env)
{
	vm_enable_cap(env->vm, KVM_CAP_MEMORY_FAULT_EXIT, ALL_ACCESSES);
}

static void set_access(struct env *env, enum guest_op op, int page, u64 val)
{
	*env->cmd = (struct guest_cmd) {
		.op = op,
		.gva = TEST_GVA + word_offset(page),
		.val = val,
	};
}

/*
 * Return the errno of KVM_RUN.  Scribble on kvm_run beforehand, to tell what is
 * new from what is left of earlier exits, and see that the statistics count the
 * memory-fault exits and nothing else.
 */
static int run_vcpu(struct env *env)
{
	u64 nr_exits = vcpu_get_stat(env->vcpu, memory_fault_exits);
	struct kvm_run *run = env->vcpu->run;
	bool memory_fault;
	int r;

	run->memory_fault.flags = SCRIBBLE;
	run->memory_fault.gpa = SCRIBBLE;
	run->memory_fault.size = SCRIBBLE;

	r = _vcpu_run(env->vcpu) ? errno : 0;

	memory_fault = (r == EFAULT || r == EHWPOISON) &&
		       run->exit_reason == KVM_EXIT_MEMORY_FAULT;
	nr_exits = vcpu_get_stat(env->vcpu, memory_fault_exits) - nr_exits;
	TEST_ASSERT(nr_exits == memory_fault,
		    "%lu memory_fault_exits counted, errno = %d, exit %u (%s)",
		    nr_exits, r, run->exit_reason, exit_reason_str(run->exit_reason));
	return r;
}

static void assert_outcome(struct env *env, int r, bool as_expected)
{
	struct guest_cmd *cmd = env->cmd;
	struct kvm_run *run = env->vcpu->run;

	TEST_ASSERT(as_expected,
		    "%s of 0x%lx: errno = %d (%s), exit %u (%s), flags 0x%llx, gpa 0x%llx, size 0x%llx",
		    accesses[cmd->op].name, cmd->gva, r, strerror(r), run->exit_reason,
		    exit_reason_str(run->exit_reason), run->memory_fault.flags,
		    run->memory_fault.gpa, run->memory_fault.size);
}

/* KVM_RUN fails as it does on kernels that lack the capability. */
static void expect_bare_fault(struct env *env)
{
	struct kvm_run *run = env->vcpu->run;
	int r = run_vcpu(env);
	bool as_expected = r == EFAULT && run->exit_reason == KVM_EXIT_UNKNOWN &&
			   run->memory_fault.flags == SCRIBBLE &&
			   run->memory_fault.gpa == SCRIBBLE &&
			   run->memory_fault.size == SCRIBBLE;

	assert_outcome(env, r, as_expected);
}

static void __expect_memory_fault(struct env *env, int expected_errno, u64 flags)
{
	u64 gpa = env->cmd->gva & -(u64)getpagesize();
	struct kvm_run *run = env->vcpu->run;
	int r = run_vcpu(env);
	bool as_expected = r == expected_errno && run->exit_reason == KVM_EXIT_MEMORY_FAULT &&
			   run->memory_fault.flags == flags &&
			   run->memory_fault.gpa == gpa &&
			   run->memory_fault.size == getpagesize();

	assert_outcome(env, r, as_expected);
}

static void expect_memory_fault(struct env *env)
{
	__expect_memory_fault(env, EFAULT, accesses[env->cmd->op].flags);
}

static void expect_done(struct env *env)
{
	struct guest_cmd *cmd = env->cmd;
	struct ucall uc;
	u64 val;
	int r;

	r = run_vcpu(env);
	assert_outcome(env, r, !r);

	switch (get_ucall(env->vcpu, &uc)) {
	case UCALL_SYNC:
		TEST_ASSERT_EQ(uc.args[1], cmd->op);
		break;
	case UCALL_ABORT:
		REPORT_GUEST_ASSERT(uc);
	default:
		assert_outcome(env, r, false);
	}

	if (cmd->op == GUEST_EXEC)
		return;

	val = READ_ONCE(*(u64 *)(env->hva + cmd->gva - TEST_GVA));
	TEST_ASSERT(cmd->val == val, "%s of 0x%lx: guest has 0x%lx, host has 0x%lx",
		    accesses[cmd->op].name, cmd->gva, cmd->val, val);
}

/* Each kind of hole is made in, and removed from, present memory. */
struct hole {
	void (*make)(struct env *env, int page);
	void (*repair)(struct env *env, int page, u64 val);
	bool memfd;
	/* Reads and fetches are allowed. */
	bool readable;
	/* For userfaultfd. */
	int uffd_flags;
	u64 uffd_features;
};

static void punch_munmap(struct env *env, int page)
{
	kvm_munmap(env->hva + page_offset(page), page_offset(1));
}

static void repair_munmap(struct env *env, int page, u64 val)
{
	void *hva = env->hva + page_offset(page);
	void *mem = mmap(hva, page_offset(1), PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);

	TEST_ASSERT(mem == hva, "mmap() failed, errno = %d", errno);
	WRITE_ONCE(*host_word(env, page), val);
}

static void set_prot(struct env *env, int page, int prot)
{
	int r = mprotect(env->hva + page_offset(page), page_offset(1), prot);

	TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("mprotect()", r));
}

static void make_prot_none(struct env *env, int page)
{
	set_prot(env, page, PROT_NONE);
}

static void make_prot_read(struct env *env, int page)
{
	set_prot(env, page, PROT_READ);
}

static void repair_prot(struct env *env, int page, u64 val)
{
	set_prot(env, page, PROT_READ | PROT_WRITE);
	WRITE_ONCE(*host_word(env, page), val);
}

static void truncate_file(struct env *env, int page)
{
	kvm_ftruncate(env->memfd, page_offset(page));
}

static void extend_file(struct env *env, int page, u64 val)
{
	kvm_ftruncate(env->memfd, env->size);
	WRITE_ONCE(*host_word(env, page), val);
}

static void discard_page(struct env *env, int page)
{
	int r = madvise(env->hva + page_offset(page), page_offset(1), MADV_DONTNEED);

	TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("madvise()", r));
}

static void copy_page(struct env *env, int page, u64 val)
{
	struct uffdio_copy copy = {
		.dst = (u64)env->hva + page_offset(page),
		.len = page_offset(1),
	};
	void *src = kvm_mmap(copy.len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	int r;

	*(u64 *)(src + word_offset(0)) = val;
	copy.src = (u64)src;
	r = ioctl(env->uffd, UFFDIO_COPY, &copy);
	TEST_ASSERT(!r, KVM_IOCTL_ERROR(UFFDIO_COPY, r));
	kvm_munmap(src, copy.len);
}

/* Return NULL if all is set up, otherwise the reason to skip the test. */
static const char *register_uffd(struct env *env, int flags, u64 features)
{
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = features,
	};
	struct uffdio_register reg = {
		.range = { .start = (u64)env->hva, .len = env->size },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};

	env->uffd = syscall(__NR_userfaultfd, O_CLOEXEC | flags);
	if (env->uffd < 0)
		return "userfaultfd is not permitted";
	if (ioctl(env->uffd, UFFDIO_API, &api))
		return "userfaultfd lacks a feature";

	TEST_ASSERT(!ioctl(env->uffd, UFFDIO_REGISTER, &reg), "UFFDIO_REGISTER failed, errno = %d",
		    errno);
	return NULL;
}

FIXTURE(hole) {
	struct env env;
};

FIXTURE_VARIANT(hole) {
	struct hole hole;
};

FIXTURE_VARIANT_ADD(hole, munmap) {
	.hole = { punch_munmap, repair_munmap },
};

FIXTURE_VARIANT_ADD(hole, prot_none) {
	.hole = { make_prot_none, repair_prot },
};

FIXTURE_VARIANT_ADD(hole, prot_read) {
	.hole = { make_prot_read, repair_prot, .readable = true },
};

FIXTURE_VARIANT_ADD(hole, truncated) {
	.hole = { truncate_file, extend_file, .memfd = true },
};

FIXTURE_VARIANT_ADD(hole, uffd_sigbus) {
	.hole = { discard_page, copy_page, .uffd_features = UFFD_FEATURE_SIGBUS },
};

FIXTURE_VARIANT_ADD(hole, uffd_user_mode_only) {
	.hole = { discard_page, copy_page, .uffd_flags = UFFD_USER_MODE_ONLY },
};

FIXTURE_SETUP(hole)
{
	const struct hole *hole = &variant->hole;
	const char *reason = NULL;

	env_create(&self->env, hole->memfd);
	if (hole->uffd_flags || hole->uffd_features)
		reason = register_uffd(&self->env, hole->uffd_flags, hole->uffd_features);
	if (reason)
		SKIP(return, "%s", reason);
}

FIXTURE_TEARDOWN(hole)
{
	env_destroy(&self->env);
}

/* On x86, KVM lets a vCPU that can be interrupted wait for a page, if that helps. */
static void set_interruptible(struct kvm_vcpu *vcpu, bool interruptible)
{
#ifdef __x86_64__
	struct kvm_regs regs;

	vcpu_regs_get(vcpu, &regs);
	regs.rflags &= ~X86_EFLAGS_IF;
	if (interruptible)
		regs.rflags |= X86_EFLAGS_IF;
	vcpu_regs_set(vcpu, &regs);
#endif
}

static void test_hole(struct env *env, const struct hole *hole, enum guest_op op)
{
	bool fails = op == GUEST_WRITE || !hole->readable;
	int page = op, round, cap, i;

	for (round = 0; round < 4; round++) {
		cap = round / 2;
		if (cap)
			enable_cap(env);
		set_interruptible(env->vcpu, round % 2);

		/* Let the guest map the page, in order that it has to be unmapped. */
		hole->make(env, page);
		hole->repair(env, page, content(1));
		set_access(env, op, page, content(2));
		expect_done(env);

		set_access(env, op, page, content(3));
		hole->make(env, page);

		/* If userspace does nothing about it, the outcome is the same. */
		for (i = 0; fails && i < 2; i++) {
			if (cap)
				expect_memory_fault(env);
			else
				expect_bare_fault(env);
		}

		if (fails)
			hole->repair(env, page, content(4));
		expect_done(env);
	}
}

TEST_F(hole, read)
{
	test_hole(&self->env, &variant->hole, GUEST_READ);
}

TEST_F(hole, write)
{
	test_hole(&self->env, &variant->hole, GUEST_WRITE);
}

TEST_F(hole, fetch)
{
	test_hole(&self->env, &variant->hole, GUEST_EXEC);
}

FIXTURE(memory_fault_exit) {
	struct env env;
};

FIXTURE_SETUP(memory_fault_exit)
{
	env_create(&self->env, false);
}

FIXTURE_TEARDOWN(memory_fault_exit)
{
	env_destroy(&self->env);
}

static void expect_einval(int r, const char *what, u64 val)
{
	TEST_ASSERT(r == -1 && errno == EINVAL, "KVM_ENABLE_CAP, %s 0x%lx: r = %d, errno = %d (%s)",
		    what, val, r, errno, strerror(errno));
}

TEST_F(memory_fault_exit, check_extension)
{
	struct kvm_vm *vm = self->env.vm;

	TEST_ASSERT_EQ(kvm_check_cap(KVM_CAP_MEMORY_FAULT_EXIT), ALL_ACCESSES);
	TEST_ASSERT_EQ(vm_check_cap(vm, KVM_CAP_MEMORY_FAULT_EXIT), ALL_ACCESSES);
	TEST_ASSERT_EQ(kvm_check_cap(KVM_CAP_MEMORY_FAULT_INFO), 1);
	TEST_ASSERT_EQ(vm_check_cap(vm, KVM_CAP_MEMORY_FAULT_INFO), 1);

	expect_einval(__vm_enable_cap(vm, KVM_CAP_EXIT_ON_MISSING, 0), "EXIT_ON_MISSING", 0);
	expect_einval(__vm_enable_cap(vm, KVM_CAP_EXIT_ON_MISSING, KVM_MEM_EXIT_ON_MISSING),
		      "EXIT_ON_MISSING", KVM_MEM_EXIT_ON_MISSING);
}

static const struct enable_arg {
	const char *what;
	struct kvm_enable_cap cap;
} bad_enable_args[] = {
	{ "flags",	{ .flags = 1, .args = { ALL_ACCESSES } } },
	{ "flags",	{ .flags = BIT(31), .args = { ALL_ACCESSES } } },
	{ "nothing",	{ .args = { 0 } } },
	{ "READ",	{ .args = { KVM_MEMORY_EXIT_FLAG_READ } } },
	{ "WRITE",	{ .args = { KVM_MEMORY_EXIT_FLAG_WRITE } } },
	{ "EXEC",	{ .args = { KVM_MEMORY_EXIT_FLAG_EXEC } } },
	{ "no READ",	{ .args = { ALL_ACCESSES & ~KVM_MEMORY_EXIT_FLAG_READ } } },
	{ "no WRITE",	{ .args = { ALL_ACCESSES & ~KVM_MEMORY_EXIT_FLAG_WRITE } } },
	{ "no EXEC",	{ .args = { ALL_ACCESSES & ~KVM_MEMORY_EXIT_FLAG_EXEC } } },
	{ "PRIVATE",	{ .args = { KVM_MEMORY_EXIT_FLAG_PRIVATE } } },
	{ "and PRIVATE", { .args = { ALL_ACCESSES | KVM_MEMORY_EXIT_FLAG_PRIVATE } } },
	{ "and bit 4",	{ .args = { ALL_ACCESSES | BIT_ULL(4) } } },
	{ "and bit 32",	{ .args = { ALL_ACCESSES | BIT_ULL(32) } } },
	{ "and bit 63",	{ .args = { ALL_ACCESSES | BIT_ULL(63) } } },
	{ "all bits",	{ .args = { -1ull } } },
	{ "args[1]",	{ .args = { ALL_ACCESSES, 1 } } },
	{ "args[1]",	{ .args = { ALL_ACCESSES, ALL_ACCESSES } } },
	{ "args[1]",	{ .args = { 0, ALL_ACCESSES } } },
	{ "args[2]",	{ .args = { ALL_ACCESSES, 0, 1 } } },
	{ "args[3]",	{ .args = { ALL_ACCESSES, 0, 0, 1 } } },
	{ "args[3]",	{ .args = { ALL_ACCESSES, 0, 0, BIT_ULL(63) } } },
};

static void try_bad_enable_args(struct env *env, const struct enable_arg *arg)
{
	struct kvm_enable_cap cap = arg->cap;

	cap.cap = KVM_CAP_MEMORY_FAULT_EXIT;
	expect_einval(__vm_ioctl(env->vm, KVM_ENABLE_CAP, &cap), arg->what, cap.args[0]);
}

TEST_F(memory_fault_exit, enable_args)
{
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_MEMORY_FAULT_EXIT,
		.args = { ALL_ACCESSES },
	};
	struct env *env = &self->env;
	int i;

	punch_munmap(env, 0);
	set_access(env, GUEST_READ, 0, 0);

	/* What is refused has no effect. */
	expect_bare_fault(env);
	for (i = 0; i < ARRAY_SIZE(bad_enable_args); i++) {
		try_bad_enable_args(env, &bad_enable_args[i]);
		expect_bare_fault(env);
	}

	/* It is a capability of VMs. */
	expect_einval(__vcpu_ioctl(env->vcpu, KVM_ENABLE_CAP, &cap), "vCPU", cap.args[0]);
	expect_bare_fault(env);

	for (i = 0; i < 2; i++) {
		enable_cap(env);
		expect_memory_fault(env);
	}

	for (i = 0; i < ARRAY_SIZE(bad_enable_args); i++) {
		try_bad_enable_args(env, &bad_enable_args[i]);
		expect_memory_fault(env);
	}

	repair_munmap(env, 0, content(0));
	expect_done(env);
}

/* The capability of one VM is no matter of another. */
TEST_F(memory_fault_exit, two_vms)
{
	struct env other = {};

	env_create(&other, false);
	enable_cap(&other);

	punch_munmap(&self->env, 0);
	punch_munmap(&other, 0);
	set_access(&self->env, GUEST_WRITE, 0, content(0));
	set_access(&other, GUEST_WRITE, 0, content(0));

	expect_memory_fault(&other);
	expect_bare_fault(&self->env);
	expect_memory_fault(&other);

	env_destroy(&other);
}

/*
 * A memory-fault exit is followed by a KVM_RUN that fails for memory in a slot
 * without the flag, in a VM without the capability, i.e. without a description.
 */
TEST_F(memory_fault_exit, not_stale)
{
	struct env *env = &self->env;
	int i;

	vm_set_user_memory_region(env->vm, OTHER_SLOT, KVM_MEM_EXIT_ON_MISSING,
				  TEST_GPA + env->size, page_offset(1),
				  kvm_mmap(page_offset(1), PROT_READ | PROT_WRITE,
					   MAP_PRIVATE | MAP_ANONYMOUS, -1));
	env_map(env, OTHER_PAGE, 1);
	punch_munmap(env, 0);

	for (i = 0; i < 2; i++) {
		set_access(env, GUEST_WRITE, OTHER_PAGE, content(0));
		expect_memory_fault(env);
		/* Leave the access by running another one. */
		vcpu_arch_set_entry_point(env->vcpu, guest_code);
		set_access(env, GUEST_WRITE, 0, content(0));
		expect_bare_fault(env);
		vcpu_arch_set_entry_point(env->vcpu, guest_code);
	}
}

/*
 * Pretend a memory-fault exit when the vCPU is already in the guest, as KVM
 * overwrites what it finds in kvm_run on entry.
 */
static void *forge_exit_fn(void *arg)
{
	struct env *env = arg;

	while (!READ_ONCE(env->cmd->spinning))
		sched_yield();

	WRITE_ONCE(env->vcpu->run->exit_reason, KVM_EXIT_MEMORY_FAULT);
	__atomic_store_n(&env->cmd->spin, false, __ATOMIC_RELEASE);
	return NULL;
}

static void set_forged_access(struct env *env, int page, pthread_t *thread)
{
	set_access(env, GUEST_WRITE, page, content(0));
	env->cmd->spin = true;
	kvm_pthread_create(thread, NULL, forge_exit_fn, env);
}

TEST_F(memory_fault_exit, not_forged)
{
	struct env *env = &self->env;
	pthread_t thread;

	punch_munmap(env, 0);
	set_forged_access(env, 0, &thread);
	expect_bare_fault(env);
	kvm_pthread_join(thread, NULL);

	/* Without the forger, and with a fault that KVM does describe. */
	expect_bare_fault(env);
	enable_cap(env);
	expect_memory_fault(env);
	repair_munmap(env, 0, content(1));
	expect_done(env);

	punch_munmap(env, 1);
	set_forged_access(env, 1, &thread);
	expect_memory_fault(env);
	kvm_pthread_join(thread, NULL);
}

TEST_F(memory_fault_exit, stat)
{
	struct env *env = &self->env;
	int i;

	punch_munmap(env, 0);
	set_access(env, GUEST_READ, 0, 0);
	for (i = 0; i < 3; i++)
		expect_bare_fault(env);
	TEST_ASSERT_EQ(vcpu_get_stat(env->vcpu, memory_fault_exits), 0);

	enable_cap(env);
	for (i = 0; i < 4; i++)
		expect_memory_fault(env);
	TEST_ASSERT_EQ(vcpu_get_stat(env->vcpu, memory_fault_exits), 4);

	repair_munmap(env, 0, content(0));
	for (i = 0; i < 3; i++)
		expect_done(env);
	TEST_ASSERT_EQ(vcpu_get_stat(env->vcpu, memory_fault_exits), 4);
}

#ifdef __aarch64__
/* A page is there, and the guest may not have it, as it can't have tags. */
TEST(mte_disallowed)
{
	struct env env = { .size = page_offset(TEST_NR_PAGES) };
	void *mem;
	int op;

	if (!kvm_check_cap(KVM_CAP_ARM_MTE))
		SKIP(return, "no KVM_CAP_ARM_MTE");

	env.hva = kvm_mmap(env.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	env.vm = vm_create(2);
	vm_enable_cap(env.vm, KVM_CAP_ARM_MTE, 0);
	env.vcpu = vm_vcpu_add(env.vm, 0, guest_code);
	env.idle_vcpu = vm_vcpu_add(env.vm, 1, guest_code);
	kvm_arch_vm_finalize_vcpus(env.vm);
	env.cmd = addr_gva2hva(env.vm, (gva_t)&guest_cmd);
	vm_set_user_memory_region(env.vm, TEST_SLOT, 0, TEST_GPA, env.size, env.hva);
	env_map(&env, 0, TEST_NR_PAGES);

	for (op = 0; op < NR_ACCESSES; op++) {
		mem = mmap(env.hva + page_offset(op), page_offset(1), PROT_READ | PROT_WRITE,
			   MAP_SHARED | MAP_FIXED, env.vcpu->fd, 0);
		TEST_ASSERT(mem != MAP_FAILED, "mmap() of kvm_run failed, errno = %d", errno);
	}

	set_access(&env, GUEST_READ, 0, 0);
	expect_bare_fault(&env);
	enable_cap(&env);
	for (op = 0; op < NR_ACCESSES; op++) {
		set_access(&env, op, op, content(0));
		expect_memory_fault(&env);
		repair_munmap(&env, op, content(1));
		expect_done(&env);
	}

	env_destroy(&env);
}
#endif

FIXTURE(gmem) {
	struct env env;
};

FIXTURE_VARIANT(gmem) {
	bool poison;
	int expected_errno;
};

/* Nobody but the slot knows the file any more, which thus has gone. */
FIXTURE_VARIANT_ADD(gmem, closed) {
	.expected_errno = EFAULT,
};

FIXTURE_VARIANT_ADD(gmem, poisoned) {
	.poison = true,
	.expected_errno = EHWPOISON,
};

FIXTURE_SETUP(gmem)
{
	env_create(&self->env, false);
	if (!(vm_check_cap(self->env.vm, KVM_CAP_GUEST_MEMFD_FLAGS) & GUEST_MEMFD_FLAG_MMAP) ||
	    !(vm_check_cap(self->env.vm, KVM_CAP_GUEST_MEMFD_FLAGS) & GUEST_MEMFD_FLAG_INIT_SHARED))
		SKIP(return, "no guest_memfd for all of guest memory");
}

FIXTURE_TEARDOWN(gmem)
{
	env_destroy(&self->env);
}

static void ignore_sigbus(int sig)
{
}

/* Return 0, or why the page can't be poisoned. */
static int poison_gmem(int fd)
{
	const struct sigaction sa = { .sa_handler = ignore_sigbus };
	void *mem = kvm_mmap(page_offset(1), PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	int r;

	TEST_ASSERT(!sigaction(SIGBUS, &sa, NULL), "sigaction() failed, errno = %d", errno);
	WRITE_ONCE(*(u64 *)mem, 0);
	r = madvise(mem, page_offset(1), MADV_HWPOISON) ? errno : 0;
	kvm_munmap(mem, page_offset(1));
	return r;
}

/*
 * Failures of guest_memfd have been reported ever since, with the capability
 * they tell the access.
 */
TEST_F(gmem, read_write_fetch)
{
	struct env *env = &self->env;
	u64 gpa = TEST_GPA + page_offset(OTHER_PAGE);
	int op, fd, r;

	env_map(env, OTHER_PAGE, 1);

	for (op = 0; op < NR_ACCESSES; op++) {
		fd = vm_create_guest_memfd(env->vm, page_offset(1), GUEST_MEMFD_FLAG_MMAP |
					   GUEST_MEMFD_FLAG_INIT_SHARED);
		vm_set_user_memory_region2(env->vm, OTHER_SLOT, KVM_MEM_GUEST_MEMFD, gpa,
					   page_offset(1), NULL, fd, 0);
		if (variant->poison) {
			r = poison_gmem(fd);
			if (r == EPERM || r == EINVAL)
				SKIP(return, "can't poison memory, errno = %d", r);
			/* That guest_memfd keeps the page is a failure by the book. */
			TEST_ASSERT(!r || r == EBUSY, "MADV_HWPOISON failed, errno = %d", r);
		} else {
			close(fd);
		}

		set_access(env, op, OTHER_PAGE, content(0));
		if (!op) {
			__expect_memory_fault(env, variant->expected_errno, 0);
			enable_cap(env);
		}
		__expect_memory_fault(env, variant->expected_errno, accesses[op].flags);
		__expect_memory_fault(env, variant->expected_errno, accesses[op].flags);

		vm_set_user_memory_region2(env->vm, OTHER_SLOT, 0, gpa, 0, NULL, -1, 0);
		if (variant->poison)
			close(fd);
		vcpu_arch_set_entry_point(env->vcpu, guest_code);
	}
}

#define TRACEFS			"/sys/kernel/tracing"
#define INSTANCE		TRACEFS "/instances/kvm_memory_fault_exit_test"

FIXTURE(trace) {
	struct env env;
	bool has_instance;
};

static void __printf(2, 3) write_trace_file(const char *path, const char *fmt, ...)
{
	va_list ap;
	int fd, r;

	fd = open(path, O_WRONLY | O_TRUNC | O_CLOEXEC);
	TEST_ASSERT(fd >= 0, "open of %s failed, errno = %d (%s)", path, errno, strerror(errno));

	va_start(ap, fmt);
	r = vdprintf(fd, fmt, ap);
	va_end(ap);
	TEST_ASSERT(r >= 0, "write to %s failed, errno = %d (%s)", path, errno, strerror(errno));
	close(fd);
}

/* Trace the calling thread alone. */
static void start_trace(void)
{
	write_trace_file(INSTANCE "/set_event_pid", "%d", kvm_gettid());
	write_trace_file(INSTANCE "/events/kvm/kvm_memory_fault_exit/enable", "1");
	write_trace_file(INSTANCE "/events/kvm/kvm_userspace_exit/enable", "1");
}

FIXTURE_SETUP(trace)
{
	if (access(TRACEFS "/instances", F_OK))
		mount("tracefs", TRACEFS, "tracefs", 0, NULL);

	/* A buffer of its own, left behind if the test has failed before. */
	rmdir(INSTANCE);
	self->has_instance = !mkdir(INSTANCE, 0700);
	if (!self->has_instance)
		SKIP(return, "no tracefs");
	if (access(INSTANCE "/events/kvm", F_OK))
		SKIP(return, "no tracepoints of KVM");

	start_trace();
	env_create(&self->env, false);
}

FIXTURE_TEARDOWN(trace)
{
	env_destroy(&self->env);
	if (self->has_instance)
		TEST_ASSERT(!rmdir(INSTANCE), "rmdir() failed, errno = %d", errno);
}

/* See that the trace consists of exactly these lines, and clear it. */
static void expect_trace(const char *expected)
{
	char line[256], *event, text[2048] = "";
	size_t len = 0;
	FILE *f;

	f = fopen(INSTANCE "/trace", "re");
	TEST_ASSERT(f, "open trace failed, errno = %d", errno);
	while (fgets(line, sizeof(line), f)) {
		event = strstr(line, ": kvm_");
		if (line[0] != '#' && event)
			len += snprintf(text + len, sizeof(text) - len, "%s", event + 2);
		TEST_ASSERT(len < sizeof(text), "Too many events:\n%s", text);
	}
	fclose(f);

	TEST_ASSERT(!strcmp(text, expected), "Unexpected events:\n%sinstead of:\n%s",
		    text, expected);
	write_trace_file(INSTANCE "/trace", " ");
}

TEST_F(trace, memory_fault_exit)
{
	struct env *env = &self->env;
	char expected[512];
	int op, r;

	for (op = 0; op < NR_ACCESSES; op++) {
		punch_munmap(env, op);
		set_access(env, op, op, content(0));
		if (!op) {
			expect_bare_fault(env);
			expect_trace("kvm_userspace_exit: reason error (14)\n");
			enable_cap(env);
		}

		expect_memory_fault(env);
		snprintf(expected, sizeof(expected),
			 "kvm_memory_fault_exit: vcpu 1 gpa 0x%lx size 0x%x flags %s\n"
			 "kvm_userspace_exit: reason KVM_EXIT_MEMORY_FAULT (14)\n",
			 TEST_GPA + page_offset(op), getpagesize(), accesses[op].flags_name);
		expect_trace(expected);

		/* To read the ucall, the library runs the vCPU, and stops it at once. */
		repair_munmap(env, op, content(1));
		r = run_vcpu(env);
		assert_outcome(env, r, !r);
		expect_trace("kvm_userspace_exit: reason " UCALL_EXIT_NAME "\n"
			     "kvm_userspace_exit: reason restart (4)\n");
	}
}

/* The tracepoint knows the names of the newer exits. */
TEST_F(trace, dirty_ring_full)
{
	const u32 nr_entries = 1024;
	struct env env = {};
	int r;

	if (!kvm_check_cap(KVM_CAP_DIRTY_LOG_RING_ACQ_REL))
		SKIP(return, "no KVM_CAP_DIRTY_LOG_RING_ACQ_REL");

	env.vm = vm_create(1);
	vm_enable_dirty_ring(env.vm, nr_entries * sizeof(struct kvm_dirty_gfn));
	env.vcpu = vm_vcpu_add(env.vm, 0, guest_code);
	kvm_arch_vm_finalize_vcpus(env.vm);
	vcpu_args_set(env.vcpu, 1, env.vm->page_size);
	env.cmd = addr_gva2hva(env.vm, (gva_t)&guest_cmd);

	/* KVM logs pages of the host's size. */
	vm_userspace_mem_region_add(env.vm, VM_MEM_SRC_ANONYMOUS, TEST_GPA, TEST_SLOT,
				    page_offset(nr_entries) / env.vm->page_size,
				    KVM_MEM_LOG_DIRTY_PAGES);
	env_map(&env, 0, nr_entries);

	set_access(&env, GUEST_FILL, 0, 0);
	r = _vcpu_run(env.vcpu);
	TEST_ASSERT(!r, KVM_IOCTL_ERROR(KVM_RUN, r));
	TEST_ASSERT_KVM_EXIT_REASON(env.vcpu, KVM_EXIT_DIRTY_RING_FULL);
	expect_trace("kvm_userspace_exit: reason KVM_EXIT_DIRTY_RING_FULL (31)\n");

	kvm_vm_free(env.vm);
}

#ifdef __x86_64__
TEST_F(trace, private)
{
	const struct vm_shape shape = {
		.mode = VM_MODE_DEFAULT,
		.type = KVM_X86_SW_PROTECTED_VM,
	};
	struct env env = {};

	if (!(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM)))
		SKIP(return, "no KVM_X86_SW_PROTECTED_VM");

	env.vm = vm_create_shape_with_one_vcpu(shape, &env.vcpu, guest_code);
	env.cmd = addr_gva2hva(env.vm, (gva_t)&guest_cmd);
	vm_userspace_mem_region_add(env.vm, VM_MEM_SRC_ANONYMOUS, TEST_GPA, TEST_SLOT, 1, 0);
	env_map(&env, 0, 1);
	vm_mem_set_private(env.vm, TEST_GPA, page_offset(1));

	set_access(&env, GUEST_READ, 0, 0);
	__expect_memory_fault(&env, EFAULT, KVM_MEMORY_EXIT_FLAG_PRIVATE);
	expect_trace("kvm_memory_fault_exit: vcpu 0 gpa 0xc0000000 size 0x1000 flags PRIVATE\n"
		     "kvm_userspace_exit: reason KVM_EXIT_MEMORY_FAULT (14)\n");

	enable_cap(&env);
	__expect_memory_fault(&env, EFAULT,
			      KVM_MEMORY_EXIT_FLAG_READ | KVM_MEMORY_EXIT_FLAG_PRIVATE);
	expect_trace("kvm_memory_fault_exit: vcpu 0 gpa 0xc0000000 size 0x1000 flags READ|PRIVATE\n"
		     "kvm_userspace_exit: reason KVM_EXIT_MEMORY_FAULT (14)\n");

	kvm_vm_free(env.vm);
}
#endif

static void *kill_on_message_fn(void *arg)
{
	struct env *env = arg;
	struct uffd_msg msg;
	int r = read(env->uffd, &msg, sizeof(msg));

	TEST_ASSERT(r == sizeof(msg), "Read %d bytes of userfaultfd, errno = %d", r, errno);
	kill(getpid(), SIGKILL);
	return NULL;
}

/*
 * A vCPU that is killed while it sleeps on userfaultfd has been interrupted, the
 * memory isn't to blame.  Nobody but the trace sees the error.
 */
TEST_F(trace, killed)
{
	const char *reason;
	int cap, status;
	pthread_t thread;
	struct env env;
	pid_t pid;

	for (cap = 0; cap < 2; cap++) {
		pid = fork();
		TEST_ASSERT(pid >= 0, __KVM_SYSCALL_ERROR("fork()", pid));

		if (!pid) {
			env_create(&env, false);
			reason = register_uffd(&env, 0, 0);
			if (reason)
				_exit(KSFT_SKIP);
			if (cap)
				enable_cap(&env);

			start_trace();
			kvm_pthread_create(&thread, NULL, kill_on_message_fn, &env);
			set_access(&env, GUEST_WRITE, 0, content(0));
			_vcpu_run(env.vcpu);
			_exit(KSFT_FAIL);
		}

		TEST_ASSERT_EQ(waitpid(pid, &status, 0), pid);
		if (WIFEXITED(status) && WEXITSTATUS(status) == KSFT_SKIP)
			SKIP(return, "userfaultfd is not permitted");
		TEST_ASSERT(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL,
			    "The vCPU was not killed, status = 0x%x", status);
		expect_trace("kvm_userspace_exit: reason restart (4)\n");
	}
}

int main(int argc, char *argv[])
{
	if (!kvm_check_cap(KVM_CAP_MEMORY_FAULT_EXIT)) {
		struct kvm_vm *vm = vm_create_barebones();

		expect_einval(__vm_enable_cap(vm, KVM_CAP_MEMORY_FAULT_EXIT, ALL_ACCESSES),
			      "mask", ALL_ACCESSES);
		kvm_vm_free(vm);
		ksft_exit_skip("no KVM_CAP_MEMORY_FAULT_EXIT\n");
	}

	return test_harness_run(argc, argv);
}
