// SPDX-License-Identifier: GPL-2.0-only
/*
 * Postcopy migration: the source.
 *
 * It has nothing to remember but the guest: what the destination lacks is said by
 * the destination, i.e. every connection starts from scratch.  A process per
 * connection may thus be killed at any time.
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>

#include "linux/bitmap.h"
#include "postcopy.h"

struct sender {
	struct pc_source *src;
	int fd;
	/* Pages to be sent, where to go on, and how many there are. */
	unsigned long *todo[PC_MAX_SLOTS];
	u32 slot;
	u64 page;
	u64 nr_todo;
	u64 nr_sent;
	u64 nr_pushed;
	u64 nr_contents;
	u64 next_push_ns;

	/* What was requested, and how many pages are sent before that. */
	struct {
		u32 slot;
		u64 page;
	} queue[256];
	int nr_queued;
	int detour;
};

static u64 nr_pages(struct pc_source *src, u32 slot)
{
	return src->layout.slots[slot].size / src->layout.slots[slot].page_size;
}

static bool held(struct sender *s, u32 slot, u64 page)
{
	struct pc_trouble *t = &s->src->trouble;

	return t->hold && READ_ONCE(*t->hold) && slot == t->hold_slot &&
	       page == t->hold_offset / s->src->layout.slots[slot].page_size;
}

static bool is_zero(const void *page, size_t size)
{
	return !*(u64 *)page && !memcmp(page, page + sizeof(u64), size - sizeof(u64));
}

/* The header and a half of the page, then nothing any more. */
static int send_half(struct sender *s, u32 slot, u64 page)
{
	struct pc_slot *layout = &s->src->layout.slots[slot];
	struct pc_msg msg = {
		.magic = PC_MAGIC,
		.version = PC_VERSION,
		.type = PC_PAGE,
		.slot = slot,
		.len = layout->page_size,
		.offset = page * layout->page_size,
	};

	if (send(s->fd, &msg, sizeof(msg), MSG_NOSIGNAL) < 0 ||
	    send(s->fd, s->src->hva[slot] + msg.offset, msg.len / 2, MSG_NOSIGNAL) < 0)
		return -errno;

	if (s->src->trouble.break_how == PC_BREAK_KILL)
		raise(SIGKILL);
	return -ECONNABORTED;
}

static int __send_page(struct sender *s, u32 slot, u64 page)
{
	struct pc_trouble *t = &s->src->trouble;
	u64 size = s->src->layout.slots[slot].page_size;
	const void *content = s->src->hva[slot] + page * size;
	u8 spoiled[size];
	bool spoil;

	if (is_zero(content, size))
		return pc_send(s->fd, PC_ZERO, slot, page * size, NULL, 0);

	spoil = s->src->layout.slots[slot].gpa + page * size >= t->spoil_gpa;
	s->nr_contents += spoil;
	if (spoil && s->nr_contents <= t->zero)
		return pc_send(s->fd, PC_ZERO, slot, page * size, NULL, 0);
	if (spoil && s->nr_contents <= t->corrupt) {
		memcpy(spoiled, content, size);
		spoiled[size / 2] ^= 1;
		content = spoiled;
	}

	return pc_send(s->fd, PC_PAGE, slot, page * size, content, size);
}

static void mark_sent(struct sender *s, u32 slot, u64 page)
{
	if (!test_bit(page, s->todo[slot]))
		return;

	clear_bit(page, s->todo[slot]);
	s->nr_todo--;
	s->nr_sent++;
}

static int send_page(struct sender *s, u32 slot, u64 page)
{
	struct pc_trouble *t = &s->src->trouble;
	int r;

	if (t->break_how != PC_BREAK_NEVER &&
	    (t->break_now ? READ_ONCE(*t->break_now) : s->nr_sent >= t->break_at))
		return t->break_how == PC_BREAK_CLEAN ? -ECONNABORTED : send_half(s, slot, page);

	if (__kvm_random_bool(&t->rng, t->delay))
		usleep(kvm_random_u32_in_range(&t->rng, 100, 5000));

	r = __send_page(s, slot, page);

	mark_sent(s, slot, page);

	/* Whoever has asked for this page is likely to ask for the next one. */
	s->slot = slot;
	s->page = page + 1;
	return r;
}

static int send_duplicate(struct sender *s)
{
	struct pc_trouble *t = &s->src->trouble;
	u32 slot = kvm_random_u32_in_range(&t->rng, 0, s->src->layout.nr_slots - 1);
	u64 page = kvm_random_u64_in_range(&t->rng, 0, nr_pages(s->src, slot) - 1);

	/* Long after the destination has got it, and the guest has changed it. */
	return test_bit(page, s->todo[slot]) ? 0 : __send_page(s, slot, page);
}

/* Returns a page that nobody has asked for, if there is one. */
static bool next_page(struct sender *s)
{
	const bool *no_push = s->src->trouble.no_push;
	u32 i;

	for (i = 0; i <= s->src->layout.nr_slots; i++) {
		u64 nr = nr_pages(s->src, s->slot);

		for (; s->page < nr; s->page++) {
			if (test_bit(s->page, s->todo[s->slot]) && !held(s, s->slot, s->page))
				return !no_push || !READ_ONCE(*no_push);
		}
		s->page = 0;
		s->slot = (s->slot + 1) % s->src->layout.nr_slots;
	}

	return false;
}

/* Returns 0, or -errno; *bye if the destination has all it wants. */
static int receive(struct sender *s, bool *bye)
{
	struct pc_layout *layout = &s->src->layout;
	struct pc_msg msg;
	int r;

	r = pc_recv(s->fd, &msg, sizeof(msg));
	if (r)
		return r;
	if (pc_check_msg(&msg, layout))
		return -EPROTO;

	switch (msg.type) {
	case PC_REQUEST:
		TEST_ASSERT(s->nr_queued < ARRAY_SIZE(s->queue), "Too many requests");
		s->queue[s->nr_queued].slot = msg.slot;
		s->queue[s->nr_queued++].page = msg.offset / layout->slots[msg.slot].page_size;
		if (__kvm_random_bool(&s->src->trouble.rng, s->src->trouble.reorder))
			s->detour = kvm_random_u32_in_range(&s->src->trouble.rng, 1, 8);
		return 0;
	case PC_BYE:
		*bye = true;
		return 0;
	default:
		return -EPROTO;
	}
}

/* Sends the first page of the queue that can be sent. */
static int send_queued(struct sender *s, bool done, bool *sent)
{
	int i, r;

	for (i = 0; i < s->nr_queued; i++) {
		if (held(s, s->queue[i].slot, s->queue[i].page))
			continue;

		/* What has been sent is on its way, or so it seems before DONE. */
		*sent = true;
		r = 0;
		if (test_bit(s->queue[i].page, s->todo[s->queue[i].slot]) || done)
			r = send_page(s, s->queue[i].slot, s->queue[i].page);
		memmove(&s->queue[i], &s->queue[i + 1],
			(--s->nr_queued - i) * sizeof(s->queue[0]));
		return r;
	}

	return 0;
}

/* How long to wait for a request, until there is something else to be done. */
static int timeout_ms(struct sender *s, bool more, bool done)
{
	u64 now = pc_now();

	if (more)
		return s->next_push_ns > now ? (s->next_push_ns - now) / 1000000 + 1 : 0;

	/* Pages that are held back remain. */
	if (s->nr_todo || s->nr_queued)
		return 1;

	return done ? -1 : 0;
}

static int send_pages(struct sender *s)
{
	struct pc_trouble *t = &s->src->trouble;
	struct pollfd pollfd = { .fd = s->fd, .events = POLLIN };
	bool bye = false, done = false, more, sent;
	int r;

	for (;;) {
		more = next_page(s);
		for (r = poll(&pollfd, 1, timeout_ms(s, more, done)); r > 0;
		     r = poll(&pollfd, 1, 0)) {
			r = receive(s, &bye);
			if (r || bye)
				return r;
		}

		sent = false;
		if (!s->detour || !more) {
			s->detour = 0;
			r = send_queued(s, done, &sent);
			if (r)
				return r;
		}
		if (sent) {
			done = false;
			continue;
		}

		if (more && (s->detour || pc_now() >= s->next_push_ns)) {
			s->detour -= !!s->detour;
			s->next_push_ns = pc_now() + s->src->push_delay * 1000ull;
			if (++s->nr_pushed == t->lose)
				mark_sent(s, s->slot, s->page);
			else
				r = send_page(s, s->slot, s->page);
			if (!r && __kvm_random_bool(&t->rng, t->duplicate))
				r = send_duplicate(s);
		} else if (!s->nr_todo && !s->nr_queued && !done) {
			r = pc_send(s->fd, PC_DONE, 0, 0, NULL, 0);
			done = true;
		}
		if (r)
			return r;
	}
}

static int send_state(struct pc_source *src, int fd)
{
	u32 i;
	int r;

	r = pc_send(fd, PC_VM, 0, 0, src->vm_state, src->vm_state_size);
	for (i = 0; !r && i < src->layout.nr_vcpus; i++)
		r = pc_send(fd, PC_VCPU, i, 0, src->vcpu_state[i], src->vcpu_state_size[i]);

	return r ?: pc_send(fd, PC_RUN, 0, 0, NULL, 0);
}

/* Returns 0 if the destination has got everything, or why the connection broke. */
int pc_send_guest(struct pc_source *src, int fd)
{
	struct sender s = { .src = src, .fd = fd };
	struct pc_layout theirs;
	struct pc_msg msg;
	u32 i;
	u64 page;
	int r;

	r = pc_send(fd, PC_HELLO, 0, 0, &src->layout, sizeof(src->layout));
	r = r ?: pc_recv(fd, &msg, sizeof(msg));
	if (r)
		return r;
	if (pc_check_msg(&msg, &src->layout) || msg.type != PC_HELLO)
		return -EPROTO;
	r = pc_recv(fd, &theirs, sizeof(theirs));
	if (r)
		return r;

	for (i = 0; i < src->layout.nr_slots; i++) {
		u64 size = pc_have_size(&src->layout.slots[i]);

		r = pc_recv(fd, &msg, sizeof(msg));
		if (r)
			return r;
		if (pc_check_msg(&msg, &src->layout) || msg.type != PC_HAVE || msg.slot != i)
			return -EPROTO;

		s.todo[i] = calloc(1, size);
		TEST_ASSERT(s.todo[i], "No memory");
		r = pc_recv(fd, s.todo[i], size);
		if (r)
			return r;
		for (page = 0; page < nr_pages(src, i); page++) {
			if (test_bit(page, s.todo[i])) {
				clear_bit(page, s.todo[i]);
			} else {
				set_bit(page, s.todo[i]);
				s.nr_todo++;
			}
		}
	}

	/* A destination that has a session has the state. */
	if (!theirs.session)
		r = send_state(src, fd);
	r = r ?: send_pages(&s);

	for (i = 0; i < src->layout.nr_slots; i++)
		free(s.todo[i]);
	return r;
}
