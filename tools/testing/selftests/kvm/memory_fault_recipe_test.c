// SPDX-License-Identifier: GPL-2.0-only
/*
 * Run the recipe of Documentation/virt/kvm/memory-fault-exits.rst, on every kind of
 * memory, and verify what the guest reads and what it leaves in memory.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <linux/kvm.h>
#include <linux/sizes.h>
#include <linux/userfaultfd.h>

#include "kselftest.h"
#include "kvm_util.h"
#include "memory_fault_recipe.h"
#include "numaif.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"

#define TEST_SLOT	10
#define TEST_GPA	0xc0000000ul
#define TEST_GVA	TEST_GPA
#define MAX_PAGES	16
#define NR_VCPUS	2

/* The last pages of memory have a purpose, the guest uses all before. */
#define PAGE_ZEROED(nr)	((nr) - 1)
#define PAGE_HOST(nr)	((nr) - 2)
#define PAGE_UNTOUCHED(nr) ((nr) - 3)
#define GUEST_PAGES(nr)	((nr) - 3)

struct guest_cmd {
	u64 first;
	u64 nr;
	u64 stride;
	bool zeroed;
};

static struct guest_cmd guest_cmd;

static u64 first_word(u64 page)
{
	return 0x1234567800000000ul | page;
}

static u64 last_word(u64 page)
{
	return ~first_word(page);
}

static u64 guest_word(u64 vcpu_id, u64 page)
{
	return first_word(page) << 8 | (vcpu_id + 1);
}

/*
 * Read the last and the first word of each page, and write a word that belongs to
 * the vCPU.  Half of the pages are written first.
 */
static void guest_code(u64 vcpu_id)
{
	for (;;) {
		struct guest_cmd cmd = READ_ONCE(guest_cmd);
		u64 i;

		for (i = cmd.first; i < cmd.first + cmd.nr; i++) {
			u64 *page = (u64 *)(TEST_GVA + i * cmd.stride);
			u64 *last = (u64 *)(TEST_GVA + (i + 1) * cmd.stride) - 1;

			if (i & 1)
				WRITE_ONCE(page[1 + vcpu_id], guest_word(vcpu_id, i));

			GUEST_ASSERT_EQ(READ_ONCE(*last), cmd.zeroed ? 0 : last_word(i));
			GUEST_ASSERT_EQ(READ_ONCE(*page), cmd.zeroed ? 0 : first_word(i));
			WRITE_ONCE(page[1 + vcpu_id], guest_word(vcpu_id, i));
		}

		GUEST_SYNC(cmd.first);
	}
}

static const struct backing {
	const char *name;
	int mmap_flags;
	bool memfd;
	bool hugetlb;
	bool uffd;
} backings[] = {
	{ "anonymous memory, UFFDIO_COPY",
	  MAP_PRIVATE | MAP_ANONYMOUS, .uffd = true },
	{ "shmem, UFFDIO_CONTINUE",
	  MAP_SHARED, .memfd = true, .uffd = true },
	{ "hugetlb, UFFDIO_COPY",
	  MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, .hugetlb = true, .uffd = true },
	{ "shared hugetlb, UFFDIO_CONTINUE",
	  MAP_SHARED, .memfd = true, .hugetlb = true, .uffd = true },
	{ "private mapping of a file, MADV_POPULATE",
	  MAP_PRIVATE, .memfd = true },
};

struct test {
	const struct backing *backing;
	struct memory mem;
	int nr_pages;
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpus[NR_VCPUS];
	pthread_t server;
	bool filled[MAX_PAGES];
};

/* The content of all of memory, which a VMM would have to get from elsewhere. */
static void *test_content;

static int fetch(struct memory *mem, __u64 offset, const void **content)
{
	*content = test_content + offset;
	return 0;
}

static u64 *page_word(struct test *t, u64 page, u64 word)
{
	return (u64 *)(t->mem.region.userspace_addr + page * t->mem.page_size) + word;
}

static u64 nr_exits(struct test *t)
{
	u64 nr = 0;
	int i;

	for (i = 0; i < NR_VCPUS; i++)
		nr += vcpu_get_stat(t->vcpus[i], memory_fault_exits);

	return nr;
}

static int run(struct test *t, struct kvm_vcpu *vcpu)
{
	int r;

	do {
		r = run_vcpu(vcpu->fd, vcpu->run, &t->mem, 1);
	} while (r == -EINTR);

	return r;
}

static void run_to_sync(struct test *t, struct kvm_vcpu *vcpu)
{
	struct kvm_run *run_page = vcpu->run;
	struct ucall uc;
	int r = run(t, vcpu);

	TEST_ASSERT(!r, "%s: run_vcpu() = %d (%s), exit_reason %u, gpa 0x%llx, flags 0x%llx",
		    t->backing->name, r, strerror(-r), run_page->exit_reason,
		    run_page->memory_fault.gpa, run_page->memory_fault.flags);

	switch (get_ucall(vcpu, &uc)) {
	case UCALL_SYNC:
		return;
	case UCALL_ABORT:
		REPORT_GUEST_ASSERT(uc);
	default:
		TEST_FAIL("%s: unexpected exit %u", t->backing->name, run_page->exit_reason);
	}
}

static void set_guest_cmd(struct test *t, u64 first, u64 nr, bool zeroed)
{
	*(struct guest_cmd *)addr_gva2hva(t->vm, (gva_t)&guest_cmd) = (struct guest_cmd) {
		.first = first,
		.nr = nr,
		.stride = t->mem.page_size,
		.zeroed = zeroed,
	};
}

struct vcpu_thread {
	struct test *t;
	struct kvm_vcpu *vcpu;
};

static void *vcpu_thread_fn(void *arg)
{
	struct vcpu_thread *thread = arg;

	run_to_sync(thread->t, thread->vcpu);
	return NULL;
}

/* Let all vCPUs page in the same memory at the same time. */
static void run_all_vcpus(struct test *t)
{
	struct vcpu_thread args[NR_VCPUS];
	pthread_t threads[NR_VCPUS];
	int i;

	for (i = 0; i < NR_VCPUS; i++) {
		args[i] = (struct vcpu_thread) { t, t->vcpus[i] };
		kvm_pthread_create(&threads[i], NULL, vcpu_thread_fn, &args[i]);
	}

	for (i = 0; i < NR_VCPUS; i++)
		kvm_pthread_join(threads[i], NULL);
}

/* The library ends the test if there is no huge page, thus see about it first. */
static size_t hugetlb_page_size(void)
{
	void *page = mmap(NULL, 1, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);

	if (page == MAP_FAILED)
		return 0;

	munmap(page, get_def_hugetlb_pagesz());
	return get_def_hugetlb_pagesz();
}

/* Returns NULL, or the reason why there is no such memory. */
static const char *setup(struct test *t)
{
	const struct backing *backing = t->backing;
	struct memory *mem = &t->mem;
	void *hva, *buf;
	int fd = -1;
	size_t size;
	u64 i;

	t->nr_pages = backing->hugetlb ? 6 : MAX_PAGES;
	mem->page_size = backing->hugetlb ? hugetlb_page_size() : getpagesize();
	if (!mem->page_size)
		return "no free huge page";

	size = t->nr_pages * mem->page_size;

	/* Pages of 512M, as on arm64 with 64K pages, are not worth it. */
	if (mem->page_size > SZ_32M)
		return "huge page too large";

	buf = kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	for (i = 0; i < t->nr_pages; i++) {
		*(u64 *)(buf + i * mem->page_size) = first_word(i);
		*(u64 *)(buf + (i + 1) * mem->page_size - sizeof(u64)) = last_word(i);
	}
	test_content = buf;

	if (backing->memfd)
		fd = kvm_memfd_alloc(size, backing->hugetlb);

	hva = mmap(NULL, size, PROT_READ | PROT_WRITE, backing->mmap_flags, fd, 0);
	if (hva == MAP_FAILED && backing->hugetlb)
		return "not enough free huge pages";
	TEST_ASSERT(hva != MAP_FAILED, __KVM_SYSCALL_ERROR("mmap()", (int)(u64)hva));

	if (!backing->hugetlb)
		madvise(hva, size, MADV_NOHUGEPAGE);

	if (backing->memfd) {
		mem->alias = kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
		close(fd);
	}

	/* A snapshot is complete, and is there before the guest starts. */
	if (!backing->uffd) {
		memcpy(mem->alias, buf, size);
		mem->alias = NULL;
	}

	t->vm = vm_create_with_vcpus(NR_VCPUS, guest_code, t->vcpus);
	for (i = 0; i < NR_VCPUS; i++)
		vcpu_args_set(t->vcpus[i], 1, i);
	virt_map(t->vm, TEST_GVA, TEST_GPA, size / t->vm->page_size);

	mem->vm_fd = t->vm->fd;
	mem->region = (struct kvm_userspace_memory_region) {
		.slot = TEST_SLOT,
		.guest_phys_addr = TEST_GPA,
		.memory_size = size,
		.userspace_addr = (u64)hva,
	};
	mem->fetch = fetch;
	mem->filled = t->filled;
	mem->uffd = -1;
	for (i = 0; i < ARRAY_SIZE(mem->locks); i++)
		pthread_mutex_init(&mem->locks[i], NULL);

	return NULL;
}

/* A write to a zero page: UFFDIO_COPY can't resolve it, the recipe has to. */
static void test_eexist(struct test *t)
{
	int page = PAGE_ZEROED(t->nr_pages);
	struct uffdio_zeropage zeropage = {
		.range = { (u64)page_word(t, page, 0), t->mem.page_size },
	};
	u64 exits = nr_exits(t);
	int r;

	r = ioctl(t->mem.uffd, UFFDIO_ZEROPAGE, &zeropage);
	TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("UFFDIO_ZEROPAGE", r));

	set_guest_cmd(t, page, 1, true);
	run_to_sync(t, t->vcpus[0]);
	TEST_ASSERT(nr_exits(t) > exits, "No exit for a write to a zero page");
	TEST_ASSERT_EQ(*page_word(t, page, 1), guest_word(0, page));
}

static void ignore_signal(int signal)
{
}

static void drop_page(void *mem, size_t size, int advice)
{
	int r = madvise(mem, size, advice);

	TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("madvise()", r));
}

/* The recipe leaves a poisoned page to the VMM, which gives the guest a new one. */
static void test_poison(struct test *t)
{
	struct kvm_run *run_page = t->vcpus[0]->run;
	void *hva = page_word(t, 0, 0);
	int r;

	/* MADV_HWPOISON sends a signal on its own, and KVM must not. */
	signal(SIGBUS, ignore_signal);
	r = madvise(hva, t->mem.page_size, MADV_HWPOISON);
	signal(SIGBUS, SIG_DFL);
	if (r) {
		ksft_print_msg("no MADV_HWPOISON, errno = %d\n", errno);
		return;
	}

	set_guest_cmd(t, 0, 1, false);
	r = run(t, t->vcpus[0]);
	TEST_ASSERT(r == -EHWPOISON, "run_vcpu() = %d (%s), expected EHWPOISON", r, strerror(-r));
	TEST_ASSERT_EQ(run_page->memory_fault.gpa, TEST_GPA);

	if (t->mem.alias) {
		drop_page(t->mem.alias, t->mem.page_size, MADV_REMOVE);
		drop_page(t->mem.alias, t->mem.page_size, MADV_DONTNEED);
		t->filled[0] = false;
	}
	drop_page(hva, t->mem.page_size, MADV_DONTNEED);
	run_to_sync(t, t->vcpus[0]);
}

/* A failure that isn't about the flag is described by the other capability. */
static void test_hole(struct test *t)
{
	struct kvm_run *run_page = t->vcpus[0]->run;
	void *hva = page_word(t, 0, 0);
	int r;

	r = munmap(hva, t->mem.page_size);
	TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("munmap()", r));

	set_guest_cmd(t, 0, 1, false);
	r = run(t, t->vcpus[0]);
	TEST_ASSERT(r, "The guest has read memory that doesn't exist");
	TEST_ASSERT_EQ(run_page->exit_reason, KVM_EXIT_MEMORY_FAULT);
	TEST_ASSERT_EQ(run_page->memory_fault.flags, KVM_MEMORY_EXIT_FLAG_READ);
	TEST_ASSERT_EQ(run_page->memory_fault.gpa, TEST_GPA + t->mem.page_size - getpagesize());
}

static void *read_word(void *word)
{
	return (void *)READ_ONCE(*(u64 *)word);
}

/*
 * A page that a vCPU has populated, and that somebody sleeps on: the one who
 * serves the userfaultfd, and who learns about the page too late, has to wake.
 */
static void start_server(struct test *t)
{
	struct pollfd pollfd = { .fd = t->mem.uffd, .events = POLLIN };
	pthread_t sleeper;
	void *word;

	kvm_pthread_create(&sleeper, NULL, read_word, page_word(t, 0, 0));
	TEST_ASSERT_EQ(poll(&pollfd, 1, -1), 1);

	set_guest_cmd(t, 0, 1, false);
	run_to_sync(t, t->vcpus[0]);

	kvm_pthread_create(&t->server, NULL, serve_uffd, &t->mem);
	pthread_join(sleeper, &word);
	TEST_ASSERT_EQ((u64)word, first_word(0));
}

static void run_test(struct test *t)
{
	const struct backing *backing = t->backing;
	struct memory *mem = &t->mem;
	int nr = t->nr_pages, host = PAGE_HOST(nr), i, v, r;
	u64 one = 1, exits;

	r = enable_memory_fault_exit(mem->vm_fd);
	TEST_ASSERT(!r, "enable_memory_fault_exit() = %d (%s)", r, strerror(-r));

	if (backing->uffd) {
		r = open_uffd(mem);
		TEST_ASSERT(!r, "open_uffd() = %d (%s)", r, strerror(-r));
		mem->stop_fd = eventfd(0, EFD_CLOEXEC);
		TEST_ASSERT(mem->stop_fd >= 0, __KVM_SYSCALL_ERROR("eventfd()", mem->stop_fd));
	}

	r = set_exit_on_missing(mem, true);
	TEST_ASSERT(!r, "set_exit_on_missing() = %d (%s)", r, strerror(-r));

	if (backing->uffd)
		start_server(t);

	set_guest_cmd(t, 0, GUEST_PAGES(nr), false);
	run_all_vcpus(t);
	exits = nr_exits(t);
	TEST_ASSERT(exits >= GUEST_PAGES(nr), "%lu exits for %d pages", exits, GUEST_PAGES(nr));

	if (backing->uffd) {
		/* The VMM's own access: no exit, but userfaultfd. */
		TEST_ASSERT_EQ(READ_ONCE(*page_word(t, host, 0)), first_word(host));
		TEST_ASSERT_EQ(nr_exits(t), exits);
	}

	if (backing->uffd && !backing->memfd && !backing->hugetlb)
		test_eexist(t);
	if (backing->uffd && !backing->hugetlb)
		test_poison(t);

	r = finish_paging(mem);
	TEST_ASSERT(!r, "finish_paging() = %d (%s)", r, strerror(-r));
	if (backing->uffd) {
		TEST_ASSERT_EQ(write(mem->stop_fd, &one, sizeof(one)), sizeof(one));
		kvm_pthread_join(t->server, NULL);
	}

	/* What the guest has written is still there, but for a poisoned page. */
	for (i = 1; i < GUEST_PAGES(nr); i++) {
		for (v = 0; v < NR_VCPUS; v++)
			TEST_ASSERT_EQ(*page_word(t, i, 1 + v), guest_word(v, i));
	}

	/* All content has arrived, and the flag is gone. */
	exits = nr_exits(t);
	set_guest_cmd(t, 0, PAGE_ZEROED(nr), false);
	for (v = 0; v < NR_VCPUS; v++)
		run_to_sync(t, t->vcpus[v]);
	TEST_ASSERT_EQ(nr_exits(t), exits);

	test_hole(t);
	kvm_vm_free(t->vm);

	/* Huge pages are scarce. */
	munmap((void *)mem->region.userspace_addr, mem->region.memory_size);
	if (mem->alias)
		munmap(mem->alias, mem->region.memory_size);
	if (backing->uffd) {
		close(mem->uffd);
		close(mem->stop_fd);
	}
}

int main(void)
{
	struct kvm_vm *vm;
	bool supported;
	int i, fd;

	ksft_print_header();

	vm = vm_create_barebones();
	supported = has_exit_on_missing(vm->fd);
	kvm_vm_free(vm);
	__TEST_REQUIRE(supported, "KVM_CAP_EXIT_ON_MISSING is not available");

	fd = syscall(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	__TEST_REQUIRE(fd >= 0, "userfaultfd() failed, errno = %d (%s)", errno, strerror(errno));
	close(fd);

	disable_numa_balancing();

	ksft_set_plan(ARRAY_SIZE(backings));

	for (i = 0; i < ARRAY_SIZE(backings); i++) {
		struct test t = { .backing = &backings[i] };
		const char *reason = setup(&t);

		if (reason) {
			ksft_test_result_skip("%s: %s\n", backings[i].name, reason);
			continue;
		}

		run_test(&t);
		ksft_test_result_pass("%s\n", backings[i].name);
	}

	ksft_finished();
}
