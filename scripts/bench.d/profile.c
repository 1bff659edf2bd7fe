// SPDX-License-Identifier: GPL-2.0
/*
 * A plugin for QEMU's TCG: counts how often each block of instructions was executed,
 * and writes lines "address instructions" at the end, to the file that the argument
 * out=FILE names. The declarations are those of QEMU's documentation of its plugin API;
 * the header is in no package.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct qemu_plugin_tb;
void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, void (*cb)(uint64_t, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *tb, void (*cb)(unsigned int, void *),
					  int flags, void *data);
void qemu_plugin_register_atexit_cb(uint64_t id, void (*cb)(uint64_t, void *), void *data);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *tb);

#define API __attribute__((visibility("default")))
#define NR_BLOCKS (1u << 21)

API int qemu_plugin_version = VERSION;

/* Blocks differ by address and length; the emulated machine has one CPU. */
static struct block {
	uint64_t start, length, executed;
} *blocks[NR_BLOCKS];

static const char *out;

static void executed(unsigned int vcpu, void *block)
{
	(void)vcpu;
	((struct block *)block)->executed++;
}

static void translated(uint64_t id, struct qemu_plugin_tb *tb)
{
	uint64_t start = qemu_plugin_tb_vaddr(tb), length = qemu_plugin_tb_n_insns(tb);
	uint32_t slot = (start * 0x9e3779b97f4a7c15ull + length) >> 43;

	(void)id;
	while (blocks[slot % NR_BLOCKS] && (blocks[slot % NR_BLOCKS]->start != start ||
					    blocks[slot % NR_BLOCKS]->length != length))
		slot++;
	slot %= NR_BLOCKS;
	if (!blocks[slot]) {
		blocks[slot] = calloc(1, sizeof(struct block));
		if (!blocks[slot])
			abort();
		*blocks[slot] = (struct block){ .start = start, .length = length };
	}
	qemu_plugin_register_vcpu_tb_exec_cb(tb, executed, 0, blocks[slot]);
}

static void at_exit(uint64_t id, void *data)
{
	FILE *f = fopen(out, "w");

	(void)id;
	(void)data;
	for (size_t i = 0; f && i < NR_BLOCKS; i++) {
		if (blocks[i])
			fprintf(f, "%" PRIx64 " %" PRIu64 "\n", blocks[i]->start,
				blocks[i]->executed * blocks[i]->length);
	}
	if (!f || fclose(f))
		perror(out);
}

API int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv)
{
	(void)info;
	if (argc != 1 || strncmp(argv[0], "out=", 4))
		return -1;
	out = strdup(argv[0] + 4);
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	qemu_plugin_register_atexit_cb(id, at_exit, NULL);
	return 0;
}
