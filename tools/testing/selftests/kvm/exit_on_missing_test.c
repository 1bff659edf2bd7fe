// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test KVM_MEM_EXIT_ON_MISSING, i.e. that a guest access to a page that is not
 * mapped in the host exits to userspace instead of faulting the page in, and
 * that the access makes progress once userspace has mapped the page.
 *
 * The guest's code, stack and page tables are in slot 0, which doesn't have the
 * flag.  Only the slot under test has it.
 */
#include <glob.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/time.h>

#include <linux/bitfield.h>
#include <linux/bitmap.h>
#include <linux/bits.h>
#include <linux/log2.h>
#include <linux/sizes.h>
#include <linux/udmabuf.h>
#include <linux/userfaultfd.h>

#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "numaif.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"

#define TEST_SLOT		10
#define TEST_GPA		0xc0000000ul
#define TEST_GVA		TEST_GPA
#define TEST_NR_PAGES		4

#define OTHER_SLOT		11
#define OTHER_GPA		0xd0000000ul

/* No slot has this page, an access to it is MMIO. */
#define MMIO_GPA		0xf0000000ul
#define MMIO_GVA		MMIO_GPA

#define MAX_VCPUS		2
#define MAX_HUGE_PAGE		SZ_32M

#ifdef __x86_64__
#define RET_INSN		0xc3ul
#define DEBUG_PORT		0x80
#elif defined(__aarch64__)
#define RET_INSN		0xd65f03c0ul
#define MTE_GRANULE_SIZE	16ul
#define MTE_TAG_MASK		GENMASK(59, 56)
#else
#error "Unsupported architecture"
#endif

/* A RAM-backed PCI BAR, given by the user. */
static const char *bar_path;

enum guest_op {
	GUEST_READ,
	GUEST_WRITE,
	GUEST_EXEC,
	/* These operations exist only on x86. */
	GUEST_RMW,
	GUEST_OUTS,
	GUEST_STI,
	/* These operations exist only on arm64. */
	GUEST_LDADD,
	GUEST_CAS,
	GUEST_LDXR_STXR,
	GUEST_DC_ZVA,
	GUEST_DC_CIVAC,
	GUEST_LDR_POST,
	GUEST_STR_PRE,
	GUEST_LDG,
	GUEST_STG,
};

/* The flags are alternatives, an exit has exactly one of them. */
static const struct access_type {
	const char *name;
	u64 flags;
} access_types[] = {
	[GUEST_READ]  = { "read",  KVM_MEMORY_EXIT_FLAG_READ },
	[GUEST_WRITE] = { "write", KVM_MEMORY_EXIT_FLAG_WRITE },
	[GUEST_EXEC]  = { "fetch", KVM_MEMORY_EXIT_FLAG_EXEC },
	[GUEST_RMW]   = { "read-modify-write", KVM_MEMORY_EXIT_FLAG_WRITE },
	[GUEST_OUTS]  = { "outs", 0 },
	[GUEST_STI]   = { "sti", 0 },

	[GUEST_LDADD]	  = { "ldadd", KVM_MEMORY_EXIT_FLAG_READ | KVM_MEMORY_EXIT_FLAG_WRITE },
	[GUEST_CAS]	  = { "cas", KVM_MEMORY_EXIT_FLAG_READ | KVM_MEMORY_EXIT_FLAG_WRITE },
	[GUEST_LDXR_STXR] = { "ldxr", KVM_MEMORY_EXIT_FLAG_READ },
	[GUEST_DC_ZVA]	  = { "dc zva", KVM_MEMORY_EXIT_FLAG_WRITE },
	[GUEST_DC_CIVAC]  = { "dc civac", KVM_MEMORY_EXIT_FLAG_WRITE },
	[GUEST_LDR_POST]  = { "post-indexed load", KVM_MEMORY_EXIT_FLAG_READ },
	[GUEST_STR_PRE]	  = { "pre-indexed store", KVM_MEMORY_EXIT_FLAG_WRITE },
	[GUEST_LDG]	  = { "load of a tag", KVM_MEMORY_EXIT_FLAG_READ },
	[GUEST_STG]	  = { "store of a tag", KVM_MEMORY_EXIT_FLAG_WRITE },
};

static u64 access_flags(enum guest_op op)
{
	u64 flags = access_types[op].flags;

	/*
	 * An atomic instruction on a missing page is a read, as a read would
	 * fault as well.  QEMU says so only if it emulates no more than one CPU.
	 */
	if (flags & KVM_MEMORY_EXIT_FLAG_READ && get_nprocs_conf() == 1)
		flags = KVM_MEMORY_EXIT_FLAG_READ;

	/*
	 * A read-modify-write is a write on x86.  QEMU with one CPU emulates even
	 * a locked one by a read that is followed by a write.
	 */
	if (op == GUEST_RMW && get_nprocs_conf() == 1)
		flags |= KVM_MEMORY_EXIT_FLAG_READ;

	return flags;
}

struct guest_cmd {
	u64 op;
	u64 gva;
	/* The value to write, or the value read. */
	u64 val;
};

static struct guest_cmd guest_cmds[MAX_VCPUS];

#ifdef __aarch64__
static void guest_arm64_insn(struct guest_cmd *cmd, u64 *mem)
{
	u64 val = cmd->val, tmp, status;

	switch (cmd->op) {
	case GUEST_LDADD:
		asm volatile(".arch_extension lse\n\t"
			     "ldadd %2, %0, %1"
			     : "=r" (val), "+Q" (*mem) : "r" (1ul));
		break;
	case GUEST_CAS:
		asm volatile(".arch_extension lse\n\t"
			     "cas %0, %2, %1"
			     : "+r" (val), "+Q" (*mem) : "r" (~val));
		break;
	case GUEST_LDXR_STXR:
		asm volatile("1: ldxr %0, %3\n\t"
			     "add %1, %0, #1\n\t"
			     "stxr %w2, %1, %3\n\t"
			     "cbnz %w2, 1b"
			     : "=&r" (val), "=&r" (tmp), "=&r" (status), "+Q" (*mem));
		break;
	case GUEST_DC_ZVA:
		asm volatile("dc zva, %0" : : "r" (mem) : "memory");
		break;
	case GUEST_DC_CIVAC:
		asm volatile("dc civac, %0" : : "r" (mem) : "memory");
		break;
	case GUEST_LDR_POST:
		asm volatile("ldr %0, [%1], #8" : "=&r" (val), "+r" (mem) : : "memory");
		break;
	case GUEST_STR_PRE:
		mem--;
		asm volatile("str %1, [%0, #8]!" : "+r" (mem) : "r" (~val) : "memory");
		break;
	case GUEST_LDG:
		tmp = 0;
		asm volatile(".arch armv8.5-a+memtag\n\t"
			     "ldg %0, [%1]"
			     : "+r" (tmp) : "r" ((u64)mem & ~(MTE_GRANULE_SIZE - 1)) : "memory");
		val = FIELD_GET(MTE_TAG_MASK, tmp);
		break;
	case GUEST_STG:
		asm volatile(".arch armv8.5-a+memtag\n\t"
			     "stg %0, [%1]"
			     : : "r" (FIELD_PREP(MTE_TAG_MASK, val)),
			       "r" ((u64)mem & ~(MTE_GRANULE_SIZE - 1)) : "memory");
		break;
	}

	/* Reveal whether base registers were updated, and how often. */
	WRITE_ONCE(cmd->gva, (u64)mem);
	WRITE_ONCE(cmd->val, val);
}
#endif

static void guest_code(u64 vcpu_id)
{
	struct guest_cmd *cmd = &guest_cmds[vcpu_id];

	for (;;) {
		u64 *mem = (u64 *)READ_ONCE(cmd->gva);

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
#ifdef __x86_64__
		case GUEST_RMW:
			asm volatile("lock incq %0" : "+m"(*mem));
			break;
		case GUEST_OUTS:
			asm volatile("outsb" : "+S"(mem) : "d"(DEBUG_PORT) : "memory");
			break;
		case GUEST_STI:
			asm volatile("sti");
			break;
#elif defined(__aarch64__)
		case GUEST_LDADD ... GUEST_STG:
			guest_arm64_insn(cmd, mem);
			break;
#endif
		default:
			GUEST_FAIL("Unknown operation %lu", cmd->op);
		}

		GUEST_SYNC(cmd->op);
	}
}

enum backing_type {
	BACKING_ANON,
	BACKING_SHMEM,
	BACKING_SHMEM_PRIVATE,
	BACKING_THP,
	BACKING_HUGETLB,
	BACKING_HUGETLB_SHARED,
	/* Memory that the caller has mapped. */
	BACKING_EXTERNAL,
};

static const struct backing {
	int mmap_flags;
	bool memfd;
	bool hugetlb;
} backings[] = {
	[BACKING_ANON]		 = { MAP_PRIVATE | MAP_ANONYMOUS },
	[BACKING_SHMEM]		 = { MAP_SHARED, .memfd = true },
	[BACKING_SHMEM_PRIVATE]	 = { MAP_PRIVATE, .memfd = true },
	[BACKING_THP]		 = { MAP_PRIVATE | MAP_ANONYMOUS },
	[BACKING_HUGETLB]	 = { MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, .hugetlb = true },
	[BACKING_HUGETLB_SHARED] = { MAP_SHARED, .memfd = true, .hugetlb = true },
};

struct env_config {
	enum backing_type backing;
	/* UFFDIO_REGISTER_MODE_*, 0 for memory without userfaultfd. */
	u64 uffd_mode;
	u64 uffd_features;
	/* Flags in addition to KVM_MEM_EXIT_ON_MISSING. */
	u32 slot_flags;
	int nr_vcpus;
	void *hva;
	size_t size;
};

struct env {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	struct kvm_vcpu *vcpus[MAX_VCPUS];
	struct guest_cmd *cmds;

	void *hva;
	/* A second mapping of shared memory, not registered with userfaultfd. */
	void *alias;
	/* The content that UFFDIO_COPY gives to the slot. */
	void *src;
	size_t size;
	u32 slot_flags;

	int uffd;
	int stop_fd;
	pthread_t uffd_reader;
	bool expect_uffd_msgs;
	u64 nr_uffd_msgs;
	u32 uffd_msg_tid;
};

static size_t host_page_size(void)
{
	return getpagesize();
}

/* Access the end of a page, to see that KVM reports the start of the page. */
static size_t word_offset(void)
{
	return host_page_size() - 3 * sizeof(u64);
}

static size_t page_offset(int page)
{
	return page * host_page_size();
}

static u64 *host_word(void *base, int page)
{
	return base + page_offset(page) + word_offset();
}

/* Code that returns if it is called, and is different for each page. */
static u64 page_content(int page)
{
	return RET_INSN | (u64)(page + 1) << 32;
}

static int uffd_ioctl(struct env *env, unsigned long cmd, void *arg)
{
	return ioctl(env->uffd, cmd, arg) ? errno : 0;
}

static int __uffd_copy(struct env *env, size_t offset, size_t len, u64 mode)
{
	struct uffdio_copy copy = {
		.dst = (u64)env->hva + offset,
		.src = (u64)env->src + offset,
		.len = len,
		.mode = mode,
	};

	return uffd_ioctl(env, UFFDIO_COPY, &copy);
}

static int uffd_copy(struct env *env, size_t offset, size_t len)
{
	return __uffd_copy(env, offset, len, 0);
}

static int uffd_zeropage(struct env *env, size_t offset, size_t len)
{
	struct uffdio_zeropage zeropage = {
		.range = { .start = (u64)env->hva + offset, .len = len },
	};

	return uffd_ioctl(env, UFFDIO_ZEROPAGE, &zeropage);
}

static int uffd_continue(struct env *env, size_t offset, size_t len)
{
	struct uffdio_continue cont = {
		.range = { .start = (u64)env->hva + offset, .len = len },
	};

	return uffd_ioctl(env, UFFDIO_CONTINUE, &cont);
}

static int uffd_poison(struct env *env, size_t offset, size_t len)
{
	struct uffdio_poison poison = {
		.range = { .start = (u64)env->hva + offset, .len = len },
	};

	return uffd_ioctl(env, UFFDIO_POISON, &poison);
}

static int uffd_writeprotect(struct env *env, size_t offset, size_t len, bool protect)
{
	struct uffdio_writeprotect wp = {
		.range = { .start = (u64)env->hva + offset, .len = len },
		.mode = protect ? UFFDIO_WRITEPROTECT_MODE_WP : 0,
	};

	return uffd_ioctl(env, UFFDIO_WRITEPROTECT, &wp);
}

static int populate_read(struct env *env, size_t offset, size_t len)
{
	return madvise(env->hva + offset, len, MADV_POPULATE_READ) ? errno : 0;
}

static int populate_write(struct env *env, size_t offset, size_t len)
{
	return madvise(env->hva + offset, len, MADV_POPULATE_WRITE) ? errno : 0;
}

static int touch_read(struct env *env, size_t offset, size_t len)
{
	(void)READ_ONCE(*(u64 *)(env->hva + offset));
	return 0;
}

static int touch_write(struct env *env, size_t offset, size_t len)
{
	__atomic_fetch_or((u64 *)(env->hva + offset), 0, __ATOMIC_RELAXED);
	return 0;
}

/*
 * Fail as soon as a message arrives that the test doesn't expect, as the thread
 * that caused the message would sleep until the page is provided.
 */
static void *uffd_reader_fn(void *arg)
{
	struct env *env = arg;
	struct pollfd fds[] = {
		{ .fd = env->uffd, .events = POLLIN },
		{ .fd = env->stop_fd, .events = POLLIN },
	};
	struct uffd_msg msg;
	u64 offset;
	int r;

	for (;;) {
		r = poll(fds, ARRAY_SIZE(fds), -1);
		if (r < 0 && errno == EINTR)
			continue;
		TEST_ASSERT(r > 0, __KVM_SYSCALL_ERROR("poll()", r));

		if (!fds[0].revents)
			return NULL;

		r = read(env->uffd, &msg, sizeof(msg));
		if (r < 0 && errno == EAGAIN)
			continue;
		TEST_ASSERT(r == sizeof(msg), "Read %d bytes of userfaultfd, errno = %d", r, errno);
		TEST_ASSERT(msg.event == UFFD_EVENT_PAGEFAULT,
			    "Unexpected userfaultfd event 0x%x", msg.event);

		offset = (msg.arg.pagefault.address - (u64)env->hva) & ~(host_page_size() - 1);
		TEST_ASSERT(READ_ONCE(env->expect_uffd_msgs),
			    "Unexpected userfaultfd message, offset 0x%lx, flags 0x%llx",
			    offset, msg.arg.pagefault.flags);

		env->uffd_msg_tid = msg.arg.pagefault.feat.ptid;
		WRITE_ONCE(env->nr_uffd_msgs, env->nr_uffd_msgs + 1);

		r = uffd_copy(env, offset, host_page_size());
		TEST_ASSERT(!r, "UFFDIO_COPY failed, errno = %d (%s)", r, strerror(r));
	}
}

/* The reader fails on a message, but may not yet have had the time to do so. */
static void assert_no_uffd_msg(struct env *env)
{
	struct pollfd pollfd = { .fd = env->uffd, .events = POLLIN };
	int r;

	if (env->uffd < 0)
		return;

	r = poll(&pollfd, 1, 0);
	TEST_ASSERT(!r, "userfaultfd has a message, poll() = %d, revents 0x%x", r, pollfd.revents);
}

static const char *env_register_uffd(struct env *env, const struct env_config *config)
{
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = config->uffd_features,
	};
	struct uffdio_register reg = {
		.range = { .start = (u64)env->hva, .len = env->size },
		.mode = config->uffd_mode,
	};
	int r;

	if (config->uffd_mode == UFFDIO_REGISTER_MODE_MINOR) {
		if (backings[config->backing].hugetlb)
			api.features |= UFFD_FEATURE_MINOR_HUGETLBFS;
		else
			api.features |= UFFD_FEATURE_MINOR_SHMEM;
	}

	env->uffd = syscall(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	TEST_ASSERT(env->uffd >= 0, __KVM_SYSCALL_ERROR("userfaultfd()", env->uffd));

	r = uffd_ioctl(env, UFFDIO_API, &api);
	if (r == EINVAL)
		return "userfaultfd lacks a feature";
	TEST_ASSERT(!r, "UFFDIO_API failed, errno = %d (%s)", r, strerror(r));

	r = uffd_ioctl(env, UFFDIO_REGISTER, &reg);
	if (r == EINVAL)
		return "userfaultfd does not support the memory";
	TEST_ASSERT(!r, "UFFDIO_REGISTER failed, errno = %d (%s)", r, strerror(r));
	return NULL;
}

static const char *env_setup_uffd(struct env *env, const struct env_config *config)
{
	const char *reason = env_register_uffd(env, config);

	if (reason)
		return reason;

	env->stop_fd = eventfd(0, EFD_CLOEXEC);
	TEST_ASSERT(env->stop_fd >= 0, __KVM_SYSCALL_ERROR("eventfd()", env->stop_fd));
	kvm_pthread_create(&env->uffd_reader, NULL, uffd_reader_fn, env);
	return NULL;
}

static const char *env_map_memory(struct env *env, const struct env_config *config)
{
	const struct backing *backing = &backings[config->backing];
	size_t align = host_page_size();
	int fd = -1;
	void *mem;

	env->size = TEST_NR_PAGES * host_page_size();

	if (config->backing == BACKING_THP) {
		if (!thp_configured())
			return "no transparent huge pages";
		align = get_trans_hugepagesz();
		env->size = align;
	} else if (backing->hugetlb) {
		env->size = get_def_hugetlb_pagesz();
	}

	if (env->size > MAX_HUGE_PAGE)
		return "huge page too large";

	if (backing->memfd)
		fd = kvm_memfd_alloc(env->size, backing->hugetlb);

	/* Hugetlb memory is aligned by mmap(), other memory can be moved up. */
	mem = mmap(NULL, env->size + align - host_page_size(), PROT_READ | PROT_WRITE,
		   backing->mmap_flags, fd, 0);
	if (mem == MAP_FAILED && backing->hugetlb)
		return "no free huge page";
	TEST_ASSERT(mem != MAP_FAILED, __KVM_SYSCALL_ERROR("mmap()", (int)(u64)mem));
	env->hva = align_ptr_up(mem, align);

	if (fd >= 0) {
		env->alias = kvm_mmap(env->size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
		close(fd);
	}

	/* Whether this works is seen, or doesn't matter. */
	if (!backing->hugetlb) {
		madvise(env->hva, env->size,
			config->backing == BACKING_THP ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
		if (env->alias)
			madvise(env->alias, env->size, MADV_NOHUGEPAGE);
	}

	return NULL;
}

/* Return NULL if all is set up, otherwise the reason to skip the test. */
static const char *env_create(struct env *env, const struct env_config *config)
{
	int nr_vcpus = config->nr_vcpus ?: 1;
	const char *reason = NULL;
	int i;

	env->uffd = -1;
	env->slot_flags = config->slot_flags;

	if (config->backing == BACKING_EXTERNAL) {
		env->hva = config->hva;
		env->size = config->size;
	} else {
		reason = env_map_memory(env, config);
	}
	if (reason)
		return reason;

	env->src = kvm_mmap(env->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	for (i = 0; i < env->size / host_page_size(); i++)
		WRITE_ONCE(*host_word(env->src, i), page_content(i));

	if (config->uffd_mode)
		reason = env_setup_uffd(env, config);
	if (reason)
		return reason;

	env->vm = vm_create_with_vcpus(nr_vcpus, guest_code, env->vcpus);
	env->vcpu = env->vcpus[0];
	env->cmds = addr_gva2hva(env->vm, (gva_t)guest_cmds);
	for (i = 0; i < nr_vcpus; i++)
		vcpu_args_set(env->vcpus[i], 1, i);

	vm_set_user_memory_region(env->vm, TEST_SLOT, env->slot_flags | KVM_MEM_EXIT_ON_MISSING,
				  TEST_GPA, env->size, env->hva);
	virt_map(env->vm, TEST_GVA, TEST_GPA, env->size / env->vm->page_size);
	virt_map(env->vm, MMIO_GVA, MMIO_GPA, host_page_size() / env->vm->page_size);
	return NULL;
}

static void env_destroy(struct env *env)
{
	u64 stop = 1;

	if (!env->vm)
		return;

	kvm_vm_free(env->vm);

	if (env->uffd < 0)
		return;

	/* The reader handles messages before it looks at stop_fd. */
	TEST_ASSERT_EQ(write(env->stop_fd, &stop, sizeof(stop)), sizeof(stop));
	kvm_pthread_join(env->uffd_reader, NULL);
	close(env->uffd);
}

static void set_slot_flag(struct env *env, bool exit_on_missing, bool region2)
{
	u32 flags = env->slot_flags | (exit_on_missing ? KVM_MEM_EXIT_ON_MISSING : 0);

	if (region2)
		vm_set_user_memory_region2(env->vm, TEST_SLOT, flags, TEST_GPA,
					   env->size, env->hva, 0, 0);
	else
		vm_set_user_memory_region(env->vm, TEST_SLOT, flags, TEST_GPA,
					  env->size, env->hva);
}

static void vcpu_set_access(struct env *env, struct kvm_vcpu *vcpu, enum guest_op op,
			    u64 gva, u64 val)
{
	env->cmds[vcpu->id] = (struct guest_cmd) { .op = op, .gva = gva, .val = val };
}

static const char *access_name(struct env *env, struct kvm_vcpu *vcpu)
{
	return access_types[env->cmds[vcpu->id].op].name;
}

/* Return true if the access is done, false if it ended in a memory fault. */
static bool vcpu_try_access(struct env *env, struct kvm_vcpu *vcpu)
{
	struct guest_cmd *cmd = &env->cmds[vcpu->id];
	struct kvm_run *run = vcpu->run;
	struct ucall uc;
	int r;

	/* Don't mistake an earlier exit for a new one. */
	if (run->exit_reason == KVM_EXIT_MEMORY_FAULT) {
		run->exit_reason = KVM_EXIT_UNKNOWN;
		memset(&run->memory_fault, 0xa5, sizeof(run->memory_fault));
	}

	r = _vcpu_run(vcpu);
	if (r) {
		TEST_ASSERT(r == -1 && errno == EFAULT,
			    "%s of 0x%lx: KVM_RUN = %d, errno = %d (%s)",
			    access_name(env, vcpu), cmd->gva, r, errno, strerror(errno));
		TEST_ASSERT_KVM_EXIT_REASON(vcpu, KVM_EXIT_MEMORY_FAULT);
		return false;
	}

	switch (get_ucall(vcpu, &uc)) {
	case UCALL_SYNC:
		TEST_ASSERT_EQ(uc.args[1], cmd->op);
		return true;
	case UCALL_ABORT:
		REPORT_GUEST_ASSERT(uc);
	default:
		TEST_FAIL("%s of 0x%lx: unexpected exit %u (%s)", access_name(env, vcpu), cmd->gva,
			  run->exit_reason, exit_reason_str(run->exit_reason));
	}
}

static void vcpu_expect_done(struct env *env, struct kvm_vcpu *vcpu)
{
	bool done = vcpu_try_access(env, vcpu);

	TEST_ASSERT(done, "%s of 0x%lx: unexpected exit for gpa 0x%llx, flags 0x%llx",
		    access_name(env, vcpu), env->cmds[vcpu->id].gva,
		    vcpu->run->memory_fault.gpa, vcpu->run->memory_fault.flags);
}

static void vcpu_expect_exit_for(struct env *env, struct kvm_vcpu *vcpu, u64 gpa, u64 flags)
{
	struct kvm_run *run = vcpu->run;
	struct guest_cmd *cmd = &env->cmds[vcpu->id];
	bool done = vcpu_try_access(env, vcpu);

	TEST_ASSERT(!done, "%s of 0x%lx: no exit", access_name(env, vcpu), cmd->gva);
	TEST_ASSERT(is_power_of_2(run->memory_fault.flags) &&
		    !(run->memory_fault.flags & ~flags) && run->memory_fault.gpa == gpa &&
		    run->memory_fault.size == host_page_size(),
		    "%s of 0x%lx: flags 0x%llx, gpa 0x%llx, size 0x%llx, expected 0x%lx, 0x%lx, 0x%lx",
		    access_name(env, vcpu), cmd->gva, run->memory_fault.flags,
		    run->memory_fault.gpa, run->memory_fault.size, flags, gpa, host_page_size());
	assert_no_uffd_msg(env);
}

static void vcpu_expect_exit(struct env *env, struct kvm_vcpu *vcpu)
{
	struct guest_cmd *cmd = &env->cmds[vcpu->id];

	vcpu_expect_exit_for(env, vcpu, cmd->gva & ~(host_page_size() - 1), access_flags(cmd->op));
}

static void set_access(struct env *env, enum guest_op op, int page, u64 val)
{
	vcpu_set_access(env, env->vcpu, op, TEST_GVA + page_offset(page) + word_offset(), val);
}

static void expect_done(struct env *env)
{
	vcpu_expect_done(env, env->vcpu);
}

/* Without any action of userspace, the exit repeats and doesn't change. */
static void expect_exits(struct env *env)
{
	vcpu_expect_exit(env, env->vcpu);
	vcpu_expect_exit(env, env->vcpu);
}

static void __maybe_unused expect_exits_for(struct env *env, int page, u64 flags)
{
	vcpu_expect_exit_for(env, env->vcpu, TEST_GPA + page_offset(page), flags);
	vcpu_expect_exit_for(env, env->vcpu, TEST_GPA + page_offset(page), flags);
}

static void guest_read(struct env *env, int page, u64 val)
{
	set_access(env, GUEST_READ, page, ~val);
	expect_done(env);
	TEST_ASSERT(env->cmds[0].val == val, "Guest read 0x%lx in page %d, expected 0x%lx",
		    env->cmds[0].val, page, val);
}

static void guest_write(struct env *env, int page, u64 val)
{
	u64 host_val;

	set_access(env, GUEST_WRITE, page, val);
	expect_done(env);
	host_val = READ_ONCE(*host_word(env->hva, page));
	TEST_ASSERT(host_val == val, "Host read 0x%lx in page %d, expected 0x%lx",
		    host_val, page, val);
}

static void __do_populate(struct env *env, const char *name,
			  int (*populate)(struct env *, size_t, size_t),
			  size_t offset, size_t len)
{
	int r = populate(env, offset, len);

	TEST_ASSERT(!r, "%s(0x%lx, 0x%lx) failed, errno = %d (%s)", name, offset, len,
		    r, strerror(r));
}

#define do_populate(env, populate, page)					\
	__do_populate(env, #populate, populate, page_offset(page), host_page_size())

static void do_populate_all(struct env *env, int (*populate)(struct env *, size_t, size_t))
{
	__do_populate(env, "populate", populate, 0, env->size);
}

FIXTURE(exit_on_missing) {
	struct env env;
};

FIXTURE_SETUP(exit_on_missing)
{
}

FIXTURE_TEARDOWN(exit_on_missing)
{
	env_destroy(&self->env);
}

/* Most tests need nothing but anonymous memory with userfaultfd. */
static const struct env_config anon_config = {
	.backing = BACKING_ANON,
	.uffd_mode = UFFDIO_REGISTER_MODE_MISSING,
};

TEST_F(exit_on_missing, capability)
{
	struct env *env = &self->env;
	int r;

	TEST_ASSERT(!env_create(env, &anon_config), "Unexpected skip");

	TEST_ASSERT_EQ(kvm_check_cap(KVM_CAP_EXIT_ON_MISSING), KVM_MEM_EXIT_ON_MISSING);
	TEST_ASSERT_EQ(vm_check_cap(env->vm, KVM_CAP_EXIT_ON_MISSING), KVM_MEM_EXIT_ON_MISSING);

	r = __vm_enable_cap(env->vm, KVM_CAP_EXIT_ON_MISSING, 0);
	TEST_ASSERT(r == -1 && errno == EINVAL, "KVM_ENABLE_CAP = %d, errno = %d", r, errno);
	r = __vm_enable_cap(env->vm, KVM_CAP_EXIT_ON_MISSING, KVM_MEM_EXIT_ON_MISSING);
	TEST_ASSERT(r == -1 && errno == EINVAL, "KVM_ENABLE_CAP = %d, errno = %d", r, errno);
}

FIXTURE(populate) {
	struct env env;
};

FIXTURE_VARIANT(populate) {
	int (*populate)(struct env *env, size_t offset, size_t len);
	enum backing_type backing;
	u64 uffd_mode;
	/* The page is filled with zeroes. */
	bool zero;
	/* The page is mapped read-only, i.e. a write exits once more. */
	bool read_only;
};

FIXTURE_VARIANT_ADD(populate, uffd_copy) {
	.populate = uffd_copy,
	.backing = BACKING_ANON,
	.uffd_mode = UFFDIO_REGISTER_MODE_MISSING,
};

FIXTURE_VARIANT_ADD(populate, uffd_copy_shmem) {
	.populate = uffd_copy,
	.backing = BACKING_SHMEM,
	.uffd_mode = UFFDIO_REGISTER_MODE_MISSING,
};

FIXTURE_VARIANT_ADD(populate, uffd_zeropage) {
	.populate = uffd_zeropage,
	.backing = BACKING_ANON,
	.uffd_mode = UFFDIO_REGISTER_MODE_MISSING,
	.zero = true,
	.read_only = true,
};

FIXTURE_VARIANT_ADD(populate, uffd_continue) {
	.populate = uffd_continue,
	.backing = BACKING_SHMEM,
	.uffd_mode = UFFDIO_REGISTER_MODE_MINOR,
};

FIXTURE_VARIANT_ADD(populate, uffd_continue_private) {
	.populate = uffd_continue,
	.backing = BACKING_SHMEM_PRIVATE,
	.uffd_mode = UFFDIO_REGISTER_MODE_MINOR,
	.read_only = true,
};

FIXTURE_VARIANT_ADD(populate, madv_read) {
	.populate = populate_read,
	.backing = BACKING_ANON,
	.zero = true,
	.read_only = true,
};

FIXTURE_VARIANT_ADD(populate, madv_read_shmem) {
	.populate = populate_read,
	.backing = BACKING_SHMEM,
	.uffd_mode = UFFDIO_REGISTER_MODE_MISSING,
};

FIXTURE_VARIANT_ADD(populate, madv_write) {
	.populate = populate_write,
	.backing = BACKING_ANON,
	.zero = true,
};

FIXTURE_VARIANT_ADD(populate, madv_write_shmem) {
	.populate = populate_write,
	.backing = BACKING_SHMEM,
	.uffd_mode = UFFDIO_REGISTER_MODE_MISSING,
};

FIXTURE_VARIANT_ADD(populate, touch_read) {
	.populate = touch_read,
	.backing = BACKING_ANON,
	.zero = true,
	.read_only = true,
};

FIXTURE_VARIANT_ADD(populate, touch_read_shmem) {
	.populate = touch_read,
	.backing = BACKING_SHMEM,
	.uffd_mode = UFFDIO_REGISTER_MODE_MISSING,
};

FIXTURE_VARIANT_ADD(populate, touch_write) {
	.populate = touch_write,
	.backing = BACKING_ANON,
	.zero = true,
};

FIXTURE_VARIANT_ADD(populate, touch_write_shmem) {
	.populate = touch_write,
	.backing = BACKING_SHMEM,
	.uffd_mode = UFFDIO_REGISTER_MODE_MISSING,
};

FIXTURE_SETUP(populate)
{
	const struct env_config config = {
		.backing = variant->backing,
		.uffd_mode = variant->uffd_mode,
	};
	const char *reason = env_create(&self->env, &config);

	if (reason)
		SKIP(return, "%s", reason);
}

FIXTURE_TEARDOWN(populate)
{
	env_destroy(&self->env);
}

TEST_F(populate, read_write_fetch)
{
	struct env *env = &self->env;
	u64 val;
	int op;

	for (op = GUEST_READ; op <= GUEST_EXEC; op++) {
		/* Zeroes are not code that returns. */
		if (op == GUEST_EXEC && variant->zero)
			continue;

		/*
		 * Put pages into the page cache one by one, as a read fault in
		 * the host may map all cached pages around the faulting one.
		 */
		if (env->alias && variant->populate != uffd_copy)
			WRITE_ONCE(*host_word(env->alias, op), page_content(op));

		val = ~page_content(op);
		set_access(env, op, op, val);
		expect_exits(env);

		do_populate(env, variant->populate, op);
		if (op == GUEST_WRITE && variant->read_only) {
			expect_exits(env);
			do_populate(env, populate_write, op);
		}

		expect_done(env);

		if (op == GUEST_READ)
			TEST_ASSERT_EQ(env->cmds[0].val, variant->zero ? 0 : page_content(op));
		else if (op == GUEST_WRITE)
			TEST_ASSERT_EQ(READ_ONCE(*host_word(env->hva, op)), val);

		/* Repeat the access, the page is mapped now. */
		expect_done(env);
	}

	/* Nothing of the above has mapped another page. */
	set_access(env, GUEST_READ, TEST_NR_PAGES - 1, 0);
	expect_exits(env);
}

/*
 * KVM can't use fast GUP for the zero page, and must use it nevertheless if it
 * is mapped, otherwise the guest would exit forever.
 */
TEST_F(exit_on_missing, zero_page)
{
	const struct env_config config = { .backing = BACKING_ANON };
	struct env *env = &self->env;
	int i;

	TEST_ASSERT(!env_create(env, &config), "Unexpected skip");

	do_populate_all(env, populate_read);
	for (i = 0; i < TEST_NR_PAGES; i++)
		guest_read(env, i, 0);

	for (i = 0; i < TEST_NR_PAGES; i++) {
		set_access(env, GUEST_WRITE, i, page_content(i));
		expect_exits(env);
		do_populate(env, populate_write, i);
		expect_done(env);
		TEST_ASSERT_EQ(READ_ONCE(*host_word(env->hva, i)), page_content(i));
		guest_read(env, i, page_content(i));
	}
}

static bool huge_zero_page_enabled(void)
{
	char val = '0';
	int fd;

	fd = open("/sys/kernel/mm/transparent_hugepage/use_zero_page", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;

	test_read(fd, &val, sizeof(val));
	close(fd);
	return val == '1';
}

/* Return the number of pages that are mapped, without mapping more of them. */
static size_t nr_mapped_pages(struct env *env)
{
	size_t nr_pages = env->size / host_page_size(), nr_mapped = 0, i;
	u8 *vec = calloc(nr_pages, 1);
	int r;

	TEST_ASSERT(vec, "calloc() failed");
	r = mincore(env->hva, env->size, vec);
	TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("mincore()", r));

	for (i = 0; i < nr_pages; i++)
		nr_mapped += vec[i] & 1;

	free(vec);
	return nr_mapped;
}

TEST_F(exit_on_missing, huge_zero_page)
{
	const struct env_config config = { .backing = BACKING_THP };
	struct env *env = &self->env;
	const char *reason = env_create(env, &config);
	int nr_pages, middle, i;

	if (reason)
		SKIP(return, "%s", reason);

	nr_pages = env->size / host_page_size();
	middle = nr_pages / 2;

	set_access(env, GUEST_READ, middle, 0);
	expect_exits(env);
	do_populate(env, populate_read, middle);
	if (!huge_zero_page_enabled() || nr_mapped_pages(env) != nr_pages)
		SKIP(return, "no huge zero page");

	expect_done(env);
	for (i = middle - 1; i <= middle + 1; i++)
		guest_read(env, i, 0);
	guest_read(env, 0, 0);
	guest_read(env, nr_pages - 1, 0);

	set_access(env, GUEST_WRITE, middle + 1, page_content(0));
	expect_exits(env);
	do_populate(env, populate_write, middle + 1);
	expect_done(env);
	guest_read(env, middle + 1, page_content(0));
}

struct collapse {
	struct env *env;
	bool done;
	int r;
};

static void *collapse_fn(void *arg)
{
	struct collapse *collapse = arg;

	collapse->r = madvise(collapse->env->hva, collapse->env->size, MADV_COLLAPSE);
	WRITE_ONCE(collapse->done, true);
	return NULL;
}

/*
 * To replace small pages by a huge one unmaps all of them for as long as it takes
 * to copy them.  They are not missing meanwhile, no page was ever dropped.
 */
TEST_F(exit_on_missing, collapse)
{
	const struct env_config config = { .backing = BACKING_THP };
	struct env *env = &self->env;
	const char *reason = env_create(env, &config);
	struct collapse collapse = { .env = env };
	int nr_pages, nr_collapsed = 0, i, page;
	pthread_t thread;

	if (reason)
		SKIP(return, "%s", reason);

	nr_pages = env->size / host_page_size();
	for (i = 0; i < 20; i++) {
		kvm_madvise(env->hva, env->size, MADV_DONTNEED);
		kvm_madvise(env->hva, env->size, MADV_NOHUGEPAGE);
		for (page = 0; page < nr_pages; page++)
			WRITE_ONCE(*host_word(env->hva, page), page_content(page));
		kvm_madvise(env->hva, env->size, MADV_HUGEPAGE);

		collapse.done = false;
		kvm_pthread_create(&thread, NULL, collapse_fn, &collapse);
		for (page = 0; !READ_ONCE(collapse.done); page = (page + 1) % nr_pages)
			guest_read(env, page, page_content(page));
		kvm_pthread_join(thread, NULL);
		nr_collapsed += !collapse.r;
	}

	if (!nr_collapsed)
		SKIP(return, "no MADV_COLLAPSE, or no huge page for it");
}

struct drop {
	void *mem;
	size_t size;
};

static void *drop_fn(void *arg)
{
	struct drop *drop = arg;

	kvm_madvise(drop->mem, drop->size, MADV_DONTNEED);
	return NULL;
}

static bool is_resident(void *page)
{
	u8 vec;
	int r = mincore(page, host_page_size(), &vec);

	TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("mincore()", r));
	return vec & 1;
}

/*
 * While memory is being invalidated, a page that isn't found may be back soon, thus
 * KVM retries, and doesn't exit before the end.  To make that last, drop much more
 * memory than the slot has.  What is last in it is dropped last, i.e. as long as it
 * is there, no exit may have been.  KVM on x86 looks for an invalidation before it
 * looks for the page, too, and either would do here.
 */
TEST_F(exit_on_missing, invalidation)
{
	struct drop drop = { .size = SZ_256M };
	struct env_config config = { .backing = BACKING_EXTERNAL };
	struct env *env = &self->env;
	void *last_page;
	pthread_t thread;
	int i;

	drop.mem = kvm_mmap(drop.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	madvise(drop.mem, drop.size, MADV_NOHUGEPAGE);
	last_page = drop.mem + drop.size - host_page_size();

	config.hva = drop.mem;
	config.size = TEST_NR_PAGES * host_page_size();
	TEST_ASSERT(!env_create(env, &config), "Unexpected skip");

	for (i = 0; i < 10; i++) {
		/* Zero pages, i.e. no memory to speak of. */
		kvm_madvise(drop.mem, drop.size, MADV_POPULATE_READ);
		guest_read(env, 0, 0);

		kvm_pthread_create(&thread, NULL, drop_fn, &drop);
		do {
			set_access(env, GUEST_READ, 0, 1);
		} while (vcpu_try_access(env, env->vcpu));
		TEST_ASSERT(!is_resident(last_page), "Exit %d, before the invalidation's end", i);
		kvm_pthread_join(thread, NULL);
	}
}

/* Expect the given pages, in ascending order, and no other page to be dirty. */
static void expect_dirty(struct env *env, const int *pages, int nr)
{
	int nr_pages = env->size / host_page_size(), i;
	unsigned long *bitmap = bitmap_zalloc(nr_pages);

	kvm_vm_get_dirty_log(env->vm, TEST_SLOT, bitmap);
	for (i = 0; i < nr_pages; i++) {
		bool expected = nr && *pages == i;

		TEST_ASSERT(test_bit(i, bitmap) == expected, "Page %d is %s", i,
			    expected ? "not dirty" : "dirty");
		if (expected) {
			pages++;
			nr--;
		}
	}

	free(bitmap);
}

FIXTURE(huge_page) {
	struct env env;
};

FIXTURE_VARIANT(huge_page) {
	int (*populate)(struct env *env, size_t offset, size_t len);
	enum backing_type backing;
	u64 uffd_mode;
	u32 slot_flags;
};

FIXTURE_VARIANT_ADD(huge_page, thp) {
	.populate = populate_write,
	.backing = BACKING_THP,
};

FIXTURE_VARIANT_ADD(huge_page, hugetlb) {
	.populate = uffd_copy,
	.backing = BACKING_HUGETLB,
	.uffd_mode = UFFDIO_REGISTER_MODE_MISSING,
};

FIXTURE_VARIANT_ADD(huge_page, hugetlb_shared) {
	.populate = uffd_continue,
	.backing = BACKING_HUGETLB_SHARED,
	.uffd_mode = UFFDIO_REGISTER_MODE_MINOR,
};

/* KVM maps the huge page as small pages, to log which of them is written. */
FIXTURE_VARIANT_ADD(huge_page, thp_dirty_log) {
	.populate = populate_write,
	.backing = BACKING_THP,
	.slot_flags = KVM_MEM_LOG_DIRTY_PAGES,
};

FIXTURE_VARIANT_ADD(huge_page, hugetlb_dirty_log) {
	.populate = uffd_copy,
	.backing = BACKING_HUGETLB,
	.uffd_mode = UFFDIO_REGISTER_MODE_MISSING,
	.slot_flags = KVM_MEM_LOG_DIRTY_PAGES,
};

FIXTURE_SETUP(huge_page)
{
	const struct env_config config = {
		.backing = variant->backing,
		.uffd_mode = variant->uffd_mode,
		.slot_flags = variant->slot_flags,
	};
	const char *reason = env_create(&self->env, &config);

	if (reason)
		SKIP(return, "%s", reason);
}

FIXTURE_TEARDOWN(huge_page)
{
	env_destroy(&self->env);
}

TEST_F(huge_page, fault_in_the_middle)
{
	struct env *env = &self->env;
	int nr_pages = env->size / host_page_size();
	int middle = nr_pages / 2 + 1;
	int i;

	/* Minor faults need the page to be in the page cache. */
	for (i = 0; i < nr_pages && variant->populate == uffd_continue; i++)
		WRITE_ONCE(*host_word(env->alias, i), page_content(i));

	set_access(env, GUEST_WRITE, middle, ~page_content(middle));
	expect_exits(env);

	/* UFFDIO_{COPY,CONTINUE} provide a huge page only as a whole. */
	if (backings[variant->backing].hugetlb)
		do_populate_all(env, variant->populate);
	else
		do_populate(env, variant->populate, middle);

	if (nr_mapped_pages(env) != nr_pages)
		SKIP(return, "no huge page");

	expect_done(env);
	TEST_ASSERT_EQ(READ_ONCE(*host_word(env->hva, middle)), ~page_content(middle));

	guest_write(env, middle - 1, page_content(0));
	guest_write(env, 0, page_content(0));
	guest_write(env, nr_pages - 1, page_content(0));

	if (variant->slot_flags & KVM_MEM_LOG_DIRTY_PAGES)
		expect_dirty(env, (int[]){ 0, middle - 1, middle, nr_pages - 1 }, 4);

	guest_read(env, middle + 1, backings[variant->backing].hugetlb ?
		   page_content(middle + 1) : 0);
}

/* The access is not allowed to begin with, still KVM doesn't tell why. */
TEST_F(exit_on_missing, read_only_vma)
{
	const struct env_config config = {
		.backing = BACKING_SHMEM,
		.uffd_mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	struct env *env = &self->env;
	int i, r;

	TEST_ASSERT(!env_create(env, &config), "Unexpected skip");

	r = mprotect(env->hva, env->size, PROT_READ);
	TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("mprotect()", r));

	for (i = 0; i < TEST_NR_PAGES; i++) {
		WRITE_ONCE(*host_word(env->alias, i), page_content(i));
		set_access(env, GUEST_READ, i, 0);
		expect_exits(env);
		do_populate(env, populate_read, i);
		expect_done(env);
		TEST_ASSERT_EQ(env->cmds[0].val, page_content(i));

		set_access(env, GUEST_WRITE, i, ~page_content(i));
		expect_exits(env);
		r = mprotect(env->hva + page_offset(i), host_page_size(), PROT_READ | PROT_WRITE);
		TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("mprotect()", r));
		do_populate(env, populate_write, i);
		expect_done(env);
		TEST_ASSERT_EQ(READ_ONCE(*host_word(env->hva, i)), ~page_content(i));
	}
}

static void expect_mmio_write(struct env *env, int page)
{
	struct kvm_run *run = env->vcpu->run;
	u64 val = ~page_content(page);
	int r;

	set_access(env, GUEST_WRITE, page, val);
	r = _vcpu_run(env->vcpu);
	TEST_ASSERT(!r, KVM_IOCTL_ERROR(KVM_RUN, r));
	TEST_ASSERT_KVM_EXIT_REASON(env->vcpu, KVM_EXIT_MMIO);
	TEST_ASSERT_EQ(run->mmio.phys_addr, TEST_GPA + page_offset(page) + word_offset());
	TEST_ASSERT_EQ(run->mmio.is_write, 1);
	TEST_ASSERT_EQ(run->mmio.len, sizeof(val));
	TEST_ASSERT(!memcmp(run->mmio.data, &val, sizeof(val)), "MMIO data 0x%lx, expected 0x%lx",
		    *(u64 *)run->mmio.data, val);
	expect_done(env);
}

/* Writes to a read-only memslot are MMIO, be the page missing or not. */
TEST_F(exit_on_missing, read_only_slot)
{
	const struct env_config config = {
		.backing = BACKING_ANON,
		.uffd_mode = UFFDIO_REGISTER_MODE_MISSING,
		.slot_flags = KVM_MEM_READONLY,
	};
	struct env *env = &self->env;

	if (!kvm_has_cap(KVM_CAP_READONLY_MEM))
		SKIP(return, "no read-only memslots");

	TEST_ASSERT(!env_create(env, &config), "Unexpected skip");

	expect_mmio_write(env, 0);
	set_access(env, GUEST_READ, 0, 0);
	expect_exits(env);
	do_populate(env, uffd_copy, 0);
	guest_read(env, 0, page_content(0));
	expect_mmio_write(env, 0);
	guest_read(env, 0, page_content(0));

	set_access(env, GUEST_EXEC, 1, 0);
	expect_exits(env);
	do_populate(env, uffd_copy, 1);
	expect_done(env);
	expect_mmio_write(env, 1);

	set_access(env, GUEST_READ, 2, 0);
	expect_exits(env);
	do_populate(env, uffd_zeropage, 2);
	guest_read(env, 2, 0);
	expect_mmio_write(env, 2);
	guest_read(env, 2, 0);

	assert_no_uffd_msg(env);
}

static int open_sysfs(const char *dir, const char *name, int flags)
{
	char path[PATH_MAX];

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	return open(path, flags | O_CLOEXEC);
}

static bool is_ivshmem(const char *dir)
{
	const char *id = "pci:v00001AF4d00001110";
	char modalias[64] = {};
	int fd, r;

	fd = open_sysfs(dir, "modalias", O_RDONLY);
	if (fd < 0)
		return false;

	r = read(fd, modalias, sizeof(modalias) - 1);
	close(fd);
	return r > 0 && !strncmp(modalias, id, strlen(id));
}

/* Find the BAR of an ivshmem device, as its memory has no side effects. */
static int open_bar(void)
{
	int bar = -1, fd, i;
	glob_t devices;

	if (bar_path) {
		bar = open(bar_path, O_RDWR | O_CLOEXEC);
		TEST_ASSERT(bar >= 0, "Can't open %s, errno = %d", bar_path, errno);
		return bar;
	}

	if (glob("/sys/bus/pci/devices/*", 0, NULL, &devices))
		return -1;

	for (i = 0; i < devices.gl_pathc && bar < 0; i++) {
		if (!is_ivshmem(devices.gl_pathv[i]))
			continue;

		/* Memory decoding may be off if no driver uses the device. */
		fd = open_sysfs(devices.gl_pathv[i], "enable", O_WRONLY);
		if (fd >= 0) {
			test_write(fd, "1", 1);
			close(fd);
		}

		bar = open_sysfs(devices.gl_pathv[i], "resource2", O_RDWR);
	}

	globfree(&devices);
	return bar;
}

/* A PFN without struct page is never "missing", nothing could populate it. */
TEST_F(exit_on_missing, pfnmap)
{
	struct env_config config = { .backing = BACKING_EXTERNAL };
	struct env *env = &self->env;
	u64 val, nr_pages;
	struct stat st;
	int fd, i, r;

	fd = open_bar();
	if (fd < 0)
		SKIP(return, "no PCI device with a RAM-backed BAR");
	TEST_ASSERT(!fstat(fd, &st), "fstat() failed, errno = %d", errno);

	nr_pages = min_t(u64, st.st_size / host_page_size(), TEST_NR_PAGES);
	TEST_ASSERT(nr_pages, "BAR of 0x%lx bytes", (u64)st.st_size);
	config.size = nr_pages * host_page_size();
	config.hva = kvm_mmap(config.size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	close(fd);

	TEST_ASSERT(!env_create(env, &config), "Unexpected skip");

	/* pKVM on arm64 maps only memory, whether the slot has the flag or not. */
	set_slot_flag(env, false, false);
	set_access(env, GUEST_READ, nr_pages - 1, 0);
	r = _vcpu_run(env->vcpu);
	if (r == -1 && errno == EINVAL)
		SKIP(return, "KVM can't map a BAR");
	TEST_ASSERT(!r, KVM_IOCTL_ERROR(KVM_RUN, r));
	set_slot_flag(env, true, false);

	for (i = 0; i < nr_pages; i++) {
		val = page_content(i);
		guest_write(env, i, val);
		guest_read(env, i, val);
		WRITE_ONCE(*host_word(env->hva, i), ~val);
		guest_read(env, i, ~val);
	}
}

/* Map something else where the memslot's memory is. */
static void remap(struct env *env, int prot, int flags, int fd)
{
	void *mem = mmap(env->hva, env->size, prot, MAP_FIXED | flags, fd, 0);

	TEST_ASSERT(mem == env->hva, __KVM_SYSCALL_ERROR("mmap()", (int)(u64)mem));
}

static bool can_map_cacheable_pfns(void)
{
#ifdef __aarch64__
	struct kvm_vm *vm = vm_create_barebones();
	bool can = vm_check_cap(vm, KVM_CAP_ARM_CACHEABLE_PFNMAP_SUPPORTED);

	kvm_vm_free(vm);
	return can;
#else
	return true;
#endif
}

/*
 * A mapping of PFNs that the first access to it sets up: fast GUP finds nothing,
 * and no ioctl of userfaultfd could provide it.
 */
TEST_F(exit_on_missing, pfnmap_on_demand)
{
	struct udmabuf_create create = { .size = TEST_NR_PAGES * host_page_size() };
	struct env_config config = {
		.backing = BACKING_EXTERNAL,
		.size = create.size,
	};
	struct env *env = &self->env;
	int fd, buf, r;
	void *mem;

	if (!can_map_cacheable_pfns())
		SKIP(return, "KVM can't map cacheable PFNs");

	fd = open("/dev/udmabuf", O_RDWR | O_CLOEXEC);
	if (fd < 0)
		SKIP(return, "no /dev/udmabuf");

	create.memfd = memfd_create("udmabuf", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	TEST_ASSERT(create.memfd >= 0, __KVM_SYSCALL_ERROR("memfd_create()", create.memfd));
	r = ftruncate(create.memfd, create.size);
	TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("ftruncate()", r));
	r = fcntl(create.memfd, F_ADD_SEALS, F_SEAL_SHRINK);
	TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("fcntl()", r));
	mem = kvm_mmap(create.size, PROT_READ | PROT_WRITE, MAP_SHARED, create.memfd);
	*host_word(mem, 0) = page_content(0);

	buf = ioctl(fd, UDMABUF_CREATE, &create);
	TEST_ASSERT(buf >= 0, __KVM_IOCTL_ERROR("UDMABUF_CREATE", buf));
	config.hva = kvm_mmap(create.size, PROT_READ | PROT_WRITE, MAP_SHARED, buf);
	close(fd);
	TEST_ASSERT(!env_create(env, &config), "Unexpected skip");

	guest_read(env, 0, page_content(0));

	/* To map the buffer anew makes all of its pages untouched. */
	remap(env, PROT_READ | PROT_WRITE, MAP_SHARED, buf);
	guest_write(env, 0, ~page_content(0));
	TEST_ASSERT_EQ(READ_ONCE(*host_word(mem, 0)), ~page_content(0));

	close(buf);
	close(create.memfd);
	kvm_munmap(mem, create.size);
}

static void *find_vvar(void)
{
	unsigned long start = 0;
	char line[256];
	FILE *f;

	f = fopen("/proc/self/maps", "r");
	TEST_ASSERT(f, "Can't open /proc/self/maps, errno = %d", errno);
	while (!start && fgets(line, sizeof(line), f)) {
		if (strstr(line, "[vvar]\n"))
			sscanf(line, "%lx", &start);
	}
	fclose(f);
	return (void *)start;
}

FIXTURE(vvar) {
	struct env env;
};

FIXTURE_VARIANT(vvar) {
	u32 slot_flags;
};

FIXTURE_VARIANT_ADD(vvar, writable_slot) {
	.slot_flags = 0,
};

FIXTURE_VARIANT_ADD(vvar, read_only_slot) {
	.slot_flags = KVM_MEM_READONLY,
};

FIXTURE_SETUP(vvar)
{
}

FIXTURE_TEARDOWN(vvar)
{
	env_destroy(&self->env);
}

/* The pages of [vvar] belong to the kernel, and are mapped read-only. */
TEST_F(vvar, read)
{
	const struct env_config config = {
		.backing = BACKING_EXTERNAL,
		.hva = find_vvar(),
		.size = host_page_size(),
		.slot_flags = variant->slot_flags,
	};
	struct env *env = &self->env;
	u64 *word = config.hva;
	u64 before, after;
	int i;

	if (!config.hva)
		SKIP(return, "no [vvar]");
	if (variant->slot_flags && !kvm_has_cap(KVM_CAP_READONLY_MEM))
		SKIP(return, "no read-only memslots");

	TEST_ASSERT(!env_create(env, &config), "Unexpected skip");

	for (i = 0; i < host_page_size() / sizeof(*word); i += 8) {
		vcpu_set_access(env, env->vcpu, GUEST_READ, TEST_GVA + i * sizeof(*word), 0);
		before = READ_ONCE(word[i]);
		expect_done(env);
		after = READ_ONCE(word[i]);

		/* The kernel updates the page all the time. */
		if (before == after)
			TEST_ASSERT(env->cmds[0].val == after, "Guest read 0x%lx, host 0x%lx",
				    env->cmds[0].val, after);
	}

	if (!variant->slot_flags) {
		set_access(env, GUEST_WRITE, 0, 0);
		expect_exits(env);
	}
}

struct two_vcpus {
	struct env *env;
	pthread_barrier_t barrier;
};

struct two_vcpus_thread {
	struct two_vcpus *shared;
	struct kvm_vcpu *vcpu;
	pthread_t thread;
};

static void *two_vcpus_fn(void *arg)
{
	struct two_vcpus_thread *thread = arg;
	struct two_vcpus *shared = thread->shared;
	struct kvm_vcpu *vcpu = thread->vcpu;
	struct env *env = shared->env;
	u64 gva;
	bool done;
	int i;

	for (i = 0; i < TEST_NR_PAGES; i++) {
		/* One vCPU reads, the other one writes a different word. */
		gva = TEST_GVA + page_offset(i) + word_offset();
		if (vcpu->id == (i / 2) % 2)
			vcpu_set_access(env, vcpu, GUEST_READ, gva, 0);
		else
			vcpu_set_access(env, vcpu, GUEST_WRITE, gva + sizeof(u64), gva);

		/* Both exit, as long as none populates. */
		pthread_barrier_wait(&shared->barrier);
		vcpu_expect_exit(env, vcpu);
		pthread_barrier_wait(&shared->barrier);

		/* Race re-running the access with populating the page. */
		done = false;
		if (vcpu->id == i % 2)
			do_populate(env, uffd_copy, i);
		else
			done = vcpu_try_access(env, vcpu);

		pthread_barrier_wait(&shared->barrier);
		if (!done)
			vcpu_expect_done(env, vcpu);

		if (env->cmds[vcpu->id].op == GUEST_READ)
			TEST_ASSERT_EQ(env->cmds[vcpu->id].val, page_content(i));
		else
			TEST_ASSERT_EQ(READ_ONCE(*(host_word(env->hva, i) + 1)), gva);
	}

	return NULL;
}

TEST_F(exit_on_missing, two_vcpus)
{
	const struct env_config config = {
		.backing = BACKING_ANON,
		.uffd_mode = UFFDIO_REGISTER_MODE_MISSING,
		.nr_vcpus = 2,
	};
	struct env *env = &self->env;
	struct two_vcpus shared = { .env = env };
	struct two_vcpus_thread threads[2];
	int i;

	TEST_ASSERT(!env_create(env, &config), "Unexpected skip");
	TEST_ASSERT(!pthread_barrier_init(&shared.barrier, NULL, 2), "pthread_barrier_init()");

	for (i = 0; i < 2; i++) {
		threads[i].shared = &shared;
		threads[i].vcpu = env->vcpus[i];
		kvm_pthread_create(&threads[i].thread, NULL, two_vcpus_fn, &threads[i]);
	}
	for (i = 0; i < 2; i++)
		kvm_pthread_join(threads[i].thread, NULL);
}

static void *idle_fn(void *unused)
{
	for (;;)
		pause();
	return NULL;
}

/* The scheduler's scans go by this clock. */
static time_t cpu_seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
	return now.tv_sec;
}

/*
 * Return NULL, or the reason to skip the test.
 *
 * A page with a NUMA hint is there: a read doesn't exit, as MADV_POPULATE_READ would
 * leave the hint alone.  A write does.  It is up to the scheduler when hints appear;
 * it gives none to pages of the own node while a process has one thread only.  The
 * slot is as large as a huge page, for KVM to look at the size of the host's mapping.
 */
static const char *try_numa_hints(struct env *env, bool huge)
{
	const struct env_config config = { .backing = BACKING_THP, .nr_vcpus = 2 };
	struct kvm_vcpu *reader;
	int nr_hints, page = 0;
	const char *reason;
	pthread_t idle;
	time_t start;
	u64 gva;

	if (!is_multi_numa_node_system() || !is_numa_balancing_enabled())
		return "no NUMA balancing";

	set_mempolicy(MPOL_DEFAULT, NULL, 0);
	reason = env_create(env, &config);
	if (reason)
		return reason;
	if (!huge)
		madvise(env->hva, env->size, MADV_NOHUGEPAGE);
	reader = env->vcpus[1];
	do_populate_all(env, populate_write);
	kvm_pthread_create(&idle, NULL, idle_fn, NULL);

	for (nr_hints = 0; nr_hints < 2; nr_hints++) {
		start = cpu_seconds();
		do {
			if (cpu_seconds() - start > 60)
				return "no NUMA hint in a minute of CPU time";
			page = (page + 1) % TEST_NR_PAGES;
			set_access(env, GUEST_WRITE, page, page_content(page));
		} while (vcpu_try_access(env, env->vcpu));

		/* Nobody writes to the start of a page. */
		gva = TEST_GVA + page_offset(page);
		vcpu_set_access(env, reader, GUEST_READ, gva, 1);
		vcpu_expect_done(env, reader);
		TEST_ASSERT_EQ(env->cmds[reader->id].val, 0);

		expect_exits(env);
		do_populate(env, populate_write, page);
		while (!vcpu_try_access(env, env->vcpu))
			do_populate(env, populate_write, page);
	}

	kvm_pthread_cancel_join(idle);
	return NULL;
}

TEST_F(exit_on_missing, numa_hint)
{
	const char *reason = try_numa_hints(&self->env, false);

	if (reason)
		SKIP(return, "%s", reason);
}

TEST_F(exit_on_missing, numa_hint_huge)
{
	const char *reason = try_numa_hints(&self->env, true);

	if (reason)
		SKIP(return, "%s", reason);
}

/*
 * Once the flag is cleared, an access to a missing page goes to userfaultfd.
 * Once it is set again, the access exits again.
 */
TEST_F(exit_on_missing, toggle)
{
	struct env *env = &self->env;
	int i;

	TEST_ASSERT(!env_create(env, &anon_config), "Unexpected skip");

	for (i = 0; i < TEST_NR_PAGES; i += 2) {
		set_access(env, i ? GUEST_WRITE : GUEST_READ, i, page_content(i));
		expect_exits(env);

		WRITE_ONCE(env->expect_uffd_msgs, true);
		set_slot_flag(env, false, i);
		expect_done(env);
		TEST_ASSERT_EQ(READ_ONCE(env->nr_uffd_msgs), 1 + i / 2);

		set_slot_flag(env, true, i);
		WRITE_ONCE(env->expect_uffd_msgs, false);
		set_access(env, GUEST_READ, i + 1, 0);
		expect_exits(env);
		do_populate(env, uffd_copy, i + 1);
		expect_done(env);
	}

	TEST_ASSERT_EQ(READ_ONCE(env->nr_uffd_msgs), TEST_NR_PAGES / 2);
}

struct other_slot {
	struct env *env;
	void *hva;
	u64 nr;
	bool stop;
};

static void *other_slot_fn(void *arg)
{
	struct other_slot *other = arg;
	struct kvm_vm *vm = other->env->vm;
	int i, r;

	while (!READ_ONCE(other->stop)) {
		for (i = 1; i >= 0; i--) {
			r = __vm_set_user_memory_region(vm, OTHER_SLOT, 0, OTHER_GPA,
							i * host_page_size(), other->hva);
			TEST_ASSERT(!r, KVM_IOCTL_ERROR(KVM_SET_USER_MEMORY_REGION, r));
		}
		WRITE_ONCE(other->nr, other->nr + 1);
	}

	return NULL;
}

/* To remove a memslot may make KVM drop all it has mapped, at any time. */
TEST_F(exit_on_missing, other_slot_comes_and_goes)
{
	struct env *env = &self->env;
	struct other_slot other = { .env = env };
	pthread_t thread;
	int i;

	TEST_ASSERT(!env_create(env, &anon_config), "Unexpected skip");
	other.hva = kvm_mmap(host_page_size(), PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1);
	kvm_pthread_create(&thread, NULL, other_slot_fn, &other);

	for (i = 0; i < 50 || READ_ONCE(other.nr) < 50; i++) {
		set_access(env, GUEST_READ, 0, 0);
		expect_exits(env);
		do_populate(env, uffd_copy, 0);
		expect_done(env);
		kvm_madvise(env->hva + page_offset(0), host_page_size(), MADV_DONTNEED);
	}

	WRITE_ONCE(other.stop, true);
	kvm_pthread_join(thread, NULL);
	kvm_munmap(other.hva, host_page_size());
}

static void *drop_page_fn(void *page)
{
	kvm_madvise(page, host_page_size(), MADV_DONTNEED);
	return NULL;
}

/* As long as an event of userfaultfd is unread, pages can't be provided. */
TEST_F(exit_on_missing, unread_event)
{
	const struct env_config config = { .backing = BACKING_ANON };
	struct env *env = &self->env;
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = UFFD_FEATURE_EVENT_REMOVE,
	};
	struct uffdio_register reg = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	struct pollfd pollfd = { .events = POLLIN };
	struct uffd_msg msg;
	pthread_t thread;
	int i, r;

	TEST_ASSERT(!env_create(env, &config), "Unexpected skip");

	pollfd.fd = syscall(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	TEST_ASSERT(pollfd.fd >= 0, __KVM_SYSCALL_ERROR("userfaultfd()", pollfd.fd));
	r = ioctl(pollfd.fd, UFFDIO_API, &api);
	if (r && errno == EPERM)
		SKIP(return, "no permission for events of userfaultfd");
	TEST_ASSERT(!r, KVM_IOCTL_ERROR(UFFDIO_API, r));
	reg.range = (struct uffdio_range) { (u64)env->hva, env->size };
	r = ioctl(pollfd.fd, UFFDIO_REGISTER, &reg);
	TEST_ASSERT(!r, KVM_IOCTL_ERROR(UFFDIO_REGISTER, r));

	set_access(env, GUEST_READ, 0, 0);
	expect_exits(env);

	kvm_pthread_create(&thread, NULL, drop_page_fn, env->hva + page_offset(1));
	TEST_ASSERT_EQ(poll(&pollfd, 1, -1), 1);

	/* There is no handler, i.e. no stop_fd, and nobody to read the event. */
	env->uffd = pollfd.fd;
	for (i = 0; i < 2; i++) {
		r = uffd_copy(env, page_offset(0), host_page_size());
		TEST_ASSERT(r == EAGAIN, "UFFDIO_COPY: errno = %d (%s)", r, strerror(r));
		TEST_ASSERT(!vcpu_try_access(env, env->vcpu), "No exit");
	}

	TEST_ASSERT_EQ(read(pollfd.fd, &msg, sizeof(msg)), sizeof(msg));
	TEST_ASSERT_EQ(msg.event, UFFD_EVENT_REMOVE);
	kvm_pthread_join(thread, NULL);

	do_populate(env, uffd_copy, 0);
	env->uffd = -1;
	expect_done(env);
	TEST_ASSERT_EQ(env->cmds[0].val, page_content(0));
	close(pollfd.fd);
}

struct late_exit {
	struct env *env;
	u64 nr_exits;
	u64 max_exits;
};

static void *late_exit_fn(void *arg)
{
	struct late_exit *late_exit = arg;

	while (!vcpu_try_access(late_exit->env, late_exit->env->vcpu)) {
		WRITE_ONCE(late_exit->nr_exits, late_exit->nr_exits + 1);
		TEST_ASSERT(late_exit->nr_exits <= READ_ONCE(late_exit->max_exits),
			    "More than one exit after the flag was cleared");
	}

	return NULL;
}

/* An exit that was under way while the flag was cleared may come late. */
TEST_F(exit_on_missing, late_exit)
{
	struct env *env = &self->env;
	struct late_exit late_exit = { .env = env };
	pthread_t thread;
	int i;

	TEST_ASSERT(!env_create(env, &anon_config), "Unexpected skip");

	for (i = 0; i < TEST_NR_PAGES; i++) {
		set_access(env, GUEST_READ, i, 0);
		late_exit.nr_exits = 0;
		late_exit.max_exits = -1ull;
		kvm_pthread_create(&thread, NULL, late_exit_fn, &late_exit);

		while (READ_ONCE(late_exit.nr_exits) < 2)
			sched_yield();

		WRITE_ONCE(env->expect_uffd_msgs, true);
		set_slot_flag(env, false, i % 2);
		WRITE_ONCE(late_exit.max_exits, READ_ONCE(late_exit.nr_exits) + 1);

		kvm_pthread_join(thread, NULL);
		TEST_ASSERT_EQ(READ_ONCE(env->nr_uffd_msgs), i + 1);
		TEST_ASSERT_EQ(env->cmds[0].val, page_content(i));

		set_slot_flag(env, true, i % 2);
		WRITE_ONCE(env->expect_uffd_msgs, false);
	}
}

static const struct env_config wp_config = {
	.backing = BACKING_ANON,
	.uffd_mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP,
	.uffd_features = UFFD_FEATURE_PAGEFAULT_FLAG_WP,
};

static int uffd_copy_wp(struct env *env, size_t offset, size_t len)
{
	return __uffd_copy(env, offset, len, UFFDIO_COPY_MODE_WP);
}

/*
 * Resolve write-protection from the vCPU's thread, nobody reads userfaultfd
 * except to fail if there is a message.
 */
TEST_F(exit_on_missing, write_protect)
{
	struct env *env = &self->env;
	const char *reason = env_create(env, &wp_config);
	int i, r;

	if (reason)
		SKIP(return, "%s", reason);

	for (i = 0; i < TEST_NR_PAGES; i++) {
		/* Protect before, or after the guest has mapped the page. */
		if (i % 2) {
			do_populate(env, uffd_copy_wp, i);
		} else {
			do_populate(env, uffd_copy, i);
			guest_write(env, i, page_content(i));
			r = uffd_writeprotect(env, page_offset(i), host_page_size(), true);
			TEST_ASSERT(!r, "UFFDIO_WRITEPROTECT failed, errno = %d", r);
		}

		guest_read(env, i, page_content(i));
		set_access(env, GUEST_WRITE, i, ~page_content(i));
		expect_exits(env);
		r = uffd_writeprotect(env, page_offset(i), host_page_size(), false);
		TEST_ASSERT(!r, "UFFDIO_WRITEPROTECT failed, errno = %d", r);
		expect_done(env);
		TEST_ASSERT_EQ(READ_ONCE(*host_word(env->hva, i)), ~page_content(i));
	}
}

static struct {
	int nr;
	int code;
	void *addr;
} sigbus;

static void sigbus_handler(int sig, siginfo_t *info, void *ctxt)
{
	sigbus.nr++;
	sigbus.code = info->si_code;
	sigbus.addr = info->si_addr;
}

/* Poison a page that the guest has mapped, and which thus has to be unmapped. */
static int madv_hwpoison(struct env *env, size_t offset, size_t len)
{
	int r = uffd_copy(env, offset, len);

	TEST_ASSERT(!r, "UFFDIO_COPY failed, errno = %d (%s)", r, strerror(r));
	guest_write(env, offset / host_page_size(), 0);

	return madvise(env->hva + offset, len, MADV_HWPOISON) ? errno : 0;
}

FIXTURE(poison) {
	struct env env;
};

FIXTURE_VARIANT(poison) {
	int (*poison)(struct env *env, size_t offset, size_t len);
	u64 uffd_features;
	/* UFFDIO_COPY may replace what UFFDIO_POISON has left, nothing else. */
	int copy_errno;
};

FIXTURE_VARIANT_ADD(poison, uffd_poison) {
	.poison = uffd_poison,
	.uffd_features = UFFD_FEATURE_POISON,
	.copy_errno = 0,
};

FIXTURE_VARIANT_ADD(poison, madv_hwpoison) {
	.poison = madv_hwpoison,
	.copy_errno = EEXIST,
};

FIXTURE_SETUP(poison)
{
	const struct env_config config = {
		.backing = BACKING_ANON,
		.uffd_mode = UFFDIO_REGISTER_MODE_MISSING,
		.uffd_features = variant->uffd_features,
	};
	const char *reason = env_create(&self->env, &config);

	if (reason)
		SKIP(return, "%s", reason);
}

FIXTURE_TEARDOWN(poison)
{
	env_destroy(&self->env);
}

static void expect_errno(const char *what, int r, int expected)
{
	TEST_ASSERT(r == expected, "%s: errno = %d (%s), expected %d (%s)", what,
		    r, strerror(r), expected, strerror(expected));
}

/* To KVM, a poisoned page is a missing one.  Userspace sees the difference. */
TEST_F(poison, read_write_fetch)
{
	const struct sigaction sa = { .sa_sigaction = sigbus_handler, .sa_flags = SA_SIGINFO };
	size_t size = host_page_size();
	struct env *env = &self->env;
	int op, r;

	TEST_ASSERT(!sigaction(SIGBUS, &sa, NULL), "sigaction() failed, errno = %d", errno);

	for (op = GUEST_READ; op <= GUEST_EXEC; op++) {
		r = variant->poison(env, page_offset(op), size);
		if (r == EPERM || r == EINVAL)
			SKIP(return, "can't poison memory, errno = %d (%s)", r, strerror(r));
		expect_errno("poison", r, 0);

		/* MADV_HWPOISON sends a signal on its own. */
		sigbus.nr = 0;

		set_access(env, op, op, ~page_content(op));
		expect_exits(env);

		expect_errno("UFFDIO_ZEROPAGE", uffd_zeropage(env, page_offset(op), size), EEXIST);
		expect_errno("MADV_POPULATE_READ", populate_read(env, page_offset(op), size),
			     EHWPOISON);
		expect_errno("MADV_POPULATE_WRITE", populate_write(env, page_offset(op), size),
			     EHWPOISON);

		expect_exits(env);
		TEST_ASSERT(!sigbus.nr, "Unexpected SIGBUS, si_code = %d, si_addr = %p",
			    sigbus.code, sigbus.addr);

		/* Without the flag, KVM sends the signal that it has always sent. */
		set_slot_flag(env, false, false);
		r = __vcpu_run(env->vcpu);
		TEST_ASSERT(r == -1 && errno == EINTR, "KVM_RUN = %d, errno = %d, exit %u (%s)",
			    r, errno, env->vcpu->run->exit_reason,
			    exit_reason_str(env->vcpu->run->exit_reason));
		TEST_ASSERT(sigbus.nr == 1 && sigbus.code == BUS_MCEERR_AR &&
			    sigbus.addr == env->hva + page_offset(op),
			    "%d SIGBUS, si_code = %d, si_addr = %p, expected 1, %d, %p",
			    sigbus.nr, sigbus.code, sigbus.addr, BUS_MCEERR_AR,
			    env->hva + page_offset(op));

		/* Give the guest a new page. */
		set_slot_flag(env, true, false);
		expect_exits(env);
		r = uffd_copy(env, page_offset(op), size);
		expect_errno("UFFDIO_COPY", r, variant->copy_errno);
		if (r) {
			r = madvise(env->hva + page_offset(op), size, MADV_DONTNEED);
			TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("madvise()", r));
			expect_exits(env);
			do_populate(env, uffd_copy, op);
		}
		expect_done(env);
		TEST_ASSERT_EQ(env->cmds[0].val,
			       op == GUEST_READ ? page_content(op) : ~page_content(op));
	}
}

static void signal_handler(int sig)
{
}

static void set_timer(int usec)
{
	struct itimerval timer = { { 0, usec }, { 0, usec } };

	TEST_ASSERT(!setitimer(ITIMER_REAL, &timer, NULL), "setitimer(), errno = %d", errno);
}

/* Interrupt whatever sleeps, again and again. */
static void start_signals(void)
{
	const struct sigaction sa = { .sa_handler = signal_handler };

	TEST_ASSERT(!sigaction(SIGALRM, &sa, NULL), "sigaction(), errno = %d", errno);
	set_timer(100000);
}

static void stop_signals(void)
{
	set_timer(0);
}

/* Call KVM_PRE_FAULT_MEMORY, and verify that it doesn't touch kvm_run. */
static int try_pre_fault(struct kvm_vcpu *vcpu, struct kvm_pre_fault_memory *range)
{
	struct kvm_run *saved;
	int r, err;

	saved = malloc(sizeof(*saved));
	TEST_ASSERT(saved, "malloc() failed");
	memcpy(saved, vcpu->run, sizeof(*saved));

	r = __vcpu_ioctl(vcpu, KVM_PRE_FAULT_MEMORY, range);
	err = r ? errno : 0;

	TEST_ASSERT(!memcmp(saved, vcpu->run, sizeof(*saved)),
		    "kvm_run has changed, exit_reason 0x%x, was 0x%x",
		    vcpu->run->exit_reason, saved->exit_reason);
	free(saved);
	return err;
}

static int pre_fault(struct kvm_vcpu *vcpu, struct kvm_pre_fault_memory *range)
{
	int err;

	do {
		err = try_pre_fault(vcpu, range);
	} while (err == EINTR);
	return err;
}

/* As above, for a kvm_run whose every byte would reveal a change. */
static int pre_fault_pattern(struct kvm_vcpu *vcpu, struct kvm_pre_fault_memory *range)
{
	vcpu->run->exit_reason = 0xa5a5a5a5;
	memset(vcpu->run->padding, 0xa5, sizeof(vcpu->run->padding));
	return pre_fault(vcpu, range);
}

static void expect_pre_fault(struct env *env, int page, int nr_pages, int expected_nr, int expected)
{
	struct kvm_pre_fault_memory range = {
		.gpa = TEST_GPA + page_offset(page),
		.size = page_offset(nr_pages),
	};
	int r = pre_fault_pattern(env->vcpu, &range);

	TEST_ASSERT(r == expected, "KVM_PRE_FAULT_MEMORY: errno = %d (%s), expected %d",
		    r, strerror(r), expected);
	TEST_ASSERT(range.gpa == TEST_GPA + page_offset(page + expected_nr) &&
		    range.size == page_offset(nr_pages - expected_nr),
		    "KVM_PRE_FAULT_MEMORY: gpa 0x%llx, size 0x%llx left, expected %d pages done",
		    range.gpa, range.size, expected_nr);
	assert_no_uffd_msg(env);
}

TEST_F(exit_on_missing, pre_fault)
{
	struct env *env = &self->env;
	int i;

	TEST_ASSERT(!env_create(env, &anon_config), "Unexpected skip");
	if (!vm_check_cap(env->vm, KVM_CAP_PRE_FAULT_MEMORY))
		SKIP(return, "no KVM_PRE_FAULT_MEMORY");

	expect_pre_fault(env, 0, TEST_NR_PAGES, 0, EFAULT);

	do_populate(env, uffd_copy, 0);
	do_populate(env, uffd_copy, 1);
	expect_pre_fault(env, 0, TEST_NR_PAGES, 2, 0);
	expect_pre_fault(env, 2, TEST_NR_PAGES - 2, 0, EFAULT);
	expect_pre_fault(env, 1, TEST_NR_PAGES - 1, 1, 0);
	expect_pre_fault(env, 0, 2, 2, 0);

	do_populate(env, uffd_zeropage, 2);
	do_populate(env, uffd_copy, 3);
	expect_pre_fault(env, 0, TEST_NR_PAGES, TEST_NR_PAGES, 0);

	for (i = 0; i < TEST_NR_PAGES; i++)
		guest_read(env, i, i == 2 ? 0 : page_content(i));
}

/* KVM_PRE_FAULT_MEMORY must not disturb an exit that is yet to be completed. */
TEST_F(exit_on_missing, pre_fault_in_mmio)
{
	struct kvm_pre_fault_memory range = {
		.gpa = TEST_GPA,
		.size = host_page_size(),
	};
	struct env *env = &self->env;
	u64 val = page_content(0);
	struct kvm_run *run;
	int r;

	TEST_ASSERT(!env_create(env, &anon_config), "Unexpected skip");
	if (!vm_check_cap(env->vm, KVM_CAP_PRE_FAULT_MEMORY))
		SKIP(return, "no KVM_PRE_FAULT_MEMORY");

	run = env->vcpu->run;
	vcpu_set_access(env, env->vcpu, GUEST_READ, MMIO_GVA, 0);
	r = _vcpu_run(env->vcpu);
	TEST_ASSERT(!r, KVM_IOCTL_ERROR(KVM_RUN, r));
	TEST_ASSERT_KVM_EXIT_REASON(env->vcpu, KVM_EXIT_MMIO);
	TEST_ASSERT_EQ(run->mmio.phys_addr, MMIO_GPA);
	TEST_ASSERT_EQ(run->mmio.is_write, 0);

	memcpy(run->mmio.data, &val, sizeof(val));
	r = pre_fault(env->vcpu, &range);
	TEST_ASSERT(r == EFAULT, "KVM_PRE_FAULT_MEMORY: errno = %d, expected EFAULT", r);

	expect_done(env);
	TEST_ASSERT_EQ(env->cmds[0].val, val);
}

/* The same if a signal arrives while it sleeps on userfaultfd.  Nobody answers. */
TEST_F(exit_on_missing, pre_fault_interrupted)
{
	const struct env_config config = {
		.backing = BACKING_ANON,
	};
	struct kvm_pre_fault_memory range = {
		.gpa = TEST_GPA,
		.size = host_page_size(),
	};
	struct env *env = &self->env;
	int r;

	TEST_ASSERT(!env_create(env, &config), "Unexpected skip");
	if (!vm_check_cap(env->vm, KVM_CAP_PRE_FAULT_MEMORY))
		SKIP(return, "no KVM_PRE_FAULT_MEMORY");

	set_slot_flag(env, false, false);
	TEST_ASSERT(!env_register_uffd(env, &anon_config), "Unexpected skip");

	start_signals();
	r = try_pre_fault(env->vcpu, &range);
	TEST_ASSERT(r == EINTR, "KVM_PRE_FAULT_MEMORY: errno = %d, expected EINTR", r);
	stop_signals();
	TEST_ASSERT_EQ(vcpu_get_stat(env->vcpu, signal_exits), 0);

	close(env->uffd);
	env->uffd = -1;
	r = pre_fault(env->vcpu, &range);
	TEST_ASSERT(!r, "KVM_PRE_FAULT_MEMORY: errno = %d", r);
}

#ifdef __x86_64__
/* The same for a private page without guest_memfd, i.e. without the flag. */
TEST_F(exit_on_missing, pre_fault_private)
{
	const struct vm_shape shape = {
		.mode = VM_MODE_DEFAULT,
		.type = KVM_X86_SW_PROTECTED_VM,
	};
	struct kvm_pre_fault_memory range = {
		.gpa = TEST_GPA,
		.size = PAGE_SIZE,
	};
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	int r;

	if (!(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM)))
		SKIP(return, "no KVM_X86_SW_PROTECTED_VM");

	vm = vm_create_shape_with_one_vcpu(shape, &vcpu, guest_code);
	if (!vm_check_cap(vm, KVM_CAP_PRE_FAULT_MEMORY))
		SKIP(return, "no KVM_PRE_FAULT_MEMORY");

	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, TEST_GPA, TEST_SLOT, 1, 0);
	vm_mem_set_private(vm, TEST_GPA, PAGE_SIZE);

	r = pre_fault_pattern(vcpu, &range);
	TEST_ASSERT(r == EFAULT, "KVM_PRE_FAULT_MEMORY: errno = %d, expected EFAULT", r);
	TEST_ASSERT_EQ(range.gpa, TEST_GPA);
	TEST_ASSERT_EQ(range.size, PAGE_SIZE);

	kvm_vm_free(vm);
}

TEST_F(exit_on_missing, read_modify_write)
{
	struct env *env = &self->env;

	TEST_ASSERT(!env_create(env, &anon_config), "Unexpected skip");

	set_access(env, GUEST_RMW, 0, 0);
	expect_exits(env);
	do_populate(env, uffd_copy, 0);
	expect_done(env);

	/* The exits have not executed a part of the instruction. */
	TEST_ASSERT_EQ(READ_ONCE(*host_word(env->hva, 0)), page_content(0) + 1);
}

/*
 * With interrupts enabled and an in-kernel local APIC, KVM halts the vCPU and
 * lets a worker fault-in the page.  With the flag, it must exit instead.
 */
TEST_F(exit_on_missing, no_async_pf)
{
	const struct env_config config = {
		.backing = BACKING_ANON,
		.uffd_mode = UFFDIO_REGISTER_MODE_MISSING,
		.uffd_features = UFFD_FEATURE_THREAD_ID,
	};
	struct env *env = &self->env;
	const char *reason = env_create(env, &config);

	if (reason)
		SKIP(return, "%s", reason);

	set_access(env, GUEST_STI, 0, 0);
	expect_done(env);

	set_access(env, GUEST_READ, 0, 0);
	expect_exits(env);
	do_populate(env, uffd_copy, 0);
	expect_done(env);

	/* See that a worker is at work without the flag, not the vCPU. */
	WRITE_ONCE(env->expect_uffd_msgs, true);
	set_slot_flag(env, false, false);
	set_access(env, GUEST_READ, 1, 0);
	expect_done(env);
	TEST_ASSERT_EQ(env->cmds[0].val, page_content(1));
	TEST_ASSERT_EQ(READ_ONCE(env->nr_uffd_msgs), 1);
	TEST_ASSERT(env->uffd_msg_tid != kvm_gettid(), "The vCPU has not set up an async #PF");
}

/*
 * With two-dimensional paging, KVM_RUN maps a page that was provided after an
 * exit before the guest faults on it again.
 */
TEST_F(exit_on_missing, completion)
{
	struct env *env = &self->env;
	u64 nr_faults, nr_fixed;
	struct kvm_vcpu *vcpu;
	int i;

	if (!kvm_is_tdp_enabled())
		SKIP(return, "no two-dimensional paging");
	if (host_cpu_is_intel && !get_kvm_intel_param_bool("eptad"))
		SKIP(return, "no Accessed bits");

	TEST_ASSERT(!env_create(env, &anon_config), "Unexpected skip");
	vcpu = env->vcpu;

	/* Let the guest fault on the pages of its own. */
	set_access(env, GUEST_WRITE, 0, 0);
	expect_exits(env);
	do_populate(env, uffd_copy, 0);
	expect_done(env);
	kvm_madvise(env->hva + page_offset(0), host_page_size(), MADV_DONTNEED);

	for (i = 0; i < TEST_NR_PAGES; i++) {
		set_access(env, i % 2 ? GUEST_WRITE : GUEST_READ, i, page_content(i));
		expect_exits(env);
		do_populate(env, uffd_copy, i);
		nr_faults = vcpu_get_stat(vcpu, pf_taken);

		expect_done(env);
		TEST_ASSERT_EQ(vcpu_get_stat(vcpu, pf_taken), nr_faults);
		kvm_madvise(env->hva + page_offset(i), host_page_size(), MADV_DONTNEED);
	}

	/* A page that is gone again exits again, and immediate_exit maps nothing. */
	set_access(env, GUEST_READ, 0, 0);
	expect_exits(env);
	do_populate(env, uffd_copy, 0);
	nr_fixed = vcpu_get_stat(vcpu, pf_fixed);
	vcpu->run->immediate_exit = 1;
	TEST_ASSERT(__vcpu_run(vcpu) == -1 && errno == EINTR, "immediate_exit has no effect");
	vcpu->run->immediate_exit = 0;
	TEST_ASSERT_EQ(vcpu_get_stat(vcpu, pf_fixed), nr_fixed);
	kvm_madvise(env->hva + page_offset(0), host_page_size(), MADV_DONTNEED);
	expect_exits(env);

	/* Without the flag, the guest faults, and once. */
	nr_faults = vcpu_get_stat(vcpu, pf_taken);
	WRITE_ONCE(env->expect_uffd_msgs, true);
	set_slot_flag(env, false, false);
	expect_done(env);
	TEST_ASSERT_EQ(READ_ONCE(env->nr_uffd_msgs), 1);
	TEST_ASSERT(vcpu_get_stat(vcpu, pf_taken) > nr_faults,
		    "The page was faulted in ahead of the guest");
}

/*
 * KVM itself accesses guest memory like any other part of the kernel, e.g. to
 * emulate an instruction, which is what userspace has to keep userfaultfd for.
 */
TEST_F(exit_on_missing, emulation)
{
	struct env *env = &self->env;
	struct kvm_run *run;
	int r;

	TEST_ASSERT(!env_create(env, &anon_config), "Unexpected skip");
	run = env->vcpu->run;

	WRITE_ONCE(env->expect_uffd_msgs, true);
	set_access(env, GUEST_OUTS, 0, 0);
	r = _vcpu_run(env->vcpu);
	TEST_ASSERT(!r, KVM_IOCTL_ERROR(KVM_RUN, r));
	TEST_ASSERT_KVM_EXIT_REASON(env->vcpu, KVM_EXIT_IO);
	TEST_ASSERT_EQ(run->io.port, DEBUG_PORT);
	TEST_ASSERT_EQ(*((u8 *)run + run->io.data_offset), (u8)page_content(0));
	expect_done(env);
	TEST_ASSERT_EQ(READ_ONCE(env->nr_uffd_msgs), 1);

	WRITE_ONCE(env->expect_uffd_msgs, false);
	set_access(env, GUEST_READ, 1, 0);
	expect_exits(env);
}
#endif

#ifdef __aarch64__
#define vcpu_has_feature(vcpu, reg, field)					\
	(!!FIELD_GET(reg##_##field, vcpu_get_reg(vcpu, KVM_ARM64_SYS_REG(SYS_##reg))))

/*
 * KVM maps the page that has been provided before it enters the guest, so that
 * the latter leaves the guest only once, for the ucall, but for interrupts.
 */
TEST_F(exit_on_missing, completion)
{
	u64 nr_exits, min_exits[] = { ~0ull, ~0ull };
	struct env *env = &self->env;
	struct kvm_vcpu *vcpu;
	int i;

	TEST_ASSERT(!env_create(env, &anon_config), "Unexpected skip");
	vcpu = env->vcpu;

	for (i = 0; i < 2 * TEST_NR_PAGES; i++) {
		int page = i % TEST_NR_PAGES, write = i / TEST_NR_PAGES;

		kvm_madvise(env->hva + page_offset(page), host_page_size(), MADV_DONTNEED);
		set_access(env, write ? GUEST_WRITE : GUEST_READ, page, page_content(page));
		expect_exits(env);
		do_populate(env, uffd_copy, page);

		nr_exits = vcpu_get_stat(vcpu, exits);
		expect_done(env);
		nr_exits = vcpu_get_stat(vcpu, exits) - nr_exits;
		if (nr_exits < min_exits[write])
			min_exits[write] = nr_exits;
	}
	TEST_ASSERT_EQ(min_exits[0], 1);
	TEST_ASSERT_EQ(min_exits[1], 1);

	/* Without the flag, the guest faults, and once. */
	kvm_madvise(env->hva + page_offset(0), host_page_size(), MADV_DONTNEED);
	set_access(env, GUEST_READ, 0, 0);
	expect_exits(env);
	WRITE_ONCE(env->expect_uffd_msgs, true);
	set_slot_flag(env, false, false);
	nr_exits = vcpu_get_stat(vcpu, exits);
	expect_done(env);
	TEST_ASSERT_EQ(READ_ONCE(env->nr_uffd_msgs), 1);
	TEST_ASSERT(vcpu_get_stat(vcpu, exits) - nr_exits > 1,
		    "The page was faulted in ahead of the guest");
}

/*
 * A vCPU that is initialized again has nothing to complete: nobody has written to
 * the page.  It's powered off, i.e. KVM_RUN does nothing until a signal arrives.
 */
TEST_F(exit_on_missing, completion_init)
{
	struct env_config config = anon_config;
	struct env *env = &self->env;
	struct kvm_mp_state mp_state;
	struct kvm_vcpu_init init;
	int page = 1;

	config.slot_flags = KVM_MEM_LOG_DIRTY_PAGES;
	TEST_ASSERT(!env_create(env, &config), "Unexpected skip");

	set_access(env, GUEST_WRITE, page, 0);
	expect_exits(env);
	do_populate(env, uffd_copy, page);
	expect_done(env);
	expect_dirty(env, &page, 1);

	kvm_madvise(env->hva + page_offset(page), host_page_size(), MADV_DONTNEED);
	expect_exits(env);
	do_populate(env, uffd_copy, page);

	init = env->vcpu->init;
	init.features[0] |= BIT(KVM_ARM_VCPU_POWER_OFF);
	vcpu_ioctl(env->vcpu, KVM_ARM_VCPU_INIT, &init);

	start_signals();
	TEST_ASSERT(__vcpu_run(env->vcpu) == -1 && errno == EINTR, "No signal has arrived");
	stop_signals();
	vcpu_mp_state_get(env->vcpu, &mp_state);
	TEST_ASSERT_EQ(mp_state.mp_state, KVM_MP_STATE_STOPPED);
	expect_dirty(env, NULL, 0);
}

FIXTURE(instruction) {
	struct env env;
};

FIXTURE_VARIANT(instruction) {
	enum guest_op op;
};

FIXTURE_VARIANT_ADD(instruction, ldadd) { .op = GUEST_LDADD };
FIXTURE_VARIANT_ADD(instruction, cas) { .op = GUEST_CAS };
FIXTURE_VARIANT_ADD(instruction, ldxr_stxr) { .op = GUEST_LDXR_STXR };
FIXTURE_VARIANT_ADD(instruction, dc_zva) { .op = GUEST_DC_ZVA };
FIXTURE_VARIANT_ADD(instruction, dc_civac) { .op = GUEST_DC_CIVAC };
FIXTURE_VARIANT_ADD(instruction, ldr_post) { .op = GUEST_LDR_POST };
FIXTURE_VARIANT_ADD(instruction, str_pre) { .op = GUEST_STR_PRE };

FIXTURE_SETUP(instruction)
{
	struct env *env = &self->env;

	TEST_ASSERT(!env_create(env, &anon_config), "Unexpected skip");

	if ((variant->op == GUEST_LDADD || variant->op == GUEST_CAS) &&
	    !vcpu_has_feature(env->vcpu, ID_AA64ISAR0_EL1, ATOMIC))
		SKIP(return, "no atomic instructions");

	if (variant->op == GUEST_DC_ZVA && FIELD_GET(DCZID_EL0_DZP_MASK, read_sysreg(dczid_el0)))
		SKIP(return, "no DC ZVA");
}

FIXTURE_TEARDOWN(instruction)
{
	env_destroy(&self->env);
}

static u64 instruction_result(enum guest_op op, u64 val)
{
	switch (op) {
	case GUEST_LDADD:
	case GUEST_LDXR_STXR:
		return val + 1;
	case GUEST_CAS:
	case GUEST_STR_PRE:
		return ~val;
	case GUEST_DC_ZVA:
		return 0;
	default:
		return val;
	}
}

/* Exits have no effect on memory and registers, the instruction is executed once. */
TEST_F(instruction, executed_once)
{
	struct env *env = &self->env;
	struct guest_cmd *cmd = &env->cmds[0];
	enum guest_op op = variant->op;
	u64 val, gva, result;
	int i;

	for (i = 0; i < 2; i++) {
		val = i ? 0 : page_content(i);
		set_access(env, op, i, val);
		gva = cmd->gva;

		if (op == GUEST_DC_CIVAC && vcpu_try_access(env, env->vcpu))
			SKIP(return, "cache maintenance doesn't access memory");
		expect_exits(env);

		/* A page that is populated for reading can't be written. */
		do_populate(env, i ? uffd_zeropage : uffd_copy, i);
		if (i && op != GUEST_LDR_POST) {
			expect_exits_for(env, i, KVM_MEMORY_EXIT_FLAG_WRITE);
			do_populate(env, populate_write, i);
		}
		expect_done(env);

		TEST_ASSERT_EQ(cmd->val, val);
		TEST_ASSERT_EQ(cmd->gva, op == GUEST_LDR_POST ? gva + sizeof(u64) : gva);
		result = READ_ONCE(*host_word(env->hva, i));
		TEST_ASSERT_EQ(result, instruction_result(op, val));
	}
}

#define S1PTW_GVA		0x100000000ul

FIXTURE(s1ptw) {
	struct env env;
};

FIXTURE_VARIANT(s1ptw) {
	/* The CPU sets the access flag, i.e. has to write the page table. */
	bool set_af;
	u32 slot_flags;
};

FIXTURE_VARIANT_ADD(s1ptw, no_af) {};
FIXTURE_VARIANT_ADD(s1ptw, set_af) { .set_af = true };
FIXTURE_VARIANT_ADD(s1ptw, no_af_dirty_log) { .slot_flags = KVM_MEM_LOG_DIRTY_PAGES };
FIXTURE_VARIANT_ADD(s1ptw, set_af_dirty_log) {
	.set_af = true,
	.slot_flags = KVM_MEM_LOG_DIRTY_PAGES,
};

FIXTURE_SETUP(s1ptw)
{
	const struct env_config config = {
		.backing = BACKING_SHMEM_PRIVATE,
		.uffd_mode = UFFDIO_REGISTER_MODE_MINOR,
		.slot_flags = variant->slot_flags,
	};
	struct env *env = &self->env;
	const char *reason = env_create(env, &config);
	struct kvm_vcpu *vcpu = env->vcpu;

	if (reason)
		SKIP(return, "%s", reason);

	if (!variant->set_af)
		return;

	if (!vcpu_has_feature(vcpu, ID_AA64MMFR1_EL1, HAFDBS))
		SKIP(return, "no hardware update of the access flag");

	vcpu_set_reg(vcpu, ctxt_reg_alias(vcpu, SYS_TCR_EL1), TCR_HA |
		     vcpu_get_reg(vcpu, ctxt_reg_alias(vcpu, SYS_TCR_EL1)));
}

FIXTURE_TEARDOWN(s1ptw)
{
	env_destroy(&self->env);
}

/* The access to a page table is a read, and a write only to update an entry. */
TEST_F(s1ptw, read_write_fetch)
{
	struct env *env = &self->env;
	struct kvm_vm *vm = env->vm;
	size_t size = host_page_size();
	u64 *table, *parent, *pte;
	size_t table_offset;
	int op, page, i, r;

	/*
	 * Map the slot once more, and move the last level of the page tables to
	 * page 0, to its end as a guest page may be smaller than a host page.
	 */
	virt_map(vm, S1PTW_GVA, TEST_GPA, env->size / vm->page_size);
	parent = virt_get_pte_hva_at_level(vm, S1PTW_GVA, 2);
	table = virt_get_pte_hva(vm, S1PTW_GVA);
	table_offset = size - vm->page_size;
	for (i = 0; variant->set_af && i < env->size / vm->page_size; i++)
		table[i] &= ~PTE_AF;
	memcpy(env->alias + table_offset, table, vm->page_size);
	memset(table, 0, vm->page_size);
	*parent = (TEST_GPA + table_offset) | (*parent & (vm->page_size - 1));

	for (op = GUEST_READ; op <= GUEST_EXEC; op++) {
		page = op + 1;
		WRITE_ONCE(*host_word(env->alias, page), page_content(page));
		vcpu_set_access(env, env->vcpu, op, S1PTW_GVA + page_offset(page) + word_offset(),
				~page_content(page));

		expect_exits_for(env, 0, KVM_MEMORY_EXIT_FLAG_READ);
		do_populate(env, uffd_continue, 0);

		/*
		 * It's up to the CPU whether it sets the flag if the access is
		 * going to fault, thus don't make it choose.
		 */
		if (!variant->set_af)
			expect_exits_for(env, page, access_flags(op));
		do_populate(env, uffd_continue, page);
		do_populate(env, populate_write, page);

		if (variant->set_af) {
			expect_exits_for(env, 0, KVM_MEMORY_EXIT_FLAG_WRITE);
			do_populate(env, populate_write, 0);
		}
		expect_done(env);

		if (op == GUEST_READ)
			TEST_ASSERT_EQ(env->cmds[0].val, page_content(page));
		else if (op == GUEST_WRITE)
			TEST_ASSERT_EQ(READ_ONCE(*host_word(env->hva, page)), ~page_content(page));

		pte = env->hva + table_offset;
		pte += (page_offset(page) + word_offset()) / vm->page_size;
		TEST_ASSERT(READ_ONCE(*pte) & PTE_AF, "No access flag in PTE 0x%lx", *pte);

		if (variant->slot_flags & KVM_MEM_LOG_DIRTY_PAGES) {
			int dirty[2] = {}, nr = 0;

			if (variant->set_af)
				dirty[nr++] = 0;
			if (op == GUEST_WRITE)
				dirty[nr++] = page;
			expect_dirty(env, dirty, nr);
		}

		/* Let the page table be missing again. */
		r = madvise(env->hva, size, MADV_DONTNEED);
		TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("madvise()", r));
	}
}

#define MT_NORMAL_TAGGED	7

FIXTURE(mte) {
	struct env env;
};

FIXTURE_SETUP(mte)
{
	struct env *env = &self->env;
	struct kvm_vcpu *vcpu;
	u64 *pte, reg;
	int i;

	if (!kvm_check_cap(KVM_CAP_ARM_MTE))
		SKIP(return, "no memory tagging");

	test_wants_mte();
	TEST_ASSERT(!env_create(env, &anon_config), "Unexpected skip");
	vcpu = env->vcpu;

	reg = ctxt_reg_alias(vcpu, SYS_SCTLR_EL1);
	vcpu_set_reg(vcpu, reg, vcpu_get_reg(vcpu, reg) | SCTLR_EL1_ATA);
	reg = ctxt_reg_alias(vcpu, SYS_MAIR_EL1);
	vcpu_set_reg(vcpu, reg, vcpu_get_reg(vcpu, reg) |
		     MAIR_ATTRIDX(MAIR_ATTR_NORMAL_TAGGED, MT_NORMAL_TAGGED));

	for (i = 0; i < env->size; i += env->vm->page_size) {
		pte = virt_get_pte_hva(env->vm, TEST_GVA + i);
		*pte = (*pte & ~PTE_ATTRINDX_MASK) | PTE_ATTRINDX(MT_NORMAL_TAGGED);
	}
}

FIXTURE_TEARDOWN(mte)
{
	env_destroy(&self->env);
}

/*
 * Return the tag of what set_access() accesses.  Don't look at the other tags,
 * QEMU 7.2 keeps no more than two of them per page.
 */
static u8 host_get_tag(struct env *env, int page)
{
	size_t nr_tags = host_page_size() / MTE_GRANULE_SIZE;
	u8 *tags = malloc(nr_tags), tag;
	struct kvm_arm_copy_mte_tags copy_tags = {
		.guest_ipa = TEST_GPA + page_offset(page),
		.length = host_page_size(),
		.addr = tags,
		.flags = KVM_ARM_TAGS_FROM_GUEST,
	};
	int r;

	TEST_ASSERT(tags, "malloc() failed");
	memset(tags, 0xff, nr_tags);
	r = __vm_ioctl(env->vm, KVM_ARM_MTE_COPY_TAGS, &copy_tags);
	TEST_ASSERT(r == host_page_size(), KVM_IOCTL_ERROR(KVM_ARM_MTE_COPY_TAGS, r));

	tag = tags[word_offset() / MTE_GRANULE_SIZE];
	free(tags);
	return tag;
}

static void guest_expect_tag(struct env *env, int page, u8 tag)
{
	set_access(env, GUEST_LDG, page, ~0ul);
	expect_done(env);
	TEST_ASSERT_EQ(env->cmds[0].val, tag);
	TEST_ASSERT_EQ(host_get_tag(env, page), tag);
}

FIXTURE_VARIANT(mte) {
	int prot;
};

FIXTURE_VARIANT_ADD(mte, untagged_in_host) { .prot = PROT_READ | PROT_WRITE };
FIXTURE_VARIANT_ADD(mte, tagged_in_host) { .prot = PROT_READ | PROT_WRITE | PROT_MTE };

TEST_F(mte, tags)
{
	struct env *env = &self->env;
	int r;

	r = mprotect(env->hva, env->size, variant->prot);
	TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("mprotect()", r));

	set_access(env, GUEST_LDG, 0, ~0ul);
	expect_exits(env);
	do_populate(env, uffd_copy, 0);
	guest_expect_tag(env, 0, 0);
	set_access(env, GUEST_STG, 0, 5);
	expect_done(env);
	guest_expect_tag(env, 0, 5);
	guest_read(env, 0, page_content(0));

	set_access(env, GUEST_STG, 1, 9);
	expect_exits(env);
	do_populate(env, uffd_copy, 1);
	expect_done(env);
	guest_expect_tag(env, 1, 9);
	guest_read(env, 1, page_content(1));

	set_access(env, GUEST_LDG, 2, ~0ul);
	expect_exits(env);
	do_populate(env, uffd_zeropage, 2);
	expect_done(env);
	TEST_ASSERT_EQ(env->cmds[0].val, 0);
	set_access(env, GUEST_STG, 2, 3);
	expect_exits(env);
	do_populate(env, populate_write, 2);
	expect_done(env);
	guest_expect_tag(env, 2, 3);

	/* The ioctl isn't about a vCPU, it goes to userfaultfd. */
	WRITE_ONCE(env->expect_uffd_msgs, true);
	TEST_ASSERT_EQ(host_get_tag(env, 3), 0);
	TEST_ASSERT_EQ(READ_ONCE(env->nr_uffd_msgs), 1);
	guest_read(env, 3, page_content(3));
}

/*
 * KVM doesn't map memory that can't have tags, be it present or not.  It does
 * not let such memory into a memslot either, thus put it there afterwards.
 */
TEST_F(mte, no_tags_allowed)
{
	struct env *env = &self->env;
	struct kvm_vcpu *vcpu = env->vcpu;
	int fd, op, r;

	fd = open("/dev/zero", O_RDWR | O_CLOEXEC);
	TEST_ASSERT(fd >= 0, "Can't open /dev/zero, errno = %d", errno);

	for (op = GUEST_READ; op <= GUEST_EXEC; op++) {
		remap(env, variant->prot, MAP_PRIVATE | MAP_ANONYMOUS, -1);
		set_slot_flag(env, false, false);
		remap(env, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd);
		set_access(env, op, op, page_content(op));
		r = _vcpu_run(vcpu);
		TEST_ASSERT(r == -1 && errno == EFAULT, "KVM_RUN = %d, errno = %d", r, errno);
		TEST_ASSERT_KVM_EXIT_REASON(vcpu, KVM_EXIT_UNKNOWN);

		remap(env, variant->prot, MAP_PRIVATE | MAP_ANONYMOUS, -1);
		set_slot_flag(env, true, false);
		remap(env, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd);
		expect_exits(env);
		do_populate(env, populate_write, op);
		expect_exits(env);

		remap(env, variant->prot, MAP_PRIVATE | MAP_ANONYMOUS, -1);
		expect_exits(env);
		WRITE_ONCE(*host_word(env->hva, op), page_content(op));
		expect_done(env);
		TEST_ASSERT_EQ(env->cmds[0].val, page_content(op));
	}

	close(fd);
}

static int fd_ioctl(int fd, unsigned long cmd, void *arg)
{
	return ioctl(fd, cmd, arg) ? errno : 0;
}

/* The memory of a protected VM is pinned, and isn't userspace's to provide. */
TEST_F(exit_on_missing, protected_vm)
{
	u64 type = KVM_VM_TYPE_ARM_PROTECTED | kvm_check_cap(KVM_CAP_ARM_VM_IPA_SIZE);
	size_t size = host_page_size();
	struct kvm_userspace_memory_region region = {
		.flags = KVM_MEM_EXIT_ON_MISSING,
		.memory_size = size,
		.userspace_addr = (u64)kvm_mmap(size, PROT_READ | PROT_WRITE,
						MAP_PRIVATE | MAP_ANONYMOUS, -1),
	};
	struct kvm_userspace_memory_region2 region2 = {
		.flags = region.flags,
		.memory_size = region.memory_size,
		.userspace_addr = region.userspace_addr,
	};
	struct kvm_enable_cap enable_cap = {
		.cap = KVM_CAP_MEMORY_FAULT_EXIT,
		.args[0] = kvm_check_cap(KVM_CAP_MEMORY_FAULT_EXIT),
	};
	int kvm_fd, vm_fd, r;

	kvm_fd = open_kvm_dev_path_or_exit();
	vm_fd = __kvm_ioctl(kvm_fd, KVM_CREATE_VM, (void *)type);
	close(kvm_fd);
	if (vm_fd < 0)
		SKIP(return, "no protected VMs");

	r = __kvm_ioctl(vm_fd, KVM_CHECK_EXTENSION, (void *)KVM_CAP_MEMORY_FAULT_EXIT);
	TEST_ASSERT_EQ(r, 0);
	r = __kvm_ioctl(vm_fd, KVM_CHECK_EXTENSION, (void *)KVM_CAP_EXIT_ON_MISSING);
	TEST_ASSERT_EQ(r, 0);
	r = fd_ioctl(vm_fd, KVM_ENABLE_CAP, &enable_cap);
	expect_errno("KVM_ENABLE_CAP", r, EINVAL);
	r = fd_ioctl(vm_fd, KVM_SET_USER_MEMORY_REGION, &region);
	expect_errno("KVM_SET_USER_MEMORY_REGION", r, EPERM);
	r = fd_ioctl(vm_fd, KVM_SET_USER_MEMORY_REGION2, &region2);
	expect_errno("KVM_SET_USER_MEMORY_REGION2", r, EPERM);

	/* See the flag being at fault, also if it's set later on. */
	region.flags = 0;
	kvm_ioctl(vm_fd, KVM_SET_USER_MEMORY_REGION, &region);
	region.flags = KVM_MEM_EXIT_ON_MISSING;
	r = fd_ioctl(vm_fd, KVM_SET_USER_MEMORY_REGION, &region);
	expect_errno("KVM_SET_USER_MEMORY_REGION", r, EPERM);

	close(vm_fd);
}
#endif

int main(int argc, char *argv[])
{
	int fd;

	/* The harness has its own options, thus handle only a leading one. */
	if (argc > 2 && !strcmp(argv[1], "-b")) {
		bar_path = argv[2];
		argv[2] = argv[0];
		argv += 2;
		argc -= 2;
	} else if (argc > 1 && !strcmp(argv[1], "-h")) {
		printf("Usage: %s [-b path of a RAM-backed PCI BAR in sysfs] [options below]\n",
		       argv[0]);
	}

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_EXIT_ON_MISSING) == KVM_MEM_EXIT_ON_MISSING);

	fd = syscall(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	__TEST_REQUIRE(fd >= 0, "userfaultfd() failed, errno = %d (%s)", errno, strerror(errno));
	close(fd);

	disable_numa_balancing();

	return test_harness_run(argc, argv);
}
