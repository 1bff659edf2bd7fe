// SPDX-License-Identifier: GPL-2.0-only
/*
 * Postcopy migration: the state of a VM and its vCPUs, but for memory.
 */
#include "postcopy.h"
#include "processor.h"

struct vcpu_blob {
	u32 msrs_size;
	u32 xsave_size;
	struct kvm_lapic_state lapic;
	struct kvm_x86_state state;
	/* The MSRs that end kvm_x86_state, and then what "xsave" points to. */
};

/*
 * Local APICs are part of the vCPUs' state.  Guests of the selftests have neither a
 * use for the PIC, the I/O APIC and the PIT, nor other devices.
 */
void *pc_save_vm(struct kvm_vm *vm, size_t *size)
{
	struct kvm_clock_data *clock = calloc(1, sizeof(*clock));

	TEST_ASSERT(clock, "No memory");
	vm_ioctl(vm, KVM_GET_CLOCK, clock);
	*size = sizeof(*clock);
	return clock;
}

void pc_load_vm(struct kvm_vm *vm, const void *state, size_t size)
{
	struct kvm_clock_data clock = { .clock = ((struct kvm_clock_data *)state)->clock };

	TEST_ASSERT_EQ(size, sizeof(clock));
	vm_ioctl(vm, KVM_SET_CLOCK, &clock);
}

void *pc_save_vcpu(struct kvm_vcpu *vcpu, size_t *size)
{
	struct kvm_x86_state *state = vcpu_save_state(vcpu);
	u32 msrs_size = state->msrs.nmsrs * sizeof(state->msrs.entries[0]);
	u32 xsave_size = vm_check_cap(vcpu->vm, KVM_CAP_XSAVE2) ?: sizeof(struct kvm_xsave);
	struct vcpu_blob *blob;

	*size = sizeof(*blob) + msrs_size + xsave_size;
	blob = malloc(*size);
	TEST_ASSERT(blob, "No memory");

	blob->msrs_size = msrs_size;
	blob->xsave_size = xsave_size;
	vcpu_ioctl(vcpu, KVM_GET_LAPIC, &blob->lapic);
	memcpy(&blob->state, state, sizeof(*state) + msrs_size);
	memcpy((void *)blob + sizeof(*blob) + msrs_size, state->xsave, xsave_size);

	kvm_x86_state_cleanup(state);
	return blob;
}

void pc_load_vcpu(struct kvm_vcpu *vcpu, const void *data, size_t size)
{
	const struct vcpu_blob *blob = data;
	struct kvm_lapic_state lapic;
	struct kvm_x86_state *state;

	TEST_ASSERT(size >= sizeof(*blob) &&
		    size == sizeof(*blob) + blob->msrs_size + blob->xsave_size,
		    "%lu bytes can't be the state of a vCPU", size);

	state = malloc(sizeof(*state) + blob->msrs_size);
	TEST_ASSERT(state, "No memory");
	memcpy(state, &blob->state, sizeof(*state) + blob->msrs_size);
	state->xsave = malloc(blob->xsave_size);
	TEST_ASSERT(state->xsave, "No memory");
	memcpy(state->xsave, data + sizeof(*blob) + blob->msrs_size, blob->xsave_size);

	lapic = blob->lapic;
	vcpu_load_state(vcpu, state);
	vcpu_ioctl(vcpu, KVM_SET_LAPIC, &lapic);
	kvm_x86_state_cleanup(state);
}
