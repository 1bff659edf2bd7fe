// SPDX-License-Identifier: GPL-2.0-only
/*
 * Postcopy migration: the state of a VM and its vCPUs, but for memory.
 */
#include "kvm_util.h"
#include "gic.h"
#include "gic_v3.h"
#include "postcopy.h"
#include "processor.h"

#define MAX_REG_SIZE	256

struct reg {
	u64 id;
	u8 val[MAX_REG_SIZE];
};

static void put_reg(struct reg *reg, u64 id, const void *val)
{
	reg->id = id;
	memcpy(reg->val, val, KVM_REG_SIZE(id));
}

/* What is in the library's GIC: 64 interrupts, neither LPIs nor an ITS. */
#define NR_IRQS		64
#define MAX_GIC_REGS	(128 * (PC_MAX_VCPUS + 1))

struct gic_reg {
	u64 group;
	u64 attr;
	u64 val;
};

/* In the order in which they're to be restored. */
struct gic_state {
	u64 nr;
	struct gic_reg regs[MAX_GIC_REGS];
};

static void add_gic_reg(struct gic_state *state, u64 group, u64 attr)
{
	TEST_ASSERT(state->nr < MAX_GIC_REGS, "Too many registers of the GIC");
	state->regs[state->nr++] = (struct gic_reg) { group, attr };
}

/* All but SPIs are per vCPU.  Both the distributor and a redistributor have these. */
static void add_gic_irqs(struct gic_state *state, u64 group, u64 base, int first, int last)
{
	static const struct {
		u64 offset;
		int bits;
	} regs[] = {
		{ GICD_IGROUPR, 1 }, { GICD_IPRIORITYR, 8 }, { GICD_ICFGR, 2 },
		{ GICD_ISENABLER, 1 }, { GICD_ISPENDR, 1 }, { GICD_ISACTIVER, 1 },
	};
	int i, irq;

	for (i = 0; i < ARRAY_SIZE(regs); i++) {
		for (irq = first; irq < last; irq += 32 / regs[i].bits)
			add_gic_reg(state, group, base + regs[i].offset + irq * regs[i].bits / 8);
	}
}

static void add_gic_vcpu(struct gic_state *state, struct kvm_vcpu *vcpu)
{
	static const u64 sysregs[] = {
		SYS_ICC_SRE_EL1, SYS_ICC_CTLR_EL1, SYS_ICC_PMR_EL1, SYS_ICC_BPR0_EL1,
		SYS_ICC_BPR1_EL1, SYS_ICC_AP0R0_EL1, SYS_ICC_AP1R0_EL1,
		SYS_ICC_IGRPEN0_EL1, SYS_ICC_IGRPEN1_EL1,
	};
	/* Affinity 0 is enough for PC_MAX_VCPUS. */
	u64 mpidr = (u64)vcpu->id << KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT;
	int i;

	add_gic_irqs(state, KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, mpidr | SZ_64K, 0, 32);
	add_gic_reg(state, KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, mpidr);
	for (i = 0; i < ARRAY_SIZE(sysregs); i++)
		add_gic_reg(state, KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, mpidr |
			    (KVM_ARM64_SYS_REG(sysregs[i]) & KVM_DEV_ARM_VGIC_SYSREG_INSTR_MASK));
}

/* Timers are part of the vCPUs' state.  Selftests have no other devices. */
void *pc_save_vm(struct kvm_vm *vm, size_t *size)
{
	struct gic_state *state = calloc(1, sizeof(*state));
	struct kvm_vcpu *vcpu;
	int i;

	TEST_ASSERT(state, "No memory");
	*size = sizeof(*state);
	if (!vm->arch.has_gic)
		return state;

	add_gic_reg(state, KVM_DEV_ARM_VGIC_GRP_DIST_REGS, GICD_CTLR);
	add_gic_irqs(state, KVM_DEV_ARM_VGIC_GRP_DIST_REGS, 0, 32, NR_IRQS);
	add_gic_reg(state, KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, 32);
	/* In 64 bits, by halves. */
	for (i = 32; i < NR_IRQS; i++) {
		add_gic_reg(state, KVM_DEV_ARM_VGIC_GRP_DIST_REGS, GICD_IROUTER + i * 8);
		add_gic_reg(state, KVM_DEV_ARM_VGIC_GRP_DIST_REGS, GICD_IROUTER + i * 8 + 4);
	}
	list_for_each_entry(vcpu, &vm->vcpus, list)
		add_gic_vcpu(state, vcpu);

	for (i = 0; i < state->nr; i++)
		kvm_device_attr_get(vm->arch.gic_fd, state->regs[i].group, state->regs[i].attr,
				    &state->regs[i].val);
	return state;
}

void pc_load_vm(struct kvm_vm *vm, const void *data, size_t size)
{
	struct gic_state *state = malloc(sizeof(*state));
	int i;

	TEST_ASSERT(state, "No memory");
	TEST_ASSERT_EQ(size, sizeof(*state));
	memcpy(state, data, size);
	TEST_ASSERT(state->nr <= MAX_GIC_REGS && (!state->nr || vm->arch.has_gic),
		    "Unexpected state of a GIC, %lu registers", state->nr);

	for (i = 0; i < state->nr; i++)
		kvm_device_attr_set(vm->arch.gic_fd, state->regs[i].group, state->regs[i].attr,
				    &state->regs[i].val);
	free(state);
}

void *pc_save_vcpu(struct kvm_vcpu *vcpu, size_t *size)
{
	struct kvm_reg_list *list = vcpu_get_reg_list(vcpu);
	struct reg *regs = calloc(list->n, sizeof(*regs));
	u8 val[MAX_REG_SIZE];
	u64 i;
	int r;

	TEST_ASSERT(regs, "No memory");
	for (i = 0; i < list->n; i++) {
		TEST_ASSERT(KVM_REG_SIZE(list->reg[i]) <= sizeof(val),
			    "Register 0x%llx is too large", list->reg[i]);
		r = __vcpu_get_reg(vcpu, list->reg[i], val);
		TEST_ASSERT(!r, "KVM_GET_ONE_REG failed for 0x%llx, errno = %d",
			    list->reg[i], errno);
		put_reg(&regs[i], list->reg[i], val);
	}

	*size = list->n * sizeof(*regs);
	free(list);
	return regs;
}

void pc_load_vcpu(struct kvm_vcpu *vcpu, const void *state, size_t size)
{
	const struct reg *regs = state;
	u8 val[MAX_REG_SIZE];
	u64 i;

	TEST_ASSERT(!(size % sizeof(*regs)), "%lu bytes can't be the state of a vCPU", size);
	for (i = 0; i < size / sizeof(*regs); i++) {
		struct kvm_one_reg reg = { .id = regs[i].id, .addr = (u64)regs[i].val };

		if (!__vcpu_ioctl(vcpu, KVM_SET_ONE_REG, &reg))
			continue;

		/* What is a constant must be the same one. */
		TEST_ASSERT(!__vcpu_get_reg(vcpu, regs[i].id, val) &&
			    !memcmp(val, regs[i].val, KVM_REG_SIZE(regs[i].id)),
			    "KVM_SET_ONE_REG failed for 0x%lx", regs[i].id);
	}
}
