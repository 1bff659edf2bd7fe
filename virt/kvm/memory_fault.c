// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM memory-fault exits
 *
 * A memory-fault exit is a KVM_RUN that fails with -EFAULT or -EHWPOISON, and
 * whose kvm_run describes the guest memory that could not be accessed.
 */
#include <linux/kvm_host.h>

#include <trace/events/kvm.h>

/*
 * Describe the access that makes the current KVM_RUN fail.  Call this only
 * where the error is on its way to userspace, never where a caller may ignore
 * the error: kvm_run.memory_fault overlays the other exits, e.g. an MMIO exit
 * that the same instruction has already prepared.
 */
void kvm_prepare_memory_fault_exit(struct kvm_vcpu *vcpu,
				   const struct kvm_memory_slot *slot,
				   gpa_t gpa, gpa_t size, bool is_write,
				   bool is_exec, bool is_private)
{
	struct kvm_run *run = vcpu->run;
	u64 flags = 0;

	/*
	 * Report the type of access only to userspace that has opted in, VMMs
	 * that don't know the flags stop the VM if one of them is set.
	 */
	if (kvm_reports_memory_faults(vcpu->kvm, slot)) {
		if (is_exec)
			flags |= KVM_MEMORY_EXIT_FLAG_EXEC;
		else if (is_write)
			flags |= KVM_MEMORY_EXIT_FLAG_WRITE;
		else
			flags |= KVM_MEMORY_EXIT_FLAG_READ;
	}

	if (is_private)
		flags |= KVM_MEMORY_EXIT_FLAG_PRIVATE;

	run->exit_reason = KVM_EXIT_MEMORY_FAULT;
	run->memory_fault.flags = flags;
	run->memory_fault.gpa = gpa;
	run->memory_fault.size = size;

	vcpu->memory_fault_reported = true;
	trace_kvm_memory_fault_exit(vcpu->vcpu_id, gpa, size, flags);
}
EXPORT_SYMBOL_FOR_KVM_INTERNAL(kvm_prepare_memory_fault_exit);

/*
 * Ensure that a failed KVM_RUN can't be mistaken for a memory-fault exit if
 * exit_reason was left behind by an earlier KVM_RUN.  Don't rely on kvm_run to
 * tell the two apart, userspace can write it at any time.
 */
void kvm_finish_memory_fault_exit(struct kvm_vcpu *vcpu, int r)
{
	if (r != -EFAULT && r != -EHWPOISON)
		return;

	if (vcpu->memory_fault_reported) {
		++vcpu->stat.memory_fault_exits;
		return;
	}

	if (vcpu->run->exit_reason == KVM_EXIT_MEMORY_FAULT)
		vcpu->run->exit_reason = KVM_EXIT_UNKNOWN;
}
