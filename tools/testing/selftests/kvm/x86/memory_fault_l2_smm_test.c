// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test memory-fault exits where KVM has more than one view of guest memory, or
 * accesses it on behalf of L1: a page that L2 misses, a page that is missing in
 * one of the two address spaces, i.e. in or out of SMM, and the VP assist page
 * of Hyper-V, which KVM reads if L1 executes VMRUN.
 */
#include <pthread.h>

#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "numaif.h"
#include "processor.h"
#include "hyperv.h"
#include "smm.h"
#include "svm_util.h"
#include "test_util.h"
#include "vmx.h"

#define TEST_SLOT	10
#define TEST_NR_PAGES	4
#define TEST_SIZE	(TEST_NR_PAGES * PAGE_SIZE)

/* All differ, so that none can be mistaken for L1's guest physical address. */
#define TEST_GPA	0xc0000000ul
#define TEST_GVA	0x40000000ul
#define TEST_L2_GPA	0x80000000ul

#define SMRAM_GPA	0x1000000
#define SYNC_PORT	0xe

/* Code that returns if it is called. */
#define RET_INSN	0xc3ul

enum guest_op {
	GUEST_READ,
	GUEST_WRITE,
	GUEST_EXEC,
	/* Use the page as stack until an NMI arrives. */
	GUEST_NMI,
	GUEST_VMCALL,
};

static struct guest_cmd {
	u64 op;
	u64 gva;
	/* The value to write, or the value read. */
	u64 val;
} guest_cmd;

static void guest_nmi_handler(struct ex_regs *regs)
{
	WRITE_ONCE(guest_cmd.val, READ_ONCE(guest_cmd.val) + 1);
}

/* Run by L2, and by a guest without nested virtualization. */
static void guest_code(void)
{
	for (;;) {
		u64 *mem = (u64 *)READ_ONCE(guest_cmd.gva);

		switch (READ_ONCE(guest_cmd.op)) {
		case GUEST_READ:
			WRITE_ONCE(guest_cmd.val, READ_ONCE(*mem));
			break;
		case GUEST_WRITE:
			WRITE_ONCE(*mem, READ_ONCE(guest_cmd.val));
			break;
		case GUEST_EXEC:
			((void (*)(void))mem)();
			break;
		case GUEST_NMI:
			asm volatile("xchg %0, %%rsp\n\t"
				     "out %%al, $" __stringify(SYNC_PORT) "\n\t"
				     "xchg %0, %%rsp" : "+r"(mem) : : "memory");
			break;
		case GUEST_VMCALL:
			vmcall();
			break;
		default:
			GUEST_FAIL("Unknown operation %lu", guest_cmd.op);
		}

		GUEST_SYNC(guest_cmd.op);
	}
}

static void set_access(struct kvm_vm *vm, enum guest_op op, u64 gva, u64 val)
{
	struct guest_cmd *cmd = addr_gva2hva(vm, (gva_t)&guest_cmd);

	*cmd = (struct guest_cmd) { .op = op, .gva = gva, .val = val };
}

static u64 get_val(struct kvm_vm *vm)
{
	return ((struct guest_cmd *)addr_gva2hva(vm, (gva_t)&guest_cmd))->val;
}

static void expect_ucall(struct kvm_vcpu *vcpu, u64 cmd)
{
	struct ucall uc = {};
	int r = _vcpu_run(vcpu);

	TEST_ASSERT(!r, "KVM_RUN = %d, errno = %d (%s), exit %u (%s), gpa 0x%llx, flags 0x%llx",
		    r, errno, strerror(errno), vcpu->run->exit_reason,
		    exit_reason_str(vcpu->run->exit_reason),
		    vcpu->run->memory_fault.gpa, vcpu->run->memory_fault.flags);

	if (get_ucall(vcpu, &uc) == UCALL_ABORT)
		REPORT_GUEST_ASSERT(uc);
	TEST_ASSERT_EQ(uc.cmd, cmd);
}

static void expect_efault(struct kvm_vcpu *vcpu, u32 exit_reason)
{
	int r;

	/* Don't mistake an earlier exit for a new one. */
	vcpu->run->exit_reason = KVM_EXIT_UNKNOWN;
	vcpu->run->flags = -1;
	memset(&vcpu->run->memory_fault, 0xa5, sizeof(vcpu->run->memory_fault));

	r = _vcpu_run(vcpu);
	TEST_ASSERT(r == -1 && errno == EFAULT, "KVM_RUN = %d, errno = %d (%s), exit %u (%s)",
		    r, errno, strerror(errno), vcpu->run->exit_reason,
		    exit_reason_str(vcpu->run->exit_reason));
	TEST_ASSERT_KVM_EXIT_REASON(vcpu, exit_reason);
}

static void expect_exit(struct kvm_vcpu *vcpu, u64 gpa, u64 flags, u16 run_flags)
{
	struct kvm_run *run = vcpu->run;

	expect_efault(vcpu, KVM_EXIT_MEMORY_FAULT);
	TEST_ASSERT(run->memory_fault.flags == flags && run->memory_fault.gpa == gpa &&
		    run->memory_fault.size == PAGE_SIZE && run->flags == run_flags,
		    "flags 0x%llx, gpa 0x%llx, size 0x%llx, kvm_run.flags 0x%x, expected 0x%lx, 0x%lx, 0x%llx, 0x%x",
		    run->memory_fault.flags, run->memory_fault.gpa, run->memory_fault.size,
		    run->flags, flags, gpa, PAGE_SIZE, run_flags);
}

static void expect_io(struct kvm_vcpu *vcpu, u16 run_flags)
{
	struct kvm_run *run = vcpu->run;

	vcpu_run(vcpu);
	TEST_ASSERT_KVM_EXIT_REASON(vcpu, KVM_EXIT_IO);
	TEST_ASSERT_EQ(run->io.port, SYNC_PORT);
	TEST_ASSERT_EQ(run->flags, run_flags);
}

static void l1_svm_code(struct svm_test_data *svm)
{
	generic_svm_setup(svm, guest_code);
	run_guest(svm->vmcb, svm->vmcb_gpa);
	GUEST_ASSERT_EQ(svm->vmcb->control.exit_code, SVM_EXIT_VMMCALL);
}

static void l1_vmx_code(struct vmx_pages *vmx)
{
	GUEST_ASSERT(prepare_for_vmx_operation(vmx));
	GUEST_ASSERT(load_vmcs(vmx));
	prepare_vmcs(vmx, guest_code);
	GUEST_ASSERT(!vmlaunch());
	GUEST_ASSERT_EQ(vmreadz(VM_EXIT_REASON), EXIT_REASON_VMCALL);
}

static void l1_guest_code(void *nested)
{
	if (this_cpu_has(X86_FEATURE_SVM))
		l1_svm_code(nested);
	else
		l1_vmx_code(nested);

	GUEST_DONE();
}

FIXTURE(l2) {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
};

FIXTURE_VARIANT(l2) {
	bool nested_tdp;
	/* Load the saved state into a new VM, or into the same vCPU. */
	bool new_vm;
};

FIXTURE_VARIANT_ADD(l2, same_vcpu) {
	.nested_tdp = false,
	.new_vm = false,
};

FIXTURE_VARIANT_ADD(l2, new_vm) {
	.nested_tdp = false,
	.new_vm = true,
};

FIXTURE_VARIANT_ADD(l2, tdp_same_vcpu) {
	.nested_tdp = true,
	.new_vm = false,
};

FIXTURE_VARIANT_ADD(l2, tdp_new_vm) {
	.nested_tdp = true,
	.new_vm = true,
};

FIXTURE_SETUP(l2)
{
	gva_t nested_gva;

	if (!kvm_cpu_has(X86_FEATURE_SVM) && !kvm_cpu_has(X86_FEATURE_VMX))
		SKIP(return, "no nested virtualization");
	if (!kvm_has_cap(KVM_CAP_NESTED_STATE))
		SKIP(return, "no KVM_CAP_NESTED_STATE");
	if (variant->nested_tdp && !kvm_cpu_has_tdp())
		SKIP(return, "no nested TDP");

	self->vm = vm_create_with_one_vcpu(&self->vcpu, l1_guest_code);
	vm_install_exception_handler(self->vm, NMI_VECTOR, guest_nmi_handler);

	if (variant->nested_tdp)
		vm_enable_tdp(self->vm);
	if (kvm_cpu_has(X86_FEATURE_SVM))
		vcpu_alloc_svm(self->vm, &nested_gva);
	else
		vcpu_alloc_vmx(self->vm, &nested_gva);
	vcpu_args_set(self->vcpu, 1, nested_gva);

	vm_userspace_mem_region_add(self->vm, VM_MEM_SRC_ANONYMOUS, TEST_GPA, TEST_SLOT,
				    TEST_NR_PAGES, KVM_MEM_EXIT_ON_MISSING);
	virt_map(self->vm, TEST_GVA, variant->nested_tdp ? TEST_L2_GPA : TEST_GPA,
		 TEST_NR_PAGES);

	if (variant->nested_tdp) {
		tdp_identity_map_default_memslots(self->vm);
		tdp_map(self->vm, TEST_L2_GPA, TEST_GPA, TEST_SIZE);
	}
}

FIXTURE_TEARDOWN(l2)
{
	if (self->vm)
		kvm_vm_free(self->vm);
}

static struct kvm_vcpu *reload_vcpu(struct kvm_vcpu *vcpu, bool new_vm)
{
	struct kvm_x86_state *state = vcpu_save_state(vcpu);
	struct kvm_vm *vm = vcpu->vm;

	TEST_ASSERT(state->nested.flags & KVM_STATE_NESTED_GUEST_MODE,
		    "The vCPU is not in L2, nested flags 0x%x", state->nested.flags);

	if (new_vm) {
		kvm_vm_release(vm);
		vcpu = vm_recreate_with_one_vcpu(vm);
	}

	vcpu_load_state(vcpu, state);
	kvm_x86_state_cleanup(state);
	return vcpu;
}

TEST_F(l2, save_restore)
{
	static const u64 flags[TEST_NR_PAGES] = {
		[GUEST_READ]  = KVM_MEMORY_EXIT_FLAG_READ,
		[GUEST_WRITE] = KVM_MEMORY_EXIT_FLAG_WRITE,
		[GUEST_EXEC]  = KVM_MEMORY_EXIT_FLAG_EXEC,
		[GUEST_NMI]   = KVM_MEMORY_EXIT_FLAG_WRITE,
	};
	u64 offset, val, *mem;
	int op, i;

	for (op = GUEST_READ; op <= GUEST_NMI; op++) {
		/* Access the middle of a page, KVM reports its start. */
		offset = op * PAGE_SIZE + PAGE_SIZE / 2;
		mem = addr_gpa2hva(self->vm, TEST_GPA + offset);
		val = RET_INSN | (u64)(op + 1) << 32;
		set_access(self->vm, op, TEST_GVA + offset, ~val);

		if (op == GUEST_NMI) {
			expect_io(self->vcpu, KVM_RUN_X86_GUEST_MODE);
			vcpu_ioctl(self->vcpu, KVM_NMI, NULL);
		}

		for (i = 0; i < 2; i++) {
			expect_exit(self->vcpu, TEST_GPA + op * PAGE_SIZE, flags[op],
				    KVM_RUN_X86_GUEST_MODE);
			self->vcpu = reload_vcpu(self->vcpu, variant->new_vm);
		}

		WRITE_ONCE(*mem, val);
		expect_ucall(self->vcpu, UCALL_SYNC);

		switch (op) {
		case GUEST_READ:
			TEST_ASSERT_EQ(get_val(self->vm), val);
			break;
		case GUEST_WRITE:
			TEST_ASSERT_EQ(READ_ONCE(*mem), ~val);
			break;
		case GUEST_NMI:
			/* The NMI is neither lost nor delivered twice. */
			TEST_ASSERT_EQ(get_val(self->vm), ~val + 1);
			break;
		}
	}

	/* L1 has survived, too. */
	set_access(self->vm, GUEST_VMCALL, 0, 0);
	expect_ucall(self->vcpu, UCALL_DONE);
}

/*
 * Like the guest, store to page 1 and load from page 0, where SMM sees another
 * memslot, and send the result to the host.
 */
static const u8 smi_handler[] = {
	0x66, 0xb8, 0x78, 0x56, 0x34, 0x12,		/* mov $SMM_VAL, %eax */
	0x66, 0x67, 0xa3, 0x00, 0x10, 0x00, 0xc0,	/* mov %eax, TEST_GPA + 0x1000 */
	0x66, 0x67, 0xa1, 0x00, 0x00, 0x00, 0xc0,	/* mov TEST_GPA, %eax */
	0x66, 0xe7, SYNC_PORT,				/* out %eax, $SYNC_PORT */
	0x0f, 0xaa,					/* rsm */
};

#define SMM_VAL		0x12345678

FIXTURE(smm) {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	/* The mapping given to KVM, and another one to put content into the file. */
	u64 *mem[2];
	u64 *alias[2];
};

FIXTURE_VARIANT(smm) {
	/* Of address space 0, and of address space 1, i.e. that of SMM. */
	u32 slot_flags[2];
};

FIXTURE_VARIANT_ADD(smm, not_in_smm) {
	.slot_flags = { KVM_MEM_EXIT_ON_MISSING, 0 },
};

FIXTURE_VARIANT_ADD(smm, only_in_smm) {
	.slot_flags = { 0, KVM_MEM_EXIT_ON_MISSING },
};

FIXTURE_VARIANT_ADD(smm, both) {
	.slot_flags = { KVM_MEM_EXIT_ON_MISSING, KVM_MEM_EXIT_ON_MISSING },
};

/* What each address space has in page 0. */
static u64 smm_content(int as_id)
{
	return 0xabcd0000 + as_id;
}

FIXTURE_SETUP(smm)
{
	int as_id, fd;

	if (!kvm_has_cap(KVM_CAP_X86_SMM))
		SKIP(return, "no KVM_CAP_X86_SMM");
	/* If KVM emulates real mode, it is KVM that accesses memory. */
	if (host_cpu_is_intel && !kvm_is_unrestricted_guest_enabled())
		SKIP(return, "no unrestricted guest");

	self->vm = vm_create_with_one_vcpu(&self->vcpu, guest_code);
	TEST_ASSERT_EQ(vm_check_cap(self->vm, KVM_CAP_MULTI_ADDRESS_SPACE), 2);
	setup_smram(self->vm, self->vcpu, SMRAM_GPA, smi_handler, sizeof(smi_handler));

	for (as_id = 0; as_id < 2; as_id++) {
		fd = kvm_memfd_alloc(TEST_SIZE, false);
		self->mem[as_id] = kvm_mmap(TEST_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
		self->alias[as_id] = kvm_mmap(TEST_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
		close(fd);

		WRITE_ONCE(*self->alias[as_id], smm_content(as_id));
		vm_set_user_memory_region(self->vm, as_id << 16 | TEST_SLOT,
					  variant->slot_flags[as_id], TEST_GPA, TEST_SIZE,
					  self->mem[as_id]);
	}

	virt_map(self->vm, TEST_GVA, TEST_GPA, TEST_NR_PAGES);
}

FIXTURE_TEARDOWN(smm)
{
	if (self->vm)
		kvm_vm_free(self->vm);
}

TEST_F(smm, address_spaces)
{
	static const u64 flags[] = { KVM_MEMORY_EXIT_FLAG_READ, KVM_MEMORY_EXIT_FLAG_WRITE };
	const size_t page_1 = PAGE_SIZE / sizeof(u64);
	struct kvm_run *run = self->vcpu->run;
	int i;

	for (i = 0; i < 2; i++) {
		set_access(self->vm, i, TEST_GVA + i * PAGE_SIZE, ~SMM_VAL);
		if (variant->slot_flags[0]) {
			expect_exit(self->vcpu, TEST_GPA + i * PAGE_SIZE, flags[i], 0);
			expect_exit(self->vcpu, TEST_GPA + i * PAGE_SIZE, flags[i], 0);
			kvm_madvise((void *)self->mem[0] + i * PAGE_SIZE, PAGE_SIZE,
				    MADV_POPULATE_WRITE);
		}
		expect_ucall(self->vcpu, UCALL_SYNC);
		if (i == GUEST_READ)
			TEST_ASSERT_EQ(get_val(self->vm), smm_content(0));
	}

	inject_smi(self->vcpu);
	for (i = 1; variant->slot_flags[1] && i >= 0; i--) {
		expect_exit(self->vcpu, TEST_GPA + i * PAGE_SIZE, flags[i], KVM_RUN_X86_SMM);
		expect_exit(self->vcpu, TEST_GPA + i * PAGE_SIZE, flags[i], KVM_RUN_X86_SMM);
		kvm_madvise((void *)self->mem[1] + i * PAGE_SIZE, PAGE_SIZE, MADV_POPULATE_WRITE);
	}

	expect_io(self->vcpu, KVM_RUN_X86_SMM);
	TEST_ASSERT_EQ(*(u32 *)((void *)run + run->io.data_offset), smm_content(1));

	TEST_ASSERT_EQ(READ_ONCE(self->alias[0][page_1]), ~SMM_VAL);
	TEST_ASSERT_EQ(READ_ONCE(self->alias[1][page_1]), SMM_VAL);

	/* The guest goes on, and sees its own memory. */
	set_access(self->vm, GUEST_READ, TEST_GVA, 0);
	expect_ucall(self->vcpu, UCALL_SYNC);
	TEST_ASSERT_EQ(get_val(self->vm), smm_content(0));
}

/* In the race below, as often as the flag is seen to be set, and to be cleared. */
#define SMM_RACE_MIN_ROUNDS	20

struct smm_race {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	u64 **mem;
	/* The address space whose flag is toggled. */
	int toggled;
	bool stop;
};

static void *smm_toggle_fn(void *arg)
{
	struct smm_race *race = arg;
	u32 flags = 0;

	while (!READ_ONCE(race->stop)) {
		flags ^= KVM_MEM_EXIT_ON_MISSING;
		vm_set_user_memory_region(race->vm, race->toggled << 16 | TEST_SLOT, flags,
					  TEST_GPA, TEST_SIZE, race->mem[race->toggled]);
	}

	return NULL;
}

/* Provide what is missing until KVM_RUN succeeds, and return how often. */
static int run_smm_vcpu(struct smm_race *race, int as_id)
{
	static const u64 flags[] = { KVM_MEMORY_EXIT_FLAG_READ, KVM_MEMORY_EXIT_FLAG_WRITE };
	struct kvm_run *run = race->vcpu->run;
	int nr_exits = 0;
	u64 page;

	while (_vcpu_run(race->vcpu)) {
		page = (run->memory_fault.gpa - TEST_GPA) / PAGE_SIZE;
		TEST_ASSERT(errno == EFAULT && run->exit_reason == KVM_EXIT_MEMORY_FAULT &&
			    page < ARRAY_SIZE(flags) && run->memory_fault.flags == flags[page] &&
			    run->memory_fault.gpa == TEST_GPA + page * PAGE_SIZE &&
			    run->memory_fault.size == PAGE_SIZE &&
			    run->flags == (as_id ? KVM_RUN_X86_SMM : 0),
			    "errno = %d, exit %u (%s), flags 0x%llx, gpa 0x%llx, size 0x%llx, kvm_run.flags 0x%x",
			    errno, run->exit_reason, exit_reason_str(run->exit_reason),
			    run->memory_fault.flags, run->memory_fault.gpa,
			    run->memory_fault.size, run->flags);
		nr_exits++;
		kvm_madvise((void *)race->mem[as_id] + page * PAGE_SIZE, PAGE_SIZE,
			    MADV_POPULATE_WRITE);
	}

	return nr_exits;
}

/* Return the number of exits of a guest that reads page 0. */
static int race_guest(struct smm_race *race)
{
	struct ucall uc;
	int nr_exits;

	set_access(race->vm, GUEST_READ, TEST_GVA, 0);
	nr_exits = run_smm_vcpu(race, 0);
	TEST_ASSERT_EQ(get_ucall(race->vcpu, &uc), UCALL_SYNC);
	TEST_ASSERT_EQ(get_val(race->vm), smm_content(0));
	return nr_exits;
}

/* Return the number of exits of an SMI handler, which also writes page 1. */
static int race_smi_handler(struct smm_race *race)
{
	struct kvm_run *run = race->vcpu->run;
	int nr_exits;

	inject_smi(race->vcpu);
	nr_exits = run_smm_vcpu(race, 1);
	TEST_ASSERT_KVM_EXIT_REASON(race->vcpu, KVM_EXIT_IO);
	TEST_ASSERT_EQ(*(u32 *)((void *)run + run->io.data_offset), smm_content(1));
	return nr_exits;
}

/*
 * Toggle the flag in one address space: that changes nothing in the other one,
 * and the vCPU always gets its memory, one way or the other.
 */
static void race_address_spaces(struct smm_race *race, const u32 *slot_flags)
{
	int (* const run_fns[])(struct smm_race *) = { race_guest, race_smi_handler };
	static const int nr_accesses[] = { 1, 2 };
	int nr_set = 0, nr_cleared = 0, as_id, nr_exits;
	pthread_t thread;

	kvm_pthread_create(&thread, NULL, smm_toggle_fn, race);

	while (nr_set < SMM_RACE_MIN_ROUNDS || nr_cleared < SMM_RACE_MIN_ROUNDS) {
		for (as_id = 0; as_id < 2; as_id++) {
			/* The file keeps the content. */
			kvm_madvise(race->mem[as_id], TEST_SIZE, MADV_DONTNEED);
			nr_exits = run_fns[as_id](race);

			if (as_id == race->toggled) {
				TEST_ASSERT(nr_exits <= nr_accesses[as_id], "%d exits", nr_exits);
				nr_set += nr_exits == nr_accesses[as_id];
				nr_cleared += !nr_exits;
			} else if (slot_flags[as_id]) {
				TEST_ASSERT_EQ(nr_exits, nr_accesses[as_id]);
			} else {
				TEST_ASSERT_EQ(nr_exits, 0);
			}
		}
	}

	WRITE_ONCE(race->stop, true);
	kvm_pthread_join(thread, NULL);
}

TEST_F(smm, toggle_in_0)
{
	struct smm_race race = {
		.vm = self->vm,
		.vcpu = self->vcpu,
		.mem = self->mem,
		.toggled = 0,
	};

	race_address_spaces(&race, variant->slot_flags);
}

TEST_F(smm, toggle_in_1)
{
	struct smm_race race = {
		.vm = self->vm,
		.vcpu = self->vcpu,
		.mem = self->mem,
		.toggled = 1,
	};

	race_address_spaces(&race, variant->slot_flags);
}

static void vp_assist_l2_code(void)
{
	vmmcall();
}

static void vp_assist_l1_code(struct svm_test_data *svm, struct hyperv_test_pages *hv)
{
	wrmsr(HV_X64_MSR_GUEST_OS_ID, HYPERV_LINUX_OS_ID);
	enable_vp_assist(hv->vp_assist_gpa, hv->vp_assist);
	generic_svm_setup(svm, vp_assist_l2_code);
	GUEST_SYNC(hv->vp_assist_gpa);

	/* An unexpected #GP ends up in assert_on_unhandled_exception(). */
	run_guest(svm->vmcb, svm->vmcb_gpa);
	GUEST_ASSERT_EQ(svm->vmcb->control.exit_code, SVM_EXIT_VMMCALL);
	GUEST_DONE();
}

FIXTURE(vp_assist) {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	void *hva;
	u64 gpa;
};

FIXTURE_VARIANT(vp_assist) {
	bool capability;
	bool unmap;
};

FIXTURE_VARIANT_ADD(vp_assist, prot_none) {
	.capability = false,
	.unmap = false,
};

FIXTURE_VARIANT_ADD(vp_assist, munmap) {
	.capability = false,
	.unmap = true,
};

FIXTURE_VARIANT_ADD(vp_assist, cap_prot_none) {
	.capability = true,
	.unmap = false,
};

FIXTURE_VARIANT_ADD(vp_assist, cap_munmap) {
	.capability = true,
	.unmap = true,
};

FIXTURE_SETUP(vp_assist)
{
	gva_t nested_gva, hv_pages_gva;
	struct hyperv_test_pages *hv;

	if (!kvm_cpu_has(X86_FEATURE_SVM))
		SKIP(return, "no SVM");
	if (!kvm_has_cap(KVM_CAP_SYS_HYPERV_CPUID))
		SKIP(return, "no KVM_CAP_SYS_HYPERV_CPUID");

	self->vm = vm_create_with_one_vcpu(&self->vcpu, vp_assist_l1_code);
	vcpu_set_hv_cpuid(self->vcpu);
	vcpu_alloc_svm(self->vm, &nested_gva);
	hv = vcpu_alloc_hyperv_test_pages(self->vm, &hv_pages_gva);
	vcpu_args_set(self->vcpu, 2, nested_gva, hv_pages_gva);
	self->hva = hv->vp_assist_hva;
	self->gpa = hv->vp_assist_gpa;

	if (variant->capability)
		vm_enable_cap(self->vm, KVM_CAP_MEMORY_FAULT_EXIT,
			      KVM_MEMORY_EXIT_FLAG_READ | KVM_MEMORY_EXIT_FLAG_WRITE |
			      KVM_MEMORY_EXIT_FLAG_EXEC);
}

FIXTURE_TEARDOWN(vp_assist)
{
	if (self->vm)
		kvm_vm_free(self->vm);
}

static void set_prot(void *mem, int prot)
{
	int r = mprotect(mem, PAGE_SIZE, prot);

	TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("mprotect()", r));
}

TEST_F(vp_assist, vmrun)
{
	struct kvm_vcpu_events events;
	void *mem;
	int i;

	expect_ucall(self->vcpu, UCALL_SYNC);

	if (variant->unmap)
		kvm_munmap(self->hva, PAGE_SIZE);
	else
		set_prot(self->hva, PROT_NONE);

	for (i = 0; i < 2; i++) {
		if (variant->capability)
			expect_exit(self->vcpu, self->gpa, KVM_MEMORY_EXIT_FLAG_READ, 0);
		else
			expect_efault(self->vcpu, KVM_EXIT_UNKNOWN);

		vcpu_events_get(self->vcpu, &events);
		TEST_ASSERT(!events.exception.injected && !events.exception.pending,
			    "Exception %u in L1", events.exception.nr);
	}

	if (variant->unmap) {
		mem = mmap(self->hva, PAGE_SIZE, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
		TEST_ASSERT(mem == self->hva, "mmap() = %p, expected %p", mem, self->hva);
	} else {
		set_prot(self->hva, PROT_READ | PROT_WRITE);
	}

	expect_ucall(self->vcpu, UCALL_DONE);
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_EXIT_ON_MISSING) == KVM_MEM_EXIT_ON_MISSING);
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_MEMORY_FAULT_EXIT));

	disable_numa_balancing();

	return test_harness_run(argc, argv);
}
