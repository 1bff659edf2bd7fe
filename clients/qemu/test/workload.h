/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the guest writes, and what it must therefore read: word i of page p in
 * thread t's part of the memory, in its n-th round.
 */
#ifndef WORKLOAD_H
#define WORKLOAD_H

#include <stdint.h>

#define WORKLOAD_PAGE	4096
#define WORKLOAD_WORDS	(WORKLOAD_PAGE / sizeof(uint64_t))

static inline uint64_t workload_word(uint64_t t, uint64_t p, uint64_t n, uint64_t i)
{
	return ((t + 1) * 0x9e3779b97f4a7c15 ^ (p + 1) * 0xc2b2ae3d27d4eb4f ^
		n * 0x165667b19e3779f9) + i;
}

/* The sum of all words of n_pages pages. */
static inline uint64_t workload_sum(uint64_t t, uint64_t n_pages, uint64_t n)
{
	uint64_t sum = 0;

	for (uint64_t p = 0; p < n_pages; p++)
		sum += WORKLOAD_WORDS * workload_word(t, p, n, 0) +
		       WORKLOAD_WORDS * (WORKLOAD_WORDS - 1) / 2;
	return sum;
}

#endif
