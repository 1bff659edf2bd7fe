/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Postcopy migration of a guest between two processes over a stream socket.
 *
 * The destination resumes the guest without any of its memory.  Pages are pulled
 * when they're needed, and pushed by the source meanwhile.  How pages get into the
 * guest is up to the recipe of Documentation/virt/kvm/memory-fault-exits.rst.
 */
#ifndef SELFTEST_KVM_POSTCOPY_H
#define SELFTEST_KVM_POSTCOPY_H

#include <pthread.h>
#include <stdint.h>
#include <sys/types.h>

#include <linux/sizes.h>

#include "kvm_util.h"
#include "memory_fault_recipe.h"
#include "test_util.h"

#define PC_MAX_SLOTS	16
#define PC_MAX_VCPUS	8
#define PC_MAX_READERS	8

/* The wire */

#define PC_MAGIC	0x70636b76u
#define PC_VERSION	1
#define PC_MAX_STATE	SZ_1M

enum pc_type {
	PC_HELLO,	/* both: who, and the layout of memory, see pc_layout */
	PC_HAVE,	/* to the source: bitmap of a slot's pages that are there */
	PC_VM,		/* state of the VM */
	PC_VCPU,	/* state of vCPU "slot" */
	PC_RUN,		/* that was all state, the destination may run the guest */
	PC_PAGE,
	PC_ZERO,	/* a page of zeroes */
	PC_REQUEST,	/* to the source: send this page first */
	PC_DONE,	/* all pages have been sent */
	PC_BYE,		/* to the source: all pages have arrived */
	PC_NR_TYPES,
};

struct pc_msg {
	u32 magic;
	u16 version;
	u16 type;
	u32 slot;
	u32 len;
	u64 offset;
};

struct pc_layout {
	u64 session;
	u32 nr_slots;
	u32 nr_vcpus;
	struct pc_slot {
		u64 gpa;
		u64 size;
		u64 page_size;
		/* Where the source has it, i.e. what its pointers mean. */
		u64 hva;
	} slots[PC_MAX_SLOTS];
};

int pc_send(int fd, enum pc_type type, u32 slot, u64 offset, const void *payload, u32 len);
int pc_recv(int fd, void *buf, size_t len);
const char *pc_check_msg(const struct pc_msg *msg, const struct pc_layout *layout);
u64 pc_have_size(const struct pc_slot *slot);

/* Measuring */

/* Four buckets for each power of two. */
#define PC_NR_BUCKETS	256

struct pc_hist {
	u64 nr;
	u64 max;
	u32 buckets[PC_NR_BUCKETS];
};

/* Inlined as guests use it, too. */
static __always_inline void pc_hist_add(struct pc_hist *hist, u64 val)
{
	int msb = val > 3 ? 63 - __builtin_clzll(val) : 2;

	hist->nr++;
	hist->buckets[val > 3 ? msb * 4 + ((val >> (msb - 2)) & 3) : val]++;
	if (val > hist->max)
		hist->max = val;
}

void pc_hist_merge(struct pc_hist *to, const struct pc_hist *from);
u64 pc_hist_bucket(int bucket);
u64 pc_hist_percentile(const struct pc_hist *hist, int percent);
u64 pc_now(void);

/* What a page fault was about, as far as the destination can tell. */
enum pc_kind {
	PC_READ,
	PC_WRITE,
	PC_EXEC,
	PC_BACKSTOP,
	PC_NR_KINDS,
};

extern const char * const pc_kind_names[PC_NR_KINDS];

/* All of it in memory that the processes share. */
struct pc_stats {
	u64 paused_ns;
	u64 resumed_ns;
	u64 last_page_ns;
	u64 finished_ns;

	u64 total;
	u64 received;
	u64 pages;
	u64 zeroes;
	u64 requests;
	u64 duplicates;
	u64 lost;
	u64 connections;
	u64 refused;
	u64 uffd_messages;
	u64 exits;
	/* Faults of those who sleep on a userfaultfd, or wait in user space. */
	int outstanding;
	int waiting;
	struct pc_hist faults[PC_NR_KINDS];

	/* What was wrong with the last connection. */
	char error[256];
};

/* The source */

/* Trouble to be made for the destination. */
struct pc_trouble {
	struct kvm_random_state rng;

	/* Percent of the pages that are late, sent once more, or sent too early. */
	u8 delay;
	u8 duplicate;
	u8 reorder;

	/* Break the connection after that many pages, or as soon as *break_now. */
	u64 break_at;
	const bool *break_now;
	enum { PC_BREAK_NEVER, PC_BREAK_CLEAN, PC_BREAK_HALF, PC_BREAK_KILL } break_how;

	/*
	 * Spoil the first n pages from here on that aren't zero, or forget the n-th
	 * one to be pushed.
	 */
	u64 spoil_gpa;
	u64 corrupt;
	u64 zero;
	u64 lose;

	/* Send only what is requested while *no_push, and not this page while *hold. */
	const bool *no_push;
	const bool *hold;
	u32 hold_slot;
	u64 hold_offset;
};

struct pc_source {
	struct pc_layout layout;
	void *hva[PC_MAX_SLOTS];
	void *vm_state;
	size_t vm_state_size;
	void *vcpu_state[PC_MAX_VCPUS];
	size_t vcpu_state_size[PC_MAX_VCPUS];

	/* Microseconds between two pages that nobody has asked for. */
	u32 push_delay;
	struct pc_trouble trouble;
};

int pc_send_guest(struct pc_source *src, int fd);

/* The destination */

enum pc_page_state {
	/* Requested, or not. */
	PC_MISSING,
	/* Received, a vCPU will fetch and install it. */
	PC_STAGED,
	/* Fetched, i.e. somebody is about to install it. */
	PC_BUSY,
	PC_INSTALLED,
};

struct pc_page {
	u8 state;
	bool requested;
	bool lost;
	bool zero;
	/* Somebody sleeps on it in the kernel. */
	bool sleeper;
	u8 kind;
	u16 waiters;
	void *content;
	u64 fault_ns;
};

struct pc_vcpu {
	struct kvm_vcpu *vcpu;
	struct pc_dst *dst;
	pthread_t thread;
	pid_t tid;
	u64 fault_ns;
	/* The page that it waits for, in user space. */
	struct pc_page *page;
	pthread_cond_t cond;
	bool parked;
	bool done;
};

struct pc_region {
	struct memory *mem;
	struct pc_dst *dst;
	u32 index;
	struct pc_page *pages;
	u64 nr_pages;
	pthread_t readers[PC_MAX_READERS];
};

struct pc_dst {
	struct kvm_vm *vm;
	struct pc_stats *stats;
	struct pc_layout layout;
	struct pc_vcpu vcpus[PC_MAX_VCPUS];
	struct memory mems[PC_MAX_SLOTS];
	struct pc_region regions[PC_MAX_SLOTS];
	/* The source has none that the recipe is to handle. */
	int nr_mems;
	int nr_readers;
	bool by_exits;

	/* Handles an exit of KVM_RUN, and returns true if the vCPU is done. */
	bool (*handle_exit)(struct pc_vcpu *vcpu);

	int listen_fd;
	pthread_t receiver;
	int stop_fd;

	/* Protects what follows, and the pages. */
	pthread_mutex_t lock;
	pthread_cond_t cond;
	int fd;
	bool linked;
	bool pause;
	bool have_state;
	bool complete;
	void *vm_state;
	size_t vm_state_size;
	void *vcpu_state[PC_MAX_VCPUS];
	size_t vcpu_state_size[PC_MAX_VCPUS];
};

void pc_dst_start(struct pc_dst *dst);
void pc_dst_wait_state(struct pc_dst *dst);
void pc_dst_run(struct pc_dst *dst);
void pc_dst_wait_pages(struct pc_dst *dst);
void pc_dst_finish(struct pc_dst *dst);

void pc_run_vcpus(struct pc_dst *dst);
void pc_pause_vcpus(struct pc_dst *dst);
void pc_resume_vcpus(struct pc_dst *dst);
void pc_join_vcpus(struct pc_dst *dst);

/* Architectures */

void *pc_save_vm(struct kvm_vm *vm, size_t *size);
void pc_load_vm(struct kvm_vm *vm, const void *state, size_t size);
void *pc_save_vcpu(struct kvm_vcpu *vcpu, size_t *size);
void pc_load_vcpu(struct kvm_vcpu *vcpu, const void *state, size_t size);

#endif /* SELFTEST_KVM_POSTCOPY_H */
