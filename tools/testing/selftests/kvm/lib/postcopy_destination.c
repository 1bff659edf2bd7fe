// SPDX-License-Identifier: GPL-2.0-only
/*
 * Postcopy migration: the destination.
 *
 * One thread receives.  A page that only vCPUs wait for is installed by one of
 * them, as the recipe does it, and every other page by the receiver.  The threads
 * that read userfaultfd never wait: they ask for the page, and the receiver, or the
 * vCPU that installs the page, wakes whoever sleeps in the kernel.
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>

#include <linux/userfaultfd.h>

#include "linux/bitmap.h"
#include "postcopy.h"

/* The vCPU whose thread this is. */
static __thread struct pc_vcpu *self;

/* UFFDIO_ZEROPAGE is for private memory of small pages. */
static void *zeroes;

static void wake(struct pc_region *region, u64 page)
{
	struct uffdio_range range = {
		region->mem->region.userspace_addr + page * region->mem->page_size,
		region->mem->page_size,
	};
	int r = ioctl(region->mem->uffd, UFFDIO_WAKE, &range);

	TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("UFFDIO_WAKE", r));
}

static const void *content(struct pc_region *region, struct pc_page *page)
{
	if (!page->zero)
		return page->content;

	return region->mem->alias || region->mem->page_size > getpagesize() ? zeroes : NULL;
}

/* A send that fails is the receiver's business. */
static void request(struct pc_region *region, u64 page)
{
	struct pc_dst *dst = region->dst;

	if (region->pages[page].requested)
		return;

	region->pages[page].requested = true;
	dst->stats->requests++;
	if (dst->linked)
		pc_send(dst->fd, PC_REQUEST, region->index, page * region->mem->page_size, NULL, 0);
}

static enum pc_kind fault_kind(u64 flags)
{
	if (flags & KVM_MEMORY_EXIT_FLAG_EXEC)
		return PC_EXEC;

	return flags & KVM_MEMORY_EXIT_FLAG_WRITE ? PC_WRITE : PC_READ;
}

/* With the lock held: wakes the vCPUs that wait for this page, and no other. */
static void wake_vcpus(struct pc_dst *dst, struct pc_page *page)
{
	int i;

	for (i = 0; page->waiters && i < dst->layout.nr_vcpus; i++) {
		if (dst->vcpus[i].page == page)
			pthread_cond_signal(&dst->vcpus[i].cond);
	}
}

/* Called by vCPU threads with the lock held, for a fault that they have seen. */
static void count_vcpu_fault(struct pc_vcpu *vcpu)
{
	pc_hist_add(&vcpu->dst->stats->faults[fault_kind(vcpu->vcpu->run->memory_fault.flags)],
		    pc_now() - vcpu->fault_ns);
}

/* See struct memory.  Waits for the page in vCPU threads, which can be stopped. */
static int fetch(struct memory *mem, __u64 offset, const void **cont)
{
	struct pc_region *region = mem->private;
	struct pc_page *page = &region->pages[offset / mem->page_size];
	struct pc_dst *dst = region->dst;
	int r = 0;

	if (self)
		self->fault_ns = pc_now();

	pthread_mutex_lock(&dst->lock);
	while (page->state == PC_MISSING || page->state == PC_BUSY) {
		if (page->state == PC_MISSING)
			request(region, offset / mem->page_size);

		if (self && dst->pause) {
			self->vcpu->run->immediate_exit = 1;
			r = -EINTR;
			goto unlock;
		}

		if (self) {
			self->page = page;
			page->waiters++;
			dst->stats->waiting++;
			pthread_cond_broadcast(&dst->cond);
		}
		pthread_cond_wait(self ? &self->cond : &dst->cond, &dst->lock);
		if (self) {
			self->page = NULL;
			page->waiters--;
			dst->stats->waiting--;
		}
	}

	if (page->state == PC_INSTALLED) {
		if (self)
			count_vcpu_fault(self);
		r = -EEXIST;
		goto unlock;
	}

	page->state = PC_BUSY;
	*cont = content(region, page);
unlock:
	pthread_mutex_unlock(&dst->lock);
	return r;
}

static void installed(struct memory *mem, __u64 offset)
{
	struct pc_region *region = mem->private;
	struct pc_page *page = &region->pages[offset / mem->page_size];
	struct pc_dst *dst = region->dst;
	struct pc_stats *stats = dst->stats;
	bool sleeper;

	pthread_mutex_lock(&dst->lock);
	page->state = PC_INSTALLED;
	free(page->content);
	page->content = NULL;

	if (self)
		count_vcpu_fault(self);

	sleeper = page->sleeper;
	if (sleeper) {
		page->sleeper = false;
		stats->outstanding--;
		pc_hist_add(&stats->faults[page->kind], pc_now() - page->fault_ns);
	}

	stats->pages++;
	if (stats->pages == stats->total)
		stats->last_page_ns = pc_now();
	wake_vcpus(dst, page);
	pthread_cond_broadcast(&dst->cond);
	pthread_mutex_unlock(&dst->lock);

	if (sleeper)
		wake(region, offset / mem->page_size);
}

static void serve(struct pc_region *region, u64 offset)
{
	int r = serve_page(region->mem, region->mem->region.userspace_addr + offset);

	TEST_ASSERT(!r, "serve_page() = %d (%s), slot %u, offset 0x%lx", r, strerror(-r),
		    region->index, offset);
}

static void *reader_fn(void *arg)
{
	struct pc_region *region = arg;
	struct pc_dst *dst = region->dst;
	struct memory *mem = region->mem;
	struct pollfd fds[] = {
		{ .fd = mem->uffd, .events = POLLIN },
		{ .fd = dst->stop_fd, .events = POLLIN },
	};
	struct uffd_msg msg;
	struct pc_page *page;
	bool here;
	u64 nr;

	for (;;) {
		if (read(mem->uffd, &msg, sizeof(msg)) != sizeof(msg)) {
			if (fds[1].revents)
				return NULL;
			poll(fds, ARRAY_SIZE(fds), -1);
			continue;
		}

		nr = (msg.arg.pagefault.address - mem->region.userspace_addr) / mem->page_size;
		page = &region->pages[nr];

		pthread_mutex_lock(&dst->lock);
		dst->stats->uffd_messages++;
		here = page->state == PC_STAGED || page->state == PC_INSTALLED;
		if (!here && !page->sleeper) {
			page->sleeper = true;
			page->fault_ns = pc_now();
			page->kind = dst->by_exits ? PC_BACKSTOP :
				     msg.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WRITE ?
				     PC_WRITE : PC_READ;
			dst->stats->outstanding++;
			if (page->state == PC_MISSING)
				request(region, nr);
		}
		pthread_mutex_unlock(&dst->lock);

		if (here)
			serve(region, nr * mem->page_size);
	}
}

/* A page that has arrived before is installed again, as far as the kernel lets. */
static void receive_again(struct pc_region *region, u64 offset, struct pc_page *dup)
{
	struct uffdio_range range = {
		region->mem->region.userspace_addr + offset, region->mem->page_size
	};
	int r = install_page(region->mem, offset, content(region, dup), true);

	TEST_ASSERT(!r || r == -EEXIST, "install_page() = %d (%s), slot %u, offset 0x%lx",
		    r, strerror(-r), region->index, offset);
	if (r)
		ioctl(region->mem->uffd, UFFDIO_WAKE, &range);
	free(dup->content);
}

static const char *receive_page(struct pc_dst *dst, const struct pc_msg *msg)
{
	struct pc_region *region = &dst->regions[msg->slot];
	struct pc_page *page = &region->pages[msg->offset / region->mem->page_size];
	struct pc_page new = { .zero = msg->type == PC_ZERO };
	bool dup, by_vcpu;

	if (!new.zero) {
		new.content = malloc(msg->len);
		TEST_ASSERT(new.content, "No memory");
		if (pc_recv(dst->fd, new.content, msg->len)) {
			free(new.content);
			return "the connection broke in the middle of a page";
		}
	}

	pthread_mutex_lock(&dst->lock);
	dup = page->state != PC_MISSING;
	if (dup) {
		dst->stats->duplicates++;
	} else {
		page->state = PC_STAGED;
		page->zero = new.zero;
		page->content = new.content;
		dst->stats->received++;
		dst->stats->zeroes += new.zero;
	}
	by_vcpu = page->waiters && !page->sleeper;
	wake_vcpus(dst, page);
	pthread_cond_broadcast(&dst->cond);
	pthread_mutex_unlock(&dst->lock);

	if (dup)
		receive_again(region, msg->offset, &new);
	else if (!by_vcpu)
		serve(region, msg->offset);

	return NULL;
}

static const char *receive_state(struct pc_dst *dst, const struct pc_msg *msg)
{
	void **state = msg->type == PC_VM ? &dst->vm_state : &dst->vcpu_state[msg->slot];
	size_t *size = msg->type == PC_VM ? &dst->vm_state_size : &dst->vcpu_state_size[msg->slot];

	if (dst->have_state)
		return "the state once more";

	free(*state);
	*state = malloc(msg->len);
	TEST_ASSERT(*state, "No memory");
	*size = msg->len;
	return pc_recv(dst->fd, *state, msg->len) ?
	       "the connection broke in the middle of the state" : NULL;
}

/* Say what is there, and repeat all requests that are open. */
static const char *hello(struct pc_dst *dst)
{
	struct pc_layout theirs, reply, *ours = &dst->layout;
	struct pc_region *region;
	unsigned long *have;
	u64 page;
	int i, r;

	if (pc_recv(dst->fd, &theirs, sizeof(theirs)))
		return "the connection broke in the middle of a message";

	if (dst->have_state && theirs.session != ours->session)
		return "another session";
	if (theirs.nr_slots != ours->nr_slots || theirs.nr_vcpus != ours->nr_vcpus)
		return "another guest";
	for (i = 0; i < ours->nr_slots; i++) {
		if (theirs.slots[i].gpa != ours->slots[i].gpa ||
		    theirs.slots[i].size != ours->slots[i].size ||
		    theirs.slots[i].page_size != ours->slots[i].page_size)
			return "another layout of memory";
	}

	/* Without a session, the source has to send the state. */
	reply = *ours;
	if (!dst->have_state) {
		reply.session = 0;
		*ours = theirs;
	}
	r = pc_send(dst->fd, PC_HELLO, 0, 0, &reply, sizeof(reply));

	pthread_mutex_lock(&dst->lock);
	for (i = 0; !r && i < ours->nr_slots; i++) {
		region = &dst->regions[i];
		have = calloc(1, pc_have_size(&ours->slots[i]));
		TEST_ASSERT(have, "No memory");
		for (page = 0; page < region->nr_pages; page++) {
			if (region->pages[page].state != PC_MISSING)
				set_bit(page, have);
		}
		r = pc_send(dst->fd, PC_HAVE, i, 0, have, pc_have_size(&ours->slots[i]));
		free(have);
	}

	for (i = 0; !r && i < ours->nr_slots; i++) {
		region = &dst->regions[i];
		for (page = 0; !r && page < region->nr_pages; page++) {
			if (region->pages[page].requested &&
			    region->pages[page].state == PC_MISSING)
				r = pc_send(dst->fd, PC_REQUEST, i, page * region->mem->page_size,
					    NULL, 0);
		}
	}
	/* From here on, requests may be sent. */
	dst->linked = !r;
	pthread_mutex_unlock(&dst->lock);

	return r ? "the connection broke" : NULL;
}

/* Nothing can be missing, but seeing is believing. */
static bool all_received(struct pc_dst *dst)
{
	struct pc_region *region;
	u64 page;
	int i;

	pthread_mutex_lock(&dst->lock);
	for (i = 0; i < dst->layout.nr_slots; i++) {
		region = &dst->regions[i];
		for (page = 0; page < region->nr_pages; page++) {
			if (region->pages[page].state != PC_MISSING)
				continue;
			/* The source may say more than once that it's done. */
			dst->stats->lost += !region->pages[page].lost;
			region->pages[page].lost = true;
			region->pages[page].requested = false;
			request(region, page);
		}
	}
	pthread_mutex_unlock(&dst->lock);

	return dst->stats->received == dst->stats->total;
}

/* Returns what is wrong, NULL if the connection just ended. */
static const char *receive(struct pc_dst *dst)
{
	bool greeted = false;
	const char *error;
	struct pc_msg msg;
	int r;

	for (;;) {
		r = pc_recv(dst->fd, &msg, sizeof(msg));
		if (r)
			return r == -EPIPE ? NULL : "the connection broke in a header";

		error = pc_check_msg(&msg, &dst->layout);
		if (error)
			return error;
		if (!greeted && msg.type != PC_HELLO)
			return "no HELLO";
		if (greeted && msg.type == PC_HELLO)
			return "HELLO once more";

		switch (msg.type) {
		case PC_HELLO:
			error = hello(dst);
			greeted = true;
			break;
		case PC_VM:
		case PC_VCPU:
			error = receive_state(dst, &msg);
			break;
		case PC_RUN:
			if (dst->have_state) {
				error = "the state once more";
				break;
			}
			pthread_mutex_lock(&dst->lock);
			dst->have_state = true;
			pthread_cond_broadcast(&dst->cond);
			pthread_mutex_unlock(&dst->lock);
			break;
		case PC_PAGE:
		case PC_ZERO:
			error = dst->have_state ? receive_page(dst, &msg) : "page before the state";
			break;
		case PC_DONE:
			if (!dst->have_state)
				error = "DONE before the state";
			else if (all_received(dst))
				dst->complete = !pc_send(dst->fd, PC_BYE, 0, 0, NULL, 0);
			break;
		default:
			error = "a message that is for the source";
			break;
		}

		if (error || dst->complete)
			return error;
	}
}

static void set_fd(struct pc_dst *dst, int fd)
{
	pthread_mutex_lock(&dst->lock);
	dst->fd = fd;
	dst->linked = false;
	pthread_mutex_unlock(&dst->lock);
}

/* A new connection can take up where the last one has broken. */
static void *receiver_fn(void *arg)
{
	struct pc_dst *dst = arg;
	struct pc_stats *stats = dst->stats;
	const char *error;
	char rest[SZ_4K];
	int fd;

	while (!dst->complete) {
		fd = accept(dst->listen_fd, NULL, NULL);
		TEST_ASSERT(fd >= 0, __KVM_SYSCALL_ERROR("accept()", fd));

		set_fd(dst, fd);
		stats->connections++;
		error = receive(dst);
		set_fd(dst, -1);

		/* The source may be about to answer a request that crossed with a push. */
		while (dst->complete && recv(fd, rest, sizeof(rest), 0) > 0)
			;

		if (error) {
			stats->refused++;
			snprintf(stats->error, sizeof(stats->error), "%s", error);
		}
		close(fd);
	}

	return NULL;
}

static void assert_empty(struct memory *mem)
{
	u64 i, nr = mem->region.memory_size / getpagesize();
	u8 *there = calloc(1, nr);
	int r;

	TEST_ASSERT(there, "No memory");
	r = mincore((void *)mem->region.userspace_addr, mem->region.memory_size, there);
	TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("mincore()", r));
	for (i = 0; i < nr; i++)
		TEST_ASSERT(!there[i], "Slot %u has page 0x%lx from the start",
			    mem->region.slot, i);
	free(there);
}

static void start_region(struct pc_region *region)
{
	struct memory *mem = region->mem;
	int i, r;

	for (i = 0; i < ARRAY_SIZE(mem->locks); i++)
		pthread_mutex_init(&mem->locks[i], NULL);
	mem->private = region;
	mem->fetch = fetch;
	mem->installed = installed;
	mem->stop_fd = region->dst->stop_fd;

	region->nr_pages = mem->region.memory_size / mem->page_size;
	region->pages = calloc(region->nr_pages, sizeof(*region->pages));
	mem->filled = calloc(region->nr_pages, sizeof(*mem->filled));
	TEST_ASSERT(region->pages && mem->filled, "No memory");

	/* The library has put the program there, and its page tables. */
	r = madvise((void *)mem->region.userspace_addr, mem->region.memory_size, MADV_DONTNEED);
	TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("madvise()", r));
	assert_empty(mem);

	r = open_uffd(mem);
	TEST_ASSERT(!r, "open_uffd() = %d (%s)", r, strerror(-r));
	r = set_exit_on_missing(mem, region->dst->by_exits);
	TEST_ASSERT(!r, "set_exit_on_missing() = %d (%s)", r, strerror(-r));

	for (i = 0; i < region->dst->nr_readers; i++)
		kvm_pthread_create(&region->readers[i], NULL, reader_fn, region);
}

/* Readers must be there first: even the restore of an MSR may touch memory. */
void pc_dst_start(struct pc_dst *dst)
{
	u64 largest = 0, total = 0;
	int i;

	pthread_mutex_init(&dst->lock, NULL);
	pthread_cond_init(&dst->cond, NULL);
	dst->fd = -1;
	dst->stop_fd = eventfd(0, EFD_CLOEXEC);
	TEST_ASSERT(dst->stop_fd >= 0, __KVM_SYSCALL_ERROR("eventfd()", dst->stop_fd));

	for (i = 0; i < dst->layout.nr_slots; i++) {
		largest = max(largest, dst->layout.slots[i].page_size);
		start_region(&dst->regions[i]);
		total += dst->regions[i].nr_pages;
	}
	dst->stats->total = total;
	zeroes = kvm_mmap(largest, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1);

	kvm_pthread_create(&dst->receiver, NULL, receiver_fn, dst);
}

void pc_dst_wait_state(struct pc_dst *dst)
{
	pthread_mutex_lock(&dst->lock);
	while (!dst->have_state)
		pthread_cond_wait(&dst->cond, &dst->lock);
	pthread_mutex_unlock(&dst->lock);
}

void pc_dst_run(struct pc_dst *dst)
{
	int i;

	pc_load_vm(dst->vm, dst->vm_state, dst->vm_state_size);
	for (i = 0; i < dst->layout.nr_vcpus; i++)
		pc_load_vcpu(dst->vcpus[i].vcpu, dst->vcpu_state[i], dst->vcpu_state_size[i]);

	dst->stats->resumed_ns = pc_now();
	pc_run_vcpus(dst);
}

/* Nobody may sleep on a userfaultfd if the flag is to be cleared. */
void pc_dst_wait_pages(struct pc_dst *dst)
{
	kvm_pthread_join(dst->receiver, NULL);
	TEST_ASSERT_EQ(dst->stats->received, dst->stats->total);

	pthread_mutex_lock(&dst->lock);
	while (dst->stats->outstanding)
		pthread_cond_wait(&dst->cond, &dst->lock);
	pthread_mutex_unlock(&dst->lock);
}

void pc_dst_finish(struct pc_dst *dst)
{
	u64 one = 1;
	int i, j, r;

	for (i = 0; i < dst->layout.nr_slots; i++) {
		r = finish_paging(dst->regions[i].mem);
		TEST_ASSERT(!r, "finish_paging() = %d (%s), slot %d", r, strerror(-r), i);
	}
	dst->stats->finished_ns = pc_now();

	/* Who isn't registered any more can't sleep there. */
	for (i = 0; i < dst->layout.nr_slots; i++) {
		r = install_page(dst->regions[i].mem, 0, zeroes, false);
		TEST_ASSERT(r == -ENOENT, "install_page() = %d (%s), slot %d", r, strerror(-r), i);
	}

	TEST_ASSERT_EQ(dst->stats->pages, dst->stats->total);
	TEST_ASSERT_EQ(dst->stats->outstanding, 0);

	/*
	 * The userfaultfds remain open: a vCPU may still have an exit to handle,
	 * and then gets ENOENT.
	 */
	TEST_ASSERT_EQ(write(dst->stop_fd, &one, sizeof(one)), sizeof(one));
	for (i = 0; i < dst->layout.nr_slots; i++) {
		for (j = 0; j < dst->nr_readers; j++)
			kvm_pthread_join(dst->regions[i].readers[j], NULL);
	}
}

/* Returns in the thread of the vCPU. */
static void kick(int signal)
{
	if (self)
		self->vcpu->run->immediate_exit = 1;
}

static void park(struct pc_vcpu *vcpu)
{
	struct pc_dst *dst = vcpu->dst;

	pthread_mutex_lock(&dst->lock);
	while (dst->pause) {
		vcpu->parked = true;
		pthread_cond_broadcast(&dst->cond);
		pthread_cond_wait(&dst->cond, &dst->lock);
	}
	vcpu->parked = false;
	vcpu->vcpu->run->immediate_exit = 0;
	pthread_mutex_unlock(&dst->lock);
}

static void *vcpu_fn(void *arg)
{
	struct pc_vcpu *vcpu = arg;
	struct pc_dst *dst = vcpu->dst;
	struct kvm_run *run = vcpu->vcpu->run;
	int r;

	self = vcpu;
	vcpu->tid = syscall(__NR_gettid);

	for (;;) {
		if (READ_ONCE(dst->pause))
			park(vcpu);

		r = run_vcpu(vcpu->vcpu->fd, run, dst->mems, dst->nr_mems);
		if (r == -EINTR) {
			park(vcpu);
			continue;
		}
		TEST_ASSERT(!r, "run_vcpu() = %d (%s), exit %u, gpa 0x%llx, flags 0x%llx",
			    r, strerror(-r), run->exit_reason, run->memory_fault.gpa,
			    run->memory_fault.flags);

		if (dst->handle_exit(vcpu))
			break;
	}

	pthread_mutex_lock(&dst->lock);
	vcpu->done = true;
	pthread_cond_broadcast(&dst->cond);
	pthread_mutex_unlock(&dst->lock);
	return NULL;
}

void pc_run_vcpus(struct pc_dst *dst)
{
	struct sigaction action = { .sa_handler = kick };
	int i;

	TEST_ASSERT(!sigaction(SIGUSR1, &action, NULL), "sigaction() failed");
	for (i = 0; i < dst->layout.nr_vcpus; i++) {
		dst->vcpus[i].dst = dst;
		pthread_cond_init(&dst->vcpus[i].cond, NULL);
		kvm_pthread_create(&dst->vcpus[i].thread, NULL, vcpu_fn, &dst->vcpus[i]);
	}
}

/* Doesn't wait, as a vCPU that sleeps on userfaultfd need not stop. */
void pc_pause_vcpus(struct pc_dst *dst)
{
	int i;

	pthread_mutex_lock(&dst->lock);
	dst->pause = true;
	pthread_cond_broadcast(&dst->cond);
	for (i = 0; i < dst->layout.nr_vcpus; i++) {
		pthread_cond_signal(&dst->vcpus[i].cond);
		if (!dst->vcpus[i].done)
			pthread_kill(dst->vcpus[i].thread, SIGUSR1);
	}
	pthread_mutex_unlock(&dst->lock);
}

void pc_resume_vcpus(struct pc_dst *dst)
{
	pthread_mutex_lock(&dst->lock);
	dst->pause = false;
	pthread_cond_broadcast(&dst->cond);
	pthread_mutex_unlock(&dst->lock);
}

void pc_join_vcpus(struct pc_dst *dst)
{
	int i;

	for (i = 0; i < dst->layout.nr_vcpus; i++)
		kvm_pthread_join(dst->vcpus[i].thread, NULL);
}
