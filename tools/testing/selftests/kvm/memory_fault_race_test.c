// SPDX-License-Identifier: GPL-2.0-only
/*
 * Race memory-fault exits with what changes them or ends the VM: enable
 * KVM_CAP_MEMORY_FAULT_EXIT while vCPUs fault, toggle KVM_MEM_EXIT_ON_MISSING while
 * they do, set it while an async page fault is outstanding, and kill or abandon a VM
 * whose vCPUs fault, exit and sleep while the flag is toggled.
 *
 * The guest's code, stack and page tables are in slot 0, the slot under test has
 * nothing but data.
 */
#include <dirent.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <linux/close_range.h>
#include <linux/userfaultfd.h>

#include "cgroup_util.h"
#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "numaif.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"
#ifdef __x86_64__
#include "apic.h"
#endif

#define TEST_SLOT		10
#define TEST_GPA		0xc0000000ul
#define TEST_GVA		TEST_GPA
#define TEST_NR_PAGES		8

#define MAX_VCPUS		3

#define SCRIBBLE		0xa5a5a5a5a5a5a5a5ul

#define ALL_ACCESSES		(KVM_MEMORY_EXIT_FLAG_READ |	\
				 KVM_MEMORY_EXIT_FLAG_WRITE |	\
				 KVM_MEMORY_EXIT_FLAG_EXEC)

enum guest_op {
	GUEST_READ,
	GUEST_WRITE,
	GUEST_EXEC,
	/* Write to all pages, again and again. */
	GUEST_FILL,
	/* These operations exist only on x86. */
	GUEST_STI,
	GUEST_ENABLE_APF,
	GUEST_SPIN,
};

static const u64 access_flags[] = {
	[GUEST_READ]	= KVM_MEMORY_EXIT_FLAG_READ,
	[GUEST_WRITE]	= KVM_MEMORY_EXIT_FLAG_WRITE,
	[GUEST_EXEC]	= KVM_MEMORY_EXIT_FLAG_EXEC,
};

static struct guest_cmd {
	u64 op;
	u64 gva;
	/* The value to write, or the value read. */
	u64 val;
	bool spin;
} guest_cmds[MAX_VCPUS];

#ifdef __x86_64__
#define APF_VECTOR		0x40
#define MSI_VECTOR		0x41

/* What the guest knows about async page faults, shared with the host. */
static struct {
	struct kvm_vcpu_pv_apf_data *data;
	u64 gpa;
	u32 not_present_token;
	u32 ready_token;
	u64 nr_not_present;
	u64 nr_ready;
	u64 nr_msis;
} guest_apf;

static void guest_apf_handler(struct ex_regs *regs)
{
	u32 token = READ_ONCE(guest_apf.data->token);

	/* KVM wakes all tasks when the guest enables async page faults. */
	if (token != ~0u) {
		guest_apf.nr_ready++;
		WRITE_ONCE(guest_apf.ready_token, token);
	}

	WRITE_ONCE(guest_apf.data->token, 0);
	wrmsr(MSR_KVM_ASYNC_PF_ACK, 1);
	x2apic_write_reg(APIC_EOI, 0);
}

static void guest_msi_handler(struct ex_regs *regs)
{
	guest_apf.nr_msis++;
	x2apic_write_reg(APIC_EOI, 0);
}

static void guest_enable_apf(void)
{
	wrmsr(MSR_KVM_ASYNC_PF_INT, APF_VECTOR);
	wrmsr(MSR_KVM_ASYNC_PF_EN, guest_apf.gpa | KVM_ASYNC_PF_ENABLED |
	      KVM_ASYNC_PF_SEND_ALWAYS | KVM_ASYNC_PF_DELIVERY_AS_INT);
}

/* Instead of waiting for a page that isn't present, go on with other work. */
static u64 guest_read(u64 *mem)
{
	u64 error_code, val;
	u8 vector;

	asm volatile(KVM_ASM_SAFE("mov %[mem], %[val]")
		     : KVM_ASM_SAFE_OUTPUTS(vector, error_code), [val] "=&r"(val)
		     : [mem] "m"(*mem)
		     : KVM_ASM_SAFE_CLOBBERS);
	if (!vector)
		return val;

	GUEST_ASSERT_EQ(vector, PF_VECTOR);
	GUEST_ASSERT_EQ(READ_ONCE(guest_apf.data->flags), KVM_PV_REASON_PAGE_NOT_PRESENT);
	asm volatile("mov %%cr2, %0" : "=r"(val));
	guest_apf.nr_not_present++;
	WRITE_ONCE(guest_apf.not_present_token, val);
	WRITE_ONCE(guest_apf.data->flags, 0);
	return ~0ul;
}
#else
static u64 guest_read(u64 *mem)
{
	return READ_ONCE(*mem);
}
#endif

static void guest_fill(u64 page_size, u64 val)
{
	u64 i;

	for (i = 0;; i++)
		WRITE_ONCE(*(u64 *)(TEST_GVA + i % TEST_NR_PAGES * page_size), val);
}

static void guest_code(u64 vcpu_id, u64 page_size)
{
	struct guest_cmd *cmd = &guest_cmds[vcpu_id];

	for (;; GUEST_SYNC(cmd->op)) {
		u64 *mem = (u64 *)READ_ONCE(cmd->gva);

		switch (READ_ONCE(cmd->op)) {
		case GUEST_READ:
			WRITE_ONCE(cmd->val, guest_read(mem));
			break;
		case GUEST_WRITE:
			WRITE_ONCE(*mem, READ_ONCE(cmd->val));
			break;
		case GUEST_EXEC:
			((void (*)(void))mem)();
			break;
		case GUEST_FILL:
			guest_fill(page_size, vcpu_id);
			break;
#ifdef __x86_64__
		case GUEST_STI:
			x2apic_enable();
			asm volatile("sti");
			break;
		case GUEST_ENABLE_APF:
			guest_enable_apf();
			break;
		case GUEST_SPIN:
			while (READ_ONCE(cmd->spin))
				cpu_relax();
			break;
#endif
		default:
			GUEST_FAIL("Unknown operation %lu", cmd->op);
		}
	}
}

struct env {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpus[MAX_VCPUS];
	struct guest_cmd *cmds;
	int nr_vcpus;
	void *hva;
	size_t size;
	int uffd;
};

static size_t page_offset(int page)
{
	return page * getpagesize();
}

static void env_create(struct env *env, int nr_vcpus)
{
	int i;

	env->nr_vcpus = nr_vcpus;
	env->size = page_offset(TEST_NR_PAGES);
	env->hva = kvm_mmap(env->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	/* Whether this works doesn't matter, pages are dropped one by one. */
	madvise(env->hva, env->size, MADV_NOHUGEPAGE);

	env->vm = vm_create_with_vcpus(nr_vcpus, guest_code, env->vcpus);
	env->cmds = addr_gva2hva(env->vm, (gva_t)guest_cmds);
	for (i = 0; i < nr_vcpus; i++)
		vcpu_args_set(env->vcpus[i], 2, i, getpagesize());

	vm_set_user_memory_region(env->vm, TEST_SLOT, 0, TEST_GPA, env->size, env->hva);
	virt_map(env->vm, TEST_GVA, TEST_GPA, env->size / env->vm->page_size);
}

static void env_destroy(struct env *env)
{
	kvm_vm_free(env->vm);
	kvm_munmap(env->hva, env->size);
}

static void env_create_uffd(struct env *env)
{
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_THREAD_ID };
	struct uffdio_register reg = {
		.range = { .start = (u64)env->hva, .len = env->size },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	int r;

	env->uffd = syscall(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	TEST_ASSERT(env->uffd >= 0, __KVM_SYSCALL_ERROR("userfaultfd()", env->uffd));
	r = ioctl(env->uffd, UFFDIO_API, &api);
	TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("UFFDIO_API", r));
	r = ioctl(env->uffd, UFFDIO_REGISTER, &reg);
	TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("UFFDIO_REGISTER", r));
}

static void set_access(struct env *env, int vcpu, enum guest_op op, int page)
{
	env->cmds[vcpu] = (struct guest_cmd) {
		.op = op,
		.gva = TEST_GVA + page_offset(page),
		.spin = true,
	};
}

static void scribble_on_run(struct kvm_run *run)
{
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

/* The exit says all about the access that the vCPU is at. */
static bool is_memory_fault(struct env *env, struct kvm_vcpu *vcpu)
{
	struct guest_cmd *cmd = &env->cmds[vcpu->id];
	struct kvm_run *run = vcpu->run;

	return run->exit_reason == KVM_EXIT_MEMORY_FAULT &&
	       run->memory_fault.flags == access_flags[cmd->op] &&
	       run->memory_fault.gpa == TEST_GPA + cmd->gva - TEST_GVA &&
	       run->memory_fault.size == getpagesize();
}

/* KVM_RUN has said all about a write to a missing page; returns where that is. */
static u64 missing_page_offset(struct env *env, struct kvm_run *run, int r)
{
	u64 offset = run->memory_fault.gpa - TEST_GPA;

	TEST_ASSERT(r == -1 && errno == EFAULT && run->exit_reason == KVM_EXIT_MEMORY_FAULT &&
		    run->memory_fault.flags == KVM_MEMORY_EXIT_FLAG_WRITE &&
		    run->memory_fault.size == getpagesize() && offset < env->size,
		    "KVM_RUN = %d, errno = %d, exit %u (%s), flags 0x%llx, gpa 0x%llx, size 0x%llx",
		    r, errno, run->exit_reason, exit_reason_str(run->exit_reason),
		    run->memory_fault.flags, run->memory_fault.gpa, run->memory_fault.size);
	return offset;
}

static void signal_handler(int sig)
{
}

/* Kick a vCPU by a signal, i.e. without a bit in kvm_run that stays. */
static void install_signal_handler(void)
{
	const struct sigaction action = { .sa_handler = signal_handler };
	int r = sigaction(SIGUSR1, &action, NULL);

	TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("sigaction()", r));
}

/*
 * Before KVM_ENABLE_CAP begins, an exit is the bare one of kernels that don't
 * have the capability.  Once it has returned, no KVM_RUN that begins ends with
 * anything but a complete exit.  In between, an exit is one or the other.
 */
#define CAP_MIN_ROUNDS		10
#define CAP_NR_EXITS		20

struct cap_race {
	struct env env;
	bool begun;
	bool done;
};

struct cap_vcpu {
	struct cap_race *race;
	struct kvm_vcpu *vcpu;
	u64 nr_bare;
	u64 nr_complete;
	/* KVM_RUNs that overlapped with KVM_ENABLE_CAP. */
	u64 nr_overlaps;
};

static void *cap_vcpu_fn(void *arg)
{
	struct cap_vcpu *v = arg;
	struct cap_race *race = v->race;
	struct kvm_run *run = v->vcpu->run;
	bool bare, complete, begun, done;
	int r;

	while (v->nr_complete < CAP_NR_EXITS) {
		scribble_on_run(run);

		done = __atomic_load_n(&race->done, __ATOMIC_ACQUIRE);
		r = _vcpu_run(v->vcpu);
		begun = __atomic_load_n(&race->begun, __ATOMIC_ACQUIRE);

		TEST_ASSERT(r == -1 && errno == EFAULT, "KVM_RUN = %d, errno = %d", r, errno);

		bare = run->exit_reason == KVM_EXIT_UNKNOWN && is_scribble(run);
		complete = is_memory_fault(&race->env, v->vcpu);
		TEST_ASSERT((bare && !done) || (complete && begun),
			    "%s%s: exit %u (%s), flags 0x%llx, gpa 0x%llx, size 0x%llx",
			    begun ? "begun" : "not begun", done ? ", done" : "",
			    run->exit_reason, exit_reason_str(run->exit_reason),
			    run->memory_fault.flags, run->memory_fault.gpa,
			    run->memory_fault.size);

		WRITE_ONCE(v->nr_bare, v->nr_bare + bare);
		v->nr_complete += complete;
		v->nr_overlaps += begun && !done;
	}

	TEST_ASSERT_EQ(vcpu_get_stat(v->vcpu, memory_fault_exits), v->nr_complete);
	return NULL;
}

static void enable_cap_once(struct cap_race *race, u64 *nr_overlaps)
{
	struct cap_vcpu vcpus[MAX_VCPUS] = {};
	pthread_t threads[MAX_VCPUS];
	struct env *env = &race->env;
	int i, r;

	env_create(env, MAX_VCPUS);
	r = mprotect(env->hva, env->size, PROT_NONE);
	TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("mprotect()", r));

	for (i = 0; i < MAX_VCPUS; i++) {
		set_access(env, i, GUEST_READ + i, i);
		vcpus[i].race = race;
		vcpus[i].vcpu = env->vcpus[i];
		kvm_pthread_create(&threads[i], NULL, cap_vcpu_fn, &vcpus[i]);
	}

	for (i = 0; i < MAX_VCPUS; i++) {
		while (READ_ONCE(vcpus[i].nr_bare) < CAP_NR_EXITS)
			sched_yield();
	}

	__atomic_store_n(&race->begun, true, __ATOMIC_RELEASE);
	vm_enable_cap(env->vm, KVM_CAP_MEMORY_FAULT_EXIT, ALL_ACCESSES);
	__atomic_store_n(&race->done, true, __ATOMIC_RELEASE);

	for (i = 0; i < MAX_VCPUS; i++) {
		kvm_pthread_join(threads[i], NULL);
		nr_overlaps[i] += vcpus[i].nr_overlaps;
	}

	env_destroy(env);
}

/* Go on until the race has happened to each of the accesses. */
TEST(enable_cap)
{
	u64 nr_overlaps[MAX_VCPUS] = {};
	int nr_rounds;

	for (nr_rounds = 0;
	     nr_rounds < CAP_MIN_ROUNDS || !nr_overlaps[0] || !nr_overlaps[1] || !nr_overlaps[2];
	     nr_rounds++) {
		struct cap_race race = {};

		enable_cap_once(&race, nr_overlaps);
	}

	pr_info("%d rounds, KVM_RUNs that overlapped: %lu reads, %lu writes, %lu fetches\n",
		nr_rounds, nr_overlaps[0], nr_overlaps[1], nr_overlaps[2]);
}

/*
 * While the flag changes, an access to a missing page exits, with all that there is
 * to say about it, or KVM provides the page.  A vCPU that goes by one value of the
 * flag for the access, and by another for the exit, would end with a bare exit.
 */
#define FLAG_NR_TOGGLES		1000
#define FLAG_NR_EXITS		100

struct flag_race {
	struct env env;
	u64 nr_exits;
};

static void *flag_vcpu_fn(void *arg)
{
	struct flag_race *race = arg;
	struct env *env = &race->env;
	struct kvm_run *run = env->vcpus[0]->run;
	u64 offset;
	int r;

	for (;;) {
		scribble_on_run(run);
		r = __vcpu_run(env->vcpus[0]);
		if (r == -1 && errno == EINTR && READ_ONCE(run->immediate_exit))
			return NULL;

		offset = missing_page_offset(env, run, r);
		WRITE_ONCE(*(u64 *)(env->hva + offset), 0);
		WRITE_ONCE(race->nr_exits, race->nr_exits + 1);
	}
}

TEST(flag)
{
	struct kvm_random_state random = new_kvm_random_state(kvm_random_seed);
	struct flag_race race = {};
	struct env *env = &race.env;
	pthread_t thread;
	int i;

	install_signal_handler();
	env_create(env, 1);
	set_access(env, 0, GUEST_FILL, 0);
	kvm_pthread_create(&thread, NULL, flag_vcpu_fn, &race);

	for (i = 0; i < FLAG_NR_TOGGLES || READ_ONCE(race.nr_exits) < FLAG_NR_EXITS; i++) {
		kvm_madvise(env->hva, env->size, MADV_DONTNEED);
		usleep(kvm_random_u32_in_range(&random, 0, 500));
		vm_set_user_memory_region(env->vm, TEST_SLOT, i % 2 ? 0 : KVM_MEM_EXIT_ON_MISSING,
					  TEST_GPA, env->size, env->hva);
	}

	WRITE_ONCE(env->vcpus[0]->run->immediate_exit, true);
	pthread_kill(thread, SIGUSR1);
	kvm_pthread_join(thread, NULL);
	pr_info("%d toggles, %lu exits\n", i, race.nr_exits);
	env_destroy(env);
}

/*
 * Tear down a VM while its vCPUs fault, exit and sleep on userfaultfd, and its
 * memslot changes.  The process is killed, or closes all files first.
 */
#define TEARDOWN_NR_ROUNDS	3
#define TEARDOWN_NR_VCPUS	2

/* Counted by the process that is to die, for its parent. */
struct progress {
	u64 nr_exits;
	u64 nr_toggles;
	u64 nr_messages;
	/* The thread that toggles the flag. */
	pid_t toggle_tid;
	/* Set by the parent. */
	bool close;
	bool stop_serving;
	/* Messages of vCPUs that were read and aren't going to be answered. */
	u64 nr_unserved;
};

struct teardown {
	struct env env;
	struct progress *progress;
};

struct teardown_vcpu {
	struct teardown *teardown;
	struct kvm_vcpu *vcpu;
};

static void zero_page(struct env *env, size_t offset)
{
	struct uffdio_zeropage zeropage = {
		.range = { .start = (u64)env->hva + offset, .len = getpagesize() },
	};
	int r = ioctl(env->uffd, UFFDIO_ZEROPAGE, &zeropage);

	TEST_ASSERT(!r || errno == EEXIST || errno == EAGAIN || errno == EBADF,
		    __KVM_SYSCALL_ERROR("UFFDIO_ZEROPAGE", r));

	/*
	 * While a write replaces the page of zeroes, its PTE is none for a moment.  A
	 * vCPU that faults then sleeps although the page is there: nobody else wakes it.
	 */
	if (r && errno != EBADF) {
		r = ioctl(env->uffd, UFFDIO_WAKE, &zeropage.range);
		TEST_ASSERT(!r || errno == EBADF, __KVM_SYSCALL_ERROR("UFFDIO_WAKE", r));
	}
}

static void *teardown_vcpu_fn(void *arg)
{
	struct teardown_vcpu *v = arg;
	struct progress *progress = v->teardown->progress;
	struct env *env = &v->teardown->env;
	struct kvm_run *run = v->vcpu->run;
	u64 offset;
	int r;

	for (;;) {
		r = __vcpu_run(v->vcpu);
		if (r == -1 && errno == EINTR)
			continue;
		if (r == -1 && errno == EBADF && READ_ONCE(progress->close))
			return NULL;

		offset = missing_page_offset(env, run, r);
		__atomic_add_fetch(&progress->nr_exits, 1, __ATOMIC_RELAXED);
		zero_page(env, offset);
	}
}

static void *teardown_server_fn(void *arg)
{
	struct teardown *teardown = arg;
	struct progress *progress = teardown->progress;
	struct env *env = &teardown->env;
	struct pollfd pollfd = { .fd = env->uffd, .events = POLLIN };
	struct uffd_msg msg;
	char path[64];
	int r;

	for (;;) {
		r = poll(&pollfd, 1, -1);
		if (r < 0 && errno == EINTR)
			continue;

		r = read(env->uffd, &msg, sizeof(msg));
		if (r < 0 && errno == EBADF && READ_ONCE(progress->close))
			return NULL;
		if (r < 0 && errno == EAGAIN)
			continue;
		TEST_ASSERT(r == sizeof(msg), __KVM_SYSCALL_ERROR("read()", r));

		if (READ_ONCE(progress->stop_serving)) {
			/* A worker isn't waited for, the flag's next change would succeed. */
			snprintf(path, sizeof(path), "/proc/self/task/%d",
				 msg.arg.pagefault.feat.ptid);
			if (access(path, F_OK))
				continue;
			WRITE_ONCE(progress->nr_unserved, 1);
			return NULL;
		}

		zero_page(env, align_down(msg.arg.pagefault.address, getpagesize()) -
			       (u64)env->hva);
		WRITE_ONCE(progress->nr_messages, progress->nr_messages + 1);
	}
}

static void *teardown_toggle_fn(void *arg)
{
	struct teardown *teardown = arg;
	struct progress *progress = teardown->progress;
	struct env *env = &teardown->env;
	u32 flags;
	int r;

	progress->toggle_tid = syscall(__NR_gettid);

	for (;;) {
		flags = progress->nr_toggles % 2 ? 0 : KVM_MEM_EXIT_ON_MISSING;
		r = __vm_set_user_memory_region(env->vm, TEST_SLOT, flags, TEST_GPA,
						env->size, env->hva);
		if (r && errno == EBADF && READ_ONCE(progress->close))
			return NULL;
		TEST_ASSERT(!r, KVM_IOCTL_ERROR(KVM_SET_USER_MEMORY_REGION, r));

		WRITE_ONCE(progress->nr_toggles, progress->nr_toggles + 1);
		kvm_madvise(env->hva, env->size, MADV_DONTNEED);
		sched_yield();
	}
}

/* A memory cgroup of the process that is to die, or NULL. */
static char *cgroup;

static long nr_page_table_bytes(void)
{
	return cg_read_key_long(cgroup, "memory.stat", "sec_pagetables ");
}

static void destroy_cgroup(void)
{
	cg_destroy(cgroup);
	free(cgroup);
	cgroup = NULL;
}

static void create_cgroup(void)
{
	char root[PATH_MAX];

	if (cg_find_unified_root(root, sizeof(root), NULL))
		return;

	/* It may be enabled already; whether it is will be seen. */
	cg_write(root, "cgroup.subtree_control", "+memory");
	cgroup = cg_name_indexed(root, "kvm_memory_fault", getpid());
	if (cg_create(cgroup) || nr_page_table_bytes() < 0)
		destroy_cgroup();
	else
		atexit(destroy_cgroup);
}

static void teardown_child(struct progress *progress)
{
	struct teardown teardown = { .progress = progress };
	struct teardown_vcpu vcpus[TEARDOWN_NR_VCPUS];
	pthread_t threads[TEARDOWN_NR_VCPUS + 2];
	struct env *env = &teardown.env;
	int i;

	/* Don't outlive a parent that fails. */
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	TEST_ASSERT(!cgroup || !cg_enter_current(cgroup), "Can't enter %s", cgroup);
	/* The parent's, which an exit of the child must not destroy. */
	cgroup = NULL;

	install_signal_handler();
	env_create(env, TEARDOWN_NR_VCPUS);
	env_create_uffd(env);

#ifdef __x86_64__
	/* With interrupts enabled, KVM halts vCPU 0 instead of letting it sleep. */
	set_access(env, 0, GUEST_STI, 0);
	vcpu_run(env->vcpus[0]);
#endif
	for (i = 0; i < TEARDOWN_NR_VCPUS; i++) {
		set_access(env, i, GUEST_FILL, 0);
		vcpus[i].teardown = &teardown;
		vcpus[i].vcpu = env->vcpus[i];
		kvm_pthread_create(&threads[i], NULL, teardown_vcpu_fn, &vcpus[i]);
	}
	kvm_pthread_create(&threads[i++], NULL, teardown_server_fn, &teardown);
	kvm_pthread_create(&threads[i++], NULL, teardown_toggle_fn, &teardown);

	while (!READ_ONCE(progress->close))
		usleep(1000);

	/* Spare stdio, to hear about failed assertions. */
	TEST_ASSERT_EQ(syscall(__NR_close_range, 3, ~0u, 0), 0);
	while (i--) {
		pthread_kill(threads[i], SIGUSR1);
		kvm_pthread_join(threads[i], NULL);
	}
	_exit(0);
}

/* PROC_PID_INIT_INO */
#define INIT_PID_NS		"pid:[4026531836]"

/* Some of what the kernel says of a process has the ID that it has there. */
static bool in_first_pid_namespace(void)
{
	char pid_ns[32] = {};

	return readlink("/proc/self/ns/pid", pid_ns, sizeof(pid_ns) - 1) <= 0 ||
	       !strcmp(pid_ns, INIT_PID_NS);
}

/* As long as a VM lives, debugfs has a directory PID-FD for it. */
#define KVM_DEBUGFS		"/sys/kernel/debug/kvm"

static bool vm_exists(pid_t pid)
{
	DIR *dir = opendir(KVM_DEBUGFS);
	struct dirent *entry;
	bool exists = false;
	int owner, len;

	while (dir && !exists && (entry = readdir(dir))) {
		len = 0;
		exists = sscanf(entry->d_name, "%d-%n", &owner, &len) == 1 && len &&
			 owner == pid;
	}
	if (dir)
		closedir(dir);
	return exists;
}

/*
 * While a vCPU sleeps in KVM_RUN, the next change of the flag doesn't return.  Wait
 * until the thread is in uninterruptible sleep, and stays there for a while, i.e.
 * isn't merely waiting for a lock.
 */
static void wait_for_sleep(struct progress *progress, pid_t child)
{
	u64 nr_toggles = 0;
	char path[64], state;
	int nr = 0;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%d/task/%d/stat", child, progress->toggle_tid);
	while (nr < 20) {
		f = fopen(path, "re");
		TEST_ASSERT(f, "Can't open %s, errno = %d", path, errno);
		TEST_ASSERT_EQ(fscanf(f, "%*d (%*[^)]) %c", &state), 1);
		fclose(f);

		nr = state == 'D' && READ_ONCE(progress->nr_toggles) == nr_toggles ? nr + 1 : 0;
		nr_toggles = READ_ONCE(progress->nr_toggles);
		usleep(1000);
	}
}

FIXTURE(teardown) {
	struct progress *progress;
	bool have_debugfs;
};

FIXTURE_VARIANT(teardown) {
	bool close;
	bool stop_serving;
};

FIXTURE_VARIANT_ADD(teardown, killed) {
	.close = false,
	.stop_serving = false,
};

/*
 * A vCPU sleeps on userfaultfd, and makes the thread that toggles the flag wait
 * in a way that no signal ends.
 */
FIXTURE_VARIANT_ADD(teardown, killed_asleep) {
	.close = false,
	.stop_serving = true,
};

FIXTURE_VARIANT_ADD(teardown, closed) {
	.close = true,
	.stop_serving = false,
};

FIXTURE_VARIANT_ADD(teardown, closed_asleep) {
	.close = true,
	.stop_serving = true,
};

FIXTURE_SETUP(teardown)
{
	self->have_debugfs = in_first_pid_namespace() && !access(KVM_DEBUGFS, R_OK);
	create_cgroup();
	pr_info("debugfs %s VMs, a memory cgroup %s page tables\n",
		self->have_debugfs ? "counts" : "doesn't count",
		cgroup ? "counts" : "doesn't count");

	self->progress = kvm_mmap(sizeof(*self->progress), PROT_READ | PROT_WRITE,
				  MAP_SHARED | MAP_ANONYMOUS, -1);
}

FIXTURE_TEARDOWN(teardown)
{
	kvm_munmap(self->progress, sizeof(*self->progress));
	destroy_cgroup();
}

static void wait_for(u64 *counter, u64 min, pid_t child)
{
	while (__atomic_load_n(counter, __ATOMIC_RELAXED) < min) {
		TEST_ASSERT(!waitpid(child, NULL, WNOHANG), "The child has died");
		usleep(1000);
	}
}

TEST_F(teardown, in_flight)
{
	struct kvm_random_state random = new_kvm_random_state(kvm_random_seed);
	struct progress *progress = self->progress;
	int round, status;
	pid_t child;

	for (round = 0; round < TEARDOWN_NR_ROUNDS; round++) {
		memset(progress, 0, sizeof(*progress));

		child = fork();
		TEST_ASSERT(child >= 0, __KVM_SYSCALL_ERROR("fork()", child));
		if (!child)
			teardown_child(progress);

		wait_for(&progress->nr_exits, 4 << round, child);
		wait_for(&progress->nr_toggles, 4 << round, child);
		wait_for(&progress->nr_messages, 2, child);
		if (self->have_debugfs)
			TEST_ASSERT(vm_exists(child), "debugfs doesn't know the VM");
		if (cgroup)
			TEST_ASSERT(nr_page_table_bytes(), "The VM has no page tables");

		if (variant->stop_serving) {
			WRITE_ONCE(progress->stop_serving, true);
			wait_for(&progress->nr_unserved, 1, child);
			wait_for_sleep(progress, child);
		}
		usleep(kvm_random_u32_in_range(&random, 0, 20000));

		if (variant->close)
			WRITE_ONCE(progress->close, true);
		else
			kill(child, SIGKILL);

		TEST_ASSERT_EQ(waitpid(child, &status, 0), child);
		if (variant->close)
			TEST_ASSERT(WIFEXITED(status) && !WEXITSTATUS(status),
				    "The child's status is 0x%x", status);
		else
			TEST_ASSERT(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL,
				    "The child's status is 0x%x", status);

		/*
		 * A worker may have been the last to hold on to the memory map,
		 * and RCU frees page tables.  What never goes ends in a timeout.
		 */
		while (vm_exists(child) || (cgroup && nr_page_table_bytes()))
			usleep(1000);
	}
}

#ifdef __x86_64__
/*
 * Set the flag while an async page fault is outstanding, i.e. a worker sleeps on
 * userfaultfd on behalf of a vCPU that is halted, or does something else.
 */
struct async_pf {
	struct env env;
	struct kvm_vcpu *vcpu;
	pthread_t thread;
	void *src;
	/* The worker that the last message was about. */
	pid_t worker;
	/* The result of the last KVM_RUN. */
	int error;
};

FIXTURE(async_pf) {
	struct async_pf apf;
};

static u64 page_content(int page)
{
	return 0xabcd0000 + page;
}

static void set_slot_flag(struct env *env, bool exit_on_missing)
{
	vm_set_user_memory_region(env->vm, TEST_SLOT,
				  exit_on_missing ? KVM_MEM_EXIT_ON_MISSING : 0,
				  TEST_GPA, env->size, env->hva);
}

FIXTURE_SETUP(async_pf)
{
	struct async_pf *apf = &self->apf;
	struct env *env = &apf->env;
	int i;

	if (!kvm_cpu_has(X86_FEATURE_KVM_ASYNC_PF_INT))
		SKIP(return, "no KVM_FEATURE_ASYNC_PF_INT");
	/* userfaultfd tells the worker's ID, which is that of the first namespace. */
	if (!in_first_pid_namespace())
		SKIP(return, "not in the first PID namespace");

	install_signal_handler();
	env_create(env, 1);
	env_create_uffd(env);
	apf->vcpu = env->vcpus[0];
	apf->src = kvm_mmap(env->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	for (i = 0; i < TEST_NR_PAGES; i++)
		*(u64 *)(apf->src + page_offset(i)) = page_content(i);

	vm_install_exception_handler(env->vm, APF_VECTOR, guest_apf_handler);
	vm_install_exception_handler(env->vm, MSI_VECTOR, guest_msi_handler);
}

FIXTURE_TEARDOWN(async_pf)
{
	struct env *env = &self->apf.env;

	if (!env->vm)
		return;

	kvm_munmap(self->apf.src, env->size);
	env_destroy(env);
	close(env->uffd);
}

static void *async_pf_run_fn(void *arg)
{
	struct async_pf *apf = arg;

	scribble_on_run(apf->vcpu->run);
	apf->error = __vcpu_run(apf->vcpu) ? errno : 0;
	return NULL;
}

static void expect_message(struct async_pf *apf, int page)
{
	struct pollfd pollfd = { .fd = apf->env.uffd, .events = POLLIN };
	struct uffd_msg msg;
	int r;

	TEST_ASSERT_EQ(poll(&pollfd, 1, -1), 1);
	r = read(apf->env.uffd, &msg, sizeof(msg));
	TEST_ASSERT(r == sizeof(msg), __KVM_SYSCALL_ERROR("read()", r));
	TEST_ASSERT_EQ(msg.arg.pagefault.address & -(u64)getpagesize(),
		       (u64)apf->env.hva + page_offset(page));
	apf->worker = msg.arg.pagefault.feat.ptid;
}

static void expect_no_message(struct async_pf *apf)
{
	struct pollfd pollfd = { .fd = apf->env.uffd, .events = POLLIN };

	TEST_ASSERT(!poll(&pollfd, 1, 0), "Unexpected userfaultfd message");
}

static void start_run(struct async_pf *apf)
{
	kvm_pthread_create(&apf->thread, NULL, async_pf_run_fn, apf);
}

/* Instead of an exit, a bug might be that KVM sleeps on userfaultfd. */
static void join_run(struct async_pf *apf)
{
	while (pthread_tryjoin_np(apf->thread, NULL)) {
		expect_no_message(apf);
		sched_yield();
	}
}

static void expect_done(struct async_pf *apf)
{
	struct kvm_run *run = apf->vcpu->run;
	struct ucall uc;

	join_run(apf);
	TEST_ASSERT(!apf->error, "errno = %d, exit %u (%s), gpa 0x%llx", apf->error,
		    run->exit_reason, exit_reason_str(run->exit_reason), run->memory_fault.gpa);

	if (get_ucall(apf->vcpu, &uc) == UCALL_ABORT)
		REPORT_GUEST_ASSERT(uc);
	TEST_ASSERT_EQ(uc.cmd, UCALL_SYNC);
}

static void do_op(struct async_pf *apf, enum guest_op op)
{
	set_access(&apf->env, 0, op, 0);
	start_run(apf);
	expect_done(apf);
}

static void expect_content(struct async_pf *apf, int page)
{
	expect_done(apf);
	TEST_ASSERT_EQ(apf->env.cmds[0].val, page_content(page));
}

static void expect_exit(struct async_pf *apf)
{
	struct kvm_run *run = apf->vcpu->run;

	join_run(apf);
	TEST_ASSERT(apf->error == EFAULT && is_memory_fault(&apf->env, apf->vcpu),
		    "errno = %d, exit %u (%s), flags 0x%llx, gpa 0x%llx, size 0x%llx",
		    apf->error, run->exit_reason, exit_reason_str(run->exit_reason),
		    run->memory_fault.flags, run->memory_fault.gpa, run->memory_fault.size);
}

/* Nothing that KVM does on its own writes what describes an exit. */
static void kick_and_expect_nothing(struct async_pf *apf)
{
	struct kvm_run *run = apf->vcpu->run;

	pthread_kill(apf->thread, SIGUSR1);
	join_run(apf);
	TEST_ASSERT(apf->error == EINTR && run->exit_reason == KVM_EXIT_INTR &&
		    is_scribble(run),
		    "errno = %d, exit %u (%s), flags 0x%llx, gpa 0x%llx, size 0x%llx",
		    apf->error, run->exit_reason, exit_reason_str(run->exit_reason),
		    run->memory_fault.flags, run->memory_fault.gpa, run->memory_fault.size);
}

static void serve(struct async_pf *apf, int page)
{
	struct uffdio_copy copy = {
		.dst = (u64)apf->env.hva + page_offset(page),
		.src = (u64)apf->src + page_offset(page),
		.len = getpagesize(),
	};
	int r = ioctl(apf->env.uffd, UFFDIO_COPY, &copy);

	TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("UFFDIO_COPY", r));
}

/* A worker that is at work has the name of the work after a '+'. */
static bool is_at_work(pid_t worker)
{
	char path[64], name[64] = {};
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/comm", worker);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;

	TEST_ASSERT(read(fd, name, sizeof(name) - 1) > 0, "Can't read %s", path);
	close(fd);
	return strchr(name, '+');
}

static void serve_and_drop(struct async_pf *apf, int page)
{
	TEST_ASSERT(is_at_work(apf->worker), "Thread %d isn't a worker", apf->worker);
	serve(apf, page);
	while (is_at_work(apf->worker))
		sched_yield();
	kvm_madvise(apf->env.hva + page_offset(page), getpagesize(), MADV_DONTNEED);
}

static void expect_nr_exits(struct async_pf *apf, u64 nr)
{
	TEST_ASSERT_EQ(vcpu_get_stat(apf->vcpu, memory_fault_exits), nr);
	expect_no_message(apf);
}

static void begin_async_pf(struct async_pf *apf, int page)
{
	set_slot_flag(&apf->env, false);
	set_access(&apf->env, 0, GUEST_READ, page);
	start_run(apf);
	expect_message(apf, page);
	set_slot_flag(&apf->env, true);
}

/* The guest knows nothing about async page faults, thus KVM halts the vCPU. */
TEST_F(async_pf, halted)
{
	struct async_pf *apf = &self->apf;
	typeof(guest_apf) *guest = addr_gva2hva(apf->env.vm, (gva_t)&guest_apf);
	struct kvm_msi msi = { .address_lo = APIC_DEFAULT_GPA, .data = MSI_VECTOR };
	int i;

	do_op(apf, GUEST_STI);

	/* The page comes while the vCPU is halted, the flag changes nothing. */
	begin_async_pf(apf, 0);
	serve(apf, 0);
	expect_content(apf, 0);
	expect_nr_exits(apf, 0);

	/* It comes while the vCPU isn't in KVM_RUN. */
	begin_async_pf(apf, 1);
	kick_and_expect_nothing(apf);
	serve(apf, 1);
	start_run(apf);
	expect_content(apf, 1);
	expect_nr_exits(apf, 0);

	/* It comes, and is gone before KVM maps it: the access exits. */
	begin_async_pf(apf, 2);
	kick_and_expect_nothing(apf);
	serve_and_drop(apf, 2);
	for (i = 0; i < 2; i++) {
		start_run(apf);
		expect_exit(apf);
	}
	serve(apf, 2);
	start_run(apf);
	expect_content(apf, 2);
	expect_nr_exits(apf, 2);

	/* An interrupt lets the vCPU try again, which exits; the worker goes on. */
	begin_async_pf(apf, 3);
	TEST_ASSERT_EQ(__vm_ioctl(apf->env.vm, KVM_SIGNAL_MSI, &msi), 1);
	expect_exit(apf);
	start_run(apf);
	expect_exit(apf);
	TEST_ASSERT(is_at_work(apf->worker), "The worker doesn't wait for the page");
	serve(apf, 3);
	start_run(apf);
	expect_content(apf, 3);
	expect_nr_exits(apf, 4);
	TEST_ASSERT_EQ(guest->nr_msis, 1);
}

/* The guest is told that the page isn't present, and that it has come. */
TEST_F(async_pf, paravirtual)
{
	struct async_pf *apf = &self->apf;
	typeof(guest_apf) *guest = addr_gva2hva(apf->env.vm, (gva_t)&guest_apf);
	gva_t data = vm_alloc_page(apf->env.vm);
	int i;

	guest->data = (void *)data;
	guest->gpa = addr_gva2gpa(apf->env.vm, data);
	do_op(apf, GUEST_STI);
	do_op(apf, GUEST_ENABLE_APF);

	begin_async_pf(apf, 0);
	expect_done(apf);
	TEST_ASSERT(guest->not_present_token, "The guest was not told about the missing page");

	/* In the meantime, another page exits. */
	set_access(&apf->env, 0, GUEST_READ, 1);
	for (i = 0; i < 2; i++) {
		start_run(apf);
		expect_exit(apf);
	}
	serve(apf, 1);
	start_run(apf);
	expect_content(apf, 1);
	expect_nr_exits(apf, 2);
	TEST_ASSERT_EQ(guest->ready_token, 0);

	/*
	 * KVM finds out that it can't map the page when it's about to tell the
	 * guest that the page is ready, which isn't an access of the guest.
	 */
	serve_and_drop(apf, 0);
	set_access(&apf->env, 0, GUEST_SPIN, 0);
	start_run(apf);
	while (!READ_ONCE(guest->ready_token)) {
		TEST_ASSERT(pthread_tryjoin_np(apf->thread, NULL), "KVM_RUN has ended");
		sched_yield();
	}
	TEST_ASSERT_EQ(guest->ready_token, guest->not_present_token);
	kick_and_expect_nothing(apf);
	WRITE_ONCE(apf->env.cmds[0].spin, false);
	start_run(apf);
	expect_done(apf);
	expect_nr_exits(apf, 2);

	set_access(&apf->env, 0, GUEST_READ, 0);
	for (i = 0; i < 2; i++) {
		start_run(apf);
		expect_exit(apf);
	}
	serve(apf, 0);
	start_run(apf);
	expect_content(apf, 0);
	expect_nr_exits(apf, 4);
	TEST_ASSERT_EQ(guest->nr_not_present, 1);
	TEST_ASSERT_EQ(guest->nr_ready, 1);
}
#endif

int main(int argc, char *argv[])
{
	int fd;

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_EXIT_ON_MISSING) == KVM_MEM_EXIT_ON_MISSING);
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_MEMORY_FAULT_EXIT) == ALL_ACCESSES);
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_BINARY_STATS_FD));

	fd = syscall(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	__TEST_REQUIRE(fd >= 0, "userfaultfd() failed, errno = %d (%s)", errno, strerror(errno));
	close(fd);

	disable_numa_balancing();

	return test_harness_run(argc, argv);
}
