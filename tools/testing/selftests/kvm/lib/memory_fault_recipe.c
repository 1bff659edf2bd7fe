// SPDX-License-Identifier: GPL-2.0-only
/*
 * The recipe of Documentation/virt/kvm/memory-fault-exits.rst.
 *
 * The documentation includes what is between a pair of "doc:" comments.  That is
 * code of a VMM, on bare system calls: it must not use the library of the tests.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <linux/userfaultfd.h>

#include "memory_fault_recipe.h"

/* doc: probe */
/* What this VMM knows; a later kernel may know more. */
#define ACCESS_FLAGS (KVM_MEMORY_EXIT_FLAG_READ |	\
		      KVM_MEMORY_EXIT_FLAG_WRITE |	\
		      KVM_MEMORY_EXIT_FLAG_EXEC)

/* Expect the flag, not just "true": other kernels may use the number, too. */
bool has_exit_on_missing(int vm_fd)
{
	return ioctl(vm_fd, KVM_CHECK_EXTENSION,
		     KVM_CAP_EXIT_ON_MISSING) == KVM_MEM_EXIT_ON_MISSING;
}

/* Not needed for what follows, but explains failures in other memslots. */
int enable_memory_fault_exit(int vm_fd)
{
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_MEMORY_FAULT_EXIT,
		.args[0] = ACCESS_FLAGS,
	};
	int flags = ioctl(vm_fd, KVM_CHECK_EXTENSION, cap.cap);

	if (flags < 0 || (flags & ACCESS_FLAGS) != ACCESS_FLAGS)
		return -ENOTSUP;

	return ioctl(vm_fd, KVM_ENABLE_CAP, &cap) ? -errno : 0;
}

/* Creates the memslot, or changes its flags.  Never call it in serve_uffd(). */
int set_exit_on_missing(struct memory *mem, bool on)
{
	mem->region.flags &= ~KVM_MEM_EXIT_ON_MISSING;
	if (on)
		mem->region.flags |= KVM_MEM_EXIT_ON_MISSING;

	return ioctl(mem->vm_fd, KVM_SET_USER_MEMORY_REGION, &mem->region) ? -errno : 0;
}

/* doc: probe end */

/* doc: uffd */
/*
 * Kernel-mode faults must be included, i.e. no UFFD_USER_MODE_ONLY.  In shared
 * memory, a fault is MINOR if the file has the page, and MISSING if not.
 */
int open_uffd(struct memory *mem)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register reg = {
		.range = { mem->region.userspace_addr, mem->region.memory_size },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};

	if (mem->alias) {
		api.features = UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_MINOR_HUGETLBFS;
		reg.mode |= UFFDIO_REGISTER_MODE_MINOR;
	}

	mem->uffd = syscall(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (mem->uffd < 0 || ioctl(mem->uffd, UFFDIO_API, &api) ||
	    ioctl(mem->uffd, UFFDIO_REGISTER, &reg))
		return -errno;

	return 0;
}

/* doc: uffd end */

/* doc: populate */
/* Private memory: the kernel takes a copy, and only if it has no page yet. */
static int install_private(struct memory *mem, __u64 offset, const void *content, bool wake)
{
	struct uffdio_copy copy = {
		.dst = mem->region.userspace_addr + offset,
		.src = (__u64)content,
		.len = mem->page_size,
		.mode = wake ? 0 : UFFDIO_COPY_MODE_DONTWAKE,
	};
	struct uffdio_zeropage zeropage = {
		.range = { copy.dst, copy.len },
		.mode = wake ? 0 : UFFDIO_ZEROPAGE_MODE_DONTWAKE,
	};

	if (!content)
		return ioctl(mem->uffd, UFFDIO_ZEROPAGE, &zeropage) ? -errno : 0;

	return ioctl(mem->uffd, UFFDIO_COPY, &copy) ? -errno : 0;
}

/*
 * Shared memory: write the page to the file, then let the kernel map it.  The
 * guest may write to the page from then on, i.e. it must not be filled twice.
 */
static int install_shared(struct memory *mem, __u64 offset, const void *content, bool wake)
{
	__u64 page = offset / mem->page_size;
	pthread_mutex_t *lock = &mem->locks[page % 16];
	struct uffdio_continue cont = {
		.range = { mem->region.userspace_addr + offset, mem->page_size },
		.mode = wake ? 0 : UFFDIO_CONTINUE_MODE_DONTWAKE,
	};

	pthread_mutex_lock(lock);
	if (!mem->filled[page])
		memcpy(mem->alias + offset, content, mem->page_size);
	mem->filled[page] = true;
	pthread_mutex_unlock(lock);

	return ioctl(mem->uffd, UFFDIO_CONTINUE, &cont) ? -errno : 0;
}

int install_page(struct memory *mem, __u64 offset, const void *content, bool wake)
{
	int r;

	do {
		if (mem->alias)
			r = install_shared(mem, offset, content, wake);
		else
			r = install_private(mem, offset, content, wake);
	} while (r == -EAGAIN);

	return r;
}

/* Populates a page by way of userfaultfd, whoever has asked for it. */
static int populate(struct memory *mem, __u64 offset, bool wake)
{
	const void *content = NULL;
	int fetched, r;

	/* Hugetlb memory can be populated only by whole huge pages. */
	offset &= ~(mem->page_size - 1);

	/* A page of shared memory that has been filled may not be mapped. */
	fetched = mem->fetch(mem, offset, &content);
	if (fetched && (fetched != -EEXIST || !mem->alias))
		return fetched;

	r = install_page(mem, offset, content, wake);
	if (!fetched && (!r || r == -EEXIST) && mem->installed)
		mem->installed(mem, offset);

	return r;
}

/* doc: populate end */

/* doc: run */
/* Returns 0 if the vCPU can be run again. */
static int handle_memory_fault(struct memory *mem, const struct kvm_run *run)
{
	__u64 offset = run->memory_fault.gpa - mem->region.guest_phys_addr;
	bool write = run->memory_fault.flags & KVM_MEMORY_EXIT_FLAG_WRITE;
	void *hva = (void *)mem->region.userspace_addr + offset;
	int r = -EEXIST;

	/* Nobody sleeps on this page, or serve_uffd() is told and wakes them. */
	if (mem->uffd >= 0)
		r = populate(mem, offset, false);

	/*
	 * Another vCPU was faster, or the page is there but needs a page fault
	 * to become accessible.  Do what KVM would have done without the flag.
	 */
	if (r == -EEXIST)
		r = madvise(hva, run->memory_fault.size,
			    write ? MADV_POPULATE_WRITE : MADV_POPULATE_READ) ? -errno : 0;

	switch (r) {
	case -ENOENT:		/* Paging has come to its end meanwhile. */
	case -ESRCH:
	case -EINTR:		/* KVM_RUN will see the signal, too. */
		return 0;
	case -EIO:		/* UFFDIO_CONTINUE's word for EHWPOISON. */
		return -EHWPOISON;
	default:
		return r;
	}
}

static struct memory *find_memory(struct memory *mems, int nr, const struct kvm_run *run)
{
	__u32 as_id = 0;

#ifdef __x86_64__
	if (run->flags & KVM_RUN_X86_SMM)
		as_id = 1;
#endif

	for (; nr--; mems++) {
		if (mems->region.slot >> 16 == as_id &&
		    run->memory_fault.gpa - mems->region.guest_phys_addr <
		    mems->region.memory_size)
			return mems;
	}

	return NULL;
}

/*
 * Returns 0 if KVM_RUN does, -EHWPOISON if the VMM has to give the guest a machine
 * check for kvm_run.memory_fault.gpa, else the reason why the vCPU can't go on.
 */
int run_vcpu(int vcpu_fd, struct kvm_run *run, struct memory *mems, int nr)
{
	__u64 gpa = 0, flags = 0;
	struct memory *mem;
	int repeats = 0;
	int r;

	while (ioctl(vcpu_fd, KVM_RUN, NULL)) {
		/* Something else, or EHWPOISON for memory of a guest_memfd. */
		if (errno != EFAULT || run->exit_reason != KVM_EXIT_MEMORY_FAULT)
			return -errno;

		/* A private access is a request to convert guest_memfd memory. */
		if (run->memory_fault.flags & KVM_MEMORY_EXIT_FLAG_PRIVATE)
			return -EFAULT;

		/* The same exit over and over: stop, with gpa and flags to report. */
		if (gpa != run->memory_fault.gpa || flags != run->memory_fault.flags)
			repeats = 0;
		gpa = run->memory_fault.gpa;
		flags = run->memory_fault.flags;
		if (++repeats > 100)
			return -ELOOP;

		mem = find_memory(mems, nr, run);
		r = mem ? handle_memory_fault(mem, run) : -EFAULT;
		if (r)
			return r;
	}

	return 0;
}

/* doc: run end */

/* doc: serve */
/* Resolves what a message of userfaultfd is about, and wakes who has caused it. */
int serve_page(struct memory *mem, __u64 address)
{
	struct uffdio_range range = {
		address & ~(mem->page_size - 1), mem->page_size
	};
	int r = populate(mem, range.start - mem->region.userspace_addr, true);

	if (r == -EEXIST)
		r = ioctl(mem->uffd, UFFDIO_WAKE, &range) ? -errno : 0;

	/* Paging has come to its end meanwhile, and nobody sleeps any more. */
	return r == -ENOENT || r == -ESRCH ? 0 : r;
}

/*
 * Serves KVM's own accesses, vhost, and those of the VMM.  Waking is up to this
 * thread: a vCPU may have populated the page, and doesn't wake.
 */
void *serve_uffd(void *arg)
{
	struct memory *mem = arg;
	struct pollfd fds[] = {
		{ .fd = mem->uffd, .events = POLLIN },
		{ .fd = mem->stop_fd, .events = POLLIN },
	};
	struct uffd_msg msg;

	for (;;) {
		if (read(mem->uffd, &msg, sizeof(msg)) != sizeof(msg)) {
			if (fds[1].revents)
				return NULL;
			poll(fds, 2, -1);
			continue;
		}

		/* Whoever sleeps on the page would do so forever. */
		if (serve_page(mem, msg.arg.pagefault.address))
			abort();
	}
}

/* doc: serve end */

/* doc: finish */
/* Fetches what nobody has touched, and returns to normal operation. */
int finish_paging(struct memory *mem)
{
	struct uffdio_range range = {
		mem->region.userspace_addr, mem->region.memory_size
	};
	__u64 offset;
	int r;

	for (offset = 0; mem->uffd >= 0 && offset < range.len; offset += mem->page_size) {
		r = populate(mem, offset, true);
		if (r && r != -EEXIST)
			return r;
	}

	/* Waits for vCPUs that sleep on the userfaultfd, which must be served. */
	r = set_exit_on_missing(mem, false);
	if (r || mem->uffd < 0)
		return r;

	return ioctl(mem->uffd, UFFDIO_UNREGISTER, &range) ? -errno : 0;
}

/* doc: finish end */
