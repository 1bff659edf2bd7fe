// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test KVM_MEM_EXIT_ON_MISSING together with each way of dirty logging: toggling
 * the flag must not affect what is known to be dirty, and an exit on a missing
 * page must not get in the way of logging the write that follows.
 */
#include <linux/bits.h>
#include <linux/sizes.h>

#include <asm/barrier.h>

#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "numaif.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"

#define TEST_SLOT	10
#define TEST_GPA	0xc0000000ul
#define TEST_GVA	TEST_GPA

/* As many pages as a dirty bitmap has in one u64. */
#define NR_PAGES	64
#define ALL_PAGES	GENMASK_ULL(NR_PAGES - 1, 0)
#define EVEN_PAGES	0x5555555555555555ull
#define ODD_PAGES	(~EVEN_PAGES)

#define MANUAL_PROTECT	KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
#define INITIALLY_SET	KVM_DIRTY_LOG_INITIALLY_SET

/* KVM reserves up to 64 + 512 entries of the ring. */
#define MIN_RING_SIZE	(1024 * sizeof(struct kvm_dirty_gfn))

enum guest_op {
	GUEST_READ,
	GUEST_WRITE,
};

static struct guest_cmd {
	u64 op;
	/* The pages to access, in this order from bit 0 to bit 63. */
	u64 pages;
	/* The value to write to each page, or all values read. */
	u64 val;
	u64 page_size;
} guest_cmd;

static void guest_code(void)
{
	int i;

	for (;;) {
		for (i = 0; i < NR_PAGES; i++) {
			u64 *mem = (u64 *)(TEST_GVA + i * READ_ONCE(guest_cmd.page_size));

			if (!(READ_ONCE(guest_cmd.pages) & BIT_ULL(i)))
				continue;

			if (READ_ONCE(guest_cmd.op) == GUEST_WRITE)
				WRITE_ONCE(*mem, READ_ONCE(guest_cmd.val));
			else
				WRITE_ONCE(guest_cmd.val, guest_cmd.val | READ_ONCE(*mem));
		}

		GUEST_SYNC(guest_cmd.op);
	}
}

struct env {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	struct guest_cmd *cmd;
	void *hva;
	bool ring;
	u64 manual_caps;
	u32 ring_index;
};

static size_t host_page_size(void)
{
	return getpagesize();
}

static void *host_page(struct env *env, int page)
{
	return env->hva + page * host_page_size();
}

static void set_flags(struct env *env, bool exit_on_missing, bool log_dirty)
{
	vm_mem_region_set_flags(env->vm, TEST_SLOT,
				(exit_on_missing ? KVM_MEM_EXIT_ON_MISSING : 0) |
				(log_dirty ? KVM_MEM_LOG_DIRTY_PAGES : 0));
}

static void toggle_flag(struct env *env)
{
	set_flags(env, false, true);
	set_flags(env, true, true);
	set_flags(env, false, true);
	set_flags(env, true, true);
}

/* Return the number of entries, and add them to @dirty. */
static u32 harvest_ring(struct env *env, u32 max, u64 *dirty)
{
	struct kvm_dirty_gfn *ring = vcpu_map_dirty_ring(env->vcpu), *gfn;
	u32 nr, nr_reset;

	for (nr = 0; nr < max; nr++) {
		gfn = &ring[env->ring_index % env->vcpu->dirty_gfns_count];
		/* Pairs with smp_wmb() in kvm_dirty_ring_push(). */
		if (smp_load_acquire(&gfn->flags) != KVM_DIRTY_GFN_F_DIRTY)
			break;

		TEST_ASSERT(gfn->slot == TEST_SLOT && gfn->offset < NR_PAGES,
			    "Dirty page 0x%llx in slot %u", gfn->offset, gfn->slot);
		*dirty |= BIT_ULL(gfn->offset);
		/* Pairs with kvm_dirty_gfn_harvested(). */
		smp_store_release(&gfn->flags, KVM_DIRTY_GFN_F_RESET);
		env->ring_index++;
	}

	nr_reset = kvm_vm_reset_dirty_ring(env->vm);
	TEST_ASSERT(nr_reset == nr, "KVM_RESET_DIRTY_RINGS = %d, expected %u", nr_reset, nr);
	return nr;
}

static u64 get_dirty_log(struct env *env)
{
	u64 dirty;

	kvm_vm_get_dirty_log(env->vm, TEST_SLOT, &dirty);
	return dirty;
}

/* Return the pages that are dirty, and make them clean. */
static u64 collect(struct env *env)
{
	u64 dirty = 0;
	u32 nr;

	if (env->ring) {
		nr = harvest_ring(env, -1, &dirty);
		TEST_ASSERT(nr == __builtin_popcountll(dirty),
			    "%u entries in the ring, dirty pages 0x%lx", nr, dirty);
		return dirty;
	}

	dirty = get_dirty_log(env);
	if (env->manual_caps)
		kvm_vm_clear_dirty_log(env->vm, TEST_SLOT, &dirty, 0, NR_PAGES);
	return dirty;
}

static void expect_dirty(struct env *env, u64 expected)
{
	u64 dirty = collect(env);

	TEST_ASSERT(dirty == expected, "Dirty pages 0x%lx, expected 0x%lx", dirty, expected);
	dirty = collect(env);
	TEST_ASSERT(!dirty, "Dirty pages 0x%lx, which were just collected", dirty);
}

/* What is dirty once dirty logging is enabled. */
static void expect_dirty_initially(struct env *env)
{
	expect_dirty(env, env->manual_caps & INITIALLY_SET ? ALL_PAGES : 0);
}

static void set_access(struct env *env, enum guest_op op, u64 pages, u64 val)
{
	*env->cmd = (struct guest_cmd) {
		.op = op,
		.pages = pages,
		.val = val,
		.page_size = host_page_size(),
	};
}

enum run_result {
	DONE,
	MISSING,
	RING_FULL,
};

static enum run_result run(struct env *env)
{
	struct kvm_run *run = env->vcpu->run;
	struct ucall uc;
	int r;

	r = _vcpu_run(env->vcpu);
	if (r) {
		TEST_ASSERT(r == -1 && errno == EFAULT, "KVM_RUN = %d, errno = %d (%s)",
			    r, errno, strerror(errno));
		TEST_ASSERT_KVM_EXIT_REASON(env->vcpu, KVM_EXIT_MEMORY_FAULT);
		TEST_ASSERT_EQ(run->memory_fault.flags, env->cmd->op == GUEST_WRITE ?
			       KVM_MEMORY_EXIT_FLAG_WRITE : KVM_MEMORY_EXIT_FLAG_READ);
		TEST_ASSERT_EQ(run->memory_fault.size, host_page_size());
		return MISSING;
	}

	if (run->exit_reason == KVM_EXIT_DIRTY_RING_FULL)
		return RING_FULL;

	switch (get_ucall(env->vcpu, &uc)) {
	case UCALL_SYNC:
		TEST_ASSERT_EQ(uc.args[1], env->cmd->op);
		return DONE;
	case UCALL_ABORT:
		REPORT_GUEST_ASSERT(uc);
	default:
		TEST_FAIL("Unexpected exit %u (%s)", run->exit_reason,
			  exit_reason_str(run->exit_reason));
	}
}

/* Populate the page that the guest misses, with a writable page only for a write. */
static int populate(struct env *env)
{
	int page = (env->vcpu->run->memory_fault.gpa - TEST_GPA) / host_page_size();

	TEST_ASSERT(page >= 0 && page < NR_PAGES && env->cmd->pages & BIT_ULL(page),
		    "Unexpected exit for gpa 0x%llx", env->vcpu->run->memory_fault.gpa);
	kvm_madvise(host_page(env, page), host_page_size(),
		    env->cmd->op == GUEST_WRITE ? MADV_POPULATE_WRITE : MADV_POPULATE_READ);
	return page;
}

/* Let the guest access pages, and expect an exit for each one of @missing. */
static void guest_access(struct env *env, enum guest_op op, u64 pages, u64 missing)
{
	static u64 val = 0xabcd000000000000ull;
	enum run_result r;
	u64 exits = 0;
	int page;

	set_access(env, op, pages, op == GUEST_WRITE ? ++val : 0);

	while ((r = run(env)) != DONE) {
		TEST_ASSERT_EQ(r, MISSING);
		page = populate(env);
		TEST_ASSERT(!(exits & BIT_ULL(page)), "A second exit for page %d", page);
		exits |= BIT_ULL(page);
	}

	TEST_ASSERT(exits == missing, "Exits for pages 0x%lx, expected 0x%lx", exits, missing);

	for (page = 0; page < NR_PAGES; page++) {
		if (op == GUEST_WRITE && pages & BIT_ULL(page))
			TEST_ASSERT_EQ(READ_ONCE(*(u64 *)host_page(env, page)), val);
	}
}

/* Return NULL if all is set up, otherwise the reason to skip the test. */
static const char *env_create(struct env *env, bool ring, u64 manual_caps)
{
	size_t size = NR_PAGES * host_page_size();
	u64 nr_guest_pages;

	env->ring = ring;
	env->manual_caps = manual_caps;

	if (manual_caps & ~kvm_check_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2))
		return "no KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2";
	if (ring && !kvm_has_cap(KVM_CAP_DIRTY_LOG_RING) &&
	    !kvm_has_cap(KVM_CAP_DIRTY_LOG_RING_ACQ_REL))
		return "no KVM_CAP_DIRTY_LOG_RING";

	env->vm = __vm_create(VM_SHAPE_DEFAULT, 1, 0);
	if (ring)
		vm_enable_dirty_ring(env->vm, max(MIN_RING_SIZE, host_page_size()));
	if (manual_caps)
		vm_enable_cap(env->vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, manual_caps);

	env->vcpu = vm_vcpu_add(env->vm, 0, guest_code);
	kvm_arch_vm_finalize_vcpus(env->vm);
	env->cmd = addr_gva2hva(env->vm, (gva_t)&guest_cmd);

	nr_guest_pages = vm_calc_num_guest_pages(env->vm->mode, size);
	vm_userspace_mem_region_add(env->vm, VM_MEM_SRC_ANONYMOUS, TEST_GPA, TEST_SLOT,
				    nr_guest_pages,
				    KVM_MEM_EXIT_ON_MISSING | KVM_MEM_LOG_DIRTY_PAGES);
	virt_map(env->vm, TEST_GVA, TEST_GPA, nr_guest_pages);
	env->hva = addr_gpa2hva(env->vm, TEST_GPA);

	/* Pages are to be populated one by one.  This fails without THP. */
	madvise(env->hva, size, MADV_NOHUGEPAGE);
	return NULL;
}

static void env_destroy(struct env *env)
{
	if (env->vm)
		kvm_vm_free(env->vm);
}

FIXTURE(dirty_log) {
	struct env env;
};

FIXTURE_VARIANT(dirty_log) {
	bool ring;
	u64 manual_caps;
};

FIXTURE_VARIANT_ADD(dirty_log, bitmap) {
	.ring = false,
};

FIXTURE_VARIANT_ADD(dirty_log, manual_protect) {
	.manual_caps = MANUAL_PROTECT,
};

FIXTURE_VARIANT_ADD(dirty_log, initially_set) {
	.manual_caps = MANUAL_PROTECT | INITIALLY_SET,
};

FIXTURE_VARIANT_ADD(dirty_log, ring) {
	.ring = true,
};

FIXTURE_SETUP(dirty_log)
{
	const char *reason = env_create(&self->env, variant->ring, variant->manual_caps);

	if (reason)
		SKIP(return, "%s", reason);
}

FIXTURE_TEARDOWN(dirty_log)
{
	env_destroy(&self->env);
}

TEST_F(dirty_log, missing_pages)
{
	struct env *env = &self->env;

	expect_dirty_initially(env);

	/* Neither an exit nor a read makes a page dirty, only the write does. */
	set_access(env, GUEST_WRITE, BIT_ULL(0), 1);
	TEST_ASSERT_EQ(run(env), MISSING);
	expect_dirty(env, 0);
	TEST_ASSERT_EQ(run(env), MISSING);
	populate(env);
	expect_dirty(env, 0);
	TEST_ASSERT_EQ(run(env), DONE);
	expect_dirty(env, BIT_ULL(0));

	guest_access(env, GUEST_READ, ODD_PAGES, ODD_PAGES);
	TEST_ASSERT_EQ(env->cmd->val, 0);
	expect_dirty(env, 0);

	guest_access(env, GUEST_WRITE, EVEN_PAGES, EVEN_PAGES & ~BIT_ULL(0));
	expect_dirty(env, EVEN_PAGES);

	/* The zero page is mapped, i.e. missing for a write. */
	guest_access(env, GUEST_WRITE, ALL_PAGES, ODD_PAGES);
	expect_dirty(env, ALL_PAGES);
}

TEST_F(dirty_log, toggle_flag)
{
	struct env *env = &self->env;

	/* The flag doesn't matter for what isn't missing. */
	kvm_madvise(env->hva, NR_PAGES * host_page_size(), MADV_POPULATE_WRITE);

	toggle_flag(env);
	expect_dirty_initially(env);
	toggle_flag(env);
	expect_dirty(env, 0);

	guest_access(env, GUEST_WRITE, EVEN_PAGES, 0);
	toggle_flag(env);
	expect_dirty(env, EVEN_PAGES);
	toggle_flag(env);
	expect_dirty(env, 0);

	/* Write while the flag is cleared, and collect in two steps if possible. */
	set_flags(env, false, true);
	guest_access(env, GUEST_WRITE, ODD_PAGES, 0);
	if (env->manual_caps)
		TEST_ASSERT_EQ(get_dirty_log(env), ODD_PAGES);
	set_flags(env, true, true);
	guest_access(env, GUEST_WRITE, BIT_ULL(0), 0);
	toggle_flag(env);
	expect_dirty(env, ODD_PAGES | BIT_ULL(0));
}

static u64 nr_faults(struct env *env)
{
#ifdef __x86_64__
	return vcpu_get_stat(env->vcpu, pf_taken);
#else
	return vcpu_get_stat(env->vcpu, exits);
#endif
}

/* Write to all pages.  Return true if there might have been a fault for each. */
static bool write_all_faults(struct env *env)
{
	u64 nr = nr_faults(env);

	guest_access(env, GUEST_WRITE, ALL_PAGES, 0);
	return nr_faults(env) - nr >= NR_PAGES;
}

/* Instead of write-protecting pages, a CPU may log pages as it sets Dirty bits. */
static bool cpu_dirty_log(void)
{
#ifdef __x86_64__
	return host_cpu_is_intel && get_kvm_intel_param_bool("pml");
#else
	return false;
#endif
}

/*
 * What is dirty already doesn't fault again, until it is collected.  A fault is
 * seen only by the number of faults, and by a second entry in the ring.
 */
TEST_F(dirty_log, no_write_protection)
{
	struct env *env = &self->env;
	int flag, i;

	if (!kvm_has_cap(KVM_CAP_BINARY_STATS_FD))
		SKIP(return, "no KVM_CAP_BINARY_STATS_FD");

	expect_dirty_initially(env);
	guest_access(env, GUEST_WRITE, ALL_PAGES, ALL_PAGES);

	for (flag = 0; flag < 2; flag++) {
		/*
		 * Try again to tell apart faults that just happen, e.g. arm64
		 * counts interrupts as well, from those that the flag causes.
		 */
		for (i = 0; i < 10; i++) {
			set_flags(env, !flag, true);
			guest_access(env, GUEST_WRITE, ALL_PAGES, 0);
			set_flags(env, flag, true);
			if (!write_all_faults(env))
				break;
		}
		TEST_ASSERT(i < 10, "Pages are write-protected if the flag is %s",
			    flag ? "set" : "cleared");
	}
	expect_dirty(env, ALL_PAGES);

	/* See that faults are counted. */
	if (!cpu_dirty_log())
		TEST_ASSERT(write_all_faults(env), "Pages are not write-protected");
	else
		guest_access(env, GUEST_WRITE, ALL_PAGES, 0);
	expect_dirty(env, ALL_PAGES);
}

/* Dirty logging can be enabled and disabled, be the flag toggled as well or not. */
TEST_F(dirty_log, toggle_both)
{
	struct env *env = &self->env;
	int i;

	expect_dirty_initially(env);
	guest_access(env, GUEST_WRITE, ALL_PAGES, ALL_PAGES);
	expect_dirty(env, ALL_PAGES);

	for (i = 0; i < 4; i++) {
		bool before = i & 1, after = i & 2;

		set_flags(env, before, false);
		guest_access(env, GUEST_WRITE, ALL_PAGES, 0);
		set_flags(env, after, true);
		expect_dirty_initially(env);
		guest_access(env, GUEST_WRITE, EVEN_PAGES, 0);
		expect_dirty(env, EVEN_PAGES);
	}
}

FIXTURE(dirty_ring) {
	struct env env;
};

FIXTURE_SETUP(dirty_ring)
{
	const char *reason = env_create(&self->env, true, 0);

	if (reason)
		SKIP(return, "%s", reason);
}

FIXTURE_TEARDOWN(dirty_ring)
{
	env_destroy(&self->env);
}

/*
 * Once the ring is full, every write to a missing page needs both exits, as only
 * one entry of the ring is collected at a time.
 */
TEST_F(dirty_ring, full)
{
	int i, page, nr_entries, nr_missing, nr_full, nr_rounds = 0;
	struct env *env = &self->env;
	enum run_result r;
	u64 dirty = 0;
	bool drop;

	nr_entries = env->vm->dirty_ring_size / sizeof(struct kvm_dirty_gfn);

	for (i = 0; nr_rounds < 2 * NR_PAGES; i++) {
		page = i % NR_PAGES;
		nr_missing = 0;
		nr_full = 0;
		/* Drop the page again between the exit and the retry. */
		drop = i & 1;

		kvm_madvise(host_page(env, page), host_page_size(), MADV_DONTNEED);
		set_access(env, GUEST_WRITE, BIT_ULL(page), i);

		while ((r = run(env)) != DONE) {
			if (r == MISSING) {
				populate(env);
				nr_missing++;
				continue;
			}

			/* There's no way around collecting dirty pages. */
			TEST_ASSERT_EQ(run(env), RING_FULL);
			TEST_ASSERT_EQ(harvest_ring(env, 1, &dirty), 1);
			nr_full++;
			TEST_ASSERT(nr_full < 10, "No progress, page %d", page);

			if (drop) {
				kvm_madvise(host_page(env, page), host_page_size(), MADV_DONTNEED);
				drop = false;
			}
		}

		TEST_ASSERT_EQ(READ_ONCE(*(u64 *)host_page(env, page)), i);
		TEST_ASSERT_EQ(nr_missing, i & 1 && !drop ? 2 : 1);
		TEST_ASSERT(nr_full || !nr_rounds, "The ring is not full any more");
		TEST_ASSERT(nr_full || i < nr_entries, "The ring of %d entries is never full",
			    nr_entries);
		nr_rounds += !!nr_full;
	}

	/* All that is left are the last writes. */
	dirty = 0;
	harvest_ring(env, -1, &dirty);
	TEST_ASSERT_EQ(dirty, ALL_PAGES);
	expect_dirty(env, 0);
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_EXIT_ON_MISSING) == KVM_MEM_EXIT_ON_MISSING);

	disable_numa_balancing();

	return test_harness_run(argc, argv);
}
