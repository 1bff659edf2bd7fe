// SPDX-License-Identifier: GPL-2.0-only
/*
 * Postcopy migration: the state of a VM and its vCPUs, but for memory.
 */
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

/* Guests of the selftests neither use the GIC nor have other devices. */
void *pc_save_vm(struct kvm_vm *vm, size_t *size)
{
	*size = 0;
	return calloc(1, 1);
}

void pc_load_vm(struct kvm_vm *vm, const void *state, size_t size)
{
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
