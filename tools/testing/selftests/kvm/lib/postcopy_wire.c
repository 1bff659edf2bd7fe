// SPDX-License-Identifier: GPL-2.0-only
/*
 * Postcopy migration: what goes over the socket, and what is refused.
 */
#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#include "postcopy.h"

const char * const pc_kind_names[PC_NR_KINDS] = { "read", "write", "exec", "backstop" };

u64 pc_now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return timespec_to_ns(ts);
}

void pc_hist_merge(struct pc_hist *to, const struct pc_hist *from)
{
	int i;

	to->nr += from->nr;
	to->max = max(to->max, from->max);
	for (i = 0; i < PC_NR_BUCKETS; i++)
		to->buckets[i] += from->buckets[i];
}

/* The least value that is in this bucket. */
u64 pc_hist_bucket(int bucket)
{
	return bucket < 12 ? bucket : (4ull | (bucket & 3)) << (bucket / 4 - 2);
}

u64 pc_hist_percentile(const struct pc_hist *hist, int percent)
{
	u64 nr = 0;
	int i;

	for (i = 0; i < PC_NR_BUCKETS; i++) {
		nr += hist->buckets[i];
		if (nr && nr * 100 >= hist->nr * percent)
			return min(pc_hist_bucket(i + 1), hist->max);
	}

	return 0;
}

/* Returns 0 or -errno.  Never raises SIGPIPE. */
int pc_send(int fd, enum pc_type type, u32 slot, u64 offset, const void *payload, u32 len)
{
	struct pc_msg msg = {
		.magic = PC_MAGIC,
		.version = PC_VERSION,
		.type = type,
		.slot = slot,
		.len = len,
		.offset = offset,
	};
	struct iovec iov[] = {
		{ .iov_base = &msg, .iov_len = sizeof(msg) },
		{ .iov_base = (void *)payload, .iov_len = len },
	};
	struct msghdr hdr = { .msg_iov = iov, .msg_iovlen = 2 };
	size_t left = sizeof(msg) + len;
	ssize_t n;

	while (left) {
		n = sendmsg(fd, &hdr, MSG_NOSIGNAL);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;

		left -= n;
		while (n && (size_t)n >= hdr.msg_iov->iov_len) {
			n -= hdr.msg_iov->iov_len;
			hdr.msg_iov++;
			hdr.msg_iovlen--;
		}
		if (n) {
			hdr.msg_iov->iov_base += n;
			hdr.msg_iov->iov_len -= n;
		}
	}

	return 0;
}

/* Returns 0, -EPIPE at the end of the stream, -EPROTO if that is too early. */
int pc_recv(int fd, void *buf, size_t len)
{
	size_t done = 0;
	ssize_t n;

	while (done < len) {
		n = recv(fd, buf + done, len - done, 0);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return done ? -EPROTO : -EPIPE;
		done += n;
	}

	return 0;
}

u64 pc_have_size(const struct pc_slot *slot)
{
	return align_up(slot->size / slot->page_size, 64) / 8;
}

/* Returns what is wrong, before any payload is read or memory allocated for it. */
const char *pc_check_msg(const struct pc_msg *msg, const struct pc_layout *layout)
{
	const struct pc_slot *slot = &layout->slots[msg->slot];
	u32 most = 0;
	u32 least;

	if (msg->magic != PC_MAGIC)
		return "wrong magic";
	if (msg->version != PC_VERSION)
		return "unknown version";
	if (msg->type >= PC_NR_TYPES)
		return "unknown type";

	switch (msg->type) {
	case PC_HAVE:
	case PC_PAGE:
	case PC_ZERO:
	case PC_REQUEST:
		if (msg->slot >= layout->nr_slots)
			return "no such slot";
		if (msg->offset >= slot->size)
			return "page outside the guest";
		if (msg->offset & (slot->page_size - 1))
			return "page is not aligned";
		break;
	case PC_VCPU:
		if (msg->slot >= layout->nr_vcpus)
			return "no such vCPU";
		break;
	}

	switch (msg->type) {
	case PC_HELLO:
		most = sizeof(*layout);
		break;
	case PC_HAVE:
		most = pc_have_size(slot);
		break;
	case PC_VM:
	case PC_VCPU:
		most = PC_MAX_STATE;
		break;
	case PC_PAGE:
		most = slot->page_size;
		break;
	}

	/* Only state may have any length. */
	least = msg->type == PC_VM || msg->type == PC_VCPU ? 0 : most;
	return msg->len < least || msg->len > most ? "wrong length" : NULL;
}
