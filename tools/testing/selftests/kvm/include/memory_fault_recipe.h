/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The recipe of Documentation/virt/kvm/memory-fault-exits.rst, see
 * lib/memory_fault_recipe.c.
 */
#ifndef SELFTEST_KVM_MEMORY_FAULT_RECIPE_H
#define SELFTEST_KVM_MEMORY_FAULT_RECIPE_H

#include <pthread.h>
#include <stdbool.h>

#include <linux/kvm.h>

/* doc: memory */
/* A memslot, and how to get its content. */
struct memory {
	int vm_fd;
	struct kvm_userspace_memory_region region;

	/* The page size of the backing, i.e. of the huge page for hugetlb. */
	__u64 page_size;

	/*
	 * Gets a page of content, e.g. from the network, or NULL for zeroes, which
	 * works only for private memory of small pages.  Returns 0, -EEXIST if the
	 * page has been installed before, or -EINTR if the vCPU has to stop.
	 */
	int (*fetch)(struct memory *mem, __u64 offset, const void **content);

	/* The page that fetch() has returned is there; may be NULL. */
	void (*installed)(struct memory *mem, __u64 offset);

	/* For these two. */
	void *private;

	/* -1 if the content is in a file that is mapped at userspace_addr. */
	int uffd;

	/* The thread that serves the userfaultfd stops when this is readable. */
	int stop_fd;

	/*
	 * For shared memory: a second mapping that has no userfaultfd, the pages
	 * that have been written to it, and locks to do so exactly once.
	 */
	void *alias;
	bool *filled;
	pthread_mutex_t locks[16];
};

/* doc: memory end */

bool has_exit_on_missing(int vm_fd);
int enable_memory_fault_exit(int vm_fd);
int set_exit_on_missing(struct memory *mem, bool on);
int open_uffd(struct memory *mem);
int install_page(struct memory *mem, __u64 offset, const void *content, bool wake);
int serve_page(struct memory *mem, __u64 address);
void *serve_uffd(void *arg);
int run_vcpu(int vcpu_fd, struct kvm_run *run, struct memory *mems, int nr);
int finish_paging(struct memory *mem);

#endif /* SELFTEST_KVM_MEMORY_FAULT_RECIPE_H */
