// SPDX-License-Identifier: GPL-2.0-only
/*
 * Race accesses of several vCPUs to a slot with KVM_MEM_EXIT_ON_MISSING against
 * all that userspace and the primary MMU do to the slot and to its memory.
 *
 * In each page, each vCPU has a word of its own, to which it writes ascending
 * values.  Before and after a write, it makes known the value: a reader, be it
 * another vCPU or the host, that looks at the latter before and at the former
 * after it reads the word knows what it may see.  Thus no write can get lost,
 * and nobody can read something stale, without being noticed.
 *
 * Anonymous memory, which has no second mapping, loses its content if dropped.
 * What was there before MADV_DONTNEED must not be read afterwards.  MADV_FREE may
 * take effect at any time, or never, until the next write: both the last value
 * and zero are fine.
 *
 * Actions against which the vCPUs race are up to injectors, each of which is a
 * thread with random numbers of its own.  The seed reproduces the actions, and
 * the accesses, of each thread, though not their interleaving.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <linux/bitmap.h>
#include <linux/bits.h>
#include <linux/sizes.h>
#include <linux/userfaultfd.h>

#include <asm/barrier.h>

#include "kselftest.h"
#include "kvm_util.h"
#include "numaif.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"

#define TEST_SLOT		10
#define TEST_GPA		0xc0000000ul
#define TEST_GVA		TEST_GPA

/* Another slot, above or below, which no vCPU accesses. */
#define OTHER_SLOT		(TEST_SLOT + 1)
#define OTHER_GPA_ABOVE		(TEST_GPA + SZ_1G)
#define OTHER_GPA_BELOW		(TEST_GPA - SZ_1G)
#define OTHER_SIZE		SZ_64M

#define MAX_VCPUS		4
#define NR_PAGES		64
#define HOST			MAX_VCPUS
#define MAX_HUGE_PAGE		SZ_32M

/*
 * The memory is moved away and back.  No mmap() must put something else to where
 * it comes back, hence keep out of the kernel's way.
 */
#define TEST_HVA		((void *)(1ul << 35))
#define TEST_HVA_ELSEWHERE	(TEST_HVA + 2 * MAX_HUGE_PAGE)
#define TEST_HVA_END		(TEST_HVA + 4 * MAX_HUGE_PAGE)

/*
 * The second mapping.  If a huge page is in two page tables, a fault in the second
 * one may write below it while the page is split, as xas_find() may go back.
 */
#define TEST_HVA_ALIAS		TEST_HVA_END

/* Memory in front of it that no slot has, see unmap_memory(). */
#define FRONT_SIZE		SZ_32M
#define FRONT_HVA		(TEST_HVA - FRONT_SIZE)

/* Exits in a row that no injector explains, exits for a single access. */
#define MAX_UNEXPLAINED		100
#define MAX_EXITS		20000
/* Actions without success, for those that need luck, if time is up, too. */
#define MAX_ACTIONS		500

#define NAP_US			500
#define WAIT_US			20000
#define PACE_US			2000
#define PACE_ACCESSES		32

/* The kinds of accesses: read, write, execute. */
#define NR_KINDS		3

#ifdef __x86_64__
#define RET_INSN		0xc3ul
#elif defined(__aarch64__)
#define RET_INSN		0xd65f03c0ul
#else
#error "Unsupported architecture"
#endif

/* What is at the end of each page. */
struct words {
	u64 insn;
	u64 word[MAX_VCPUS + 1];
};

/* What the guest, in slot 0, and the host know about each other. */
static struct shared {
	u64 page_size;
	/* Distance of pages with words, in units of pages. */
	u64 stride;
	u64 probe_gva;
	u32 seed;
	u32 nr_vcpus;
	bool lossy;
	bool exec;
	bool host_words;

	bool stop;
	bool probe;

	struct shared_vcpu {
		/* The current access. */
		u64 flags;
		u64 gva;
		u64 nr_accesses;
		u64 nr_probes;
	} vcpus[MAX_VCPUS];

	/* The values that the writer of a word is going to write, and has written. */
	u64 intent[MAX_VCPUS + 1][NR_PAGES];
	u64 done[MAX_VCPUS + 1][NR_PAGES];

	/*
	 * How often a page was about to be dropped, and was dropped, and the
	 * last of these times that it was by MADV_DONTNEED.
	 */
	u64 drop_begin[NR_PAGES];
	u64 drop_end[NR_PAGES];
	u64 zap_end[NR_PAGES];

	/*
	 * For each word, what its writer expects, drop_end before, and
	 * drop_begin after it wrote it.
	 */
	u64 expected[MAX_VCPUS + 1][NR_PAGES];
	u64 before[MAX_VCPUS + 1][NR_PAGES];
	u64 after[MAX_VCPUS + 1][NR_PAGES];
} shared;

/*
 * Order the access to a word, or the drop of a page, against what is made known
 * about it, and what is known about it by others.
 */
static void order_accesses(void)
{
	/* Pairs with itself. */
	smp_mb();
}

static struct words *guest_words(int page)
{
	u64 page_end = (page * shared.stride + 1) * shared.page_size;

	return (struct words *)(TEST_GVA + page_end) - 1;
}

static void guest_set_access(u64 id, u64 flags, void *gva)
{
	struct shared_vcpu *v = &shared.vcpus[id];

	WRITE_ONCE(v->flags, flags);
	WRITE_ONCE(v->gva, (u64)gva);
	WRITE_ONCE(v->nr_accesses, v->nr_accesses + 1);
	order_accesses();
}

static u64 guest_read(u64 id, u64 *word)
{
	guest_set_access(id, KVM_MEMORY_EXIT_FLAG_READ, word);
#ifdef __aarch64__
	/* An access that can be emulated, in case that there is no slot. */
	return readq(word);
#else
	return READ_ONCE(*word);
#endif
}

static void guest_write(u64 id, int page, u64 val)
{
	u64 *word = &guest_words(page)->word[id];
	u64 before = READ_ONCE(shared.drop_end[page]);

	WRITE_ONCE(shared.intent[id][page], val);
	order_accesses();
	guest_set_access(id, KVM_MEMORY_EXIT_FLAG_WRITE, word);
#ifdef __aarch64__
	writeq(val, word);
#else
	WRITE_ONCE(*word, val);
#endif
	order_accesses();
	WRITE_ONCE(shared.done[id][page], val);
	WRITE_ONCE(shared.after[id][page], READ_ONCE(shared.drop_begin[page]));
	order_accesses();
	WRITE_ONCE(shared.expected[id][page], val);
	order_accesses();
	WRITE_ONCE(shared.before[id][page], before);
}

static void guest_read_own(u64 id, int page)
{
	u64 zapped = READ_ONCE(shared.zap_end[page]);
	u64 val = guest_read(id, &guest_words(page)->word[id]);
	u64 expected = shared.expected[id][page];

	if (val == expected) {
		__GUEST_ASSERT(!val || zapped <= shared.after[id][page],
			       "vCPU %lu read 0x%lx in page %d, zapped by drop %lu, written before %lu",
			       id, val, page, zapped, shared.after[id][page] + 1);
		return;
	}

	order_accesses();
	__GUEST_ASSERT(shared.lossy && !val &&
		       READ_ONCE(shared.drop_begin[page]) > shared.before[id][page],
		       "vCPU %lu read 0x%lx in page %d, expected 0x%lx, dropped %lu times, %lu before",
		       id, val, page, expected, READ_ONCE(shared.drop_begin[page]),
		       shared.before[id][page]);

	/* What is dropped must not come back. */
	shared.expected[id][page] = 0;
}

static void guest_read_other(u64 id, int page, int writer)
{
	u64 zapped = READ_ONCE(shared.zap_end[page]);
	u64 before, after, expected, min, max, val;

	order_accesses();
	/* This is about the write of expected, or a later one. */
	expected = READ_ONCE(shared.expected[writer][page]);
	order_accesses();
	after = READ_ONCE(shared.after[writer][page]);
	order_accesses();
	/* This is about the write of min, or an earlier one, but not a later one. */
	before = READ_ONCE(shared.before[writer][page]);
	order_accesses();
	min = READ_ONCE(shared.done[writer][page]);
	order_accesses();
	val = guest_read(id, &guest_words(page)->word[writer]);
	order_accesses();
	max = READ_ONCE(shared.intent[writer][page]);

	if (shared.lossy && !val && READ_ONCE(shared.drop_begin[page]) > before)
		return;

	__GUEST_ASSERT(val >= min && val <= max,
		       "vCPU %lu read 0x%lx in page %d, writer %d wrote 0x%lx to 0x%lx",
		       id, val, page, writer, min, max);
	__GUEST_ASSERT(!val || val != expected || zapped <= after,
		       "vCPU %lu read 0x%lx in page %d, zapped by drop %lu, writer %d wrote it before %lu",
		       id, val, page, zapped, writer, after + 1);
}

static void guest_exec(u64 id, int page)
{
	u64 *insn = &guest_words(page)->insn;

	guest_set_access(id, KVM_MEMORY_EXIT_FLAG_EXEC, insn);
	/* Since set_exec() looks at what was made known. */
	if (READ_ONCE(shared.exec))
		((void (*)(void))insn)();
}

static void guest_probe(u64 id)
{
	u64 *word = (u64 *)shared.probe_gva;
	u64 val = guest_read(id, word);

	__GUEST_ASSERT(!val, "vCPU %lu read 0x%lx in the page for probes", id, val);
	WRITE_ONCE(shared.vcpus[id].nr_probes, shared.vcpus[id].nr_probes + 1);
}

/* Each thread has random numbers of its own. */
enum {
	STREAM_GUEST,
	STREAM_VCPU = STREAM_GUEST + MAX_VCPUS,
	STREAM_UFFD = STREAM_VCPU + MAX_VCPUS,
	STREAM_ENV,
	STREAM_MODE = 50,
	STREAM_INJECTOR = 100,
};

/* Neighbouring seeds give similar numbers at first, hence scramble them. */
static struct kvm_random_state new_rng(u32 seed, u32 stream)
{
	u32 x = (seed + stream * 0x9e3779b9u) * 2654435761u;

	x ^= x >> 15;
	x *= 2246822519u;
	x ^= x >> 13;
	return new_kvm_random_state(x % 0x7ffffffe + 1);
}

static u32 random_below(struct kvm_random_state *rng, u32 limit)
{
	return (kvm_random_u32(rng) >> 4) % limit;
}

static void guest_code(u64 id)
{
	struct kvm_random_state rng = new_rng(shared.seed, STREAM_GUEST + id);
	u64 val = 0;
	int page;

	while (!READ_ONCE(shared.stop)) {
		if (READ_ONCE(shared.probe))
			guest_probe(id);

		page = random_below(&rng, NR_PAGES);
		switch (random_below(&rng, 8)) {
		case 0 ... 2:
			/* Make pages that KSM can merge. */
			val++;
			guest_write(id, page, val);
			guest_write(id, page ^ 1, val);
			break;
		case 3 ... 4:
			guest_read_own(id, page);
			break;
		case 5:
			guest_read_other(id, page, random_below(&rng, shared.nr_vcpus));
			break;
		case 6:
			if (shared.host_words)
				guest_read_other(id, page, HOST);
			break;
		case 7:
			if (READ_ONCE(shared.exec))
				guest_exec(id, page);
			break;
		}

		if (!random_below(&rng, 64))
			GUEST_SYNC(id);
	}

	for (page = 0; page < NR_PAGES; page++)
		guest_read_own(id, page);

	GUEST_DONE();
}

enum injector_id {
	FLAG,
	LOG,
	HOST_WORDS,
	UNMAP,
	MPROTECT,
	WP,
	COLLAPSE,
	SPLIT,
	KSM,
	MIGRATE,
	HINT,
	PAGEOUT,
	MREMAP,
	RECREATE,
	OTHER,
	SIGNAL,
	PREFAULT,
	NR_INJECTORS,
};

/* These make sense for all memory, and those for all shared memory. */
#define COMMON	(BIT(FLAG) | BIT(LOG) | BIT(UNMAP) | BIT(MPROTECT) | BIT(MIGRATE) |	\
		 BIT(HINT) | BIT(PAGEOUT) | BIT(OTHER) | BIT(SIGNAL) | BIT(PREFAULT))
#define SHARED	(COMMON | BIT(HOST_WORDS))

/* These may undo what a vCPU has populated. */
#define UNMAPS	(BIT(UNMAP) | BIT(MPROTECT) | BIT(WP) | BIT(COLLAPSE) | BIT(SPLIT) |	\
		 BIT(KSM) | BIT(MIGRATE) | BIT(HINT) | BIT(PAGEOUT) | BIT(MREMAP))

static const struct mode {
	const char *name;
	bool memfd;
	bool thp;
	/* MADV_DONTNEED loses what is in memory. */
	bool lossy;
	u64 uffd_mode;
	u64 uffd_features;
	u64 injectors;
} modes[] = {
	{
		.name = "shmem",
		.memfd = true,
		.injectors = SHARED | BIT(MREMAP) | BIT(RECREATE),
	}, {
		.name = "shmem-thp",
		.memfd = true,
		.thp = true,
		.injectors = SHARED | BIT(MREMAP) | BIT(RECREATE) | BIT(COLLAPSE) | BIT(SPLIT),
	}, {
		.name = "shmem-wp",
		.memfd = true,
		.uffd_mode = UFFDIO_REGISTER_MODE_WP,
		.uffd_features = UFFD_FEATURE_PAGEFAULT_FLAG_WP |
				 UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
		.injectors = SHARED | BIT(WP),
	}, {
		.name = "shmem-minor",
		.memfd = true,
		.uffd_mode = UFFDIO_REGISTER_MODE_MINOR,
		.uffd_features = UFFD_FEATURE_MINOR_SHMEM,
		.injectors = SHARED | BIT(RECREATE),
	}, {
		.name = "anon",
		.lossy = true,
		.injectors = COMMON | BIT(MREMAP) | BIT(KSM),
	}, {
		.name = "anon-thp",
		.thp = true,
		.lossy = true,
		.injectors = COMMON | BIT(MREMAP) | BIT(COLLAPSE) | BIT(SPLIT),
	}, {
		/* What is dropped isn't write-protected any more, thus don't. */
		.name = "anon-wp",
		.uffd_mode = UFFDIO_REGISTER_MODE_WP,
		.uffd_features = UFFD_FEATURE_PAGEFAULT_FLAG_WP,
		.injectors = (COMMON & ~BIT(UNMAP)) | BIT(WP),
	}, {
		.name = "anon-missing",
		.lossy = true,
		.uffd_mode = UFFDIO_REGISTER_MODE_MISSING,
		.injectors = COMMON,
	},
};

struct env {
	const struct mode *mode;
	u64 injectors;
	u64 nr_accesses;
	u64 nr_actions;
	int nr_vcpus;
	int max_seconds;
	/* What the user has given, and what it makes for the mode. */
	u32 user_seed;
	u32 seed;

	struct kvm_vm *vm;
	struct shared *shared;
	struct vcpu_thread {
		struct env *env;
		struct kvm_vcpu *vcpu;
		pthread_t thread;
		struct kvm_random_state rng;
		pid_t tid;
		/* By the kind of access, i.e. the bit in memory_fault.flags. */
		u64 nr_exits[NR_KINDS];
		u64 nr_bare;
		u64 nr_mmio;
		u64 nr_signals;
		/* The exits for the current access. */
		u64 access;
		u64 nr_access_exits;
		u64 nr_unexplained;
		u64 inject_seq;
		bool populated;
		int populate_errno;
	} vcpus[MAX_VCPUS];

	void *hva;
	/* A second mapping of shared memory, and its file. */
	void *alias;
	int memfd;
	/* The size of the slot, and of it without the page for probes. */
	size_t size;
	size_t main_size;
	size_t page_size;
	u64 stride;

	/* KVM_CAP_MEMORY_FAULT_EXIT and KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2. */
	bool cap;
	u64 manual_caps;

	/*
	 * Whoever changes the slot has slot_mutex, and then makes slot_seq odd
	 * for as long as it takes, and del_seq as long as there is no slot.
	 */
	pthread_mutex_t slot_mutex;
	u32 slot_flags;
	atomic_ulong slot_seq;
	atomic_ulong del_seq;

	/* Serialize changes of the VMAs, during which the memory isn't usable. */
	pthread_mutex_t layout_mutex;
	atomic_ulong map_seq;

	/* Writes to memory on behalf of the guest, see handle_mmio(). */
	pthread_mutex_t mmio_mutex;
	atomic_ulong mmio_seq;
	u64 mmio_dirty;

	/* Protects the following, pages that must not be populated, or be written. */
	pthread_mutex_t hold_mutex;
	bool probe_closed;
	u64 wp_frozen;
	atomic_ulong nr_probe_exits;

	/* Injectors at work that may undo what a vCPU has populated. */
	atomic_ulong active;
	atomic_ulong inject_seq;
	atomic_bool stop;

	atomic_bool pause;
	atomic_int nr_paused;

	int uffd;
	int uffd_pipe[2];
	pthread_t uffd_reader;
	u64 nr_closed_msgs;
	int pagemap_fd;
	/* Other memory is accessed by /proc/self/mem, whatever its protection. */
	int mem_fd;
	int split_fd;

	/* The memory of the other slot, and whether it is being invalidated, i.e. odd. */
	void *other;
	atomic_ulong other_seq;
	void *zeroes;
};

struct injector_thread {
	struct env *env;
	const struct injector *injector;
	struct kvm_random_state rng;
	pthread_t thread;
	/* Why the machine can't do this, if so. */
	const char *skip;
	u64 nr_acted;
	u64 nr_succeeded;
	/* A count of the kernel's, as it was after the last action. */
	u64 count;
	/* What a migration of the VM would have copied, and of which pages. */
	u64 copy[NR_PAGES][MAX_VCPUS];
	u64 copied;
};

/* What a failure is about. */
static struct env *failed_env;

static void nap(void)
{
	usleep(NAP_US);
}

static u64 random_pages(struct injector_thread *t)
{
	u32 first, last;

	if (!random_below(&t->rng, 4))
		return GENMASK_ULL(NR_PAGES - 1, 0);

	first = random_below(&t->rng, NR_PAGES);
	last = first + random_below(&t->rng, min(NR_PAGES - first, 16u));
	return GENMASK_ULL(last, first);
}

static size_t range_start(struct env *env, u64 pages)
{
	return __builtin_ctzll(pages) * env->stride * env->page_size;
}

static size_t range_size(struct env *env, u64 pages)
{
	return __builtin_popcountll(pages) * env->stride * env->page_size;
}

static size_t word_offset(struct env *env, int page, int writer)
{
	return (page * env->stride + 1) * env->page_size - sizeof(struct words) +
	       offsetof(struct words, word) + writer * sizeof(u64);
}

/* Access memory like the guest does, but by other means. */
static bool host_access(struct env *env, size_t offset, u64 *val, bool write)
{
	TEST_ASSERT(!(offset % sizeof(*val)), "Unaligned access to 0x%lx", offset);

	if (!env->alias) {
		TEST_ASSERT(!write, "Can't write by the host");

		/* CONFIG_DEBUG_VM warns of such an access to a missing page. */
		if (env->mode->uffd_mode == UFFDIO_REGISTER_MODE_MISSING)
			return false;

		return pread(env->mem_fd, val, sizeof(*val), (off_t)env->hva + offset) ==
		       sizeof(*val);
	}

	if (write)
		WRITE_ONCE(*(u64 *)(env->alias + offset), *val);
	else
		*val = READ_ONCE(*(u64 *)(env->alias + offset));
	return true;
}

static bool host_read_word(struct env *env, int page, int writer, u64 *val)
{
	return host_access(env, word_offset(env, page, writer), val, false);
}

static u64 total_accesses(struct env *env)
{
	u64 nr = 0;
	int i;

	for (i = 0; i < env->nr_vcpus; i++)
		nr += READ_ONCE(env->shared->vcpus[i].nr_accesses);
	return nr;
}

static u64 total_exits(struct env *env, int kind)
{
	u64 nr = 0;
	int i;

	for (i = 0; i < env->nr_vcpus; i++)
		nr += READ_ONCE(env->vcpus[i].nr_exits[kind]);
	return nr;
}

static u64 total_mmio(struct env *env)
{
	u64 nr = 0;
	int i;

	for (i = 0; i < env->nr_vcpus; i++)
		nr += READ_ONCE(env->vcpus[i].nr_mmio);
	return nr;
}

static u64 total_probes(struct env *env)
{
	u64 nr = 0;
	int i;

	for (i = 0; i < env->nr_vcpus; i++)
		nr += READ_ONCE(env->shared->vcpus[i].nr_probes);
	return nr;
}

static u64 read_number(const char *path, const char *key)
{
	char line[256];
	u64 val = 0;
	FILE *f;

	f = fopen(path, "re");
	if (!f)
		return 0;

	while (fgets(line, sizeof(line), f)) {
		if (strncmp(line, key, strlen(key)))
			continue;
		val = strtoull(line + strlen(key) + strspn(line + strlen(key), " :"), NULL, 0);
		break;
	}
	fclose(f);
	return val;
}

/* Add up a figure of all mappings of the memory, wherever it's moved to. */
static u64 read_smaps(const char *key)
{
	u64 start, end, val, sum = 0;
	bool ours = false;
	char line[256];
	FILE *f;

	f = fopen("/proc/self/smaps", "re");
	TEST_ASSERT(f, "Can't open /proc/self/smaps, errno = %d", errno);

	while (fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			ours = start >= (u64)TEST_HVA && end <= (u64)TEST_HVA_END;
		else if (ours && !strncmp(line, key, strlen(key)) &&
			 sscanf(line + strlen(key), "%lu kB", &val) == 1)
			sum += val;
	}
	fclose(f);
	return sum;
}

static bool write_text(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	bool ok;

	if (fd < 0)
		return false;

	ok = write(fd, text, strlen(text)) == (ssize_t)strlen(text);
	close(fd);
	return ok;
}

/* Settings of the machine, in the order in which they were changed. */
static struct setting {
	const char *path;
	char text[32];
} settings[16];

static int nr_settings;

/* Change a setting of the machine until the test exits. */
static bool change_setting(const char *path, const char *text)
{
	struct setting *old = &settings[nr_settings];
	int fd, i, r;

	for (i = 0; i < nr_settings && strcmp(settings[i].path, path); i++)
		;
	if (i < nr_settings)
		return true;

	TEST_ASSERT(i < ARRAY_SIZE(settings), "Too many settings");
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	r = read(fd, old->text, sizeof(old->text) - 1);
	close(fd);
	if (r <= 0 || !write_text(path, text))
		return false;

	old->path = path;
	nr_settings++;
	return true;
}

static void restore_settings(void)
{
	while (nr_settings--)
		write_text(settings[nr_settings].path, settings[nr_settings].text);
}

static int uffd_ioctl(struct env *env, unsigned long cmd, void *arg)
{
	return ioctl(env->uffd, cmd, arg) ? errno : 0;
}

static int uffd_writeprotect(struct env *env, size_t offset, size_t len, bool protect)
{
	struct uffdio_writeprotect wp = {
		.range = { .start = (u64)env->hva + offset, .len = len },
		.mode = protect ? UFFDIO_WRITEPROTECT_MODE_WP : 0,
	};

	return uffd_ioctl(env, UFFDIO_WRITEPROTECT, &wp);
}

static int uffd_zeropage(struct env *env, size_t offset, size_t len)
{
	struct uffdio_zeropage zeropage = {
		.range = { .start = (u64)env->hva + offset, .len = len },
	};

	return uffd_ioctl(env, UFFDIO_ZEROPAGE, &zeropage);
}

static int uffd_copy(struct env *env, size_t offset, size_t len)
{
	struct uffdio_copy copy = {
		.dst = (u64)env->hva + offset,
		.src = (u64)env->zeroes,
		.len = len,
	};

	return uffd_ioctl(env, UFFDIO_COPY, &copy);
}

static int uffd_continue(struct env *env, size_t offset, size_t len)
{
	struct uffdio_continue cont = {
		.range = { .start = (u64)env->hva + offset, .len = len },
	};

	return uffd_ioctl(env, UFFDIO_CONTINUE, &cont);
}

static void uffd_wake(struct env *env, size_t offset, size_t len)
{
	struct uffdio_range range = {
		.start = (u64)env->hva + offset,
		.len = len,
	};

	uffd_ioctl(env, UFFDIO_WAKE, &range);
}

/* Remove uffd's write protection, unless it's to stay.  Return false if so. */
static bool uffd_unprotect(struct env *env, size_t offset)
{
	int page = offset / env->page_size / env->stride;
	bool frozen;

	pthread_mutex_lock(&env->hold_mutex);
	frozen = page < NR_PAGES && env->wp_frozen & BIT_ULL(page);
	if (!frozen)
		uffd_writeprotect(env, offset, env->page_size, false);
	pthread_mutex_unlock(&env->hold_mutex);
	return !frozen;
}

/* Provide a page by userfaultfd, return false if something else has to do it. */
static bool uffd_provide(struct env *env, size_t offset, bool zeropage)
{
	switch (env->mode->uffd_mode) {
	case UFFDIO_REGISTER_MODE_MISSING:
		return !(zeropage ? uffd_zeropage(env, offset, env->page_size) :
				    uffd_copy(env, offset, env->page_size));
	case UFFDIO_REGISTER_MODE_MINOR:
		return !uffd_continue(env, offset, env->page_size);
	default:
		return false;
	}
}

/*
 * The page for probes must not be populated while an injector looks at whether
 * KVM does so.  Don't sleep on userfaultfd while holding the mutex.
 */
static bool populate_probe(struct env *env)
{
	bool closed;

	pthread_mutex_lock(&env->hold_mutex);
	closed = env->probe_closed;
	if (!closed && !uffd_provide(env, env->main_size, true)) {
		if (env->mode->uffd_mode == UFFDIO_REGISTER_MODE_MINOR)
			/* Have a page in the file, for the next try. */
			(void)READ_ONCE(*(u64 *)(env->alias + env->main_size));
		else if (env->mode->uffd_mode != UFFDIO_REGISTER_MODE_MISSING)
			madvise(env->hva + env->main_size, env->page_size, MADV_POPULATE_READ);
	}
	pthread_mutex_unlock(&env->hold_mutex);
	return !closed;
}

/*
 * Serve those that don't exit but sleep.  This may be so much as KVM without the
 * flag, and the host itself.
 */
static void uffd_serve(struct env *env, struct uffd_msg *msg, struct kvm_random_state *rng)
{
	size_t offset = (msg->arg.pagefault.address & ~(env->page_size - 1)) - (u64)env->hva;

	TEST_ASSERT(msg->event == UFFD_EVENT_PAGEFAULT,
		    "Unexpected userfaultfd event 0x%x", msg->event);

	if (offset == env->main_size) {
		if (!populate_probe(env)) {
			/*
			 * An access may have been interrupted since it sent the
			 * message.  If it has not, the message repeats.
			 */
			TEST_ASSERT(++env->nr_closed_msgs <= MAX_UNEXPLAINED,
				    "Messages for a page that can't be faulted in");
			nap();
		} else {
			env->nr_closed_msgs = 0;
		}
	} else if (msg->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP) {
		if (!uffd_unprotect(env, offset))
			nap();
	} else {
		uffd_provide(env, offset, kvm_random_bool(rng));
	}
	uffd_wake(env, offset, env->page_size);
}

static void *uffd_reader_fn(void *arg)
{
	struct env *env = arg;
	struct kvm_random_state rng = new_rng(env->seed, STREAM_UFFD);
	struct pollfd fds[] = {
		{ .fd = env->uffd, .events = POLLIN },
		{ .fd = env->uffd_pipe[0], .events = POLLIN },
	};
	struct uffd_msg msg;
	int r;

	for (;;) {
		r = poll(fds, ARRAY_SIZE(fds), -1);
		TEST_ASSERT(r > 0 || errno == EINTR, __KVM_SYSCALL_ERROR("poll()", r));
		if (fds[1].revents)
			return NULL;

		/* Let signals interrupt those who wait. */
		if (kvm_random_bool(&rng))
			nap();

		r = read(env->uffd, &msg, sizeof(msg));
		if (r < 0 && (errno == EAGAIN || errno == EINTR))
			continue;
		TEST_ASSERT(r == sizeof(msg), "Read %d bytes of userfaultfd, errno = %d", r, errno);
		uffd_serve(env, &msg, &rng);
	}
}

/* Return whether the page should be usable now. */
static bool populate(struct vcpu_thread *v, size_t offset, bool write)
{
	struct env *env = v->env;

	if (env->mode->uffd_mode == UFFDIO_REGISTER_MODE_WP && write &&
	    !uffd_unprotect(env, offset)) {
		nap();
		return false;
	}

	if (uffd_provide(env, offset, kvm_random_bool(&v->rng)) && !write)
		return true;

	v->populate_errno = 0;
	if (!madvise(env->hva + offset, env->page_size,
		     write ? MADV_POPULATE_WRITE : MADV_POPULATE_READ))
		return true;

	v->populate_errno = errno;
	return false;
}

/* The state of affairs at the time that KVM_RUN begins. */
struct snapshot {
	u64 slot_seq;
	u64 del_seq;
	u64 map_seq;
	u32 slot_flags;
};

static void take_snapshot(struct env *env, struct snapshot *s)
{
	s->slot_seq = atomic_load(&env->slot_seq);
	s->slot_flags = READ_ONCE(env->slot_flags);
	s->del_seq = atomic_load(&env->del_seq);
	s->map_seq = atomic_load(&env->map_seq);
	atomic_thread_fence(memory_order_seq_cst);
}

static bool has_changed(atomic_ulong *seq, u64 old)
{
	return old & 1 || atomic_load(seq) != old;
}

/*
 * An exit that repeats is fine as long as somebody might have undone what the
 * vCPU did about it.
 */
static void assert_progress(struct vcpu_thread *v)
{
	struct env *env = v->env;
	struct shared_vcpu *sv = &env->shared->vcpus[v->vcpu->id];
	bool same = v->access == sv->nr_accesses;

	if (!same)
		v->nr_access_exits = 0;
	v->access = sv->nr_accesses;
	TEST_ASSERT(++v->nr_access_exits <= MAX_EXITS,
		    "vCPU %u: no progress at 0x%lx, flags 0x%lx, populated %d, errno = %d, active injectors 0x%lx",
		    v->vcpu->id, sv->gva, sv->flags, v->populated, v->populate_errno,
		    atomic_load(&env->active));

	if (same && v->populated && !atomic_load(&env->active) &&
	    atomic_load(&env->inject_seq) == v->inject_seq)
		v->nr_unexplained++;
	else
		v->nr_unexplained = 0;
	TEST_ASSERT(v->nr_unexplained <= MAX_UNEXPLAINED,
		    "vCPU %u: exits for 0x%lx, flags 0x%lx, though it's populated",
		    v->vcpu->id, sv->gva, sv->flags);
}

static void handle_fault(struct vcpu_thread *v, int err, const struct snapshot *s)
{
	struct env *env = v->env;
	struct kvm_run *run = v->vcpu->run;
	struct shared_vcpu *sv = &env->shared->vcpus[v->vcpu->id];
	bool stable = !has_changed(&env->slot_seq, s->slot_seq);
	bool flag = s->slot_flags & KVM_MEM_EXIT_ON_MISSING;
	bool map_changed = has_changed(&env->map_seq, s->map_seq);
	size_t offset;

	if (run->exit_reason != KVM_EXIT_MEMORY_FAULT) {
		TEST_ASSERT(err == EFAULT && run->exit_reason == KVM_EXIT_UNKNOWN,
			    "errno = %d, exit %u (%s)", err, run->exit_reason,
			    exit_reason_str(run->exit_reason));
		TEST_ASSERT(!env->cap && map_changed && !(stable && flag),
			    "No information about 0x%lx, capability %d, flag %d, stable %d, map changed %d",
			    sv->gva, env->cap, flag, stable, map_changed);
		v->nr_bare++;
		nap();
		return;
	}

	TEST_ASSERT(run->memory_fault.gpa == (sv->gva & ~(env->page_size - 1)) &&
		    run->memory_fault.size == env->page_size &&
		    run->memory_fault.flags == sv->flags,
		    "Exit for gpa 0x%llx, size 0x%llx, flags 0x%llx, expected 0x%lx, 0x%lx, 0x%lx",
		    run->memory_fault.gpa, run->memory_fault.size, run->memory_fault.flags,
		    sv->gva & ~(env->page_size - 1), env->page_size, sv->flags);
	v->nr_exits[__builtin_ctzll(sv->flags)]++;
	TEST_ASSERT(!stable || flag || (env->cap && map_changed),
		    "vCPU %u: exit for 0x%lx in a slot without the flag", v->vcpu->id, sv->gva);

	offset = run->memory_fault.gpa - TEST_GPA;
	if (offset == env->main_size) {
		atomic_fetch_add(&env->nr_probe_exits, 1);
		if (!populate_probe(env))
			nap();
		return;
	}

	/* An exit that is ignored repeats. */
	if (!random_below(&v->rng, 8))
		return;

	assert_progress(v);
	v->inject_seq = atomic_load(&env->inject_seq);
	v->populated = populate(v, offset, sv->flags & KVM_MEMORY_EXIT_FLAG_WRITE);
	if (!v->populated)
		nap();
}

/* Without a slot, userspace owns the memory, and can access it for the guest. */
static void handle_mmio(struct vcpu_thread *v, const struct snapshot *s)
{
	struct env *env = v->env;
	struct kvm_run *run = v->vcpu->run;
	struct shared_vcpu *sv = &env->shared->vcpus[v->vcpu->id];
	u64 offset = run->mmio.phys_addr - TEST_GPA;
	bool write = run->mmio.is_write;

	TEST_ASSERT(run->mmio.phys_addr == sv->gva && run->mmio.len == sizeof(u64) &&
		    write == !!(sv->flags & KVM_MEMORY_EXIT_FLAG_WRITE),
		    "MMIO at 0x%llx, %u bytes, write %d, expected 0x%lx, flags 0x%lx",
		    run->mmio.phys_addr, run->mmio.len, write, sv->gva, sv->flags);
	TEST_ASSERT(has_changed(&env->del_seq, s->del_seq) ||
		    has_changed(&env->map_seq, s->map_seq),
		    "vCPU %u: MMIO at 0x%lx though there is a slot", v->vcpu->id, sv->gva);
	v->nr_mmio++;

	if (offset >= env->main_size) {
		memset(run->mmio.data, 0, sizeof(u64));
		return;
	}

	pthread_mutex_lock(&env->mmio_mutex);
	atomic_fetch_add(&env->mmio_seq, 1);
	host_access(env, offset, (u64 *)run->mmio.data, write);
	if (write)
		env->mmio_dirty |= BIT_ULL(offset / env->page_size / env->stride);
	atomic_fetch_add(&env->mmio_seq, 1);
	pthread_mutex_unlock(&env->mmio_mutex);
}

static __thread struct kvm_run *this_run;

static void signal_handler(int sig)
{
	/* The signal may be early, don't let KVM_RUN miss it. */
	if (this_run)
		WRITE_ONCE(this_run->immediate_exit, 1);
}

static void wait_while_paused(struct env *env)
{
	/* An unpaused vCPU might have been counted for the next pause. */
	while (atomic_load(&env->pause)) {
		atomic_fetch_add(&env->nr_paused, 1);
		while (atomic_load(&env->pause))
			nap();
		atomic_fetch_sub(&env->nr_paused, 1);
	}
}

static void kick_vcpus(struct env *env)
{
	int i;

	for (i = 0; i < env->nr_vcpus; i++)
		pthread_kill(env->vcpus[i].thread, SIGUSR1);
}

/* Don't wait for a mutex after this. */
static void pause_vcpus(struct env *env)
{
	atomic_store(&env->pause, true);
	while (atomic_load(&env->nr_paused) != env->nr_vcpus) {
		kick_vcpus(env);
		nap();
	}
}

static void resume_vcpus(struct env *env)
{
	atomic_store(&env->pause, false);
}

static void *vcpu_fn(void *arg)
{
	struct vcpu_thread *v = arg;
	struct env *env = v->env;
	struct kvm_vcpu *vcpu = v->vcpu;
	struct kvm_run *run = vcpu->run;
	struct snapshot s;
	struct ucall uc;
	int r;

	this_run = run;
	WRITE_ONCE(v->tid, syscall(__NR_gettid));
	v->rng = new_rng(env->seed, STREAM_VCPU + vcpu->id);

	for (;;) {
		WRITE_ONCE(run->immediate_exit, 0);
		wait_while_paused(env);

		/*
		 * Let KVM_RUN begin with what looks like an exit, but for MMIO,
		 * which it has yet to complete.
		 */
		if (run->exit_reason != KVM_EXIT_MMIO) {
			run->exit_reason = KVM_EXIT_MEMORY_FAULT;
			run->memory_fault.gpa = TEST_GPA + env->size;
			run->memory_fault.size = env->page_size;
			run->memory_fault.flags = KVM_MEMORY_EXIT_FLAG_READ;
		}

		take_snapshot(env, &s);
		r = __vcpu_run(vcpu);
		if (r) {
			r = errno;
			if (r == EINTR) {
				v->nr_signals++;
				continue;
			}
			TEST_ASSERT(r == EFAULT, "KVM_RUN failed, errno = %d (%s)",
				    r, strerror(r));
			handle_fault(v, r, &s);
			continue;
		}

		if (run->exit_reason == KVM_EXIT_MMIO && run->mmio.phys_addr >= TEST_GPA &&
		    run->mmio.phys_addr < TEST_GPA + env->size) {
			handle_mmio(v, &s);
			continue;
		}

		switch (get_ucall(vcpu, &uc)) {
		case UCALL_SYNC:
			break;
		case UCALL_DONE:
			return NULL;
		case UCALL_ABORT:
			REPORT_GUEST_ASSERT(uc);
		default:
			TEST_FAIL("vCPU %u: unexpected exit %u (%s)", vcpu->id,
				  run->exit_reason, exit_reason_str(run->exit_reason));
		}
	}
}

static void unmappable_begin(struct env *env)
{
	pthread_mutex_lock(&env->layout_mutex);
	atomic_fetch_add(&env->map_seq, 1);
}

static void unmappable_end(struct env *env)
{
	atomic_fetch_add(&env->map_seq, 1);
	pthread_mutex_unlock(&env->layout_mutex);
}

/* Watch words of the guest that must not change. */
struct frozen {
	u64 pages;
	u64 mmio_seq;
	u64 val[NR_PAGES][MAX_VCPUS];
	u64 drops[NR_PAGES];
};

/* To be called before the memory becomes unwritable. */
static void freeze_prepare(struct env *env, struct frozen *f, u64 pages)
{
	int i;

	f->pages = pages;
	for (i = 0; i < NR_PAGES; i++) {
		f->drops[i] = READ_ONCE(env->shared->drop_end[i]);
		order_accesses();
		if (READ_ONCE(env->shared->drop_begin[i]) != f->drops[i])
			f->pages &= ~BIT_ULL(i);
	}
}

static void freeze_begin(struct env *env, struct frozen *f)
{
	int i, j;

	f->mmio_seq = atomic_load(&env->mmio_seq);
	for (i = 0; i < NR_PAGES; i++) {
		for (j = 0; j < env->nr_vcpus && f->pages & BIT_ULL(i); j++) {
			if (!host_read_word(env, i, j, &f->val[i][j]))
				f->pages &= ~BIT_ULL(i);
		}
	}
}

static void freeze_end(struct env *env, struct frozen *f, const char *why, bool present)
{
	u64 val;
	int i, j;

	for (i = 0; i < NR_PAGES; i++) {
		for (j = 0; j < env->nr_vcpus && f->pages & BIT_ULL(i); j++) {
			if (!host_read_word(env, i, j, &val) || val == f->val[i][j])
				continue;

			/* MADV_FREE may take effect at any time. */
			if (env->mode->lossy && !val)
				continue;

			/* Without a page, there is nothing to write-protect. */
			if (present && !f->val[i][j])
				continue;

			order_accesses();
			if (READ_ONCE(env->shared->drop_begin[i]) != f->drops[i])
				break;
			if (has_changed(&env->mmio_seq, f->mmio_seq))
				return;
			TEST_FAIL("vCPU %d wrote 0x%lx to page %d, 0x%lx before, in spite of %s",
				  j, val, i, f->val[i][j], why);
		}
	}
}

static void freeze_wait(struct injector_thread *t)
{
	int i;

	for (i = random_below(&t->rng, 8); i >= 0; i--)
		nap();
}

static void set_slot_flags(struct env *env, u32 flags)
{
	atomic_fetch_add(&env->slot_seq, 1);
	vm_set_user_memory_region(env->vm, TEST_SLOT, flags, TEST_GPA, env->size, env->hva);
	WRITE_ONCE(env->slot_flags, flags);
	atomic_fetch_add(&env->slot_seq, 1);
}

static void drop_probe(struct env *env)
{
	int r = madvise(env->hva + env->main_size, env->page_size,
			env->alias ? MADV_REMOVE : MADV_DONTNEED);

	TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("madvise()", r));
}

static void assert_probe_missing(struct env *env)
{
	u8 vec;
	int r;

	r = mincore(env->hva + env->main_size, env->page_size, &vec);
	TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("mincore()", r));
	TEST_ASSERT(!(vec & 1), "KVM has faulted in a page of a slot with the flag");
}

static void close_probe(struct env *env, bool closed)
{
	pthread_mutex_lock(&env->hold_mutex);
	env->probe_closed = closed;
	pthread_mutex_unlock(&env->hold_mutex);
}

/*
 * Drop a page while the vCPUs are at it.  Once the flag is set, KVM must not fault
 * it in.  Once it's cleared, it has to, and must not exit.  Return whether there
 * was the time to see that.
 */
static bool probe(struct injector_thread *t)
{
	struct env *env = t->env;
	u32 flags = env->slot_flags & ~KVM_MEM_EXIT_ON_MISSING;
	u64 nr;
	int i;

	set_slot_flags(env, flags);
	WRITE_ONCE(env->shared->probe, true);
	nr = total_probes(env);
	for (i = 0; i < 20 && total_probes(env) == nr; i++)
		nap();
	for (i = random_below(&t->rng, 16); i >= 0; i--)
		drop_probe(env);

	/* Nobody populates the page from now on, and KVM doesn't know that. */
	set_slot_flags(env, flags | KVM_MEM_EXIT_ON_MISSING);
	close_probe(env, true);
	drop_probe(env);

	nr = atomic_load(&env->nr_probe_exits);
	do {
		nap();
		assert_probe_missing(env);
	} while (atomic_load(&env->nr_probe_exits) < nr + 2 && !atomic_load(&env->stop));
	close_probe(env, false);

	nr = total_probes(env);
	set_slot_flags(env, flags);
	while (total_probes(env) == nr && !atomic_load(&env->stop))
		nap();
	WRITE_ONCE(env->shared->probe, false);
	return !atomic_load(&env->stop);
}

static bool inject_flag(struct injector_thread *t)
{
	struct env *env = t->env;
	bool probed = false;

	pthread_mutex_lock(&env->slot_mutex);
	if (!(t->nr_acted & 1)) {
		probed = probe(t);
	} else {
		set_slot_flags(env, env->slot_flags & ~KVM_MEM_EXIT_ON_MISSING);
		nap();
	}
	set_slot_flags(env, env->slot_flags | KVM_MEM_EXIT_ON_MISSING);
	pthread_mutex_unlock(&env->slot_mutex);
	return probed;
}

static void set_log_flag(struct injector_thread *t, bool log)
{
	u32 flags = t->env->slot_flags & ~KVM_MEM_LOG_DIRTY_PAGES;

	if (log)
		flags |= KVM_MEM_LOG_DIRTY_PAGES;

	/* Both flags at once are a change of each of them. */
	if (kvm_random_bool(&t->rng))
		flags ^= KVM_MEM_EXIT_ON_MISSING;
	set_slot_flags(t->env, flags);
}

static void copy_pages(struct injector_thread *t, u64 pages)
{
	struct env *env = t->env;
	int i, j;

	for (i = 0; i < NR_PAGES; i++) {
		if (!(pages & BIT_ULL(i)))
			continue;

		t->copied |= BIT_ULL(i);
		for (j = 0; j < env->nr_vcpus; j++) {
			if (!host_read_word(env, i, j, &t->copy[i][j]))
				t->copied &= ~BIT_ULL(i);
		}
	}
}

/* Return the dirty pages, and make them clean. */
static u64 collect_dirty(struct env *env)
{
	int nr_pages = env->size / env->page_size, i;
	unsigned long *bitmap = bitmap_zalloc(nr_pages);
	u64 dirty;

	pthread_mutex_lock(&env->mmio_mutex);
	dirty = env->mmio_dirty;
	env->mmio_dirty = 0;
	pthread_mutex_unlock(&env->mmio_mutex);

	kvm_vm_get_dirty_log(env->vm, TEST_SLOT, bitmap);
	if (env->manual_caps)
		kvm_vm_clear_dirty_log(env->vm, TEST_SLOT, bitmap, 0, nr_pages);

	for (i = 0; i < NR_PAGES; i++) {
		if (test_bit(i * env->stride, bitmap))
			dirty |= BIT_ULL(i);
	}
	free(bitmap);
	return dirty;
}

/* See that nothing has changed since it was copied, except for dirty pages. */
static void assert_dirty(struct injector_thread *t, u64 dirty)
{
	struct env *env = t->env;
	u64 val;
	int i, j;

	for (i = 0; i < NR_PAGES; i++) {
		if (dirty & BIT_ULL(i) || !(t->copied & BIT_ULL(i)))
			continue;

		for (j = 0; j < env->nr_vcpus; j++) {
			if (!host_read_word(env, i, j, &val) || val == t->copy[i][j] ||
			    (env->mode->lossy && !val))
				continue;
			TEST_FAIL("Page %d isn't dirty, vCPU %d wrote 0x%lx, copied 0x%lx",
				  i, j, val, t->copy[i][j]);
		}
	}
}

static void pace(struct injector_thread *t)
{
	u64 target = total_accesses(t->env) + random_below(&t->rng, PACE_ACCESSES);

	do {
		usleep(PACE_US);
	} while (!atomic_load(&t->env->stop) && total_accesses(t->env) < target);
}

/* Log dirty pages for some time, like the migration of a VM does. */
static bool inject_log(struct injector_thread *t)
{
	struct env *env = t->env;
	u64 dirty, all_dirty = 0, del_seq;
	bool last = false, first = true;
	int i;

	pthread_mutex_lock(&env->slot_mutex);
	set_log_flag(t, true);
	del_seq = atomic_load(&env->del_seq);
	t->copied = 0;
	copy_pages(t, -1ull);
	pthread_mutex_unlock(&env->slot_mutex);

	for (i = random_below(&t->rng, 4); !last; i--) {
		pace(t);

		pthread_mutex_lock(&env->slot_mutex);
		last = atomic_load(&env->stop) || i <= 0;

		/* A new slot has a new log. */
		if (atomic_load(&env->del_seq) != del_seq) {
			del_seq = atomic_load(&env->del_seq);
			dirty = -1ull;
			first = true;
		} else {
			bool pause = last || kvm_random_bool(&t->rng);

			if (pause)
				pause_vcpus(env);
			dirty = collect_dirty(env);
			if (pause) {
				assert_dirty(t, dirty);
				resume_vcpus(env);
			}

			/* KVM_DIRTY_LOG_INITIALLY_SET says nothing of writes. */
			if (!first)
				all_dirty |= dirty;
			first = false;
		}
		copy_pages(t, dirty);

		if (last)
			set_log_flag(t, false);
		pthread_mutex_unlock(&env->slot_mutex);
	}

	return all_dirty;
}

/* Check what the guest has written, and write something for the guest. */
static bool inject_host_words(struct injector_thread *t)
{
	struct env *env = t->env;
	struct shared *s = env->shared;
	u64 min, max, val;
	int i, page, id;

	for (i = 0; i < NR_PAGES; i++) {
		page = random_below(&t->rng, NR_PAGES);
		id = random_below(&t->rng, env->nr_vcpus);

		min = READ_ONCE(s->done[id][page]);
		order_accesses();
		TEST_ASSERT(host_read_word(env, page, id, &val), "Can't read by the host");
		order_accesses();
		max = READ_ONCE(s->intent[id][page]);
		TEST_ASSERT(val >= min && val <= max,
			    "Host read 0x%lx in page %d, vCPU %d wrote 0x%lx to 0x%lx",
			    val, page, id, min, max);

		val = s->done[HOST][page] + 1;
		WRITE_ONCE(s->intent[HOST][page], val);
		order_accesses();
		host_access(env, word_offset(env, page, HOST), &val, true);
		order_accesses();
		WRITE_ONCE(s->done[HOST][page], val);
	}
	return true;
}

/* Bits of /proc/self/pagemap. */
#define PAGEMAP_PRESENT	BIT_ULL(63)
#define PAGEMAP_UFFD_WP	BIT_ULL(57)

/* Is one of the pages like that, i.e. is there something to undo? */
static bool any_page_is(struct env *env, u64 pages, u64 bit)
{
	u64 entry, pfn;
	int i;

	for (i = 0; i < NR_PAGES; i++) {
		if (!(pages & BIT_ULL(i)))
			continue;
		pfn = ((u64)env->hva + word_offset(env, i, 0)) / env->page_size;
		TEST_ASSERT(pread(env->pagemap_fd, &entry, sizeof(entry), pfn * sizeof(entry)) ==
			    sizeof(entry), "Can't read pagemap, errno = %d", errno);
		if (entry & bit)
			return true;
	}
	return false;
}

/* Has a count of the kernel's increased since the last action? */
static bool increased(struct injector_thread *t, u64 count)
{
	bool more = count > t->count;

	t->count = count;
	return more;
}

static bool inject_unmap(struct injector_thread *t)
{
	struct env *env = t->env;
	struct shared *s = env->shared;
	u64 pages = random_pages(t);
	int advice = MADV_DONTNEED;
	bool mapped;
	int i, r;

	if (env->mode->lossy && !random_below(&t->rng, 4))
		advice = MADV_FREE;

	for (i = 0; i < NR_PAGES && env->mode->lossy; i++) {
		if (pages & BIT_ULL(i))
			WRITE_ONCE(s->drop_begin[i], s->drop_begin[i] + 1);
	}
	order_accesses();
	mapped = any_page_is(env, pages, PAGEMAP_PRESENT);
	r = madvise(env->hva + range_start(env, pages), range_size(env, pages), advice);
	order_accesses();
	for (i = 0; i < NR_PAGES && env->mode->lossy; i++) {
		if (!(pages & BIT_ULL(i)))
			continue;
		WRITE_ONCE(s->drop_end[i], s->drop_begin[i]);
		if (!r && advice == MADV_DONTNEED)
			WRITE_ONCE(s->zap_end[i], s->drop_begin[i]);
	}
	return !r && mapped;
}

static bool inject_mprotect(struct injector_thread *t)
{
	struct env *env = t->env;
	u64 pages = random_pages(t);
	void *start = env->hva + range_start(env, pages);
	size_t size = range_size(env, pages);
	struct frozen frozen;
	bool mapped;
	int r;

	unmappable_begin(env);
	freeze_prepare(env, &frozen, pages);
	mapped = any_page_is(env, pages, PAGEMAP_PRESENT);
	r = mprotect(start, size, kvm_random_bool(&t->rng) ? PROT_READ : PROT_NONE);
	TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("mprotect()", r));

	freeze_begin(env, &frozen);
	freeze_wait(t);
	freeze_end(env, &frozen, "mprotect()", false);

	r = mprotect(start, size, PROT_READ | PROT_WRITE);
	TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("mprotect()", r));
	unmappable_end(env);
	return mapped;
}

static void set_wp_frozen(struct env *env, u64 pages)
{
	pthread_mutex_lock(&env->hold_mutex);
	env->wp_frozen = pages;
	pthread_mutex_unlock(&env->hold_mutex);
}

static bool inject_wp(struct injector_thread *t)
{
	struct env *env = t->env;
	u64 pages = random_pages(t);
	bool freeze = kvm_random_bool(&t->rng);
	struct frozen frozen;
	bool protected;
	int r;

	if (freeze) {
		set_wp_frozen(env, pages);
		freeze_prepare(env, &frozen, pages);
	}

	do {
		r = uffd_writeprotect(env, range_start(env, pages), range_size(env, pages), true);
	} while (r == EAGAIN);
	TEST_ASSERT(!r, "UFFDIO_WRITEPROTECT failed, errno = %d (%s)", r, strerror(r));
	protected = any_page_is(env, pages, PAGEMAP_UFFD_WP);

	if (freeze) {
		freeze_begin(env, &frozen);
		freeze_wait(t);
		freeze_end(env, &frozen, "UFFDIO_WRITEPROTECT", true);
		set_wp_frozen(env, 0);
	}
	return protected;
}

/* How much of the memory is mapped by huge pages. */
static u64 read_huge(struct env *env)
{
	return read_smaps(env->alias ? "ShmemPmdMapped:" : "AnonHugePages:");
}

static bool inject_collapse(struct injector_thread *t)
{
	struct env *env = t->env;
	u64 huge = read_huge(env);

	/* A success if there is nothing to do, too. */
	return !madvise(env->hva, env->main_size, MADV_COLLAPSE) && read_huge(env) > huge;
}

static bool inject_split(struct injector_thread *t)
{
	struct env *env = t->env;
	u64 nr_splits = read_number("/proc/vmstat", "thp_split_page ");
	char text[128];
	u64 huge;
	int len;

	/* Have something to split. */
	madvise(env->hva, env->main_size, MADV_COLLAPSE);
	huge = read_huge(env);

	len = snprintf(text, sizeof(text), "%d,0x%lx,0x%lx", getpid(), (u64)env->hva,
		       (u64)env->hva + env->main_size);
	if (pwrite(env->split_fd, text, len, 0) != len)
		return false;

	/* Other injectors merely unmap huge pages. */
	return read_huge(env) < huge &&
	       read_number("/proc/vmstat", "thp_split_page ") > nr_splits;
}

#define KSM_DIR		"/sys/kernel/mm/ksm/"

static bool inject_ksm(struct injector_thread *t)
{
	struct env *env = t->env;

	if (!random_below(&t->rng, 8))
		madvise(env->hva, env->main_size, MADV_UNMERGEABLE);
	madvise(env->hva, env->main_size, MADV_MERGEABLE);
	return increased(t, read_number("/proc/self/ksm_merging_pages", ""));
}

static bool inject_migrate(struct injector_thread *t)
{
	struct env *env = t->env;
	int nodes[NR_PAGES], before[NR_PAGES], after[NR_PAGES];
	u64 pages = random_pages(t);
	bool moved = false;
	void *addrs[NR_PAGES];
	int node = kvm_random_bool(&t->rng);
	int nr = 0, i;

	for (i = 0; i < NR_PAGES; i++) {
		if (!(pages & BIT_ULL(i)))
			continue;
		nodes[nr] = node;
		addrs[nr++] = env->hva + range_start(env, BIT_ULL(i));
	}

	if (move_pages(0, nr, addrs, NULL, before, 0) < 0 ||
	    move_pages(0, nr, addrs, nodes, after, MPOL_MF_MOVE_ALL) < 0)
		return false;

	for (i = 0; i < nr; i++)
		moved |= before[i] >= 0 && before[i] != node && after[i] == node;
	return moved;
}

/*
 * NUMA balancing is up to the scheduler, see that the vCPUs' threads had faults
 * due to it.  This is weak, as nothing tells whether it was in the slot's memory.
 */
static bool inject_hint(struct injector_thread *t)
{
	struct env *env = t->env;
	u64 nr_faults = 0;
	char path[64];
	int i;

	for (i = 0; i < env->nr_vcpus; i++) {
		snprintf(path, sizeof(path), "/proc/self/task/%d/sched",
			 READ_ONCE(env->vcpus[i].tid));
		nr_faults += read_number(path, "total_numa_faults");
	}
	return increased(t, nr_faults);
}

static bool inject_pageout(struct injector_thread *t)
{
	struct env *env = t->env;
	u64 pages = random_pages(t);
	size_t start = range_start(env, pages);
	size_t size = range_size(env, pages);

	/* Pages that are mapped twice aren't swapped out. */
	if (env->alias)
		kvm_madvise(env->alias + start, size, MADV_DONTNEED);
	madvise(env->hva + start, size, MADV_PAGEOUT);

	/* If memory isn't short, nothing else does that. */
	return increased(t, read_number("/proc/vmstat", "pswpout ")) && read_smaps("Swap:");
}

static void move_memory(struct env *env, void *from, void *to, int flags)
{
	void *mem = mremap(from, env->main_size, env->main_size,
			   MREMAP_MAYMOVE | MREMAP_FIXED | flags, to);

	TEST_ASSERT(mem == to, __KVM_SYSCALL_ERROR("mremap()", (int)(u64)mem));
}

static void map_fixed(void *addr, size_t size, int prot, int flags, int fd)
{
	void *mem = mmap(addr, size, prot, flags | MAP_FIXED_NOREPLACE, fd, 0);

	TEST_ASSERT(mem == addr, __KVM_SYSCALL_ERROR("mmap()", (int)(u64)mem));
}

static void map_memory(struct env *env, size_t size)
{
	map_fixed(env->hva, size, PROT_READ | PROT_WRITE,
		  env->memfd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS, env->memfd);

	/* This fails without THP. */
	madvise(env->hva, size, MADV_NOHUGEPAGE);
	if (env->mode->thp)
		madvise(env->hva, env->main_size, MADV_HUGEPAGE);
}

/*
 * Unmap the memory together with what is in front of it, zero pages, of which
 * many take long.  Until it's the memory's turn, KVM has invalidated what is
 * still mapped.
 */
static void unmap_memory(struct injector_thread *t)
{
	struct env *env = t->env;
	struct frozen frozen;

	map_fixed(FRONT_HVA, FRONT_SIZE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	madvise(FRONT_HVA, FRONT_SIZE, MADV_NOHUGEPAGE);
	kvm_madvise(FRONT_HVA, FRONT_SIZE, MADV_POPULATE_READ);

	freeze_prepare(env, &frozen, random_pages(t));
	kvm_munmap(FRONT_HVA, FRONT_SIZE + env->main_size);

	freeze_begin(env, &frozen);
	freeze_wait(t);
	freeze_end(env, &frozen, "munmap()", false);
	map_memory(env, env->main_size);
}

static bool inject_mremap(struct injector_thread *t)
{
	struct env *env = t->env;
	void *elsewhere = TEST_HVA_ELSEWHERE;
	struct frozen frozen;
	bool mapped;

	unmappable_begin(env);
	mapped = any_page_is(env, GENMASK_ULL(NR_PAGES - 1, 0), PAGEMAP_PRESENT);
	if (env->alias && !random_below(&t->rng, 4)) {
		unmap_memory(t);
	} else if (env->alias && kvm_random_bool(&t->rng)) {
		/* Leave nothing but the mapping itself behind. */
		move_memory(env, env->hva, elsewhere, MREMAP_DONTUNMAP);
		kvm_munmap(elsewhere, env->main_size);
	} else {
		freeze_prepare(env, &frozen, GENMASK_ULL(NR_PAGES - 1, 0));
		move_memory(env, env->hva, elsewhere, 0);
		freeze_begin(env, &frozen);
		freeze_wait(t);
		freeze_end(env, &frozen, "mremap()", false);
		move_memory(env, elsewhere, env->hva, 0);
	}
	unmappable_end(env);
	return mapped;
}

/* What isn't in memory can't be executed, wait until nobody is going to. */
static void set_exec(struct env *env, bool exec)
{
	struct shared_vcpu *v;
	u64 access;
	int i;

	WRITE_ONCE(env->shared->exec, exec);
	order_accesses();
	for (i = 0; i < env->nr_vcpus && !exec; i++) {
		v = &env->shared->vcpus[i];
		access = READ_ONCE(v->nr_accesses);
		while (READ_ONCE(v->flags) == KVM_MEMORY_EXIT_FLAG_EXEC &&
		       READ_ONCE(v->nr_accesses) == access)
			nap();
	}
}

static bool inject_recreate(struct injector_thread *t)
{
	struct env *env = t->env;
	struct frozen frozen;
	u64 nr_mmio;

	/* Dirty logging begins anew with each slot, give it some time. */
	if (random_below(&t->rng, 4))
		return false;

	pthread_mutex_lock(&env->slot_mutex);
	set_exec(env, false);
	nr_mmio = total_mmio(env);
	atomic_fetch_add(&env->del_seq, 1);
	atomic_fetch_add(&env->slot_seq, 1);
	vm_set_user_memory_region(env->vm, TEST_SLOT, 0, TEST_GPA, 0, env->hva);

	/* Nobody but handle_mmio() can write now. */
	pthread_mutex_lock(&env->mmio_mutex);
	freeze_prepare(env, &frozen, random_pages(t));
	freeze_begin(env, &frozen);
	freeze_wait(t);
	freeze_end(env, &frozen, "the slot being deleted", false);
	pthread_mutex_unlock(&env->mmio_mutex);
	freeze_wait(t);

	/*
	 * KVM on x86 warns if a fault that has found no slot finds a page that
	 * was mapped in the meantime, i.e. don't let faults see the creation.
	 */
	pause_vcpus(env);
	vm_set_user_memory_region(env->vm, TEST_SLOT, env->slot_flags, TEST_GPA,
				  env->size, env->hva);
	resume_vcpus(env);
	atomic_fetch_add(&env->slot_seq, 1);
	atomic_fetch_add(&env->del_seq, 1);
	set_exec(env, true);
	pthread_mutex_unlock(&env->slot_mutex);
	return total_mmio(env) > nr_mmio;
}

static void set_other_slot(struct env *env, gpa_t gpa, u64 size)
{
	vm_set_user_memory_region(env->vm, OTHER_SLOT, KVM_MEM_EXIT_ON_MISSING, gpa,
				  size, env->other);
}

static void *protect_other_fn(void *arg)
{
	struct env *env = arg;
	int i, r;

	for (i = 0; i < 4; i++) {
		atomic_fetch_add(&env->other_seq, 1);
		r = mprotect(env->other, OTHER_SIZE, PROT_READ | (i % 2 ? PROT_WRITE : 0));
		TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("mprotect()", r));
		atomic_fetch_add(&env->other_seq, 1);
	}
	return NULL;
}

/*
 * Create or delete a slot while its memory is being invalidated.  KVM must not see
 * only the beginning, or only the end, or faults will be retried for good.  Nor must
 * it forget, at the beginning, another invalidation above or below.
 */
static bool inject_other(struct injector_thread *t)
{
	struct env *env = t->env;
	gpa_t gpa = kvm_random_bool(&t->rng) ? OTHER_GPA_ABOVE : OTHER_GPA_BELOW;
	bool create = kvm_random_bool(&t->rng);
	u64 seq = atomic_load(&env->other_seq);
	pthread_t thread;
	bool met;

	if (create)
		set_other_slot(env, gpa, 0);
	kvm_pthread_create(&thread, NULL, protect_other_fn, env);
	while (atomic_load(&env->other_seq) == seq)
		sched_yield();
	met = atomic_load(&env->other_seq) % 2;
	set_other_slot(env, gpa, create ? OTHER_SIZE : 0);
	kvm_pthread_join(thread, NULL);
	if (!create)
		set_other_slot(env, gpa, OTHER_SIZE);
	return met;
}

static bool inject_signal(struct injector_thread *t)
{
	struct vcpu_thread *v = &t->env->vcpus[random_below(&t->rng, t->env->nr_vcpus)];
	u64 nr = READ_ONCE(v->nr_signals);

	pthread_kill(v->thread, SIGUSR1);
	nap();
	return READ_ONCE(v->nr_signals) > nr;
}

static bool inject_prefault(struct injector_thread *t)
{
	struct env *env = t->env;
	struct kvm_vcpu *vcpu = env->vcpus[random_below(&t->rng, env->nr_vcpus)].vcpu;
	u64 pages = random_pages(t);
	struct kvm_pre_fault_memory range = {
		.gpa = TEST_GPA + range_start(env, pages),
		.size = range_size(env, pages),
	};
	u64 start = range.gpa, end = start + range.size;
	int r;

	/* Only what is missing stops it, not the page that must not be populated. */
	if (!random_below(&t->rng, 4))
		end = start + (range.size = TEST_GPA + env->size - start);

	r = __vcpu_ioctl(vcpu, KVM_PRE_FAULT_MEMORY, &range);
	TEST_ASSERT(!r || errno == EFAULT || errno == EAGAIN || errno == EINTR || errno == ENOENT,
		    KVM_IOCTL_ERROR(KVM_PRE_FAULT_MEMORY, r));
	TEST_ASSERT(range.gpa + range.size == end && !(range.gpa % env->page_size) &&
		    (r ? range.gpa == start : range.gpa > start),
		    "KVM_PRE_FAULT_MEMORY returned %d, left gpa 0x%llx, size 0x%llx of 0x%lx to 0x%lx",
		    r, range.gpa, range.size, start, end);
	return !r;
}

static const char *needs_numa(struct env *env)
{
	return is_multi_numa_node_system() ? NULL : "one NUMA node only";
}

#define HINT_DIR	"/sys/kernel/debug/sched/numa_balancing/"

static const char *needs_hints(struct env *env)
{
	if (!is_multi_numa_node_system() || !is_numa_balancing_enabled())
		return "no NUMA balancing";

	if (!change_setting(HINT_DIR "scan_delay_ms", "1") ||
	    !change_setting(HINT_DIR "scan_period_min_ms", "10") ||
	    !change_setting(HINT_DIR "scan_period_max_ms", "50"))
		return "no NUMA balancing in debugfs";
	return NULL;
}

static const char *needs_smaps(struct env *env)
{
	return access("/proc/self/smaps", R_OK) ? "no /proc/self/smaps" : NULL;
}

static const char *needs_swap(struct env *env)
{
	return read_number("/proc/meminfo", "SwapTotal") ? needs_smaps(env) : "no swap";
}

static const char *needs_split(struct env *env)
{
	env->split_fd = open("/sys/kernel/debug/split_huge_pages", O_WRONLY | O_CLOEXEC);
	return env->split_fd >= 0 ? needs_smaps(env) : "no split_huge_pages in debugfs";
}

static const char *needs_ksm(struct env *env)
{
	if (access("/proc/self/ksm_merging_pages", R_OK) ||
	    !change_setting(KSM_DIR "sleep_millisecs", "10") ||
	    !change_setting(KSM_DIR "pages_to_scan", "64") ||
	    !change_setting(KSM_DIR "smart_scan", "0") ||
	    !change_setting(KSM_DIR "run", "1"))
		return "no KSM";

	madvise(env->hva, env->main_size, MADV_MERGEABLE);
	return NULL;
}

static const char *needs_prefault(struct env *env)
{
	return vm_check_cap(env->vm, KVM_CAP_PRE_FAULT_MEMORY) ? NULL : "no KVM_PRE_FAULT_MEMORY";
}

static const struct injector {
	const char *name;
	bool (*act)(struct injector_thread *t);
	/* Return why the machine can't do this, if so. */
	const char *(*needs)(struct env *env);
} injectors[] = {
	[FLAG]		= { "flag", inject_flag },
	[LOG]		= { "log", inject_log },
	[HOST_WORDS]	= { "host", inject_host_words },
	[UNMAP]		= { "unmap", inject_unmap },
	[MPROTECT]	= { "mprotect", inject_mprotect },
	[WP]		= { "wp", inject_wp },
	[COLLAPSE]	= { "collapse", inject_collapse, needs_smaps },
	[SPLIT]		= { "split", inject_split, needs_split },
	[KSM]		= { "ksm", inject_ksm, needs_ksm },
	[MIGRATE]	= { "migrate", inject_migrate, needs_numa },
	[HINT]		= { "hint", inject_hint, needs_hints },
	[PAGEOUT]	= { "pageout", inject_pageout, needs_swap },
	[MREMAP]	= { "mremap", inject_mremap },
	[RECREATE]	= { "recreate", inject_recreate },
	[OTHER]		= { "other", inject_other },
	[SIGNAL]	= { "signal", inject_signal },
	[PREFAULT]	= { "prefault", inject_prefault, needs_prefault },
};

/*
 * Preempt vCPU threads anywhere, not only where the kernel would let a thread of
 * the same class go on, and don't let them continue before the memory is frozen.
 * It takes a privilege, and only makes races likelier.
 */
static void outrank_vcpus(void)
{
	const struct sched_param param = { .sched_priority = 1 };

	pthread_setschedparam(pthread_self(), SCHED_FIFO, &param);
}

static void *injector_fn(void *arg)
{
	struct injector_thread *t = arg;
	struct env *env = t->env;
	u64 unmaps = BIT(t->injector - injectors) & UNMAPS;

	if (t->injector == &injectors[MPROTECT])
		outrank_vcpus();

	while (!atomic_load(&env->stop)) {
		if (unmaps) {
			atomic_fetch_or(&env->active, unmaps);
			atomic_fetch_add(&env->inject_seq, 1);
		}
		if (t->injector->act(t))
			WRITE_ONCE(t->nr_succeeded, t->nr_succeeded + 1);
		if (unmaps)
			atomic_fetch_and(&env->active, ~unmaps);
		WRITE_ONCE(t->nr_acted, t->nr_acted + 1);
		pace(t);
	}
	return NULL;
}

static const char *env_setup_uffd(struct env *env)
{
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = env->mode->uffd_features,
	};
	struct uffdio_register reg = {
		.range = { .start = (u64)env->hva, .len = env->size },
		.mode = env->mode->uffd_mode,
	};
	int r;

	env->uffd = syscall(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (env->uffd < 0)
		return "no userfaultfd";
	if (uffd_ioctl(env, UFFDIO_API, &api) == EINVAL)
		return "userfaultfd lacks a feature";

	r = uffd_ioctl(env, UFFDIO_REGISTER, &reg);
	TEST_ASSERT(!r, "UFFDIO_REGISTER failed, errno = %d (%s)", r, strerror(r));

	env->zeroes = kvm_mmap(env->page_size, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS, -1);
	TEST_ASSERT(!pipe(env->uffd_pipe), "pipe() failed, errno = %d", errno);
	kvm_pthread_create(&env->uffd_reader, NULL, uffd_reader_fn, env);
	return NULL;
}

static const char *env_map_memory(struct env *env)
{
	int i;

	env->page_size = getpagesize();
	env->main_size = NR_PAGES * env->page_size;
	if (env->mode->thp) {
		if (!thp_configured())
			return "no transparent huge pages";
		env->main_size = get_trans_hugepagesz();
		if (env->main_size > MAX_HUGE_PAGE)
			return "huge page too large";
	}
	env->stride = env->main_size / env->page_size / NR_PAGES;
	env->size = env->main_size + env->page_size;

	if (env->mode->memfd)
		env->memfd = kvm_memfd_alloc(env->size, false);

	env->hva = TEST_HVA;
	map_memory(env, env->size);
	if (env->memfd >= 0) {
		env->alias = TEST_HVA_ALIAS;
		map_fixed(env->alias, env->size, PROT_READ | PROT_WRITE, MAP_SHARED, env->memfd);
		madvise(env->alias, env->size, MADV_NOHUGEPAGE);
	}

	for (i = 0; i < NR_PAGES && env->alias; i++) {
		u64 insn = RET_INSN;

		host_access(env, word_offset(env, i, 0) - sizeof(insn), &insn, true);
	}

	/* Zero pages, of which many take long to be invalidated, and no memory. */
	env->other = kvm_mmap(OTHER_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	madvise(env->other, OTHER_SIZE, MADV_NOHUGEPAGE);
	kvm_madvise(env->other, OTHER_SIZE, MADV_POPULATE_READ);
	return NULL;
}

static const char *env_create(struct env *env)
{
	struct kvm_random_state rng = new_rng(env->seed, STREAM_ENV);
	struct kvm_vcpu *vcpus[MAX_VCPUS];
	const char *reason;
	int i;

	env->uffd = -1;
	env->split_fd = -1;
	env->memfd = -1;
	env->mem_fd = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
	TEST_ASSERT(env->mem_fd >= 0, "Can't open /proc/self/mem, errno = %d", errno);
	env->pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	TEST_ASSERT(env->pagemap_fd >= 0, "Can't open /proc/self/pagemap, errno = %d", errno);
	pthread_mutex_init(&env->slot_mutex, NULL);
	pthread_mutex_init(&env->layout_mutex, NULL);
	pthread_mutex_init(&env->mmio_mutex, NULL);
	pthread_mutex_init(&env->hold_mutex, NULL);

	reason = env_map_memory(env);
	if (reason)
		return reason;
	if (env->mode->uffd_mode)
		reason = env_setup_uffd(env);
	if (reason)
		return reason;

	env->vm = vm_create_with_vcpus(env->nr_vcpus, guest_code, vcpus);
	env->shared = addr_gva2hva(env->vm, (gva_t)&shared);
	env->shared->page_size = env->page_size;
	env->shared->stride = env->stride;
	env->shared->probe_gva = TEST_GVA + env->size - sizeof(u64);
	env->shared->seed = env->seed;
	env->shared->nr_vcpus = env->nr_vcpus;
	env->shared->lossy = env->mode->lossy;
	env->shared->host_words = env->injectors & BIT(HOST_WORDS);
	/* There are instructions, see env_map_memory(). */
	env->shared->exec = env->alias;

	env->cap = kvm_random_bool(&rng);
	if (env->cap)
		vm_enable_cap(env->vm, KVM_CAP_MEMORY_FAULT_EXIT,
			      kvm_check_cap(KVM_CAP_MEMORY_FAULT_EXIT));
	if (kvm_random_bool(&rng))
		env->manual_caps = kvm_check_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
	if (kvm_random_bool(&rng))
		env->manual_caps &= KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
	if (env->manual_caps)
		vm_enable_cap(env->vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, env->manual_caps);

	set_slot_flags(env, KVM_MEM_EXIT_ON_MISSING);
	set_other_slot(env, OTHER_GPA_ABOVE, OTHER_SIZE);
	virt_map(env->vm, TEST_GVA, TEST_GPA, env->size / env->vm->page_size);

	for (i = 0; i < env->nr_vcpus; i++) {
		vcpu_args_set(vcpus[i], 1, i);
		env->vcpus[i].env = env;
		env->vcpus[i].vcpu = vcpus[i];
	}
	return NULL;
}

static void env_destroy(struct env *env)
{
	if (env->vm)
		kvm_vm_free(env->vm);
	if (env->uffd_reader) {
		TEST_ASSERT_EQ(write(env->uffd_pipe[1], "", 1), 1);
		kvm_pthread_join(env->uffd_reader, NULL);
		close(env->uffd_pipe[0]);
		close(env->uffd_pipe[1]);
	}
	if (env->uffd >= 0)
		close(env->uffd);
	if (env->split_fd >= 0)
		close(env->split_fd);
	close(env->mem_fd);
	close(env->pagemap_fd);
	if (env->zeroes)
		kvm_munmap(env->zeroes, env->page_size);
	if (env->memfd >= 0)
		close(env->memfd);
	if (env->alias)
		kvm_munmap(env->alias, env->size);
	if (env->hva)
		kvm_munmap(env->hva, env->size);
	if (env->other)
		kvm_munmap(env->other, OTHER_SIZE);
}

/* Whether all kinds of accesses have exited, as far as that can be relied on. */
static bool all_kinds_exited(struct env *env)
{
	int kind;

	if (!(env->injectors & BIT(UNMAP)))
		return true;

	for (kind = 0; kind < NR_KINDS; kind++) {
		if (!total_exits(env, kind) &&
		    (env->alias || BIT(kind) != KVM_MEMORY_EXIT_FLAG_EXEC))
			return false;
	}
	return true;
}

/*
 * Wait until each vCPU and each injector has done its part.  Time is what this
 * thread has slept, as the whole machine may stand still at times.
 */
static void wait_until_done(struct env *env, struct injector_thread *threads)
{
	u64 nr, last[MAX_VCPUS] = {}, since[MAX_VCPUS] = {};
	u64 nr_naps = 0, max_naps = env->max_seconds * (1000000 / WAIT_US);
	bool done = false, late;
	int i;

	while (!done) {
		usleep(WAIT_US);
		late = ++nr_naps >= max_naps;
		done = all_kinds_exited(env) ||
		       (READ_ONCE(threads[UNMAP].nr_acted) >= MAX_ACTIONS && late);

		for (i = 0; i < env->nr_vcpus; i++) {
			nr = READ_ONCE(env->shared->vcpus[i].nr_accesses);
			done &= nr >= env->nr_accesses;
			if (nr != last[i]) {
				last[i] = nr;
				since[i] = nr_naps;
			}
			TEST_ASSERT(nr_naps < since[i] + max_naps,
				    "vCPU %d: no progress at 0x%lx, flags 0x%lx, %lu signals",
				    i, env->shared->vcpus[i].gva, env->shared->vcpus[i].flags,
				    env->vcpus[i].nr_signals);
		}

		for (i = 0; i < NR_INJECTORS; i++) {
			if (!threads[i].env)
				continue;
			nr = READ_ONCE(threads[i].nr_acted);
			/* Go on for some time if it takes luck to succeed. */
			done &= nr >= env->nr_actions &&
				(READ_ONCE(threads[i].nr_succeeded) ||
				 (nr >= MAX_ACTIONS && late));
		}
	}
}

static void start_injectors(struct env *env, struct injector_thread *threads)
{
	int i;

	for (i = 0; i < NR_INJECTORS; i++) {
		if (!(env->injectors & BIT(i)))
			continue;

		threads[i].injector = &injectors[i];
		threads[i].skip = injectors[i].needs ? injectors[i].needs(env) : NULL;
		if (threads[i].skip)
			continue;

		threads[i].env = env;
		threads[i].rng = new_rng(env->seed, STREAM_INJECTOR + i);
		kvm_pthread_create(&threads[i].thread, NULL, injector_fn, &threads[i]);
	}
}

static void report_vcpus(struct env *env)
{
	struct vcpu_thread *v;
	u64 nr;
	int i;

	for (i = 0; i < env->nr_vcpus; i++) {
		v = &env->vcpus[i];
		ksft_print_msg("%s: vCPU %d: %lu accesses, %lu MMIO, %lu signals, %lu failures\n",
			       env->mode->name, i, env->shared->vcpus[i].nr_accesses,
			       v->nr_mmio, v->nr_signals, v->nr_bare);
		ksft_print_msg("%s: vCPU %d: exits for %lu reads, %lu writes, %lu fetches\n",
			       env->mode->name, i, v->nr_exits[0], v->nr_exits[1],
			       v->nr_exits[2]);
		nr = vcpu_get_stat(v->vcpu, memory_fault_exits);
		TEST_ASSERT(nr == v->nr_exits[0] + v->nr_exits[1] + v->nr_exits[2],
			    "vCPU %d: %lu memory_fault_exits", i, nr);
	}
	TEST_ASSERT(all_kinds_exited(env), "A kind of access has never exited");
}

static void check_word(struct env *env, int page, int writer, u64 expected)
{
	u64 val = READ_ONCE(*(u64 *)(env->hva + word_offset(env, page, writer)));
	struct shared *s = env->shared;
	u64 val2;

	/* MADV_FREE may have taken effect since the vCPU looked at it. */
	if (writer != HOST && env->mode->lossy && !val &&
	    s->drop_begin[page] > s->before[writer][page])
		return;

	TEST_ASSERT(val == expected, "Page %d has 0x%lx of writer %d, expected 0x%lx",
		    page, val, writer, expected);
	if (env->alias) {
		host_read_word(env, page, writer, &val2);
		TEST_ASSERT(val2 == expected,
			    "Page %d has 0x%lx of writer %d in the second mapping, expected 0x%lx",
			    page, val2, writer, expected);
	}
}

static void check_memory(struct env *env)
{
	struct shared *s = env->shared;
	int i, j;

	for (i = 0; i < NR_PAGES; i++) {
		for (j = 0; j < env->nr_vcpus; j++)
			check_word(env, i, j, s->expected[j][i]);
		check_word(env, i, HOST, s->done[HOST][i]);
	}
}

/* Return NULL, or why there is nothing to run. */
static const char *run_mode(struct env *env, struct injector_thread *threads)
{
	const char *reason = env_create(env);
	int i;

	if (reason)
		return reason;

	ksft_print_msg("%s: seed 0x%x, %d vCPUs\n", env->mode->name, env->user_seed, env->nr_vcpus);
	ksft_print_msg("%s: KVM_CAP_MEMORY_FAULT_EXIT %d, manual protect %lu\n",
		       env->mode->name, env->cap, env->manual_caps);

	for (i = 0; i < env->nr_vcpus; i++)
		kvm_pthread_create(&env->vcpus[i].thread, NULL, vcpu_fn, &env->vcpus[i]);
	start_injectors(env, threads);

	wait_until_done(env, threads);

	atomic_store(&env->stop, true);
	for (i = 0; i < NR_INJECTORS; i++) {
		if (threads[i].env)
			kvm_pthread_join(threads[i].thread, NULL);
	}

	WRITE_ONCE(env->shared->stop, true);
	for (i = 0; i < env->nr_vcpus; i++)
		kvm_pthread_join(env->vcpus[i].thread, NULL);

	check_memory(env);
	report_vcpus(env);
	return NULL;
}

/* TEST_ASSERT() exits, and knows nothing about seeds. */
static void report_failure(void)
{
	int i;

	if (!failed_env)
		return;

	ksft_print_msg("Failed, to try again: -s 0x%x -m %s -v %d -n %lu -a %lu -w %d -i '",
		       failed_env->user_seed, failed_env->mode->name, failed_env->nr_vcpus,
		       failed_env->nr_accesses, failed_env->nr_actions,
		       failed_env->max_seconds);
	for (i = 0; i < NR_INJECTORS; i++) {
		if (failed_env->injectors & BIT(i))
			printf("%s,", injectors[i].name);
	}
	printf("'\n");
}

/* Run a mode.  Its result, and that of each injector in it, are results of their own. */
static void test_mode(struct env *env)
{
	static struct injector_thread threads[NR_INJECTORS];
	const char *mode = env->mode->name, *reason, *skip;
	bool passed = true;
	int i;

	memset(threads, 0, sizeof(threads));
	failed_env = env;
	reason = run_mode(env, threads);
	env_destroy(env);

	if (reason)
		ksft_test_result_skip("%s (%s)\n", reason, mode);
	else
		ksft_test_result_pass("%s\n", mode);

	for (i = 0; i < NR_INJECTORS; i++) {
		if (!(env->injectors & BIT(i)))
			continue;

		skip = reason ?: threads[i].skip;
		if (skip) {
			ksft_test_result_skip("%s (%s %s)\n", skip, mode, injectors[i].name);
			continue;
		}
		ksft_test_result(threads[i].nr_succeeded, "%s %s: %lu of %lu actions succeeded\n",
				 mode, injectors[i].name, threads[i].nr_succeeded,
				 threads[i].nr_acted);
		passed &= !!threads[i].nr_succeeded;
	}

	if (!passed)
		report_failure();
	failed_env = NULL;
}

static void help(const char *name)
{
	int i;

	printf("usage: %s [-h] [-s seed] [-n accesses] [-a actions] [-v vcpus]\n", name);
	printf("       [-w seconds] [-m mode]... [-i injector,...]\n");
	printf(" -s: the seed of all random numbers, by default the time\n");
	printf(" -n: the least number of accesses by each vCPU\n");
	printf(" -a: the least number of actions by each injector\n");
	printf(" -v: the number of vCPUs, at most %d\n", MAX_VCPUS);
	printf(" -w: the number of seconds, without progress of a vCPU or success of an\n");
	printf("     injector, to give up after\n");
	printf(" -m: the kind of memory, by default all of\n    ");
	for (i = 0; i < ARRAY_SIZE(modes); i++)
		printf(" %s", modes[i].name);
	printf("\n -i: the actions to race against, by default all that a mode allows of\n    ");
	for (i = 0; i < NR_INJECTORS; i++)
		printf(" %s", injectors[i].name);
	printf("\n");
}

static u64 parse_injectors(char *list)
{
	u64 mask = 0;
	char *name;
	int i;

	while ((name = strsep(&list, ","))) {
		if (!*name)
			continue;
		for (i = 0; i < NR_INJECTORS && strcmp(name, injectors[i].name); i++)
			;
		TEST_ASSERT(i < NR_INJECTORS, "Unknown injector '%s'", name);
		mask |= BIT(i);
	}
	return mask;
}

static u64 parse_mode(const char *name)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(modes) && strcmp(name, modes[i].name); i++)
		;
	TEST_ASSERT(i < ARRAY_SIZE(modes), "Unknown mode '%s'", name);
	return BIT(i);
}

int main(int argc, char *argv[])
{
	const struct sigaction sa = { .sa_handler = signal_handler };
	u64 mode_mask = 0, injector_mask = -1ull;
	u64 nr_accesses = 1000, nr_actions = 5;
	int nr_vcpus = 2, max_seconds = 120, nr_results = 0;
	struct timespec now;
	int opt, i;
	u32 seed;

	clock_gettime(CLOCK_REALTIME, &now);
	seed = now.tv_sec ^ now.tv_nsec;

	while ((opt = getopt(argc, argv, "s:n:a:v:w:m:i:h")) != -1) {
		switch (opt) {
		case 's':
			seed = strtoul(optarg, NULL, 0);
			break;
		case 'n':
			nr_accesses = atoi_positive("Number of accesses", optarg);
			break;
		case 'a':
			nr_actions = atoi_positive("Number of actions", optarg);
			break;
		case 'v':
			nr_vcpus = atoi_positive("Number of vCPUs", optarg);
			TEST_ASSERT(nr_vcpus <= MAX_VCPUS, "At most %d vCPUs", MAX_VCPUS);
			break;
		case 'w':
			max_seconds = atoi_positive("Number of seconds", optarg);
			break;
		case 'm':
			mode_mask |= parse_mode(optarg);
			break;
		case 'i':
			injector_mask = parse_injectors(optarg);
			break;
		case 'h':
		default:
			help(argv[0]);
			exit(opt == 'h' ? 0 : 1);
		}
	}

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_EXIT_ON_MISSING) == KVM_MEM_EXIT_ON_MISSING);
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_BINARY_STATS_FD));
	TEST_REQUIRE(!access("/proc/self/pagemap", R_OK));

	if (!mode_mask)
		mode_mask = GENMASK(ARRAY_SIZE(modes) - 1, 0);

	if (!(injector_mask & BIT(HINT)))
		disable_numa_balancing();

	for (i = 0; i < ARRAY_SIZE(modes); i++) {
		if (mode_mask & BIT(i))
			nr_results += 1 + __builtin_popcountll(modes[i].injectors & injector_mask);
	}

	ksft_print_header();
	ksft_set_plan(nr_results);
	TEST_ASSERT(!sigaction(SIGUSR1, &sa, NULL), "sigaction() failed, errno = %d", errno);
	atexit(restore_settings);
	atexit(report_failure);

	for (i = 0; i < ARRAY_SIZE(modes); i++) {
		struct env env = {
			.mode = &modes[i],
			.injectors = modes[i].injectors & injector_mask,
			.nr_accesses = nr_accesses,
			.nr_actions = nr_actions,
			.nr_vcpus = nr_vcpus,
			.max_seconds = max_seconds,
			.user_seed = seed,
			.seed = new_rng(seed, STREAM_MODE + i).seed,
		};

		if (mode_mask & BIT(i))
			test_mode(&env);
	}

	ksft_finished();
}
