// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test memory-fault exits of a nested guest, i.e. that the exit has the address
 * that L1 uses, that tables of L1 that KVM can't read are reported to userspace
 * and not to L1, and that L1 gets the fault if its tables are bad.
 *
 * L1 runs at vEL2.  L2 is a few instructions at EL1, with its MMU off, whose
 * addresses aren't those of L1.  Userspace writes the tables for L1.
 */
#include <linux/bitfield.h>
#include <linux/sizes.h>
#include <sys/mman.h>

#include <asm/ptrace.h>
#include <asm/sysreg.h>

#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"
#include "ucall.h"

#define DATA_SLOT		10
#define DATA_GPA		0xc0000000ul
#define TABLE_SLOT		11
#define TABLE_GPA		0xb0000000ul
#define VNCR_SLOT		12
#define VNCR_GPA		0xd0000000ul
#define VNCR_GVA		VNCR_GPA

/* No slot has this page. */
#define NO_SLOT_GPA		0xe0000000ul

/* Each has a last-level table of its own, whatever the size of pages is. */
#define L2_CODE			0x40000000ul
#define L2_DATA			0x60000000ul
#define L2_IPA_BITS		32

#define HVC_INSN		0xd4000002

/* Where FEAT_NV2 puts VTTBR_EL2. */
#define VNCR_VTTBR_OFFSET	0x20

/* KVM may be emulated. */
#define SLOW_TEST_TIMEOUT	300

enum l2_op {
	L2_READ,
	L2_WRITE,
	L2_EXEC,
	L2_READ_VTTBR,
	/* AT S12E1R by L1. */
	L1_TRANSLATE,
};

static const struct {
	const char *name;
	u64 flags;
} l2_ops[] = {
	[L2_READ]	= { "read",  KVM_MEMORY_EXIT_FLAG_READ },
	[L2_WRITE]	= { "write", KVM_MEMORY_EXIT_FLAG_WRITE },
	[L2_EXEC]	= { "fetch", KVM_MEMORY_EXIT_FLAG_EXEC },
};

/* The code of L2 doesn't cross a page because of the alignment. */
static const u32 l2_code[][2] __aligned(32) = {
	[L2_READ]	= { 0xf9400001, HVC_INSN },	/* ldr x1, [x0] */
	[L2_WRITE]	= { 0xf9000001, HVC_INSN },	/* str x1, [x0] */
	[L2_EXEC]	= { 0xd61f0000 },		/* br x0 */
	[L2_READ_VTTBR]	= { 0xd53c2101, HVC_INSN },	/* mrs x1, vttbr_el2 */
};

struct l2_run {
	u64 op;
	u64 entry;
	u64 addr;
	/* The value to write, or the value read. */
	u64 val;
	u64 vtcr;
	u64 vttbr;

	/* What L1 got. */
	u64 esr;
	u64 hpfar;
	u64 par;
};

static struct l2_run l2_run;

static void l2_exit_handler(struct ex_regs *regs)
{
	l2_run.esr = read_sysreg(esr_el1);
	l2_run.hpfar = read_sysreg(hpfar_el2);
	l2_run.val = regs->regs[1];

	/* Return to enter_l2(). */
	regs->pc = regs->regs[2];
	regs->pstate = PSR_MODE_EL2h | PSR_D_BIT | PSR_A_BIT | PSR_I_BIT | PSR_F_BIT;
}

/* L2 changes nothing but x1, and the handler preserves all registers of L2. */
static void enter_l2(u64 addr, u64 val)
{
	register u64 x0 asm("x0") = addr;
	register u64 x1 asm("x1") = val;

	asm volatile("adr x2, 1f\n"
		     "eret\n"
		     "1:\n"
		     : "+r" (x0), "+r" (x1) : : "x2", "memory");
}

static void l1_code(void)
{
	for (;;) {
		u64 op = READ_ONCE(l2_run.op);
		u64 hcr = HCR_EL2_RW | HCR_EL2_E2H | HCR_EL2_VM;

		if (op == L2_READ_VTTBR)
			hcr |= HCR_EL2_NV | HCR_EL2_NV2;

		write_sysreg(l2_run.vtcr, vtcr_el2);
		write_sysreg(l2_run.vttbr, vttbr_el2);
		write_sysreg_s(VNCR_GVA, SYS_VNCR_EL2);
		write_sysreg(hcr, hcr_el2);
		write_sysreg_s(INIT_SCTLR_EL1_MMU_OFF, SYS_SCTLR_EL12);
		write_sysreg(l2_run.entry, elr_el1);
		write_sysreg(PSR_MODE_EL1h | PSR_D_BIT | PSR_A_BIT | PSR_I_BIT | PSR_F_BIT,
			     spsr_el1);
		isb();

		if (op == L1_TRANSLATE) {
			write_sysreg_s(l2_run.addr, OP_AT_S12E1R);
			isb();
			l2_run.par = read_sysreg(par_el1);
		} else {
			enter_l2(l2_run.addr, l2_run.val);
		}

		GUEST_SYNC(op);
	}
}

/* The tables of L1, one page each.  There is a middle level with 4K pages only. */
enum l1_table {
	TABLE_ROOT,
	TABLE_MID,
	TABLE_CODE,
	TABLE_DATA,
	NR_TABLES,
};

struct env {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	struct l2_run *l2;
	void *data;
	void *tables;
};

static size_t host_page_size(void)
{
	return getpagesize();
}

static int host_page_shift(void)
{
	return __builtin_ctzl(host_page_size());
}

static u64 table_gpa(enum l1_table table)
{
	return TABLE_GPA + table * host_page_size();
}

static void *table_hva(struct env *env, enum l1_table table)
{
	return env->tables + table * host_page_size();
}

static int start_level(void)
{
	return host_page_size() == SZ_4K ? 1 : 2;
}

static bool table_exists(enum l1_table table)
{
	return table != TABLE_MID || start_level() == 1;
}

static u64 *table_entry(struct env *env, u64 ipa, int level, enum l1_table leaf)
{
	int stride = host_page_shift() - 3;
	int shift = host_page_shift() + (3 - level) * stride;
	u64 *table = table_hva(env, level == 3 ? leaf : level - start_level());

	return &table[(ipa >> shift) & GENMASK(stride - 1, 0)];
}

static void map_l2_page(struct env *env, u64 ipa, u64 gpa, enum l1_table leaf)
{
	int level;

	for (level = start_level(); level < 3; level++)
		*table_entry(env, ipa, level, leaf) =
			table_gpa(level == 2 ? leaf : TABLE_MID) | PTE_VALID | PMD_TYPE_TABLE;

	/* Normal write-back memory, readable, writable and executable. */
	*table_entry(env, ipa, 3, leaf) = gpa | PTE_VALID | PTE_TYPE_PAGE | 0xf << 2 |
					  3 << 6 | PTE_SHARED | PTE_AF;
}

static u64 l2_code_gpa(struct env *env)
{
	return addr_gva2gpa(env->vm, (gva_t)l2_code);
}

static void write_tables(struct env *env)
{
	u64 page_mask = ~(host_page_size() - 1);
	int i;

	map_l2_page(env, L2_CODE, l2_code_gpa(env) & page_mask, TABLE_CODE);
	for (i = 0; i <= L2_EXEC; i++)
		map_l2_page(env, L2_DATA + i * host_page_size(),
			    DATA_GPA + i * host_page_size(), TABLE_DATA);
}

static u64 default_vtcr(void)
{
	u64 tg0 = host_page_size() == SZ_4K ? VTCR_EL2_TG0_4K :
		  host_page_size() == SZ_16K ? VTCR_EL2_TG0_16K : VTCR_EL2_TG0_64K;

	/* SL0 is 1 for any size of pages, PS is 40 bits. */
	return VTCR_EL2_RES1 | FIELD_PREP(VTCR_EL2_TG0, tg0) |
	       FIELD_PREP(VTCR_EL2_T0SZ, 64 - L2_IPA_BITS) |
	       FIELD_PREP(VTCR_EL2_SL0, 1) | FIELD_PREP(VTCR_EL2_PS, 2) |
	       FIELD_PREP(VTCR_EL2_SH0, 3) | FIELD_PREP(VTCR_EL2_ORGN0, 1) |
	       FIELD_PREP(VTCR_EL2_IRGN0, 1);
}

/* Access the end of a page, to see that KVM reports the start of the page. */
static size_t word_offset(void)
{
	return host_page_size() - 3 * sizeof(u64);
}

/* Each operation has a page of its own. */
static u64 *op_word(struct env *env, enum l2_op op)
{
	return env->data + op * host_page_size() + word_offset();
}

static void populate(struct env *env, enum l2_op op)
{
	WRITE_ONCE(*op_word(env, op), HVC_INSN | (u64)(op + 1) << 32);
}

static u64 l2_pc(struct env *env, enum l2_op op)
{
	return L2_CODE + (l2_code_gpa(env) & (host_page_size() - 1)) + op * sizeof(l2_code[0]);
}

static void set_op(struct env *env, enum l2_op op)
{
	*env->l2 = (struct l2_run) {
		.op = op,
		.entry = l2_pc(env, op),
		.addr = L2_DATA + op * host_page_size() + word_offset(),
		.val = ~0ul,
		.vtcr = default_vtcr(),
		.vttbr = table_gpa(TABLE_ROOT),
	};
}

/* Return true if L1 is done, false if KVM_RUN fails because of memory. */
static bool try_run(struct env *env)
{
	struct kvm_run *run = env->vcpu->run;
	struct ucall uc;
	int r;

	/* Don't mistake an earlier exit for a new one. */
	run->exit_reason = KVM_EXIT_UNKNOWN;
	memset(&run->memory_fault, 0xa5, sizeof(run->memory_fault));

	r = _vcpu_run(env->vcpu);
	if (r) {
		TEST_ASSERT(r == -1 && errno == EFAULT, "KVM_RUN = %d, errno = %d (%s)",
			    r, errno, strerror(errno));
		return false;
	}

	switch (get_ucall(env->vcpu, &uc)) {
	case UCALL_SYNC:
		TEST_ASSERT_EQ(uc.args[1], env->l2->op);
		return true;
	case UCALL_ABORT:
		REPORT_GUEST_ASSERT(uc);
	default:
		assert_on_unhandled_exception(env->vcpu);
		TEST_FAIL("Unexpected exit %u (%s)", run->exit_reason,
			  exit_reason_str(run->exit_reason));
	}
}

/* L2 is still where it was, no exception was injected. */
static void assert_in_l2(struct env *env, u64 pc)
{
	u64 pstate = vcpu_get_reg(env->vcpu, ARM64_CORE_REG(regs.pstate));

	TEST_ASSERT_EQ(pstate & PSR_MODE_MASK, PSR_MODE_EL1h);
	TEST_ASSERT_EQ(vcpu_get_reg(env->vcpu, ARM64_CORE_REG(regs.pc)), pc);
}

static void expect_exit(struct env *env, u64 gpa, u64 flags, u64 pc)
{
	struct kvm_run *run = env->vcpu->run;

	TEST_ASSERT(!try_run(env), "No exit for gpa 0x%lx, ESR of L1 is 0x%lx", gpa, env->l2->esr);
	TEST_ASSERT_KVM_EXIT_REASON(env->vcpu, KVM_EXIT_MEMORY_FAULT);
	TEST_ASSERT(run->memory_fault.flags == flags && run->memory_fault.gpa == gpa &&
		    run->memory_fault.size == host_page_size(),
		    "Exit with flags 0x%llx, gpa 0x%llx, size 0x%llx, expected 0x%lx, 0x%lx, 0x%lx",
		    run->memory_fault.flags, run->memory_fault.gpa, run->memory_fault.size,
		    flags, gpa, host_page_size());
	assert_in_l2(env, pc);
}

static void expect_bare_efault(struct env *env, u64 pc)
{
	TEST_ASSERT(!try_run(env), "KVM_RUN didn't fail, ESR of L1 is 0x%lx", env->l2->esr);
	TEST_ASSERT_KVM_EXIT_REASON(env->vcpu, KVM_EXIT_UNKNOWN);
	assert_in_l2(env, pc);
}

/* L1 sees nothing but the HVC that ends any operation of L2. */
static void expect_done(struct env *env)
{
	struct kvm_run *run = env->vcpu->run;
	enum l2_op op = env->l2->op;
	u64 *word = op_word(env, op);

	TEST_ASSERT(try_run(env), "Unexpected exit %u, gpa 0x%llx, flags 0x%llx",
		    run->exit_reason, run->memory_fault.gpa, run->memory_fault.flags);
	TEST_ASSERT(ESR_ELx_EC(env->l2->esr) == ESR_ELx_EC_HVC64,
		    "%s by L2: L1 got a fault, ESR 0x%lx", l2_ops[op].name, env->l2->esr);

	if (op == L2_READ || op == L2_WRITE)
		TEST_ASSERT_EQ(env->l2->val, READ_ONCE(*word));
	if (op == L2_WRITE)
		TEST_ASSERT_EQ(env->l2->val, ~0ul);
}

static void expect_l1_fault(struct env *env, u64 ec, u64 fsc, u64 ipa)
{
	struct l2_run *l2 = env->l2;

	TEST_ASSERT(try_run(env), "KVM_RUN failed because of L1's tables");
	TEST_ASSERT(ESR_ELx_EC(l2->esr) == ec && (l2->esr & ESR_ELx_FSC) == fsc,
		    "ESR of L1 is 0x%lx, expected EC 0x%lx, FSC 0x%lx", l2->esr, ec, fsc);
	TEST_ASSERT_EQ(FIELD_GET(HPFAR_EL2_FIPA, l2->hpfar), ipa >> 12);
}

/* Reset the vCPU between save and restore, as a new one would be. */
static void save_restore_vcpu(struct env *env)
{
	struct kvm_reg_list *list = vcpu_get_reg_list(env->vcpu);
	__uint128_t *vals = calloc(list->n, sizeof(*vals));
	u64 i;

	TEST_ASSERT(vals, "Out of memory");

	for (i = 0; i < list->n; i++) {
		TEST_ASSERT(KVM_REG_SIZE(list->reg[i]) <= sizeof(*vals),
			    "Register 0x%llx is too big", list->reg[i]);
		TEST_ASSERT(!__vcpu_get_reg(env->vcpu, list->reg[i], &vals[i]),
			    "Get register 0x%llx, errno = %d", list->reg[i], errno);
	}

	vcpu_ioctl(env->vcpu, KVM_ARM_VCPU_INIT, &env->vcpu->init);
	TEST_ASSERT_EQ(vcpu_get_reg(env->vcpu, KVM_ARM64_SYS_REG(SYS_VTTBR_EL2)), 0);

	for (i = 0; i < list->n; i++) {
		struct kvm_one_reg reg = { .id = list->reg[i], .addr = (u64)&vals[i] };

		TEST_ASSERT(!__vcpu_ioctl(env->vcpu, KVM_SET_ONE_REG, &reg),
			    "Set register 0x%llx, errno = %d", list->reg[i], errno);
	}

	free(vals);
	free(list);
}

FIXTURE(nested_memory_fault) {
	struct env env;
};

FIXTURE_SETUP(nested_memory_fault)
{
	static const u64 ecs[] = { ESR_ELx_EC_HVC64, ESR_ELx_EC_IABT_LOW, ESR_ELx_EC_DABT_LOW };
	struct env *env = &self->env;
	struct kvm_vcpu_init init;
	int i;

	env->vm = vm_create(1);
	kvm_get_default_vcpu_target(env->vm, &init);
	init.features[0] |= BIT(KVM_ARM_VCPU_HAS_EL2);
	env->vcpu = aarch64_vcpu_add(env->vm, 0, &init, l1_code);
	kvm_arch_vm_finalize_vcpus(env->vm);

	vm_init_descriptor_tables(env->vm);
	vcpu_init_descriptor_tables(env->vcpu);
	for (i = 0; i < ARRAY_SIZE(ecs); i++)
		vm_install_sync_handler(env->vm, VECTOR_SYNC_LOWER_64, ecs[i], l2_exit_handler);

	/*
	 * KVM_MEM_EXIT_ON_MISSING makes no difference for the tables, which KVM
	 * reads as it always did, and about which it exits only if the
	 * capability is enabled.
	 */
	env->tables = kvm_mmap(NR_TABLES * host_page_size(), PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS, -1);
	vm_set_user_memory_region(env->vm, TABLE_SLOT, KVM_MEM_EXIT_ON_MISSING, TABLE_GPA,
				  NR_TABLES * host_page_size(), env->tables);
	write_tables(env);

	env->data = kvm_mmap((L2_EXEC + 1) * host_page_size(), PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1);
	vm_set_user_memory_region(env->vm, DATA_SLOT, KVM_MEM_EXIT_ON_MISSING, DATA_GPA,
				  (L2_EXEC + 1) * host_page_size(), env->data);

	env->l2 = addr_gva2hva(env->vm, (gva_t)&l2_run);
}

FIXTURE_TEARDOWN(nested_memory_fault)
{
	/*
	 * The rest is freed on exit.  With the VM gone, unmapping its memory
	 * doesn't make KVM walk all of the address space of L2.
	 */
	kvm_vm_release(self->env.vm);
}

static void enable_memory_fault_exit(struct env *env)
{
	vm_enable_cap(env->vm, KVM_CAP_MEMORY_FAULT_EXIT,
		      KVM_MEMORY_EXIT_FLAG_READ | KVM_MEMORY_EXIT_FLAG_WRITE |
		      KVM_MEMORY_EXIT_FLAG_EXEC);
}

/* The PC at which L2 accesses its page. */
static u64 access_pc(struct env *env)
{
	return env->l2->op == L2_EXEC ? env->l2->addr : env->l2->entry;
}

TEST_F(nested_memory_fault, missing_page)
{
	struct env *env = &self->env;
	enum l2_op op;

	for (op = L2_READ; op <= L2_EXEC; op++) {
		u64 gpa = DATA_GPA + op * host_page_size();

		set_op(env, op);
		expect_exit(env, gpa, l2_ops[op].flags, access_pc(env));
		expect_exit(env, gpa, l2_ops[op].flags, access_pc(env));
		save_restore_vcpu(env);
		expect_exit(env, gpa, l2_ops[op].flags, access_pc(env));
		save_restore_vcpu(env);
		populate(env, op);
		expect_done(env);

		/* The page is still there, and still the one of L2's address. */
		set_op(env, op);
		expect_done(env);
	}
}

/* KVM reads the table, whatever L2 does. */
static void expect_table_hole(struct env *env, enum l1_table table, bool report)
{
	u64 pc = table == TABLE_DATA ? access_pc(env) : env->l2->entry;
	int i;

	for (i = 0; i < 2; i++) {
		if (report)
			expect_exit(env, table_gpa(table), KVM_MEMORY_EXIT_FLAG_READ, pc);
		else
			expect_bare_efault(env, pc);
		save_restore_vcpu(env);
	}
}

/*
 * Unmap all tables before L2 runs for the first time, and provide them one by
 * one.  Unmapping one of them later makes KVM walk all of the address space of
 * L2, which is slow if KVM itself is emulated.
 */
static void test_table_holes(struct env *env, enum l2_op op, bool report)
{
	size_t size = NR_TABLES * host_page_size();
	enum l1_table table;
	void *tables, *mem;

	tables = malloc(size);
	TEST_ASSERT(tables, "Out of memory");
	memcpy(tables, env->tables, size);
	kvm_munmap(env->tables, size);

	populate(env, op);
	set_op(env, op);

	for (table = TABLE_ROOT; table < NR_TABLES; table++) {
		if (table_exists(table))
			expect_table_hole(env, table, report);

		mem = mmap(table_hva(env, table), host_page_size(), PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
		TEST_ASSERT(mem == table_hva(env, table), "mmap() failed, errno = %d", errno);
		memcpy(mem, tables + (mem - env->tables), host_page_size());
	}

	expect_done(env);
	free(tables);
}

TEST_F(nested_memory_fault, table_hole)
{
	test_table_holes(&self->env, L2_READ, false);
}

static void protect_table(struct env *env, enum l1_table table, int prot)
{
	TEST_ASSERT(!mprotect(table_hva(env, table), host_page_size(), prot),
		    "mprotect() failed, errno = %d", errno);
}

TEST_F_TIMEOUT(nested_memory_fault, table_hole_reported, SLOW_TEST_TIMEOUT)
{
	struct env *env = &self->env;

	enable_memory_fault_exit(env);
	test_table_holes(env, L2_WRITE, true);

	/* Take a table away that is in use. */
	populate(env, L2_EXEC);
	set_op(env, L2_EXEC);
	protect_table(env, TABLE_DATA, PROT_NONE);
	expect_table_hole(env, TABLE_DATA, true);
	protect_table(env, TABLE_DATA, PROT_READ | PROT_WRITE);
	expect_done(env);
}

/* Bad values of VTCR_EL2, the fault is one of level 0. */
enum bad_vtcr {
	/* The size of the input address. */
	BAD_VTCR_TOO_SMALL,
	BAD_VTCR_TOO_LARGE,
	/* The number of entries at the start level. */
	BAD_VTCR_TOO_FEW,
	BAD_VTCR_TOO_MANY,
	NR_BAD_VTCRS,
};

static const struct {
	u64 t0sz;
	u64 sl0;
} bad_vtcrs[] = {
	[BAD_VTCR_TOO_SMALL]	= { .t0sz = 63, .sl0 = 1 },
	[BAD_VTCR_TOO_LARGE]	= { .t0sz =  0, .sl0 = 1 },
	[BAD_VTCR_TOO_FEW]	= { .t0sz = 39, .sl0 = 1 },
	[BAD_VTCR_TOO_MANY]	= { .t0sz = 16, .sl0 = 0 },
};

static void set_bad_vtcr(struct env *env, enum bad_vtcr i)
{
	env->l2->vtcr &= ~(VTCR_EL2_T0SZ | VTCR_EL2_SL0);
	env->l2->vtcr |= FIELD_PREP(VTCR_EL2_T0SZ, bad_vtcrs[i].t0sz) |
			 FIELD_PREP(VTCR_EL2_SL0, bad_vtcrs[i].sl0);
}

/* Use few values, more than KVM has MMUs for make it unmap all of one of them. */
TEST_F(nested_memory_fault, bad_vtcr)
{
	struct env *env = &self->env;

	set_op(env, L2_READ);
	set_bad_vtcr(env, BAD_VTCR_TOO_MANY);
	expect_l1_fault(env, ESR_ELx_EC_IABT_LOW, ESR_ELx_FSC_FAULT_L(0), L2_CODE);

	set_op(env, L2_READ);
	set_bad_vtcr(env, BAD_VTCR_TOO_LARGE);
	expect_l1_fault(env, ESR_ELx_EC_IABT_LOW, ESR_ELx_FSC_FAULT_L(0), L2_CODE);
}

static void expect_translation(struct env *env, bool fault, u64 fsc)
{
	u64 par;

	TEST_ASSERT(try_run(env), "KVM_RUN failed because of L1's tables");
	par = env->l2->par;
	if (fault) {
		TEST_ASSERT((par & SYS_PAR_EL1_F) && (par & SYS_PAR_EL1_S) &&
			    FIELD_GET(SYS_PAR_EL1_FST, par) == fsc,
			    "PAR_EL1 is 0x%lx, expected a stage-2 fault, FST 0x%lx", par, fsc);
	} else {
		TEST_ASSERT(!(par & SYS_PAR_EL1_F), "PAR_EL1 is 0x%lx", par);
	}
}

/* KVM must not emulate the instruction again and again. */
TEST_F(nested_memory_fault, bad_vtcr_translate)
{
	struct env *env = &self->env;
	enum bad_vtcr i;

	for (i = 0; i < NR_BAD_VTCRS; i++) {
		set_op(env, L1_TRANSLATE);
		env->l2->addr = L2_DATA;
		set_bad_vtcr(env, i);
		expect_translation(env, true, ESR_ELx_FSC_FAULT_L(0));
	}

	set_op(env, L1_TRANSLATE);
	env->l2->addr = L2_DATA;
	expect_translation(env, false, 0);
}

/* A table that is in no slot can't be provided by userspace, L1 is to blame. */
TEST_F(nested_memory_fault, table_without_slot)
{
	struct env *env = &self->env;
	u64 *entry = table_entry(env, L2_DATA, 2, TABLE_DATA);
	u64 good_entry = *entry;

	enable_memory_fault_exit(env);

	set_op(env, L2_READ);
	env->l2->vttbr = NO_SLOT_GPA;
	expect_l1_fault(env, ESR_ELx_EC_IABT_LOW, ESR_ELx_FSC_SEA_TTW(start_level()), L2_CODE);

	*entry = NO_SLOT_GPA | PTE_VALID | PMD_TYPE_TABLE;
	set_op(env, L2_READ);
	expect_l1_fault(env, ESR_ELx_EC_DABT_LOW, ESR_ELx_FSC_SEA_TTW(3), L2_DATA);

	set_op(env, L1_TRANSLATE);
	env->l2->addr = L2_DATA;
	expect_translation(env, true, ESR_ELx_FSC_SEA_TTW(3));

	*entry = good_entry;
	populate(env, L2_READ);
	set_op(env, L2_READ);
	expect_done(env);
}

static int add_vncr_memory(struct env *env, u64 vttbr)
{
	size_t size = host_page_size();
	void *mem;
	int fd;

	fd = vm_create_guest_memfd(env->vm, size,
				   GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED);
	mem = kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	WRITE_ONCE(*(u64 *)(mem + VNCR_VTTBR_OFFSET), vttbr);
	kvm_munmap(mem, size);

	vm_set_user_memory_region2(env->vm, VNCR_SLOT, KVM_MEM_GUEST_MEMFD, VNCR_GPA, size,
				   mem, fd, 0);
	return fd;
}

static void expect_vttbr(struct env *env, u64 vttbr)
{
	TEST_ASSERT(try_run(env), "Unexpected exit %u", env->vcpu->run->exit_reason);
	TEST_ASSERT(ESR_ELx_EC(env->l2->esr) == ESR_ELx_EC_HVC64 && env->l2->val == vttbr,
		    "VTTBR_EL2 of L2 is 0x%lx, expected 0x%lx, ESR of L1 is 0x%lx",
		    env->l2->val, vttbr, env->l2->esr);
}

static bool has_nv2(struct env *env)
{
	return SYS_FIELD_GET(ID_AA64MMFR4_EL1, NV_frac,
			     vcpu_get_reg(env->vcpu, KVM_ARM64_SYS_REG(SYS_ID_AA64MMFR4_EL1)));
}

/*
 * L2 is a hypervisor, too.  KVM itself accesses the page with its registers, i.e.
 * faults it in even if the memslot asks for exits.
 */
TEST_F_TIMEOUT(nested_memory_fault, vncr_missing, SLOW_TEST_TIMEOUT)
{
	struct env *env = &self->env;
	void *mem;

	if (!has_nv2(env))
		SKIP(return, "L1 has no FEAT_NV2");

	vm_userspace_mem_region_add(env->vm, VM_MEM_SRC_SHMEM, VNCR_GPA, VNCR_SLOT,
				    vm_calc_num_guest_pages(env->vm->mode, host_page_size()),
				    KVM_MEM_EXIT_ON_MISSING);
	virt_map(env->vm, VNCR_GVA, VNCR_GPA, host_page_size() / env->vm->page_size);
	mem = addr_gpa2hva(env->vm, VNCR_GPA);
	WRITE_ONCE(*(u64 *)(mem + VNCR_VTTBR_OFFSET), 0x3000);
	kvm_madvise(mem, host_page_size(), MADV_DONTNEED);

	set_op(env, L2_READ_VTTBR);
	expect_vttbr(env, 0x3000);
}

/* The page is one that KVM can't get. */
TEST_F_TIMEOUT(nested_memory_fault, vncr_guest_memfd, SLOW_TEST_TIMEOUT)
{
	struct env *env = &self->env;
	int fd;

	if (!has_nv2(env))
		SKIP(return, "L1 has no FEAT_NV2");

	if (!(vm_check_cap(env->vm, KVM_CAP_GUEST_MEMFD_FLAGS) & GUEST_MEMFD_FLAG_INIT_SHARED))
		SKIP(return, "no guest_memfd");

	virt_map(env->vm, VNCR_GVA, VNCR_GPA, host_page_size() / env->vm->page_size);
	fd = add_vncr_memory(env, 0x1000);
	set_op(env, L2_READ_VTTBR);
	expect_vttbr(env, 0x1000);

	/* Without the file, there's no memory any more. */
	kvm_close(fd);

	set_op(env, L2_READ_VTTBR);
	expect_exit(env, VNCR_GPA, 0, env->l2->entry);
	enable_memory_fault_exit(env);
	expect_exit(env, VNCR_GPA, KVM_MEMORY_EXIT_FLAG_READ, env->l2->entry);

	vm_set_user_memory_region2(env->vm, VNCR_SLOT, 0, VNCR_GPA, 0, 0, 0, 0);
	fd = add_vncr_memory(env, 0x2000);
	expect_vttbr(env, 0x2000);
	kvm_close(fd);
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_ARM_EL2));
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_EXIT_ON_MISSING) == KVM_MEM_EXIT_ON_MISSING);
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_MEMORY_FAULT_EXIT) > 0);

	return test_harness_run(argc, argv);
}
