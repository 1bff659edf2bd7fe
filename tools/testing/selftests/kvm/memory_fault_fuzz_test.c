// SPDX-License-Identifier: GPL-2.0-only
/*
 * Fuzz the interface of memory-fault exits: make random calls, legal and not,
 * and compare what KVM does with what Documentation/virt/kvm says.
 *
 * What KVM is told to do, and the content of memory, is kept by the test.  Which
 * pages the host has mapped is what /proc/self/pagemap says, i.e. the memory
 * management is trusted, and KVM isn't.
 *
 * Operations come in rounds, each with new VMs.  The choices of an operation
 * depend on nothing but the seed of the round and the operation's number, so
 * that "-s seed -n number" repeats what led to a finding.  The seed is printed
 * before anything happens; "-v" prints the operations, too, in case that the
 * kernel doesn't survive one.
 *
 * What the kernel does to memory whenever it likes, i.e. KSM and NUMA hints, no seed
 * could repeat.  That is for exit_on_missing_stress_test.
 */
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <time.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <linux/bitmap.h>
#include <linux/bits.h>
#include <linux/falloc.h>
#include <linux/sizes.h>
#include <linux/sysinfo.h>
#include <linux/userfaultfd.h>

#include "kvm_util.h"
#include "numaif.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"

#define ROUND_OPS	500
#define DEFAULT_OPS	10000
#define MAX_FINDINGS	10

/* Guest memory under test, in terms of host pages. */
#define WINDOW_GPA	0xc0000000ul
#define WINDOW_SIZE	(2 * SZ_2M)
#define AREA_PAGES	8
/* One more than an area has, to try and create a slot that is larger. */
#define MAX_PAGES	(SZ_2M / SZ_4K + 1)

#define NR_VMS		2
#define MAX_AS		2
#define FIRST_SLOT	10
#define NR_SLOTS	4

#define ALL_ACCESSES	(KVM_MEMORY_EXIT_FLAG_READ |	\
			 KVM_MEMORY_EXIT_FLAG_WRITE |	\
			 KVM_MEMORY_EXIT_FLAG_EXEC)

/* All content of pages is code that returns, or zero. */
#ifdef __x86_64__
#define RET_INSN	0xc3ul
#elif defined(__aarch64__)
#define RET_INSN	0xd65f03c0ul
#else
#error "Unsupported architecture"
#endif

enum access { READ, WRITE, FETCH };

static const struct {
	const char *name;
	u64 flag;
	int prot;
} accesses[] = {
	[READ]  = { "read",  KVM_MEMORY_EXIT_FLAG_READ,  PROT_READ },
	[WRITE] = { "write", KVM_MEMORY_EXIT_FLAG_WRITE, PROT_WRITE },
	[FETCH] = { "fetch", KVM_MEMORY_EXIT_FLAG_EXEC,  PROT_READ },
};

static struct guest_cmd {
	u64 access;
	u64 gva;
	/* The value to write, or the value read. */
	u64 val;
} guest_cmd;

static void guest_code(void)
{
	for (;;) {
		u64 *mem = (u64 *)READ_ONCE(guest_cmd.gva);

		switch (READ_ONCE(guest_cmd.access)) {
		case READ:
			WRITE_ONCE(guest_cmd.val, READ_ONCE(*mem));
			break;
		case WRITE:
			WRITE_ONCE(*mem, READ_ONCE(guest_cmd.val));
			break;
		case FETCH:
			((void (*)(void))mem)();
			break;
		}
		GUEST_SYNC(0);
	}
}

enum area_type { ANON, ANON_UFFD, SHMEM, SHMEM_UFFD, THP, GMEM, GMEM_LAST = GMEM + NR_VMS - 1 };

#define NR_AREAS	(GMEM_LAST + 1)

struct page {
	u64 val;
	/* PROT_*, or UNMAPPED. */
	int prot;
	/* If the host has mapped the page, then writable. */
	bool writable;
	/* UFFDIO_POISON */
	bool poisoned;
	/* MADV_FREE: the page may become zero at any time, until it's written. */
	bool lazy;
};

#define UNMAPPED	(-1)

/* Host memory.  Without guest_memfd that can be mapped, its areas have no pages. */
struct area {
	enum area_type type;
	void *hva;
	/* A second mapping of shared memory. */
	void *alias;
	int fd;
	int uffd;
	int nr_pages;
	struct page pages[MAX_PAGES];
};

static struct area areas[NR_AREAS];

/* A bit of the dirty log is known, or KVM may set it. */
enum dirty { CLEAN, MAYBE_DIRTY, DIRTY };

struct slot {
	u64 gpa;
	/* 0 if there's no such slot. */
	int nr_pages;
	struct area *area;
	int first_page;
	u32 flags;
	u8 dirty[MAX_PAGES];
};

static struct fuzzed_vm {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	struct guest_cmd *cmd;
	struct slot slots[MAX_AS][NR_SLOTS];
	bool cap_enabled;
	u64 manual_protect;
	/* The guest hasn't completed its command. */
	bool pending;
	/* Of the last exit, if KVM_RUN wasn't called again. */
	bool exited;
	u64 exit_gpa;
	u64 nr_exits;
#ifdef __x86_64__
	struct kvm_regs regs;
#else
	u64 pc, sp;
#endif
} vms[NR_VMS];

/* What a KVM_RUN may end in. */
enum outcome {
	DONE	= BIT(0),
	MMIO	= BIT(1),
	/* EFAULT with and without information. */
	FAULTED	= BIT(2),
	BARE	= BIT(3),
	/* SIGBUS for a poisoned page. */
	SIGNAL	= BIT(4),
};

static const char * const outcomes[] = {
	"done", "MMIO", "memory-fault exit", "bare EFAULT", "SIGBUS",
};

static size_t page_size;
static int pagemap_fd;
static int split_fd;
static u64 zero_page;
static int kvm_fd;
static int nr_as, max_slots;
#ifdef __x86_64__
static u64 sync_regs;
#endif

static u64 round_seed;
static int round_op;
static bool in_round;
static bool verbose;
static bool found;
static int nr_findings;
static u64 nr_ops, nr_checked, nr_refused, nr_outcomes[ARRAY_SIZE(outcomes)];
static char op_text[256];

/* What the operation is, for the log and for findings. */
static void __printf(1, 2) describe(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(op_text, sizeof(op_text), fmt, ap);
	va_end(ap);
	if (verbose)
		printf("# %d: %s\n", round_op, op_text);
}

/* The model can't be trusted any more, i.e. this ends the round. */
static void __printf(1, 2) finding(const char *fmt, ...)
{
	va_list ap;

	if (found)
		return;
	found = true;
	nr_findings++;

	printf("# FINDING: seed %lu, operation %d: %s: ", round_seed, round_op, op_text);
	va_start(ap, fmt);
	vprintf(fmt, ap);
	va_end(ap);
	printf("\n# to reproduce: -s %lu -n %d -v\n", round_seed, round_op + 1);
}

/* A failed assertion calls exit(). */
static void report_exit(void)
{
	if (in_round)
		printf("# exit at seed %lu, operation %d: %s\n", round_seed, round_op, op_text);
}

/* An input must be refused with the error of one of the rules that it breaks. */
struct rule {
	bool broken;
	int error;
	const char *text;
};

#define MAX_RULES	64

/* How often each rule alone made KVM refuse an input, by the rule's text. */
static struct refused {
	const char *text;
	u64 nr;
} refused[MAX_RULES];

static void count_refused(const char *text, int nr)
{
	struct refused *r = refused;

	while (r->text && strcmp(r->text, text)) {
		r++;
		TEST_ASSERT(r < refused + MAX_RULES - 1, "More than %d rules", MAX_RULES - 1);
	}
	r->text = text;
	r->nr += nr;
	nr_refused += nr;
}

/* Returns whether the call is legal, with a finding if KVM doesn't agree. */
static bool check_rules(const char *call, int r, const struct rule *rules)
{
	int i, error = r < 0 ? errno : 0;
	const struct rule *broken = NULL;
	bool expected = false, alone = true;

	for (i = 0; rules[i].text; i++) {
		/* To be seen even if it's never broken. */
		count_refused(rules[i].text, 0);
		if (!rules[i].broken)
			continue;
		alone &= !broken || !strcmp(broken->text, rules[i].text);
		if (!expected)
			broken = &rules[i];
		expected |= rules[i].error == error;
	}

	if (broken && expected)
		count_refused(alone ? broken->text : "more than one rule", 1);
	else if (broken)
		finding("%s = %d, errno %d (%s), expected errno %d: %s", call, r, error,
			strerror(error), broken->error, broken->text);
	else if (error)
		finding("%s = %d, errno %d (%s), expected success", call, r, error,
			strerror(error));

	return !broken;
}

static u64 rnd_state;

/* splitmix64 */
static u64 rnd64(void)
{
	u64 z = (rnd_state += 0x9e3779b97f4a7c15ull);

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

static u64 rnd(u64 n)
{
	return rnd64() % n;
}

static bool one_in(u64 n)
{
	return !rnd(n);
}

static void rnd_seed(u64 seed, u64 nr)
{
	rnd_state = seed;
	rnd_state = rnd64() + nr;
	rnd_state = rnd64();
}

static u64 rnd_val(void)
{
	return RET_INSN | rnd64() << 32;
}

static struct fuzzed_vm *rnd_vm(void)
{
	return &vms[one_in(4)];
}

/* In a huge page, only some of the pages matter. */
static int rnd_page(int nr_pages)
{
	return nr_pages <= AREA_PAGES ? rnd(nr_pages) : rnd(AREA_PAGES) * (nr_pages / AREA_PAGES);
}

#define PM_PRESENT	BIT_ULL(63)
#define PM_SWAP		BIT_ULL(62)
#define PM_UFFD_WP	BIT_ULL(57)
#define PM_PFN		GENMASK_ULL(54, 0)

static u64 pagemap(void *addr)
{
	u64 entry;
	int r;

	r = pread(pagemap_fd, &entry, sizeof(entry), (u64)addr / page_size * sizeof(entry));
	TEST_ASSERT(r == sizeof(entry), "read() failed, errno = %d", errno);
	return entry;
}

static void *page_addr(struct area *area, int page)
{
	return area->hva + page * page_size;
}

/* Use the end of a page, to see that KVM reports the start of the page. */
static size_t word_offset(void)
{
	return page_size - 3 * sizeof(u64);
}

static u64 *word(void *base, int page)
{
	return base + page * page_size + word_offset();
}

static bool is_gmem(struct area *area)
{
	return area->type >= GMEM;
}

static bool has_uffd(struct area *area)
{
	return area->type == ANON_UFFD || area->type == SHMEM_UFFD;
}

static bool is_shmem(struct area *area)
{
	return area->type == SHMEM || area->type == SHMEM_UFFD;
}

static int uffd_ioctl(struct area *area, unsigned long cmd, void *arg)
{
	return ioctl(area->uffd, cmd, arg) ? errno : 0;
}

/* Nothing waits for userfaultfd, accesses to missing pages fail. */
static void area_register(struct area *area, int page, int nr)
{
	struct uffdio_register reg = {
		.range = { .start = (u64)page_addr(area, page), .len = nr * page_size },
		.mode = UFFDIO_REGISTER_MODE_MISSING |
			(is_shmem(area) ? UFFDIO_REGISTER_MODE_MINOR : UFFDIO_REGISTER_MODE_WP),
	};
	int r = uffd_ioctl(area, UFFDIO_REGISTER, &reg);

	TEST_ASSERT(!r, "UFFDIO_REGISTER failed, errno = %d", r);
}

static void area_map(struct area *area, int page, int nr)
{
	void *addr = page_addr(area, page);
	size_t size = nr * page_size;
	int i;

	if (area->fd >= 0)
		addr = mmap(addr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, area->fd,
			    page * page_size);
	else
		addr = mmap(addr, size, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	TEST_ASSERT(addr == page_addr(area, page), "mmap() failed, errno = %d", errno);

	/* These fail without THP. */
	madvise(addr, size, area->type == THP ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	if (has_uffd(area))
		area_register(area, page, nr);

	for (i = page; i < page + nr; i++) {
		area->pages[i].prot = PROT_READ | PROT_WRITE;
		area->pages[i].writable = false;
		area->pages[i].poisoned = false;
		area->pages[i].lazy = false;
		if (area->fd < 0)
			area->pages[i].val = 0;
	}
}

static void area_punch_hole(struct area *area, int page, int nr)
{
	int r = fallocate(area->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			  page * page_size, nr * page_size);
	int i;

	TEST_ASSERT(!r, "fallocate() failed, errno = %d", errno);
	for (i = page; i < page + nr; i++)
		area->pages[i].val = 0;
}

/* Give back all memory, and map all pages as if nothing had ever happened. */
static void area_reset(struct area *area)
{
	if (area->fd >= 0)
		area_punch_hole(area, 0, area->nr_pages);
	area_map(area, 0, area->nr_pages);
}

/* Nothing else is after the end, where a slot that is larger than the area gets to. */
static void *area_reserve(size_t size, size_t align)
{
	size += align + (AREA_PAGES + 1) * page_size;
	return align_ptr_up(kvm_mmap(size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1), align);
}

static void area_create(struct area *area, enum area_type type)
{
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = UFFD_FEATURE_SIGBUS | UFFD_FEATURE_POISON |
			    UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_MINOR_SHMEM,
	};
	size_t align = page_size, size;

	area->type = type;
	/* Those of guest_memfd come and go with the VM. */
	area->nr_pages = AREA_PAGES;
	area->fd = -1;
	area->uffd = -1;

	if (type == THP && thp_configured() && get_trans_hugepagesz() == SZ_2M) {
		align = SZ_2M;
		area->nr_pages = SZ_2M / page_size;
	}
	size = area->nr_pages * page_size;

	area->hva = area_reserve(size, align);

	if (is_shmem(area)) {
		area->fd = kvm_memfd_alloc(size, false);
		area->alias = kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, area->fd);
		madvise(area->alias, size, MADV_NOHUGEPAGE);
	}

	if (has_uffd(area)) {
		area->uffd = syscall(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK);
		__TEST_REQUIRE(area->uffd >= 0 && !uffd_ioctl(area, UFFDIO_API, &api),
			       "userfaultfd, or a feature of it, is missing");
	}
}

/* The file of a guest_memfd belongs to a VM. */
static void area_create_gmem(struct area *area, struct kvm_vm *vm)
{
	const u64 flags = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED;

	area->fd = -1;
	area->nr_pages = 0;
	if ((vm_check_cap(vm, KVM_CAP_GUEST_MEMFD_FLAGS) & flags) != flags)
		return;

	area->nr_pages = AREA_PAGES;
	area->fd = vm_create_guest_memfd(vm, AREA_PAGES * page_size, flags);
	area_reset(area);
}

static void area_destroy_gmem(struct area *area)
{
	size_t size = AREA_PAGES * page_size;

	if (area->fd < 0)
		return;
	kvm_free_fd(area->fd);
	/* A mapping of the file would keep the VM alive. */
	TEST_ASSERT(mmap(area->hva, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED,
			 -1, 0) == area->hva, "mmap() failed, errno = %d", errno);
}

/* What userspace does to its memory; returns errno. */
enum host_op {
	HOST_WRITE,
	POPULATE_READ,
	POPULATE_WRITE,
	DONTNEED,
	FREE,
	PAGEOUT,
	MIGRATE,
	COLLAPSE,
	SPLIT,
	PROTECT,
	REMAP,
	UNMAP,
	MAP,
	PUNCH_HOLE,
	COPY,
	ZEROPAGE,
	CONTINUE,
	POISON,
	WP,
	UNWP,
	NR_HOST_OPS,
};

static const struct {
	const char *name;
	bool uffd;
} host_ops[] = {
	[HOST_WRITE]	 = { "write by the host" },
	[POPULATE_READ]	 = { "MADV_POPULATE_READ" },
	[POPULATE_WRITE] = { "MADV_POPULATE_WRITE" },
	[DONTNEED]	 = { "MADV_DONTNEED" },
	[FREE]		 = { "MADV_FREE" },
	[PAGEOUT]	 = { "MADV_PAGEOUT" },
	[MIGRATE]	 = { "move_pages" },
	[COLLAPSE]	 = { "MADV_COLLAPSE" },
	[SPLIT]		 = { "split a huge page" },
	[PROTECT]	 = { "mprotect" },
	[REMAP]		 = { "mremap" },
	[UNMAP]		 = { "munmap" },
	[MAP]		 = { "mmap" },
	[PUNCH_HOLE]	 = { "punch a hole" },
	[COPY]		 = { "UFFDIO_COPY", true },
	[ZEROPAGE]	 = { "UFFDIO_ZEROPAGE", true },
	[CONTINUE]	 = { "UFFDIO_CONTINUE", true },
	[POISON]	 = { "UFFDIO_POISON", true },
	[WP]		 = { "UFFDIO_WRITEPROTECT", true },
	[UNWP]		 = { "UFFDIO_WRITEPROTECT, undo", true },
};

/* Those that have changed something. */
static u64 nr_host_ops[NR_HOST_OPS];

static int host_madvise(struct area *area, int page, int advice)
{
	return madvise(page_addr(area, page), page_size, advice) ? errno : 0;
}

/* Returns the node's number, or less. */
static int host_move(void *addr, int node)
{
	int r, status = -1;

	r = syscall(__NR_move_pages, 0, 1ul, &addr, &node, &status, MPOL_MF_MOVE);
	return r ? -errno : status;
}

static u64 read_vmstat(const char *key)
{
	FILE *f = fopen("/proc/vmstat", "re");
	char line[128];
	u64 val = 0;

	TEST_ASSERT(f, "No vmstat in /proc, errno = %d", errno);
	while (fgets(line, sizeof(line), f)) {
		if (!strncmp(line, key, strlen(key)) && line[strlen(key)] == ' ')
			val = strtoul(line + strlen(key), NULL, 10);
	}
	fclose(f);
	return val;
}

/* Make a huge page of all the memory, or the opposite. */
static int host_huge(struct area *area, bool collapse)
{
	const char *key = collapse ? "thp_collapse_alloc" : "thp_split_page";
	size_t size = area->nr_pages * page_size;
	u64 nr = read_vmstat(key);
	char text[128];
	int len;

	if (collapse) {
		if (madvise(area->hva, size, MADV_COLLAPSE))
			return errno;
	} else {
		len = snprintf(text, sizeof(text), "%d,0x%lx,0x%lx", getpid(), (u64)area->hva,
			       (u64)area->hva + size);
		if (pwrite(split_fd, text, len, 0) != len)
			return errno;
	}
	/* Success may mean that there was nothing to do. */
	return read_vmstat(key) > nr ? 0 : EALREADY;
}

/* Move a page to another address and back. */
static int host_remap(void *addr)
{
	void *other = kvm_mmap(page_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	const int flags = MREMAP_MAYMOVE | MREMAP_FIXED;
	int r = 0;

	if (mremap(addr, page_size, page_size, flags, other) == MAP_FAILED) {
		r = errno;
		kvm_munmap(other, page_size);
	} else {
		TEST_ASSERT(mremap(other, page_size, page_size, flags, addr) == addr,
			    "mremap() failed, errno = %d", errno);
	}
	return r;
}

static int host_uffd_op(struct area *area, int page, enum host_op op, u64 val)
{
	struct uffdio_range range = { (u64)page_addr(area, page), page_size };
	struct uffdio_zeropage zeropage = { .range = range };
	struct uffdio_continue cont = { .range = range };
	struct uffdio_poison poison = { .range = range };
	struct uffdio_copy copy = { .dst = range.start, .len = page_size };
	struct uffdio_writeprotect wp = {
		.range = range,
		.mode = op == WP ? UFFDIO_WRITEPROTECT_MODE_WP : 0,
	};
	static u64 *src;

	/* mmap() might use a hole that an operation has left. */
	src = src ?: aligned_alloc(page_size, page_size);
	TEST_ASSERT(src, "aligned_alloc() failed");
	memset(src, 0, page_size);
	*word(src, 0) = val;
	copy.src = (u64)src;

	switch (op) {
	case COPY:
		return uffd_ioctl(area, UFFDIO_COPY, &copy);
	case ZEROPAGE:
		return uffd_ioctl(area, UFFDIO_ZEROPAGE, &zeropage);
	case CONTINUE:
		return uffd_ioctl(area, UFFDIO_CONTINUE, &cont);
	case POISON:
		return uffd_ioctl(area, UFFDIO_POISON, &poison);
	default:
		return uffd_ioctl(area, UFFDIO_WRITEPROTECT, &wp);
	}
}

/*
 * What memory-fault-exits.rst says about the ways to populate a page, for pages
 * whose protection allows everything.  A page of a file may be in the file even
 * if it isn't mapped, thus that is about anonymous memory only.
 */
static void check_answer(struct area *area, enum host_op op, struct page *page, u64 pm, int r)
{
	bool missing = !(pm & (PM_PRESENT | PM_SWAP)), populate;
	int expected = 0;

	populate = op == POPULATE_READ || op == POPULATE_WRITE;
	if (area->type > ANON_UFFD || (op != COPY && op != ZEROPAGE && !populate))
		return;

	if (page->prot == UNMAPPED)
		expected = populate ? ENOMEM : ENOENT;
	else if (page->prot != (PROT_READ | PROT_WRITE))
		return;
	else if (populate && page->poisoned)
		expected = EHWPOISON;
	else if (populate && area->type == ANON_UFFD &&
		 (missing || (op == POPULATE_WRITE && pm & PM_UFFD_WP)))
		expected = EFAULT;
	else if (!populate && !missing && !(op == COPY && page->poisoned))
		expected = EEXIST;

	if (r != expected)
		finding("errno %d (%s), expected %d (%s)", r, strerror(r), expected,
			strerror(expected));
}

static int do_host_op(struct area *area, int nr, enum host_op op)
{
	static const int prots[] = { PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE };
	struct page *page = &area->pages[nr];
	void *addr = page_addr(area, nr);
	u64 val = rnd_val();
	int r = 0, prot;

	switch (op) {
	case HOST_WRITE:
		/* Only KVM is meant to get a SIGBUS. */
		if (!area->alias && !is_gmem(area))
			r = host_madvise(area, nr, MADV_POPULATE_WRITE);
		if (r)
			break;
		WRITE_ONCE(*word(area->alias ?: area->hva, nr), val);
		page->val = val;
		page->lazy = false;
		page->writable |= !area->alias;
		break;
	case POPULATE_READ:
		r = host_madvise(area, nr, MADV_POPULATE_READ);
		break;
	case POPULATE_WRITE:
		r = host_madvise(area, nr, MADV_POPULATE_WRITE);
		page->writable |= !r;
		break;
	case DONTNEED:
		r = host_madvise(area, nr, MADV_DONTNEED);
		if (r)
			break;
		page->poisoned = false;
		page->writable = false;
		page->lazy = false;
		if (!is_shmem(area))
			page->val = 0;
		break;
	case FREE:
		r = host_madvise(area, nr, MADV_FREE);
		if (r)
			break;
		page->poisoned = false;
		page->writable = false;
		page->lazy = true;
		break;
	case PAGEOUT:
		r = host_madvise(area, nr, MADV_PAGEOUT);
		page->writable = false;
		break;
	case MIGRATE:
		r = host_move(addr, rnd(2));
		r = r < 0 ? -r : 0;
		break;
	case COLLAPSE:
	case SPLIT:
		r = host_huge(area, op == COLLAPSE);
		break;
	case REMAP:
		/* Without UFFD_FEATURE_EVENT_REMAP, that would undo UFFDIO_REGISTER. */
		r = has_uffd(area) ? EOPNOTSUPP : host_remap(addr);
		break;
	case PROTECT:
		prot = prots[rnd(ARRAY_SIZE(prots))];
		r = mprotect(addr, page_size, prot) ? errno : 0;
		if (r)
			break;
		page->prot = prot;
		page->writable = false;
		break;
	case UNMAP:
		kvm_munmap(addr, page_size);
		page->prot = UNMAPPED;
		page->poisoned = false;
		page->lazy = false;
		break;
	case MAP:
		area_map(area, nr, 1);
		break;
	case PUNCH_HOLE:
		area_punch_hole(area, nr, 1);
		break;
	default:
		r = host_uffd_op(area, nr, op, val);
		if (r)
			break;
		if (op == COPY)
			page->val = val;
		if (op == ZEROPAGE)
			page->val = 0;
		if (op == COPY || op == ZEROPAGE)
			page->lazy = false;
		page->poisoned = op == POISON || (page->poisoned && op > POISON);
		page->writable = op == COPY && page->prot & PROT_WRITE;
		break;
	}
	return r;
}

static struct slot *find_slot(struct fuzzed_vm *vm, int as, u64 gpa)
{
	int i;

	for (i = 0; i < NR_SLOTS; i++) {
		struct slot *slot = &vm->slots[as][i];

		if (gpa >= slot->gpa && gpa < slot->gpa + slot->nr_pages * page_size)
			return slot;
	}
	return NULL;
}

static int slot_page(struct slot *slot, u64 gpa)
{
	return (gpa - slot->gpa) / page_size;
}

static bool overlaps(struct fuzzed_vm *vm, int as, struct slot *old, u64 gpa, u64 size)
{
	int i;

	for (i = 0; i < NR_SLOTS; i++) {
		struct slot *slot = &vm->slots[as][i];

		if (slot != old && slot->nr_pages && gpa < slot->gpa + slot->nr_pages * page_size &&
		    slot->gpa < gpa + size)
			return true;
	}
	return false;
}

static bool gmem_is_bound(struct fuzzed_vm *vm, struct area *area, u64 offset, u64 size)
{
	u64 start;
	int as, i;

	for (as = 0; as < nr_as; as++) {
		for (i = 0; i < NR_SLOTS; i++) {
			struct slot *slot = &vm->slots[as][i];

			start = slot->first_page * page_size;
			if (slot->nr_pages && slot->area == area &&
			    slot->flags & KVM_MEM_GUEST_MEMFD &&
			    offset < start + slot->nr_pages * page_size && start < offset + size)
				return true;
		}
	}
	return false;
}

static void set_dirty(struct slot *slot, int page, enum dirty dirty)
{
	if (slot->flags & KVM_MEM_LOG_DIRTY_PAGES && slot->dirty[page] < dirty)
		slot->dirty[page] = dirty;
}

static u64 rnd_gpa(int nr_pages)
{
	u64 half = WINDOW_GPA + rnd(2) * SZ_2M;

	return nr_pages > AREA_PAGES ? half : half + rnd(3 * AREA_PAGES) * page_size;
}

/* KVM_RUN may map the page that it has exited on, whatever the guest does then. */
static void complete_exit(struct fuzzed_vm *vm)
{
	struct slot *slot = vm->exited ? find_slot(vm, 0, vm->exit_gpa) : NULL;

	if (slot)
		set_dirty(slot, slot_page(slot, vm->exit_gpa), MAYBE_DIRTY);
	vm->exited = false;
}

static u32 rnd_flags(void)
{
	u32 flags = 0;

	if (!one_in(3))
		flags |= KVM_MEM_EXIT_ON_MISSING;
	if (one_in(2))
		flags |= KVM_MEM_LOG_DIRTY_PAGES;
	if (one_in(6))
		flags |= KVM_MEM_READONLY;
	return flags;
}

/* Replace something by what KVM should refuse, or at least may not expect. */
static void corrupt_region(struct kvm_userspace_memory_region2 *r)
{
	switch (rnd(13)) {
	case 0:
		/* Any unknown flag. */
		r->flags |= BIT(one_in(2) ? 3 + rnd(5) : 9 + rnd(23));
		break;
	case 1:
		r->flags ^= KVM_MEM_READONLY;
		break;
	case 2:
		r->flags ^= KVM_MEM_GUEST_MEMFD;
		break;
	case 3:
		r->guest_phys_addr += 1 + rnd(page_size - 1);
		break;
	case 4:
		r->memory_size += 1 + rnd(page_size - 1);
		break;
	case 5:
		r->memory_size += page_size;
		break;
	case 6:
		r->userspace_addr += 1 + rnd(page_size - 1);
		break;
	case 7:
		r->userspace_addr |= BIT_ULL(63);
		break;
	case 8:
		r->guest_phys_addr = one_in(2) ? -page_size : BIT_ULL(60);
		break;
	case 9:
		r->slot = (r->slot & ~0xffff) | (max_slots + rnd(0x10000 - max_slots));
		break;
	case 10:
		r->flags ^= KVM_MEM_EXIT_ON_MISSING;
		break;
	case 11:
		r->flags ^= KVM_MEM_LOG_DIRTY_PAGES;
		break;
	case 12:
		r->slot = (r->slot & 0xffff) | (nr_as + rnd(0x10000 - nr_as)) << 16;
		break;
	}
}

static void op_set_region(void)
{
	struct fuzzed_vm *vm = rnd_vm();
	int as = nr_as > 1 && one_in(5), id = rnd(NR_SLOTS);
	struct slot *slot = &vm->slots[as][id], new = *slot;
	struct kvm_userspace_memory_region2 r;
	bool v2 = one_in(2), exists = slot->nr_pages, gmem, change, high;
	u32 immutable = KVM_MEM_READONLY | KVM_MEM_GUEST_MEMFD;
	const struct rule *rules;
	u64 end, hva;
	int ret;

	if (!exists) {
		new.area = &areas[rnd(NR_AREAS)];
		if (is_gmem(new.area) && !one_in(4))
			new.area = &areas[GMEM + (vm - vms)];
		if (is_gmem(new.area) && (one_in(4) || new.area->fd < 0))
			new.area = &areas[ANON_UFFD];
		new.first_page = 0;
		new.nr_pages = new.area->nr_pages;
		if (new.nr_pages == AREA_PAGES || one_in(3)) {
			new.first_page = rnd_page(new.nr_pages);
			new.nr_pages = 1 + rnd(min(AREA_PAGES, new.nr_pages - new.first_page));
		}
		new.gpa = rnd_gpa(new.nr_pages);
		if (one_in(16))
			new.nr_pages = 0;
		new.flags = rnd_flags();
		if (is_gmem(new.area)) {
			if (one_in(2))
				new.flags &= ~KVM_MEM_EXIT_ON_MISSING;
			new.flags = KVM_MEM_GUEST_MEMFD | (one_in(2) ? new.flags : 0);
			if (one_in(4))
				new.nr_pages += AREA_PAGES;
		}
		v2 |= is_gmem(new.area) && !one_in(8);
	} else {
		switch (rnd(10)) {
		case 0 ... 3:
			new.flags = (new.flags & immutable) | (rnd_flags() & ~immutable);
			break;
		case 4:
			new.flags = rnd_flags();
			break;
		case 5:
			new.gpa = rnd_gpa(new.nr_pages);
			break;
		case 6:
			new.first_page ^= 1;
			break;
		case 7 ... 9:
			new.nr_pages = 0;
			break;
		}
	}

	r = (struct kvm_userspace_memory_region2) {
		.slot = as << 16 | (FIRST_SLOT + id),
		.flags = new.flags,
		.guest_phys_addr = new.gpa,
		.memory_size = new.nr_pages * page_size,
		.userspace_addr = (u64)page_addr(new.area, new.first_page),
		.guest_memfd = is_gmem(new.area) ? new.area->fd : kvm_fd,
		.guest_memfd_offset = is_gmem(new.area) ? new.first_page * page_size : 0,
	};
	if (one_in(4))
		corrupt_region(&r);

	describe("VM %ld: %s(slot 0x%x, flags 0x%x, gpa 0x%llx, size 0x%llx, area %d + 0x%llx)",
		 vm - vms, v2 ? "KVM_SET_USER_MEMORY_REGION2" : "KVM_SET_USER_MEMORY_REGION",
		 r.slot, r.flags, r.guest_phys_addr, r.memory_size, new.area->type,
		 r.userspace_addr - (u64)new.area->hva);

	ret = ioctl(vm->vm->fd, v2 ? KVM_SET_USER_MEMORY_REGION2 : KVM_SET_USER_MEMORY_REGION, &r);

	gmem = r.flags & KVM_MEM_GUEST_MEMFD;
	change = exists && r.memory_size;
	hva = exists ? (u64)page_addr(slot->area, slot->first_page) : 0;
	end = r.guest_phys_addr + r.memory_size;
	high = r.guest_phys_addr >= BIT_ULL(60);

	/* The slot isn't one of the model's if the number is corrupted. */
	rules = (const struct rule []) {
		{ r.flags & ~(KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY | KVM_MEM_EXIT_ON_MISSING |
			      (v2 ? KVM_MEM_GUEST_MEMFD : 0)), EINVAL, "unknown flag" },
		{ gmem && r.flags & KVM_MEM_EXIT_ON_MISSING, EINVAL,
		  "EXIT_ON_MISSING with GUEST_MEMFD" },
		{ gmem && r.flags & (KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY), EINVAL,
		  "LOG_DIRTY_PAGES or READONLY with GUEST_MEMFD" },
		{ r.guest_phys_addr % page_size, EINVAL, "gpa isn't aligned" },
		{ r.memory_size % page_size, EINVAL, "size isn't aligned" },
		{ r.userspace_addr % page_size, EINVAL, "userspace_addr isn't aligned" },
		{ r.userspace_addr >> 63, EINVAL, "userspace_addr isn't userspace's" },
		{ end < r.guest_phys_addr, EINVAL, "gpa + size overflows" },
		{ (r.slot & 0xffff) >= max_slots, EINVAL, "no such slot ID" },
		{ r.slot >> 16 >= nr_as, EINVAL, "no such address space" },
		{ !exists && !r.memory_size, EINVAL, "no such slot to delete" },
		{ change && r.memory_size != slot->nr_pages * page_size, EINVAL,
		  "slot can't be resized" },
		{ change && r.userspace_addr != hva, EINVAL, "userspace_addr can't be changed" },
		{ change && (r.flags ^ slot->flags) & immutable, EINVAL, "flag can't be changed" },
		{ change && gmem, EINVAL, "slot of guest_memfd can't be changed" },
		{ high && end > r.guest_phys_addr, EINVAL, "gpa out of range" },
		{ high && end > r.guest_phys_addr, EFAULT, "gpa out of range" },
		{ r.memory_size && overlaps(vm, as, slot, r.guest_phys_addr, r.memory_size), EEXIST,
		  "slots overlap" },
		{ !exists && gmem && new.area != &areas[GMEM + (vm - vms)], EINVAL,
		  "not a guest_memfd of the VM" },
		{ !exists && gmem && r.guest_memfd_offset + r.memory_size > AREA_PAGES * page_size,
		  EINVAL, "beyond the end of guest_memfd" },
		{ !exists && gmem &&
		  gmem_is_bound(vm, new.area, r.guest_memfd_offset, r.memory_size), EEXIST,
		  "guest_memfd is bound already" },
		{}
	};

	if (!check_rules("KVM_SET_USER_MEMORY_REGION", ret, rules))
		return;

	new.flags = r.flags;
	new.gpa = r.guest_phys_addr;
	new.nr_pages = r.memory_size / page_size;
	if ((new.flags & ~slot->flags) & KVM_MEM_LOG_DIRTY_PAGES || !exists)
		memset(new.dirty, vm->manual_protect & KVM_DIRTY_LOG_INITIALLY_SET ? DIRTY : CLEAN,
		       sizeof(new.dirty));
	*slot = new;
}

/* Most likely one that has a dirty log. */
static int rnd_dirty_log_slot(struct slot *slots)
{
	int i, id = 0;

	for (i = 0; i < 4; i++) {
		id = rnd(NR_SLOTS);
		if (slots[id].nr_pages && slots[id].flags & KVM_MEM_LOG_DIRTY_PAGES)
			break;
	}
	return id;
}

static void op_dirty_log(void)
{
	struct fuzzed_vm *vm = rnd_vm();
	int as = nr_as > 1 && one_in(8), id = rnd_dirty_log_slot(vm->slots[as]);
	struct slot *slot = &vm->slots[as][id];
	bool clear = !one_in(3);
	const struct rule *rules;
	int page, ret, first, last;
	unsigned long bitmap[BITS_TO_LONGS(MAX_PAGES)] = {};
	struct kvm_clear_dirty_log log = {
		.slot = as << 16 | (FIRST_SLOT + id),
		.dirty_bitmap = bitmap,
		.num_pages = slot->nr_pages,
	};
	struct kvm_dirty_log get = { .dirty_bitmap = bitmap };

	switch (rnd(10)) {
	case 0:
		log.slot = as << 16 | max_slots;
		break;
	case 1:
		log.slot = nr_as << 16 | (FIRST_SLOT + id);
		break;
	case 2:
		log.first_page = rnd(max(slot->nr_pages, 1));
		log.num_pages -= log.first_page;
		break;
	case 3:
		log.num_pages++;
		break;
	case 4:
		log.num_pages = rnd(slot->nr_pages + 1);
		break;
	case 5:
		log.first_page = 64;
		log.num_pages = max(slot->nr_pages - 64, 64);
		break;
	}
	/* All pages, or any of them. */
	memset(bitmap, one_in(2) ? 0xff : clear ? rnd(256) : 0, sizeof(bitmap));
	get.slot = log.slot;

	describe("VM %ld: %s(slot 0x%x, first %llu, number %u)", vm - vms,
		 clear ? "KVM_CLEAR_DIRTY_LOG" : "KVM_GET_DIRTY_LOG", log.slot, log.first_page,
		 log.num_pages);

	last = log.first_page + log.num_pages;
	ret = clear ? __vm_ioctl(vm->vm, KVM_CLEAR_DIRTY_LOG, &log) :
		      __vm_ioctl(vm->vm, KVM_GET_DIRTY_LOG, &get);

	rules = (const struct rule []) {
		{ (log.slot & 0xffff) >= max_slots, EINVAL, "no such slot ID" },
		{ log.slot >> 16 >= nr_as, EINVAL, "no such address space" },
		{ !(slot->nr_pages && slot->flags & KVM_MEM_LOG_DIRTY_PAGES), ENOENT,
		  "no slot with KVM_MEM_LOG_DIRTY_PAGES" },
		{ clear && log.first_page % 64, EINVAL, "first_page isn't a multiple of 64" },
		{ clear && last > slot->nr_pages, EINVAL, "beyond the end of the slot" },
		{ clear && log.num_pages % 64 && last < slot->nr_pages, EINVAL,
		  "num_pages isn't a multiple of 64" },
		{}
	};

	if (!check_rules("dirty log", ret, rules))
		return;

	/* KVM_GET_DIRTY_LOG always is about all pages. */
	first = clear ? log.first_page : 0;
	last = clear ? last : slot->nr_pages;
	for (page = first; page < last; page++) {
		bool bit = test_bit(page - first, bitmap);

		if (!clear && slot->dirty[page] == (bit ? CLEAN : DIRTY))
			finding("page %d is %s", page, bit ? "dirty" : "clean");
		if (clear ? bit : !vm->manual_protect)
			slot->dirty[page] = CLEAN;
	}
}

static void op_enable_cap(void)
{
	struct fuzzed_vm *vm = rnd_vm();
	bool vcpu = one_in(4), exit_on_missing = one_in(4);
	struct kvm_enable_cap cap = {
		.cap = exit_on_missing ? KVM_CAP_EXIT_ON_MISSING : KVM_CAP_MEMORY_FAULT_EXIT,
		.args[0] = exit_on_missing && one_in(2) ? KVM_MEM_EXIT_ON_MISSING : ALL_ACCESSES,
	};
	const struct rule *rules;
	int r;

	/* The second VM never gets the capability. */
	switch (rnd(vm == &vms[1] ? 4 : 6)) {
	case 0:
		cap.flags = BIT(rnd(32));
		break;
	case 1:
		cap.args[0] = rnd(ALL_ACCESSES);
		break;
	case 2:
		cap.args[0] |= BIT_ULL(3 + rnd(61));
		break;
	case 3:
		cap.args[1 + rnd(3)] = rnd64() | BIT_ULL(rnd(64));
		break;
	}

	describe("VM %ld: KVM_ENABLE_CAP(%u, 0x%x, 0x%llx, 0x%llx, 0x%llx, 0x%llx) of the %s",
		 vm - vms, cap.cap, cap.flags, cap.args[0], cap.args[1], cap.args[2], cap.args[3],
		 vcpu ? "vCPU" : "VM");

	r = vcpu ? __vcpu_ioctl(vm->vcpu, KVM_ENABLE_CAP, &cap) :
		   __vm_ioctl(vm->vm, KVM_ENABLE_CAP, &cap);

	rules = (const struct rule []) {
		{ exit_on_missing, EINVAL, "KVM_CAP_EXIT_ON_MISSING is always enabled" },
		{ vcpu, EINVAL, "not a capability of vCPUs" },
		{ cap.flags, EINVAL, "flags aren't 0" },
		{ !exit_on_missing && cap.args[0] != ALL_ACCESSES, EINVAL,
		  "args[0] isn't a mask of all accesses" },
		{ cap.args[1] || cap.args[2] || cap.args[3], EINVAL, "args[1..3] aren't 0" },
		{}
	};

	if (check_rules("KVM_ENABLE_CAP", r, rules))
		vm->cap_enabled = true;
}

static void op_check_extension(void)
{
	static const struct {
		long cap;
		int val;
	} caps[] = {
		{ KVM_CAP_MEMORY_FAULT_EXIT, ALL_ACCESSES },
		{ KVM_CAP_EXIT_ON_MISSING, KVM_MEM_EXIT_ON_MISSING },
	};
	struct fuzzed_vm *vm = rnd_vm();
	int i = rnd(ARRAY_SIZE(caps)), r;
	bool sys = one_in(2);

	describe("VM %ld: KVM_CHECK_EXTENSION(%ld) of the %s", vm - vms, caps[i].cap,
		 sys ? "system" : "VM");
	r = sys ? ioctl(kvm_fd, KVM_CHECK_EXTENSION, caps[i].cap) :
		  __vm_ioctl(vm->vm, KVM_CHECK_EXTENSION, (void *)caps[i].cap);
	if (r != caps[i].val)
		finding("%d, expected %d", r, caps[i].val);
}

/* What an access by the guest may end in, a mask of outcomes. */
static unsigned int predict(struct fuzzed_vm *vm, u64 gpa, enum access access)
{
	struct slot *slot = find_slot(vm, 0, gpa);
	bool flag, present, write = access == WRITE;
	unsigned int failed;
	struct area *area;
	struct page *page;
	u64 pm;
	int nr;

	if (!slot || (write && slot->flags & KVM_MEM_READONLY))
		return MMIO;
	if (slot->flags & KVM_MEM_GUEST_MEMFD)
		return DONE;

	flag = slot->flags & KVM_MEM_EXIT_ON_MISSING;
	failed = flag || vm->cap_enabled ? FAULTED : BARE;

	area = slot->area;
	nr = slot->first_page + slot_page(slot, gpa);
	page = &area->pages[nr];
	if (page->prot == UNMAPPED || !(page->prot & accesses[access].prot))
		return failed;

	pm = pagemap(page_addr(area, nr));
	present = pm & PM_PRESENT;

	/* What the host has mapped is used, if it allows the access. */
	if (flag) {
		/* The kernel may collapse pages to a huge page at any time. */
		if (!present)
			return area->type == THP ? FAULTED | DONE : FAULTED;
		if (!write)
			return DONE;
		/* To split a huge page replaces zeroes by the zero page. */
		if (pm & PM_UFFD_WP || (pm & PM_PFN) == zero_page)
			return FAULTED;
		return page->writable ? DONE : FAULTED | DONE;
	}

	/* Otherwise, it's like an access by userspace. */
	if (page->poisoned)
		return SIGNAL;
	if (has_uffd(area) && !present && !(pm & PM_SWAP))
		return failed;
	if (write && pm & PM_UFFD_WP)
		return failed;
	return DONE;
}

static void check_content(const char *who, u64 val, u64 expected)
{
	if (val != expected)
		finding("%s 0x%lx, expected 0x%lx", who, val, expected);
}

static void check_page_content(const char *who, u64 val, struct page *page)
{
	/* Once it's gone, it doesn't come back. */
	if (page->lazy && !val)
		page->val = 0;
	check_content(who, val, page->val);
}

static int nr_sigbus;

static void sigbus_handler(int sig, siginfo_t *info, void *context)
{
	/* An access by the test itself repeats, and kills it. */
	if (info->si_code != BUS_MCEERR_AR)
		signal(SIGBUS, SIG_DFL);
	WRITE_ONCE(nr_sigbus, nr_sigbus + 1);
}

static void save_regs(struct fuzzed_vm *vm)
{
#ifdef __x86_64__
	vcpu_regs_get(vm->vcpu, &vm->regs);
#else
	vm->pc = vcpu_get_reg(vm->vcpu, ARM64_CORE_REG(regs.pc));
	vm->sp = vcpu_get_reg(vm->vcpu, ctxt_reg_alias(vm->vcpu, SYS_SP_EL1));
#endif
}

/* Let the guest forget its command. */
static void restore_regs(struct fuzzed_vm *vm)
{
#ifdef __x86_64__
	vcpu_regs_set(vm->vcpu, &vm->regs);
#else
	vcpu_set_reg(vm->vcpu, ARM64_CORE_REG(regs.pc), vm->pc);
	vcpu_set_reg(vm->vcpu, ctxt_reg_alias(vm->vcpu, SYS_SP_EL1), vm->sp);
#endif
}

/* Userspace can write kvm_run, and KVM must not take that for its own. */
static void scribble(struct kvm_run *run)
{
	if (one_in(3))
		return;
	run->exit_reason = one_in(2) ? KVM_EXIT_MEMORY_FAULT : rnd64();
	run->memory_fault.flags = rnd64();
	run->memory_fault.gpa = rnd64();
	run->memory_fault.size = rnd64();
#ifdef __x86_64__
	run->kvm_valid_regs = rnd64() & sync_regs;
#endif
}

/* Returns the outcome of a KVM_RUN; what else it may be is a finding. */
static enum outcome run_vcpu(struct fuzzed_vm *vm, u64 gpa)
{
	struct guest_cmd *cmd = vm->cmd;
	struct kvm_run *run = vm->vcpu->run;
	bool mmio = false, write = cmd->access == WRITE;
	struct ucall uc;
	int r;

	for (;;) {
		r = __vcpu_run(vm->vcpu);
		if (r || run->exit_reason != KVM_EXIT_MMIO || mmio ||
		    run->mmio.phys_addr != gpa + word_offset())
			break;

		mmio = true;
		if (run->mmio.is_write != write || run->mmio.len != sizeof(u64))
			finding("MMIO %s of %u bytes", run->mmio.is_write ? "write" : "read",
				run->mmio.len);
		if (run->mmio.is_write)
			check_content("MMIO has", *(u64 *)run->mmio.data, cmd->val);
		else
			memcpy(run->mmio.data, &gpa, sizeof(gpa));
	}

	if (!r && get_ucall(vm->vcpu, &uc) == UCALL_SYNC) {
		if (mmio && cmd->access == READ)
			check_content("the guest read by MMIO", cmd->val, gpa);
		return mmio ? MMIO : DONE;
	}
	if (!mmio && r == -1 && errno == EFAULT && run->exit_reason == KVM_EXIT_MEMORY_FAULT)
		return FAULTED;
	if (!mmio && r == -1 && errno == EFAULT && run->exit_reason == KVM_EXIT_UNKNOWN)
		return BARE;
	if (!mmio && r == -1 && errno == EINTR && READ_ONCE(nr_sigbus) == 1)
		return SIGNAL;

	finding("KVM_RUN = %d, errno %d (%s), exit_reason %u (%s), %d SIGBUS", r, errno,
		strerror(errno), run->exit_reason, exit_reason_str(run->exit_reason), nr_sigbus);
	return 0;
}

static void describe_outcomes(char *buf, unsigned int mask)
{
	int i;

	*buf = '\0';
	for (i = 0; i < ARRAY_SIZE(outcomes); i++) {
		if (!(mask & BIT(i)))
			continue;
		sprintf(buf + strlen(buf), "%s%s", *buf ? " or " : "", outcomes[i]);
	}
}

static void new_command(struct fuzzed_vm *vm, u64 gpa, enum access access)
{
	if (vm->pending)
		restore_regs(vm);
	*vm->cmd = (struct guest_cmd) {
		.access = access,
		.gva = gpa + word_offset(),
		.val = access == WRITE ? rnd_val() : 0,
	};
}

static u64 rnd_access_gpa(struct fuzzed_vm *vm)
{
	struct slot *slot = &vm->slots[0][rnd(NR_SLOTS)];

	return slot->nr_pages ? slot->gpa + rnd_page(slot->nr_pages) * page_size : rnd_gpa(1);
}

static u64 command_gpa(struct fuzzed_vm *vm)
{
	return vm->cmd->gva - word_offset();
}

static struct page *gpa_to_page(struct slot *slot, u64 gpa)
{
	return &slot->area->pages[slot->first_page + slot_page(slot, gpa)];
}

static void op_run(void)
{
	struct fuzzed_vm *vm = rnd_vm();
	struct kvm_run *run = vm->vcpu->run;
	char expected_text[100], seen_text[100];
	unsigned int expected;
	enum outcome seen;
	struct slot *slot;
	struct page *page;
	u64 gpa, pm = 0;
	void *hva = NULL;
	bool moved;

	/* An access that has failed repeats, unless the guest does something else. */
	if (!vm->pending || one_in(4))
		new_command(vm, rnd_access_gpa(vm), rnd(3));

	gpa = command_gpa(vm);
	slot = find_slot(vm, 0, gpa);
	page = slot ? gpa_to_page(slot, gpa) : NULL;
	expected = predict(vm, gpa, vm->cmd->access);

	/* Don't let the guest execute what isn't code. */
	if (vm->cmd->access == FETCH &&
	    (expected & MMIO || (expected & DONE && (page->lazy || (u32)page->val != RET_INSN)))) {
		new_command(vm, gpa, READ);
		expected = predict(vm, gpa, READ);
	}

	if (slot && !(slot->flags & KVM_MEM_GUEST_MEMFD)) {
		hva = page_addr(slot->area, slot->first_page + slot_page(slot, gpa));
		pm = pagemap(hva);
	}

	describe_outcomes(expected_text, expected);
	describe("VM %ld: %s of gpa 0x%lx%s%s, expect %s", vm - vms, accesses[vm->cmd->access].name,
		 gpa, vm->pending ? ", again" : "",
		 slot && slot->flags & KVM_MEM_EXIT_ON_MISSING ? ", flag" : "", expected_text);

	scribble(run);
	WRITE_ONCE(nr_sigbus, 0);
	complete_exit(vm);
	seen = run_vcpu(vm, gpa);
	if (!seen)
		return;

	vm->pending = seen != DONE && seen != MMIO;
	describe_outcomes(seen_text, seen);
	nr_outcomes[__builtin_ctz(seen)]++;
	/* Reclaim or migration, which the zero page knows nothing of, was faster. */
	moved = hva && slot->flags & KVM_MEM_EXIT_ON_MISSING && seen == FAULTED &&
		pm & PM_PRESENT && (pm & PM_PFN) != zero_page &&
		(pagemap(hva) ^ pm) & (PM_PRESENT | PM_PFN);
	if (!(seen & expected) && !moved) {
		finding("%s, expected %s", seen_text, expected_text);
		return;
	}
	if (seen != SIGNAL && READ_ONCE(nr_sigbus))
		finding("%s, and SIGBUS", seen_text);

	if (seen == FAULTED) {
		vm->nr_exits++;
		vm->exited = true;
		vm->exit_gpa = gpa;
		if (run->memory_fault.flags != accesses[vm->cmd->access].flag ||
		    run->memory_fault.gpa != gpa || run->memory_fault.size != page_size)
			finding("memory_fault has flags 0x%llx, gpa 0x%llx, size 0x%llx",
				run->memory_fault.flags, run->memory_fault.gpa,
				run->memory_fault.size);
		if (slot->flags & KVM_MEM_EXIT_ON_MISSING && slot->area->type != THP &&
		    (pagemap(hva) ^ pm) & (PM_PRESENT | PM_SWAP | PM_PFN) && !moved)
			finding("KVM has faulted in the page, pagemap 0x%lx, was 0x%lx",
				pagemap(hva), pm);
	} else if (seen == DONE && vm->cmd->access == WRITE) {
		page->val = vm->cmd->val;
		page->writable = true;
		page->lazy = false;
		set_dirty(slot, slot_page(slot, gpa), DIRTY);
	} else if (seen == DONE) {
		if (vm->cmd->access == READ)
			check_page_content("the guest read", vm->cmd->val, page);
		/* KVM may map a page writable, and assume the worst. */
		set_dirty(slot, slot_page(slot, gpa), MAYBE_DIRTY);
	}
}

/* The host's view of a page that it can read, and that isn't missing. */
static void check_page(struct area *area, int nr)
{
	struct page *page = &area->pages[nr];
	u64 pm;

	describe("read page %d of area %d by the host", nr, area->type);
	if (!area->alias && !is_gmem(area)) {
		if (page->prot <= PROT_NONE || page->poisoned)
			return;
		pm = pagemap(page_addr(area, nr));
		if (!(pm & (PM_PRESENT | PM_SWAP)))
			return;
	}
	check_page_content("the host read", READ_ONCE(*word(area->alias ?: area->hva, nr)), page);
	nr_checked++;
}

static void op_check_content(void)
{
	struct area *area = &areas[rnd(NR_AREAS)];

	if (!area->nr_pages)
		area = &areas[ANON];
	check_page(area, rnd_page(area->nr_pages));
}

/* At the end of a round, see that nothing was lost. */
static void check_all_pages(void)
{
	int i, nr;

	for (i = 0; i < NR_AREAS; i++) {
		for (nr = 0; nr < areas[i].nr_pages && !found; nr++)
			check_page(&areas[i], nr);
	}
}

static void sigusr1_mask(sigset_t *set)
{
	sigemptyset(set);
	sigaddset(set, SIGUSR1);
}

static void op_interrupted(void)
{
	struct fuzzed_vm *vm = rnd_vm();
	bool signal = one_in(2);
	sigset_t set;
	int r, error;

	describe("VM %ld: KVM_RUN with %s", vm - vms, signal ? "a signal" : "immediate_exit");
	scribble(vm->vcpu->run);
	vm->vcpu->run->immediate_exit = !signal;
	/* Blocked until KVM_RUN. */
	if (signal)
		raise(SIGUSR1);

	complete_exit(vm);
	r = __vcpu_run(vm->vcpu);
	error = errno;
	vm->vcpu->run->immediate_exit = false;
	if (r != -1 || error != EINTR)
		finding("KVM_RUN = %d, errno %d (%s), expected EINTR", r, error, strerror(error));

	sigusr1_mask(&set);
	if (signal)
		TEST_ASSERT_EQ(sigwaitinfo(&set, NULL), SIGUSR1);
}

#ifdef __x86_64__
static void op_bad_sync_regs(void)
{
	struct fuzzed_vm *vm = rnd_vm();
	struct kvm_run *run = vm->vcpu->run;
	u64 bad = BIT_ULL(fls64(sync_regs) + rnd(32));
	static const struct rule rules[] = { { true, EINVAL, "unknown set of registers" }, {} };
	bool dirty = one_in(2);

	describe("VM %ld: KVM_RUN with kvm_%s_regs 0x%lx", vm - vms, dirty ? "dirty" : "valid",
		 bad);
	scribble(run);
	*(dirty ? &run->kvm_dirty_regs : &run->kvm_valid_regs) = bad;
	check_rules("KVM_RUN", __vcpu_run(vm->vcpu), rules);
	run->kvm_valid_regs = 0;
	run->kvm_dirty_regs = 0;
}

static void op_pre_fault(void)
{
	struct fuzzed_vm *vm = rnd_vm();
	u64 gpa = rnd_access_gpa(vm);
	struct kvm_pre_fault_memory range = {
		.size = (1 + rnd(2 * AREA_PAGES)) * page_size,
	};
	struct kvm_run *run = vm->vcpu->run, old;
	struct kvm_pre_fault_memory input;
	const struct rule *rules;
	int nr_done, nr_may, i, r, error, seen;
	unsigned int first;

	/* A poisoned page is rare. */
	for (i = 0; i < 8 && predict(vm, gpa, READ) != SIGNAL; i++)
		gpa = rnd_access_gpa(vm);
	range.gpa = gpa;

	switch (rnd(12)) {
	case 0:
		range.gpa += 1 + rnd(page_size - 1);
		break;
	case 1:
		range.size += 1 + rnd(page_size - 1);
		break;
	case 2:
		range.size = 0;
		break;
	case 3:
		range.size = -range.size;
		break;
	case 4:
		range.flags = BIT_ULL(rnd(64));
		break;
	}

	describe("VM %ld: KVM_PRE_FAULT_MEMORY(gpa 0x%llx, size 0x%llx, flags 0x%llx)", vm - vms,
		 range.gpa, range.size, range.flags);

	/*
	 * A page is mapped for sure if it's after others that are.  Where the
	 * outcome is open, stopping there is as good as going on.
	 */
	first = predict(vm, gpa, READ);
	for (nr_done = 0; predict(vm, gpa + nr_done * page_size, READ) == DONE; nr_done++)
		;
	for (nr_may = nr_done; predict(vm, gpa + nr_may * page_size, READ) & DONE; nr_may++)
		;
	nr_done = min_t(u64, nr_done, range.size / page_size);
	nr_may = min_t(u64, nr_may, range.size / page_size);

	scribble(run);
	input = range;
	old = *run;
	WRITE_ONCE(nr_sigbus, 0);
	r = __vcpu_ioctl(vm->vcpu, KVM_PRE_FAULT_MEMORY, &range);
	error = errno;
	if (memcmp(&old, run, sizeof(old)))
		finding("kvm_run was written");
	errno = error;

	/* Nothing is mapped, and the answer is open. */
	if (r == -1 && error == EFAULT && first == (FAULTED | DONE))
		return;
	rules = (const struct rule []) {
		{ input.gpa % page_size, EINVAL, "gpa isn't aligned" },
		{ input.size % page_size, EINVAL, "size isn't aligned" },
		{ !input.size, EINVAL, "size is 0" },
		{ input.gpa + input.size < input.gpa, EINVAL, "gpa + size overflows" },
		{ input.flags, EINVAL, "flags aren't 0" },
		{ first == MMIO, ENOENT, "no slot" },
		{ first == SIGNAL, EINTR, "poisoned page" },
		{ !(first & (DONE | MMIO | SIGNAL)), EFAULT, "memory can't be accessed" },
		{}
	};

	if (!check_rules("KVM_PRE_FAULT_MEMORY", r, rules) && first != SIGNAL)
		return;

	seen = slot_page(&(struct slot) { .gpa = gpa }, range.gpa);
	if (seen < nr_done || seen > nr_may)
		finding("%d pages were mapped, expected %d to %d", seen, nr_done, nr_may);
	if (READ_ONCE(nr_sigbus) && (!range.size || predict(vm, range.gpa, READ) != SIGNAL))
		finding("%d SIGBUS", nr_sigbus);
	for (i = 0; i < seen; i++)
		set_dirty(find_slot(vm, 0, gpa + i * page_size),
			  slot_page(find_slot(vm, 0, gpa + i * page_size), gpa + i * page_size),
			  MAYBE_DIRTY);
}
#endif

static bool have_swap(void)
{
	struct sysinfo info;

	return !syscall(__NR_sysinfo, &info) && info.totalswap;
}

static bool have_nodes(void)
{
	return !access("/sys/devices/system/node/node1", F_OK);
}

/* What depends on the machine. */
static bool host_op_works(enum host_op op)
{
	switch (op) {
	case PAGEOUT:
		return have_swap();
	case MIGRATE:
		return have_nodes();
	case COLLAPSE:
		return areas[THP].nr_pages > AREA_PAGES;
	case SPLIT:
		return areas[THP].nr_pages > AREA_PAGES && split_fd >= 0;
	default:
		return true;
	}
}

static void op_host(void)
{
	struct fuzzed_vm *vm = rnd_vm();
	enum host_op op = rnd(NR_HOST_OPS);
	struct area *area = &areas[rnd(NR_AREAS)];
	struct slot *slot = find_slot(vm, 0, command_gpa(vm));
	struct page old;
	int nr, pending_nr, r;
	u64 pm;

	if (op == COLLAPSE || op == SPLIT)
		area = &areas[THP];
	if (!area->nr_pages)
		area = &areas[ANON];
	nr = rnd_page(area->nr_pages);

	/* Give the guest a chance to go on. */
	pending_nr = slot ? slot->first_page + slot_page(slot, command_gpa(vm)) : 0;
	if (vm->pending && slot && pending_nr < slot->area->nr_pages && one_in(2)) {
		area = slot->area;
		nr = pending_nr;
		if (one_in(2)) {
			area_map(area, nr, 1);
			op = one_in(3) ? POISON : one_in(2) ? COPY : HOST_WRITE;
		}
	}

	if (is_gmem(area))
		op = op == PUNCH_HOLE ? PUNCH_HOLE : HOST_WRITE;
	if ((host_ops[op].uffd && !has_uffd(area)) || (op == PUNCH_HOLE && area->fd < 0) ||
	    !host_op_works(op))
		op = HOST_WRITE;

	describe("%s, page %d of area %d", host_ops[op].name, nr, area->type);
	pm = is_gmem(area) ? 0 : pagemap(page_addr(area, nr));
	old = area->pages[nr];

	r = do_host_op(area, nr, op);
	check_answer(area, op, &old, pm, r);

	/* What may do nothing counts if the host's mapping has changed. */
	if (op == PAGEOUT || op == MIGRATE)
		r |= !((pagemap(page_addr(area, nr)) ^ pm) & (PM_PRESENT | PM_PFN));
	nr_host_ops[op] += !r;
}

static struct {
	const char *name;
	void (*fn)(void);
	int weight;
	u64 nr;
} ops[] = {
	{ "KVM_RUN", op_run, 40 },
	{ "host memory", op_host, 30 },
	{ "host reads", op_check_content, 5 },
	{ "KVM_SET_USER_MEMORY_REGION", op_set_region, 30 },
	{ "KVM_ENABLE_CAP", op_enable_cap, 3 },
	{ "KVM_CHECK_EXTENSION", op_check_extension, 1 },
	{ "dirty log", op_dirty_log, 10 },
	{ "interrupted KVM_RUN", op_interrupted, 2 },
#ifdef __x86_64__
	{ "kvm_valid_regs", op_bad_sync_regs, 1 },
	{ "KVM_PRE_FAULT_MEMORY", op_pre_fault, 6 },
#endif
};

static void random_op(void)
{
	int i, sum = 0, nr;

	for (i = 0; i < ARRAY_SIZE(ops); i++)
		sum += ops[i].weight;
	nr = rnd(sum);
	for (i = 0; nr >= ops[i].weight; i++)
		nr -= ops[i].weight;

	ops[i].nr++;
	nr_ops++;
	ops[i].fn();
}

static void create_vms(void)
{
	u64 manual = kvm_check_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
	/* No signal is blocked, the kernel's set has 64. */
	struct {
		struct kvm_signal_mask head;
		u8 sigset[8];
	} mask = { .head.len = sizeof(mask.sigset) };
	struct fuzzed_vm *vm;
	int i;

	for (i = 0; i < NR_VMS; i++) {
		vm = &vms[i];
		memset(vm, 0, sizeof(*vm));
		vm->vm = vm_create_with_one_vcpu(&vm->vcpu, guest_code);
		vm->cmd = addr_gva2hva(vm->vm, (gva_t)&guest_cmd);
		virt_map(vm->vm, WINDOW_GPA, WINDOW_GPA, WINDOW_SIZE / vm->vm->page_size);
		save_regs(vm);
		vcpu_ioctl(vm->vcpu, KVM_SET_SIGNAL_MASK, &mask.head);

		/* Neither of them, MANUAL_PROTECT_ENABLE, or INITIALLY_SET, too. */
		vm->manual_protect = manual & (one_in(3) ? 0 : one_in(2) ? 1 : 3);
		if (vm->manual_protect)
			vm_enable_cap(vm->vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
				      vm->manual_protect);
		area_create_gmem(&areas[GMEM + i], vm->vm);
	}
}

static void destroy_vms(void)
{
	struct fuzzed_vm *vm;
	u64 nr;
	int i;

	for (i = 0; i < NR_VMS; i++) {
		vm = &vms[i];
		nr = vcpu_get_stat(vm->vcpu, memory_fault_exits);
		if (nr != vm->nr_exits)
			finding("memory_fault_exits is %lu, expected %lu", nr, vm->nr_exits);
		area_destroy_gmem(&areas[GMEM + i]);
		kvm_vm_free(vm->vm);
	}
}

static void run_round(u64 seed, int max_ops)
{
	int i;

	printf("# round: seed %lu\n", seed);
	round_seed = seed;
	round_op = -1;
	in_round = true;
	found = false;
	rnd_seed(seed, -1);
	describe("begin");
	for (i = 0; i < GMEM; i++)
		area_reset(&areas[i]);
	create_vms();

	for (round_op = 0; round_op < min(max_ops, ROUND_OPS) && !found; round_op++) {
		rnd_seed(seed, round_op);
		random_op();
	}

	check_all_pages();

	/* Leave no hole where the library would map something. */
	for (i = 0; i < GMEM; i++)
		area_reset(&areas[i]);
	destroy_vms();
	in_round = false;
}

static u64 find_zero_page(void)
{
	void *mem = kvm_mmap(page_size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	u64 pfn;

	madvise(mem, page_size, MADV_NOHUGEPAGE);
	(void)READ_ONCE(*(u64 *)mem);
	pfn = pagemap(mem) & PM_PFN;
	kvm_munmap(mem, page_size);
	return pfn;
}

static bool missed;

/* What never happened wasn't tested. */
static void report_count(const char *what, const char *name, u64 nr)
{
	printf("# %-10s%-45s %lu\n", what, name, nr);
	missed |= !nr;
}

static void report(void)
{
	struct refused *r;
	int i;

	for (i = 0; i < ARRAY_SIZE(ops); i++) {
		if (ops[i].weight)
			report_count("operation", ops[i].name, ops[i].nr);
	}
	for (i = 0; i < NR_HOST_OPS; i++) {
		if (host_op_works(i))
			report_count("memory", host_ops[i].name, nr_host_ops[i]);
	}
	for (i = 0; i < ARRAY_SIZE(outcomes); i++)
		report_count("outcome", outcomes[i], nr_outcomes[i]);
	for (r = refused; r->text; r++) {
		if (areas[GMEM].nr_pages || !strcasestr(r->text, "guest_memfd"))
			report_count("refused", r->text, r->nr);
	}
	printf("# %lu operations, %lu pages read, %lu bad inputs refused, %lu exits, %d findings\n",
	       nr_ops, nr_checked, nr_refused, nr_outcomes[__builtin_ctz(FAULTED)], nr_findings);
}

static void help(const char *name)
{
	printf("Usage: %s [-s seed] [-n operations] [-t seconds] [-v] [-h]\n\n"
	       "  -s: the seed of the first round; each round of %d operations has the next one\n"
	       "  -n: the number of operations, %d by default\n"
	       "  -t: go on for this long, whatever the number of operations is\n"
	       "  -v: print each operation\n", name, ROUND_OPS, DEFAULT_OPS);
	exit(0);
}

int main(int argc, char *argv[])
{
	struct sigaction action = { .sa_sigaction = sigbus_handler, .sa_flags = SA_SIGINFO };
	long max_ops = DEFAULT_OPS, seconds = 0;
	struct timespec start;
	sigset_t set;
	u64 seed = 1;
	int i, opt;

	while ((opt = getopt(argc, argv, "s:n:t:vh")) != -1) {
		switch (opt) {
		case 's':
			seed = strtoul(optarg, NULL, 0);
			break;
		case 'n':
			max_ops = atoi_positive("Number of operations", optarg);
			break;
		case 't':
			seconds = atoi_positive("Seconds", optarg);
			break;
		case 'v':
			verbose = true;
			break;
		default:
			help(argv[0]);
		}
	}

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_EXIT_ON_MISSING) == KVM_MEM_EXIT_ON_MISSING);
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_MEMORY_FAULT_EXIT) == ALL_ACCESSES);
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_BINARY_STATS_FD));

	disable_numa_balancing();
	sigaction(SIGBUS, &action, NULL);
	sigusr1_mask(&set);
	sigprocmask(SIG_BLOCK, &set, NULL);
	setlinebuf(stdout);
	atexit(report_exit);

	page_size = getpagesize();
	pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	__TEST_REQUIRE(pagemap_fd >= 0, "no /proc/self/pagemap");
	split_fd = open("/sys/kernel/debug/split_huge_pages", O_WRONLY | O_CLOEXEC);
	zero_page = find_zero_page();
	__TEST_REQUIRE(zero_page, "pagemap has no page frame numbers, no CAP_SYS_ADMIN");

	kvm_fd = open_kvm_dev_path_or_exit();
	nr_as = max(kvm_check_cap(KVM_CAP_MULTI_ADDRESS_SPACE), 1u);
	TEST_ASSERT(nr_as <= MAX_AS, "%d address spaces", nr_as);
	max_slots = kvm_check_cap(KVM_CAP_NR_MEMSLOTS);
#ifdef __x86_64__
	sync_regs = kvm_check_cap(KVM_CAP_SYNC_REGS);
#endif
	for (i = 0; i < ARRAY_SIZE(ops); i++) {
		if (!strcmp(ops[i].name, "KVM_PRE_FAULT_MEMORY") &&
		    !kvm_has_cap(KVM_CAP_PRE_FAULT_MEMORY))
			ops[i].weight = 0;
	}

	for (i = 0; i < NR_AREAS; i++)
		area_create(&areas[i], i);

	clock_gettime(CLOCK_MONOTONIC, &start);
	while (nr_findings < MAX_FINDINGS &&
	       (seconds ? timespec_elapsed(start).tv_sec < seconds : nr_ops < max_ops))
		run_round(seed++, seconds ? ROUND_OPS : max_ops - nr_ops);

	report();
	TEST_ASSERT(nr_ops < DEFAULT_OPS || !missed, "Something above never happened");
	return nr_findings ? KSFT_FAIL : KSFT_PASS;
}
