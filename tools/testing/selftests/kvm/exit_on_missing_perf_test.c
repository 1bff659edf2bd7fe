// SPDX-License-Identifier: GPL-2.0-only
/*
 * Report the CPU time of what KVM_MEM_EXIT_ON_MISSING should not make slower, i.e.
 * of exits to userspace, and of setting and clearing the flag on a memslot, which
 * should not depend on the memslot's size.
 */
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include <linux/sizes.h>

#include "kselftest.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"

#define TEST_SLOT	10
#define TEST_GPA	0x100000000ul
#define TEST_GVA	TEST_GPA

/* Touch all memory, so that KVM has mapped it, and exit forever. */
static void guest_code(u64 size, u64 page_size)
{
	u64 offset;

	for (offset = 0; offset < size; offset += page_size)
		WRITE_ONCE(*(u64 *)(TEST_GVA + offset), offset);

	for (;;)
		GUEST_SYNC(0);
}

static void run_until_exit(struct kvm_vcpu *vcpu)
{
	struct ucall uc;

	vcpu_run(vcpu);
	TEST_ASSERT_EQ(get_ucall(vcpu, &uc), UCALL_SYNC);
}

static struct timespec cpu_time(void)
{
	struct timespec now;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
	return now;
}

static void report(const char *what, u64 nr, struct timespec start)
{
	struct timespec spent = timespec_sub(cpu_time(), start);

	pr_info("%s: %lu, total CPU time: %ld.%.9lds\n", what, nr,
		spent.tv_sec, spent.tv_nsec);
}

static void help(const char *name)
{
	printf("usage: %s [-h] [-e exits] [-t toggles] [-b bytes]\n"
	       " -e: how often the guest exits to userspace (default: 100)\n"
	       " -t: how often the flag is set and cleared (default: 10)\n"
	       " -b: size of the memslot whose flag that is, e.g. 4M (default: 1M)\n", name);
}

int main(int argc, char *argv[])
{
	u64 nr_exits = 100, nr_toggles = 10, size = SZ_1M, i;
	struct timespec start;
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	int opt;

	while ((opt = getopt(argc, argv, "he:t:b:")) != -1) {
		switch (opt) {
		case 'e':
			nr_exits = atoi_non_negative("Number of exits", optarg);
			break;
		case 't':
			nr_toggles = atoi_non_negative("Number of toggles", optarg);
			break;
		case 'b':
			size = parse_size(optarg);
			break;
		case 'h':
		default:
			help(argv[0]);
			exit(opt == 'h' ? 0 : 1);
		}
	}

	vm = vm_create_with_one_vcpu(&vcpu, guest_code);
	TEST_ASSERT(size && !(size % vm->page_size), "%lu bytes are not a number of pages", size);
	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, TEST_GPA, TEST_SLOT,
				    size / vm->page_size, 0);
	virt_map(vm, TEST_GVA, TEST_GPA, size / vm->page_size);
	vcpu_args_set(vcpu, 2, size, (u64)vm->page_size);
	run_until_exit(vcpu);

	start = cpu_time();
	for (i = 0; i < nr_exits; i++)
		run_until_exit(vcpu);
	report("Exits", nr_exits, start);

	if (kvm_has_cap(KVM_CAP_EXIT_ON_MISSING)) {
		start = cpu_time();
		for (i = 0; i < nr_toggles; i++) {
			vm_mem_region_set_flags(vm, TEST_SLOT, KVM_MEM_EXIT_ON_MISSING);
			vm_mem_region_set_flags(vm, TEST_SLOT, 0);
		}
		report("Toggles", nr_toggles, start);
	}

	kvm_vm_free(vm);
	return 0;
}
