// SPDX-License-Identifier: GPL-2.0-only
/*
 * Postcopy migration of a guest from one process to another.
 *
 * The guest verifies its own memory: each vCPU has a record in each page, with the
 * record's address, a generation, a checksum and a pattern, and knows which
 * generation it has written.  It reads and writes them in random order, while the
 * guest is moved to a process that has none of its memory.  A timer interrupts each
 * vCPU, and counts: the interrupt controller, the timer, and interrupts on their way
 * when a vCPU exits, are moved as well.
 *
 * By "exits", vCPUs that need a page exit to userspace, see KVM_MEM_EXIT_ON_MISSING;
 * by "userfaultfd", they sleep in the kernel.
 */
#include <getopt.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>

#include <linux/sizes.h>

#ifdef __x86_64__
#include <asm/kvm_para.h>
#include <asm/pvclock-abi.h>

#include "apic.h"
#else
#include "arch_timer.h"
#include "gic.h"
#endif

#include "kselftest.h"
#include "kvm_util.h"
#include "postcopy.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"

#define FIRST_SLOT	10
#define MAILBOX_SLOT	100
#define TEST_GPA	SZ_4G
#define MAILBOX_GPA	0xc0000000ul

/* What a guest calls a page here, whatever the sizes of real pages are. */
#define BLOCK_SIZE	SZ_4K

/* Not migrated: the guest's view of the world outside. */
struct mailbox {
	bool stop;
	/* Leave KVM's emulator alone. */
	bool no_emulation;
	/* Read each record before it's written. */
	bool no_blind_writes;
	struct {
		u64 work;
		u64 writes;
		u64 ticks;
		/* Cycles of the first access to a page after the migration. */
		struct pc_hist first[2];
	} vcpus[PC_MAX_VCPUS];
	/* By each vCPU, after the migration. */
	u8 seen[];
};

static struct mailbox *mailbox;
static size_t mailbox_size;

/* The guest's memory: generations, KVM's own data, and then blocks of records. */
struct guest_config {
	u64 nr_vcpus;
	u64 nr_blocks;
	u64 record_size;
	u64 generations;
	u64 generations_stride;
	u64 pv;
	u64 pv_stride;
	u64 blocks;
	u64 seed;
	bool clock;
	bool steal;
	bool ticks;
};

static struct guest_config guest_config;
static bool pv_clock, pv_steal;

/* Of each vCPU's timer, as the guest has counted. */
#define TICK_MS		10
static u64 guest_ticks[PC_MAX_VCPUS];

static void guest_tick(u32 vcpu_id)
{
	struct mailbox *box = (void *)MAILBOX_GPA;

	GUEST_ASSERT_EQ(guest_ticks[vcpu_id], box->vcpus[vcpu_id].ticks);
	guest_ticks[vcpu_id]++;
	box->vcpus[vcpu_id].ticks++;
}

/* A record begins with these words, the rest is the pattern. */
enum { ADDRESS, GENERATION, CHECKSUM, PATTERN };

static __always_inline u64 pattern(u64 gva, u64 generation, u64 word)
{
	u64 x = gva ^ generation * 0x9e3779b97f4a7c15ul ^ word * 0xc2b2ae3d27d4eb4ful;

	return (x ^ x >> 29) * 0xbf58476d1ce4e5b9ul;
}

/* Returns the index of the first wrong word, or -1. */
static int check_record(const u64 *record, u64 gva, u32 generation, u64 size, u64 *want)
{
	int i, nr = size / sizeof(u64);
	u64 sum = 0;

	for (i = PATTERN; i < nr; i++) {
		*want = generation ? pattern(gva, generation, i) : 0;
		if (record[i] != *want)
			return i;
		sum += *want;
	}

	for (i = 0; i < PATTERN; i++) {
		*want = !generation ? 0 : i == ADDRESS ? gva : i == GENERATION ? generation : sum;
		if (record[i] != *want)
			return i;
	}

	return -1;
}

static void write_record(u64 *record, u32 generation, u64 size)
{
	int i, nr = size / sizeof(u64);
	u64 sum = 0;

	for (i = PATTERN; i < nr; i++) {
		record[i] = pattern((u64)record, generation, i);
		sum += record[i];
	}

	record[GENERATION] = generation;
	record[CHECKSUM] = sum;
	record[ADDRESS] = (u64)record;
}

static u64 guest_random(u64 *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

#ifdef __x86_64__
#define OUTS_PORT	0x80

static u64 guest_cycles(void)
{
	return rdtsc();
}

static void guest_pv_init(u64 vcpu_id)
{
	u64 pv = guest_config.pv + 2 * vcpu_id * guest_config.pv_stride;

	if (guest_config.clock)
		wrmsr(MSR_KVM_SYSTEM_TIME_NEW, pv | KVM_MSR_ENABLED);
	if (guest_config.steal)
		wrmsr(MSR_KVM_STEAL_TIME, (pv + guest_config.pv_stride) | KVM_MSR_ENABLED);
}

/* KVM adds to what is there, i.e. none of this ever decreases. */
static void guest_pv_check(u64 vcpu_id, u64 *last)
{
	u64 pv = guest_config.pv + 2 * vcpu_id * guest_config.pv_stride;
	struct pvclock_vcpu_time_info *clock = (void *)pv;
	struct kvm_steal_time *steal = (void *)pv + guest_config.pv_stride;

	if (guest_config.clock) {
		GUEST_ASSERT(!(READ_ONCE(clock->version) & 1));
		GUEST_ASSERT(READ_ONCE(clock->version) && READ_ONCE(clock->tsc_to_system_mul));
	}
	if (guest_config.steal) {
		GUEST_ASSERT(!(READ_ONCE(steal->version) & 1));
		GUEST_ASSERT(READ_ONCE(steal->version) >= last[0]);
		GUEST_ASSERT(READ_ONCE(steal->steal) >= last[1]);
		last[0] = READ_ONCE(steal->version);
		last[1] = READ_ONCE(steal->steal);
	}
}

/* An access by the emulator: userspace gets a byte, and verifies it. */
static void guest_emulate(u64 *record, u32 generation)
{
	u64 *src = &record[GENERATION];

	asm volatile("outsb" : "+S"(src) : "a"((u64)generation), "d"(OUTS_PORT) : "memory");
}

static bool has_clock(struct kvm_vcpu *vcpu)
{
	return true;
}

static bool has_steal(struct kvm_vcpu *vcpu)
{
	return kvm_cpu_has(X86_FEATURE_KVM_STEAL_TIME);
}

static void setup_steal(struct kvm_vcpu *vcpu, u64 gpa)
{
}

static bool handle_emulate(struct kvm_vcpu *vcpu)
{
	struct kvm_run *run = vcpu->run;
	struct kvm_regs regs;
	u8 byte;

	if (run->exit_reason != KVM_EXIT_IO || run->io.port != OUTS_PORT)
		return false;

	vcpu_regs_get(vcpu, &regs);
	byte = *((u8 *)run + run->io.data_offset);
	TEST_ASSERT(byte == (u8)regs.rax, "KVM has read 0x%x at 0x%llx, expected 0x%x",
		    byte, regs.rsi, (u8)regs.rax);
	return true;
}

static u64 cycles_khz(struct kvm_vm *vm)
{
	return __vm_ioctl(vm, KVM_GET_TSC_KHZ, NULL);
}

#define TICK_VECTOR	0x40
#define APIC_TDCR_DIV_1	0xb

static void guest_tick_handler(struct ex_regs *regs)
{
	guest_tick(x2apic_read_reg(APIC_ID));
	x2apic_write_reg(APIC_EOI, 0);
}

static void guest_tick_init(void)
{
	x2apic_enable();
	x2apic_write_reg(APIC_TDCR, APIC_TDCR_DIV_1);
	x2apic_write_reg(APIC_LVTT, APIC_LVT_TIMER_PERIODIC | TICK_VECTOR);
	/* KVM's APIC counts nanoseconds. */
	x2apic_write_reg(APIC_TMICT, TICK_MS * 1000000);
	asm volatile("sti");
}

static bool setup_ticks(struct kvm_vm *vm, struct kvm_vcpu **vcpus, int nr_vcpus)
{
	vm_install_exception_handler(vm, TICK_VECTOR, guest_tick_handler);
	return true;
}
#else
#define PV_TIME_ST	0xc5000021

struct st_time {
	u32 rev;
	u32 attr;
	u64 st_time;
};

static u64 guest_cycles(void)
{
	isb();
	return read_sysreg(cntvct_el0);
}

static void guest_pv_init(u64 vcpu_id)
{
	struct arm_smccc_res res;

	if (!guest_config.steal)
		return;

	do_smccc(PV_TIME_ST, 0, 0, 0, 0, 0, 0, 0, &res);
	GUEST_ASSERT_EQ(res.a0, guest_config.pv + (2 * vcpu_id + 1) * guest_config.pv_stride);
}

/* KVM adds to what is there, i.e. it never decreases. */
static void guest_pv_check(u64 vcpu_id, u64 *last)
{
	struct st_time *steal = (void *)guest_config.pv +
				(2 * vcpu_id + 1) * guest_config.pv_stride;

	if (!guest_config.steal)
		return;

	GUEST_ASSERT(!READ_ONCE(steal->rev) && !READ_ONCE(steal->attr));
	GUEST_ASSERT(READ_ONCE(steal->st_time) >= last[0]);
	last[0] = READ_ONCE(steal->st_time);
}

static void guest_emulate(u64 *record, u32 generation)
{
}

static bool has_clock(struct kvm_vcpu *vcpu)
{
	return false;
}

static bool has_steal(struct kvm_vcpu *vcpu)
{
	return !__vcpu_has_device_attr(vcpu, KVM_ARM_VCPU_PVTIME_CTRL, KVM_ARM_VCPU_PVTIME_IPA);
}

static void setup_steal(struct kvm_vcpu *vcpu, u64 gpa)
{
	vcpu_device_attr_set(vcpu, KVM_ARM_VCPU_PVTIME_CTRL, KVM_ARM_VCPU_PVTIME_IPA, &gpa);
}

static bool handle_emulate(struct kvm_vcpu *vcpu)
{
	return false;
}

static u64 cycles_khz(struct kvm_vm *vm)
{
	return read_sysreg(cntfrq_el0) / 1000;
}

static u32 tick_irq;

static void guest_tick_handler(struct ex_regs *regs)
{
	u32 irq = gic_get_and_ack_irq();

	/* The timer's line may have gone down meanwhile. */
	if (irq == IAR_SPURIOUS)
		return;

	GUEST_ASSERT_EQ(irq, tick_irq);
	timer_set_next_cval_ms(VIRTUAL, TICK_MS);
	guest_tick(guest_get_vcpuid());
	gic_set_eoi(irq);
}

static void guest_tick_init(void)
{
	gic_init(GIC_V3, guest_config.nr_vcpus);
	gic_irq_enable(tick_irq);
	timer_set_next_cval_ms(VIRTUAL, TICK_MS);
	timer_set_ctl(VIRTUAL, CTL_ENABLE);
	local_irq_enable();
}

static bool setup_ticks(struct kvm_vm *vm, struct kvm_vcpu **vcpus, int nr_vcpus)
{
	int i;

	if (!vm->arch.has_gic)
		return false;

	vm_init_descriptor_tables(vm);
	vm_install_exception_handler(vm, VECTOR_IRQ_CURRENT, guest_tick_handler);
	for (i = 0; i < nr_vcpus; i++)
		vcpu_init_descriptor_tables(vcpus[i]);

	tick_irq = vcpu_get_vtimer_irq(vcpus[0]);
	sync_global_to_guest(vm, tick_irq);
	return true;
}
#endif

static void guest_check(u64 vcpu_id, u64 *record, u32 generation)
{
	u64 want;
	int word = check_record(record, (u64)record, generation, guest_config.record_size, &want);

	if (word >= 0)
		GUEST_FAIL("vCPU %lu: 0x%lx at 0x%lx, expected 0x%lx, generation %u",
			   vcpu_id, record[word], (u64)&record[word], want, generation);
}

static void guest_code(u64 vcpu_id)
{
	struct guest_config *config = &guest_config;
	struct mailbox *box = (void *)MAILBOX_GPA;
	u8 *seen = box->seen + vcpu_id * config->nr_blocks;
	u32 *generations = (u32 *)(config->generations + vcpu_id * config->generations_stride);
	u64 random = (config->seed + vcpu_id + 1) * 0x9e3779b97f4a7c15ul, op, i, cycles;
	u64 last[2] = {};
	u64 *record;
	bool blind;

	guest_pv_init(vcpu_id);
	if (config->ticks)
		guest_tick_init();

	while (!READ_ONCE(box->stop)) {
		i = guest_random(&random) % config->nr_blocks;
		op = guest_random(&random) >> 32;
		record = (u64 *)(config->blocks + i * BLOCK_SIZE + vcpu_id * config->record_size);

		/* Write without having read, now and then. */
		blind = !(op & 3) && !READ_ONCE(box->no_blind_writes);
		cycles = guest_cycles();
		if (blind)
			WRITE_ONCE(record[ADDRESS], (u64)record);
		else
			READ_ONCE(record[ADDRESS]);
		cycles = guest_cycles() - cycles;
		if (!seen[i])
			pc_hist_add(&box->vcpus[vcpu_id].first[blind], cycles);
		seen[i] = true;

		if (!blind)
			guest_check(vcpu_id, record, generations[i]);
		if (blind || op & 4) {
			write_record(record, generations[i] + 1, config->record_size);
			generations[i]++;
			box->vcpus[vcpu_id].writes++;
		}

		if (!(++box->vcpus[vcpu_id].work % 64)) {
			guest_pv_check(vcpu_id, last);
			if (READ_ONCE(box->no_emulation))
				continue;
			i = guest_random(&random) % config->nr_blocks;
			record = (u64 *)(config->blocks + i * BLOCK_SIZE +
					 vcpu_id * config->record_size);
			guest_emulate(record, generations[i]);
		}
	}

	GUEST_DONE();
}

/* What one migration is like. */
struct config {
	bool by_exits;
	enum vm_mem_backing_src_type src_type;
	int nr_vcpus;
	u64 size;
	int nr_slots;
	int nr_readers;
	u32 seed;
	bool dirty_log;
	u32 push_delay;
	u32 linger_ms;
	bool tcp;
	bool quiet;

	/* Trouble: percentages, and ways to break the connection. */
	u8 delay, duplicate, reorder;
	int nr_breaks;
	u64 corrupt, zero, lose;
	/* Hold back the page that vCPU 0's steal time is in. */
	bool hold;
	/* What to do before there is a source, and while the first connection is broken. */
	void (*beginning)(const struct config *config);
	void (*scenario)(const struct config *config);
};

/* How the processes talk to each other, apart from the socket. */
struct shared {
	struct pc_stats stats;
	u64 cycles_khz;
	struct pc_layout layout;

	/* Done by the source. */
	u64 work[PC_MAX_VCPUS];
	u64 ticks[PC_MAX_VCPUS];

	/* For the source, which waits for "go" before it connects again. */
	bool hold;
	bool no_push;
	bool break_now;
	bool wait_for_go;
	bool go;
	bool broken;

	/* The destination takes connections. */
	bool listens;

	u32 inspect;
	u32 inspected;
	u32 in_user_space;
	u32 in_kernel;
	u32 have_regs;
	u32 paused;
	bool get_regs_blocks;

	/* The guest's memory is damaged, or the guest is gone. */
	bool mismatch;
	char failure[512];
	/* Of each page of the size of the host's, after the source has stopped. */
	bool hashed;
	u64 hashes[];
};

static struct shared *shared;
static size_t shared_size;
static struct sockaddr_storage address;
static socklen_t address_size;
static int listen_fd;

static int open_socket(void)
{
	int fd = socket(address.ss_family, SOCK_STREAM, 0), one = 1;

	/* Requests are small, and vCPUs wait for the answer. */
	if (fd >= 0 && address.ss_family == AF_INET)
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	return fd;
}

/* The kernel picks the name, or the port.  Returns -1 if that doesn't work. */
static int listen_somewhere(const struct config *config)
{
	struct sockaddr_in in = {
		.sin_family = AF_INET,
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK),
	};
	int fd;

	memset(&address, 0, sizeof(address));
	address.ss_family = AF_UNIX;
	address_size = sizeof(address.ss_family);
	if (config->tcp) {
		memcpy(&address, &in, sizeof(in));
		address_size = sizeof(in);
	}

	fd = open_socket();
	if (fd < 0 || bind(fd, (void *)&address, address_size))
		return -1;

	address_size = sizeof(address);
	return getsockname(fd, (void *)&address, &address_size) || listen(fd, 8) ? -1 : fd;
}

static int connect_to_destination(void)
{
	int fd = open_socket();

	TEST_ASSERT(fd >= 0 && !connect(fd, (void *)&address, address_size),
		    "connect() failed, errno = %d", errno);
	return fd;
}

static u64 guest_work(void)
{
	u64 work = 0;
	int i;

	for (i = 0; i < PC_MAX_VCPUS; i++)
		work += READ_ONCE(mailbox->vcpus[i].work);
	return work;
}

static u64 hash_page(const void *page)
{
	const u64 *word = page, *end = page + getpagesize();
	u64 hash = 0;

	for (; word < end; word++)
		hash = (hash ^ *word) * 0x100000001b3ul + (hash >> 47);
	return hash;
}

static bool is_hugetlb(enum vm_mem_backing_src_type type)
{
	return is_backing_src_hugetlb(type) || type == VM_MEM_SRC_SHARED_HUGETLB;
}

static u64 backing_page_size(enum vm_mem_backing_src_type type)
{
	return is_hugetlb(type) ? get_backing_src_pagesz(type) : getpagesize();
}

static void add_mem(struct pc_dst *dst, u32 slot, u64 page_size)
{
	int i = dst->layout.nr_slots++;
	struct userspace_mem_region *region = memslot2region(dst->vm, slot);

	dst->layout.slots[i] = (struct pc_slot) {
		.gpa = region->region.guest_phys_addr,
		.size = region->region.memory_size,
		.page_size = page_size,
		.hva = (u64)region->host_mem,
	};
	dst->regions[i] = (struct pc_region) { &dst->mems[i], dst, i };
	dst->mems[i] = (struct memory) {
		.vm_fd = dst->vm->fd,
		.page_size = page_size,
		.alias = region->host_alias,
		.uffd = -1,
		.region = {
			.slot = slot,
			.guest_phys_addr = region->region.guest_phys_addr,
			.memory_size = region->region.memory_size,
			.userspace_addr = (u64)region->host_mem,
		},
	};
}

static void layout_guest(const struct config *config, struct guest_config *guest)
{
	u64 pv_stride = max_t(u64, getpagesize(), BLOCK_SIZE);
	u64 stride = align_up(config->size / BLOCK_SIZE * sizeof(u32), BLOCK_SIZE);

	*guest = (struct guest_config) {
		.nr_vcpus = config->nr_vcpus,
		.record_size = BLOCK_SIZE / config->nr_vcpus & ~7ul,
		.generations = TEST_GPA,
		.generations_stride = stride,
		.pv = TEST_GPA + align_up(config->nr_vcpus * stride, pv_stride),
		.pv_stride = pv_stride,
		.seed = config->seed,
		.clock = pv_clock,
		.steal = pv_steal,
	};
	guest->blocks = guest->pv + 2 * config->nr_vcpus * pv_stride;
	guest->nr_blocks = (TEST_GPA + config->size - guest->blocks) / BLOCK_SIZE;
}

static bool handle_exit(struct pc_vcpu *vcpu);

/* Both processes have the same VM, but only the first one uses its memory. */
static struct pc_dst *create_vm(const struct config *config)
{
	struct pc_dst *dst = calloc(1, sizeof(*dst));
	struct kvm_vcpu *vcpus[PC_MAX_VCPUS];
	u64 size = config->size / config->nr_slots;
	struct guest_config guest;
	struct kvm_vm *vm;
	int i;

	TEST_ASSERT(dst, "No memory");
	vm = __vm_create_with_vcpus(VM_SHAPE_DEFAULT, config->nr_vcpus,
				    (config->size + mailbox_size) / MIN_PAGE_SIZE,
				    guest_code, vcpus);

	dst->vm = vm;
	dst->stats = &shared->stats;
	dst->by_exits = config->by_exits;
	dst->nr_readers = config->nr_readers;
	dst->handle_exit = handle_exit;
	dst->listen_fd = listen_fd;
	dst->layout.nr_vcpus = config->nr_vcpus;
	pthread_mutex_init(&dst->lock, NULL);
	pthread_cond_init(&dst->cond, NULL);

	add_mem(dst, 0, getpagesize());
	for (i = 0; i < config->nr_slots; i++) {
		vm_userspace_mem_region_add(vm, config->src_type, TEST_GPA + i * size,
					    FIRST_SLOT + i, size / vm->page_size, 0);
		add_mem(dst, FIRST_SLOT + i, backing_page_size(config->src_type));
	}
	virt_map(vm, TEST_GPA, TEST_GPA, config->size / vm->page_size);

	vm_set_user_memory_region(vm, MAILBOX_SLOT, 0, MAILBOX_GPA, mailbox_size, mailbox);
	virt_map(vm, MAILBOX_GPA, MAILBOX_GPA, mailbox_size / vm->page_size);

	layout_guest(config, &guest);
	guest.ticks = setup_ticks(vm, vcpus, config->nr_vcpus);
	guest_config = guest;
	sync_global_to_guest(vm, guest_config);

	for (i = 0; i < config->nr_vcpus; i++) {
		dst->vcpus[i].vcpu = vcpus[i];
		vcpu_args_set(vcpus[i], 1, i);
		if (pv_steal)
			setup_steal(vcpus[i], guest.pv + (2 * i + 1) * guest.pv_stride);
	}
	shared->cycles_khz = cycles_khz(vm);

	return dst;
}

static void __noreturn report_mismatch(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(shared->failure, sizeof(shared->failure), fmt, ap);
	va_end(ap);
	WRITE_ONCE(shared->mismatch, true);
	_exit(KSFT_FAIL);
}

/*
 * The guest says where its struct ucall is by an address of the source.  At the
 * destination, even this access may find the page missing.
 */
static bool handle_exit(struct pc_vcpu *vcpu)
{
	struct pc_dst *dst = vcpu->dst;
	struct ucall uc = {};
	void *addr;

	if (handle_emulate(vcpu->vcpu))
		return false;

	addr = ucall_arch_get_ucall(vcpu->vcpu);
	if (addr) {
		addr += dst->mems[0].region.userspace_addr - dst->layout.slots[0].hva;
		memcpy(&uc, addr, sizeof(uc));
		vcpu_run_complete_io(vcpu->vcpu);
	}

	switch (uc.cmd) {
	case UCALL_DONE:
		return true;
	case UCALL_ABORT:
		report_mismatch("guest: %s:%lu: %s", (char *)uc.args[GUEST_FILE],
				uc.args[GUEST_LINE], uc.buffer);
	default:
		TEST_FAIL("vCPU %u: unexpected exit %u (%s)", vcpu->vcpu->id,
			  vcpu->vcpu->run->exit_reason,
			  exit_reason_str(vcpu->vcpu->run->exit_reason));
	}
}

static void wait_for(bool *flag)
{
	while (!READ_ONCE(*flag))
		usleep(1000);
}

static void wait_for_work(u64 work)
{
	while (guest_work() < work)
		usleep(1000);
}

/* The source */

static struct pc_trouble make_trouble(const struct config *config, int connection,
				      const struct pc_layout *layout, u64 total)
{
	struct pc_trouble trouble = {
		.rng = new_kvm_random_state(config->seed * 16 + connection),
		.delay = config->delay,
		.duplicate = config->duplicate,
		.reorder = config->reorder,
		.spoil_gpa = guest_config.blocks,
		.corrupt = config->corrupt,
		.zero = config->zero,
		.lose = config->lose,
		.no_push = &shared->no_push,
	};
	int i;

	/* Most breaks find pages that are still missing. */
	if (connection < config->nr_breaks) {
		trouble.break_how = kvm_random_u32_in_range(&trouble.rng, PC_BREAK_CLEAN,
							    PC_BREAK_KILL);
		if (config->scenario)
			trouble.break_now = &shared->break_now;
		trouble.break_at = kvm_random_u64_in_range(&trouble.rng, 1,
							   total / (config->nr_breaks + 1));
	}

	if (config->hold) {
		u64 gpa = guest_config.pv + guest_config.pv_stride;

		trouble.hold = &shared->hold;
		for (i = 1; gpa - layout->slots[i].gpa >= layout->slots[i].size; i++)
			;
		trouble.hold_slot = i;
		trouble.hold_offset = (gpa - layout->slots[i].gpa) &
				      ~(layout->slots[i].page_size - 1);
	}

	return trouble;
}

static pid_t start_sender(struct pc_source *src)
{
	int sndbuf = SZ_64K, fd;
	pid_t pid = fork();

	TEST_ASSERT(pid >= 0, "fork() failed, errno = %d", errno);
	if (pid)
		return pid;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	fd = connect_to_destination();
	/* Whatever is in a buffer is sent before a page that is needed at once. */
	setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &sndbuf, sizeof(sndbuf));
	_exit(pc_send_guest(src, fd) ? 1 : 0);
}

static void __noreturn run_source(const struct config *config)
{
	struct pc_dst *vm = create_vm(config);
	struct pc_source src = {
		.layout = vm->layout,
		.push_delay = config->push_delay,
	};
	u64 total = 0, hash = 0, page;
	int connection, i, status;
	pid_t pid;

	src.layout.session = (u64)getpid() << 32 | config->seed | 1;
	shared->layout = src.layout;
	for (i = 0; i < src.layout.nr_slots; i++) {
		src.hva[i] = (void *)src.layout.slots[i].hva;
		total += src.layout.slots[i].size / src.layout.slots[i].page_size;
	}

	pc_run_vcpus(vm);
	wait_for_work(2 * guest_config.nr_blocks);
	usleep(config->linger_ms * 1000);

	shared->stats.paused_ns = pc_now();
	pc_pause_vcpus(vm);
	for (i = 0; i < config->nr_vcpus; i++)
		wait_for(&vm->vcpus[i].parked);
	src.vm_state = pc_save_vm(vm->vm, &src.vm_state_size);
	for (i = 0; i < config->nr_vcpus; i++)
		src.vcpu_state[i] = pc_save_vcpu(vm->vcpus[i].vcpu, &src.vcpu_state_size[i]);

	memset(mailbox->seen, 0, config->nr_vcpus * guest_config.nr_blocks);
	for (i = 0; i < config->nr_vcpus; i++) {
		memset(mailbox->vcpus[i].first, 0, sizeof(mailbox->vcpus[i].first));
		shared->work[i] = mailbox->vcpus[i].work;
		shared->ticks[i] = mailbox->vcpus[i].ticks;
	}

	for (connection = 0;; connection++) {
		src.trouble = make_trouble(config, connection, &src.layout, total);
		pid = start_sender(&src);

		for (i = 0; !shared->hashed && i < src.layout.nr_slots; i++) {
			for (page = 0; page < src.layout.slots[i].size; page += getpagesize())
				shared->hashes[hash++] = hash_page(src.hva[i] + page);
		}
		shared->hashed = true;

		TEST_ASSERT(waitpid(pid, &status, 0) == pid, "waitpid() failed");
		if (!status)
			break;

		if (shared->mismatch)
			_exit(0);
		TEST_ASSERT(connection < config->nr_breaks,
			    "The destination has closed the connection: %s", shared->stats.error);
		WRITE_ONCE(shared->broken, true);
		if (shared->wait_for_go)
			wait_for(&shared->go);
	}

	_exit(0);
}

/* The destination */

/* Returns the system call that a thread sleeps in, or -1. */
static int sleeps_in(pid_t tid)
{
	char path[64];
	int nr = -1;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/self/task/%d/syscall", tid);
	f = fopen(path, "r");
	TEST_ASSERT(f, "Can't open %s, errno = %d", path, errno);
	if (fscanf(f, "%d", &nr) != 1)
		nr = -1;
	fclose(f);
	return nr;
}

struct get_regs {
	struct pc_vcpu *vcpu;
	pid_t tid;
	bool done;
};

static u64 get_pc(struct kvm_vcpu *vcpu)
{
#ifdef __x86_64__
	struct kvm_regs regs;

	vcpu_regs_get(vcpu, &regs);
	return regs.rip;
#else
	return vcpu_get_reg(vcpu, ARM64_CORE_REG(regs.pc));
#endif
}

static void *get_regs_fn(void *arg)
{
	struct get_regs *get = arg;

	WRITE_ONCE(get->tid, syscall(__NR_gettid));
	get_pc(get->vcpu->vcpu);
	WRITE_ONCE(get->done, true);
	return NULL;
}

/*
 * No page arrives, hence all vCPUs get stuck sooner or later.  Where, and can the
 * VMM see what they are up to, and stop them?
 */
static void inspect(struct pc_dst *dst, const struct config *config)
{
	int nr = config->nr_vcpus, user = 0, kernel = 0, tries = 0, last, i;
	struct get_regs get = { .vcpu = &dst->vcpus[0] };
	struct pc_vcpu *vcpu;
	pthread_t thread;

	do {
		usleep(5000);
		last = user + kernel;
		user = 0;
		kernel = 0;
		for (i = 0; i < nr; i++) {
			vcpu = &dst->vcpus[i];
			if (READ_ONCE(vcpu->page))
				user++;
			else if (READ_ONCE(vcpu->tid) && sleeps_in(vcpu->tid) == __NR_ioctl)
				kernel++;
		}
	} while (user + kernel < nr || last < nr ||
		 (kernel && !READ_ONCE(dst->stats->outstanding)));

	shared->in_user_space = user;
	shared->in_kernel = kernel;

	shared->have_regs = 0;
	for (i = 0; i < nr; i++) {
		if (READ_ONCE(dst->vcpus[i].page) && get_pc(dst->vcpus[i].vcpu))
			shared->have_regs++;
	}

	/* Whoever wants to look at a vCPU that sleeps in KVM_RUN sleeps as well. */
	if (!READ_ONCE(dst->vcpus[0].page)) {
		kvm_pthread_create(&thread, NULL, get_regs_fn, &get);
		while (!READ_ONCE(get.tid) || sleeps_in(get.tid) != __NR_ioctl)
			usleep(1000);
		shared->get_regs_blocks = !READ_ONCE(get.done);
	}

	/* Give those a chance that need not stop, too. */
	pc_pause_vcpus(dst);
	do {
		usleep(1000);
		for (i = shared->paused = 0; i < nr; i++)
			shared->paused += READ_ONCE(dst->vcpus[i].parked);
	} while (shared->paused < user || (shared->paused < nr && ++tries < 500));

	WRITE_ONCE(shared->inspected, shared->inspect);
	wait_for(&shared->go);

	/* It takes a vCPU that leaves KVM_RUN. */
	if (get.tid)
		kvm_pthread_join(thread, NULL);
	pc_resume_vcpus(dst);
}

/* With dirty logging, what isn't dirty must be what the source has sent. */
static void sweep_dirty_log(struct pc_dst *dst, u64 *nr_clean)
{
	u64 hash = 0, page;
	int i;

	*nr_clean = 0;
	for (i = 0; i < dst->layout.nr_slots; i++) {
		struct kvm_userspace_memory_region *region = &dst->mems[i].region;
		u64 nr = region->memory_size / getpagesize();
		unsigned long *log = calloc(1, align_up(nr, 64) / 8);

		TEST_ASSERT(log, "No memory");
		kvm_vm_get_dirty_log(dst->vm, region->slot, log);
		for (page = 0; page < nr; page++, hash++) {
			void *mem = (void *)region->userspace_addr + page * getpagesize();

			if (test_bit(page, log))
				continue;
			(*nr_clean)++;
			if (hash_page(mem) != shared->hashes[hash])
				report_mismatch("slot %d, page 0x%lx: not dirty, nor the source's",
						i, page);
		}
		free(log);
	}
}

/* The guest has stopped between two records. */
static void sweep(struct pc_dst *dst, const struct config *config)
{
	u64 want, gva, sum, i, nr_clean = 0;
	struct guest_config *guest = &guest_config;
	u32 generation;
	void *record;
	int v, word;

	for (v = 0; v < config->nr_vcpus; v++) {
		for (i = sum = 0; i < guest->nr_blocks; i++) {
			generation = *(u32 *)addr_gpa2hva(dst->vm, guest->generations +
							  v * guest->generations_stride +
							  i * sizeof(u32));
			sum += generation;
			gva = guest->blocks + i * BLOCK_SIZE + v * guest->record_size;
			record = addr_gpa2hva(dst->vm, gva);
			word = check_record(record, gva, generation, guest->record_size, &want);
			if (word >= 0)
				report_mismatch("end: vCPU %d, 0x%lx, word %d, generation %u",
						v, gva, word, generation);
		}

		if (sum != mailbox->vcpus[v].writes)
			report_mismatch("end: vCPU %d has written %lu times, memory says %lu",
					v, mailbox->vcpus[v].writes, sum);
	}

	if (config->dirty_log) {
		wait_for(&shared->hashed);
		sweep_dirty_log(dst, &nr_clean);
		TEST_ASSERT(nr_clean, "All pages are dirty");
	}
}

static u64 count_exits(struct pc_dst *dst)
{
	u64 exits = 0;
	int i;

	for (i = 0; i < dst->layout.nr_vcpus && has_exit_on_missing(dst->vm->fd); i++)
		exits += vcpu_get_stat(dst->vcpus[i].vcpu, memory_fault_exits);
	return exits;
}

/*
 * The content remains, but KVM needs page faults to get at it, i.e. a slot that
 * still has the flag exits: shared memory is unmapped, and the child of a fork
 * leaves private memory write-protected.
 */
static void make_inaccessible(struct pc_dst *dst)
{
	pid_t pid = fork();
	int i, r;

	TEST_ASSERT(pid >= 0, __KVM_SYSCALL_ERROR("fork()", pid));
	if (!pid)
		_exit(0);
	TEST_ASSERT(waitpid(pid, NULL, 0) == pid, "waitpid() failed");

	for (i = 0; i < dst->layout.nr_slots; i++) {
		if (!dst->mems[i].alias)
			continue;
		r = madvise((void *)dst->mems[i].region.userspace_addr,
			    dst->mems[i].region.memory_size, MADV_DONTNEED);
		TEST_ASSERT(!r, __KVM_SYSCALL_ERROR("madvise()", r));
	}
}

/* Each vCPU has to work, and to be interrupted by its timer. */
static void go_on_verified(const struct config *config)
{
	u64 end, work;
	int i;

	wait_for_work(guest_work() + guest_config.nr_blocks);

	/* A vCPU that has run, and for that long, must have seen ticks. */
	end = pc_now() + 10 * NSEC_PER_SEC;
	for (i = 0; i < config->nr_vcpus && guest_config.ticks; i++) {
		work = READ_ONCE(mailbox->vcpus[i].work) + guest_config.nr_blocks;
		while (READ_ONCE(mailbox->vcpus[i].ticks) < shared->ticks[i] + 3) {
			if (pc_now() > end && READ_ONCE(mailbox->vcpus[i].work) > work)
				report_mismatch("vCPU %d has lost its timer", i);
			usleep(1000);
		}
	}
}

static void pause_and_wait(struct pc_dst *dst)
{
	int i;

	pc_pause_vcpus(dst);
	for (i = 0; i < dst->layout.nr_vcpus; i++)
		wait_for(&dst->vcpus[i].parked);
}

static void __noreturn run_destination(const struct config *config)
{
	struct pc_dst *dst = create_vm(config);
	int i;

	for (i = 0; i < dst->layout.nr_slots && config->dirty_log; i++)
		dst->mems[i].region.flags |= KVM_MEM_LOG_DIRTY_PAGES;
	dst->nr_mems = dst->layout.nr_slots;

	pc_dst_start(dst);
	if (config->beginning) {
		shared->layout = dst->layout;
		WRITE_ONCE(shared->listens, true);
	}
	pc_dst_wait_state(dst);
	pc_dst_run(dst);

	while (!READ_ONCE(dst->complete)) {
		if (READ_ONCE(shared->inspect) != shared->inspected)
			inspect(dst, config);
		usleep(1000);
	}
	pc_dst_wait_pages(dst);
	pc_dst_finish(dst);

	pause_and_wait(dst);
	shared->stats.exits = count_exits(dst);
	pc_resume_vcpus(dst);
	usleep(config->linger_ms * 1000);

	pause_and_wait(dst);
	make_inaccessible(dst);
	pc_resume_vcpus(dst);

	go_on_verified(config);
	WRITE_ONCE(mailbox->stop, true);
	pc_join_vcpus(dst);

	if (count_exits(dst) != shared->stats.exits)
		report_mismatch("%lu exits after the end", count_exits(dst) - shared->stats.exits);
	sweep(dst, config);
	_exit(0);
}

/* The judge, i.e. the parent of both */

static FILE *json;
#define JSON_U64(name)	", \"" name "\": %lu"
static int interval_ms = 100;

#define MAX_SAMPLES	16384

static struct sample {
	u64 ns;
	u64 work;
	u64 pages;
} samples[MAX_SAMPLES];
static int nr_samples;

static const char *by_name(const struct config *config)
{
	return config->by_exits ? "exits" : "userfaultfd";
}

static void take_sample(void)
{
	u64 now = pc_now();

	if (nr_samples == MAX_SAMPLES ||
	    (nr_samples && now - samples[nr_samples - 1].ns < interval_ms * 1000000ull))
		return;

	samples[nr_samples++] = (struct sample) { now, guest_work(), shared->stats.pages };
}

static void show_progress(const struct config *config, bool end)
{
	static u64 last_ns, last_pages;
	struct pc_stats *stats = &shared->stats;
	struct winsize size = {};
	u64 now = pc_now(), pages = READ_ONCE(stats->pages), rate;
	bool bar;
	int done;

	/* A terminal without a width is no terminal, but e.g. another test's. */
	bar = !ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) && size.ws_col >= 80;
	if (config->quiet || !stats->total ||
	    (!end && now - last_ns < (bar ? 100 : 1000) * 1000000ull))
		return;

	rate = pages >= last_pages && last_ns ?
	       (pages - last_pages) * NSEC_PER_SEC / (now - last_ns + 1) : 0;
	last_ns = now;
	last_pages = pages;

	if (bar) {
		done = 40 * pages / stats->total;
		printf("\r[%.*s%*s] ", done, "########################################",
		       40 - done, "");
	} else {
		printf("# ");
	}
	printf("%s: %lu pages in, %lu left, %lu pages/s, %d faults outstanding%s", by_name(config),
	       pages, stats->total - pages, rate,
	       READ_ONCE(stats->outstanding) + READ_ONCE(stats->waiting),
	       bar && !end ? " " : "\n");
	fflush(stdout);
}

static const char *milliseconds(u64 to, u64 from)
{
	static char buf[4][32];
	static int i;

	i = (i + 1) % 4;
	snprintf(buf[i], sizeof(buf[i]), "%.1f ms", (s64)(to - from) / 1e6);
	return buf[i];
}

/* One object a line: pick the lines of a type, and columns by position. */
static void __printf(3, 4) write_json(const struct config *config, const char *type,
				      const char *fmt, ...)
{
	va_list ap;

	fprintf(json, "%s{\"type\": \"%s\", \"by\": \"%s\"", json == stdout ? "json: " : "",
		type, by_name(config));
	va_start(ap, fmt);
	vfprintf(json, fmt, ap);
	va_end(ap);
	fprintf(json, "}\n");
}

static void json_hist(const struct config *config, const char *what, const char *kind,
		      const struct pc_hist *hist, u64 num, u64 den)
{
	u64 sum = 0;
	int i;

	if (!hist->nr)
		return;

	write_json(config, "latency", ", \"of\": \"%s\", \"kind\": \"%s\", \"nr\": %lu"
		   JSON_U64("p50_ns") JSON_U64("p90_ns") JSON_U64("p99_ns") JSON_U64("max_ns"),
		   what, kind, hist->nr, pc_hist_percentile(hist, 50) * num / den,
		   pc_hist_percentile(hist, 90) * num / den,
		   pc_hist_percentile(hist, 99) * num / den, hist->max * num / den);

	for (i = 0; i < PC_NR_BUCKETS; i++) {
		sum += hist->buckets[i];
		if (hist->buckets[i])
			write_json(config, "bucket", ", \"of\": \"%s\", \"kind\": \"%s\""
				   JSON_U64("ns") JSON_U64("nr") ", \"share\": %.5f",
				   what, kind, pc_hist_bucket(i) * num / den,
				   (u64)hist->buckets[i], (double)sum / hist->nr);
	}
}

static const char * const first_kinds[] = { "read", "write" };

static struct pc_hist first_accesses(int kind)
{
	struct pc_hist hist = {};
	int i;

	for (i = 0; i < PC_MAX_VCPUS; i++)
		pc_hist_merge(&hist, &mailbox->vcpus[i].first[kind]);
	return hist;
}

static void report_json(const struct config *config)
{
	struct pc_stats *stats = &shared->stats;
	int i;

	if (!json)
		return;

	write_json(config, "run", ", \"backing\": \"%s\"" JSON_U64("seed") JSON_U64("vcpus")
		   JSON_U64("bytes") JSON_U64("pages") JSON_U64("zeroes") JSON_U64("downtime_ns")
		   JSON_U64("last_page_ns") JSON_U64("finished_ns") JSON_U64("exits")
		   JSON_U64("uffd_messages") JSON_U64("requests") JSON_U64("duplicates")
		   JSON_U64("connections"),
		   vm_mem_backing_src_alias(config->src_type)->name, (u64)config->seed,
		   (u64)config->nr_vcpus, config->size, stats->pages, stats->zeroes,
		   stats->resumed_ns - stats->paused_ns, stats->last_page_ns - stats->paused_ns,
		   stats->finished_ns - stats->paused_ns, stats->exits, stats->uffd_messages,
		   stats->requests, stats->duplicates, stats->connections);

	/* Time 0 is when the source stops the guest. */
	for (i = 1; i < nr_samples; i++)
		write_json(config, "work", ", \"ms\": %.1f" JSON_U64("work") JSON_U64("pages")
			   ", \"work_per_s\": %.0f",
			   (s64)(samples[i].ns - stats->paused_ns) / 1e6,
			   samples[i].work, samples[i].pages,
			   (samples[i].work - samples[i - 1].work) * 1e9 /
			   (samples[i].ns - samples[i - 1].ns));

	for (i = 0; i < PC_NR_KINDS; i++)
		json_hist(config, "fault", pc_kind_names[i], &stats->faults[i], 1, 1);
	for (i = 0; i < 2; i++) {
		struct pc_hist hist = first_accesses(i);

		json_hist(config, "first access", first_kinds[i], &hist,
			  1000000, shared->cycles_khz);
	}
	fflush(json);
}

static void print_hist(const char *what, const char *kind, const struct pc_hist *hist,
		       u64 num, u64 den)
{
	if (hist->nr)
		ksft_print_msg("%s, %s: %lu, p50 %lu us, p90 %lu us, p99 %lu us, max %lu us\n",
			       what, kind, hist->nr,
			       pc_hist_percentile(hist, 50) * num / den / 1000,
			       pc_hist_percentile(hist, 90) * num / den / 1000,
			       pc_hist_percentile(hist, 99) * num / den / 1000,
			       hist->max * num / den / 1000);
}

static void report(const struct config *config)
{
	struct pc_stats *stats = &shared->stats;
	int i;

	report_json(config);
	if (config->quiet)
		return;

	ksft_print_msg("%s, %s: downtime %s, last page after %s, %lu pages, %lu of zeroes\n",
		       by_name(config), vm_mem_backing_src_alias(config->src_type)->name,
		       milliseconds(stats->resumed_ns, stats->paused_ns),
		       milliseconds(stats->last_page_ns, stats->paused_ns),
		       stats->pages, stats->zeroes);
	ksft_print_msg("exits %lu, userfaultfd messages %lu, requests %lu\n",
		       stats->exits, stats->uffd_messages, stats->requests);
	ksft_print_msg("duplicates %lu, connections %lu\n", stats->duplicates,
		       stats->connections);
	for (i = 0; i < PC_NR_KINDS; i++)
		print_hist("faults", pc_kind_names[i], &stats->faults[i], 1, 1);
	for (i = 0; i < 2; i++) {
		struct pc_hist hist = first_accesses(i);

		print_hist("first accesses", first_kinds[i], &hist, 1000000, shared->cycles_khz);
	}
}

static pid_t source, destination;

static pid_t start(void (*run)(const struct config *config), const struct config *config)
{
	pid_t pid;

	fflush(NULL);
	pid = fork();
	TEST_ASSERT(pid >= 0, "fork() failed, errno = %d", errno);
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		run(config);
	}
	return pid;
}

static void stop(pid_t *pid)
{
	if (!*pid)
		return;

	kill(*pid, SIGKILL);
	waitpid(*pid, NULL, 0);
	*pid = 0;
}

/* Returns false once the process has ended. */
static bool alive(pid_t *pid, int *status)
{
	if (*pid && waitpid(*pid, status, WNOHANG) == *pid)
		*pid = 0;
	return *pid;
}

static void __noreturn fail(const struct config *config, const char *fmt, ...)
{
	va_list ap;

	stop(&source);
	stop(&destination);

	printf("# %s, %s, seed %u: ", by_name(config),
	       vm_mem_backing_src_alias(config->src_type)->name, config->seed);
	va_start(ap, fmt);
	vprintf(fmt, ap);
	va_end(ap);
	printf("\n# %s\n", shared->failure);
	ksft_exit_fail_msg("postcopy migration by %s, --seed=%u\n", by_name(config), config->seed);
}

#define JUDGE(config, cond, fmt, ...)			\
do {							\
	if (!(cond))					\
		fail(config, fmt, ##__VA_ARGS__);	\
} while (0)

static void start_migration(const struct config *config)
{
	memset(shared, 0, shared_size);
	memset(mailbox, 0, mailbox_size);
	nr_samples = 0;

	listen_fd = listen_somewhere(config);
	TEST_ASSERT(listen_fd >= 0, "No socket, errno = %d", errno);

	layout_guest(config, &guest_config);
	shared->wait_for_go = config->scenario;
	shared->no_push = true;
	shared->hold = config->hold;
	mailbox->no_emulation = config->scenario;
	mailbox->no_blind_writes = config->corrupt || config->zero;
	destination = start(run_destination, config);
	if (config->beginning) {
		wait_for(&shared->listens);
		config->beginning(config);
	}
	source = start(run_source, config);
}

/*
 * Each vCPU runs again, but for one that waits for a page that doesn't come.  Until
 * then, nothing is pushed: however slow the destination is, it has to pull.
 */
static bool has_resumed(const struct config *config)
{
	int i;

	if (!READ_ONCE(shared->stats.resumed_ns))
		return false;

	for (i = config->hold; i < config->nr_vcpus; i++) {
		if (READ_ONCE(mailbox->vcpus[i].work) < shared->work[i] + 3)
			return false;
	}

	return true;
}

/* Returns true if the guest is complete, and false if it's damaged, or gone. */
static bool migrate(const struct config *config)
{
	bool scenario = config->scenario;
	int s = 0, d = 0;

	start_migration(config);
	while (alive(&source, &s) | alive(&destination, &d)) {
		take_sample();
		show_progress(config, false);
		if (has_resumed(config)) {
			WRITE_ONCE(shared->break_now, true);
			if (!config->scenario)
				WRITE_ONCE(shared->no_push, false);
		}
		if (scenario && READ_ONCE(shared->broken)) {
			config->scenario(config);
			scenario = false;
		}
		if (s || d)
			break;
		usleep(5000);
	}
	close(listen_fd);

	if (shared->mismatch) {
		stop(&source);
		stop(&destination);
		return false;
	}

	JUDGE(config, !s, "the source has ended with status 0x%x", s);
	JUDGE(config, !d, "the destination has ended with status 0x%x", d);
	JUDGE(config, !scenario, "the guest has got its memory too early");
	show_progress(config, true);
	report(config);
	return true;
}

static void migrate_well(const struct config *config)
{
	struct pc_stats *stats = &shared->stats;

	JUDGE(config, migrate(config), "the guest is damaged");

	JUDGE(config, stats->requests, "no page was pulled");
	JUDGE(config, stats->zeroes && stats->zeroes < stats->pages,
	      "%lu of %lu pages of zeroes", stats->zeroes, stats->pages);
	if (config->by_exits) {
		JUDGE(config, stats->exits, "no exit");
		JUDGE(config, stats->faults[PC_BACKSTOP].nr || !(pv_clock || pv_steal),
		      "KVM has not used the backstop");
	} else {
		JUDGE(config, !stats->exits, "%lu exits", stats->exits);
		JUDGE(config, stats->uffd_messages, "no message");
	}
}

static void test_migration(struct config config)
{
	migrate_well(&config);
}

static void test_dirty_log(struct config config)
{
	config.dirty_log = true;
	migrate_well(&config);
}

/* The first thing that the destination says, after a good HELLO, is its layout. */
static struct pc_layout say_hello(int fd, const struct pc_layout *layout)
{
	struct pc_layout theirs = {};
	struct pc_msg msg;

	if (!pc_send(fd, PC_HELLO, 0, 0, layout, sizeof(*layout)) &&
	    !pc_recv(fd, &msg, sizeof(msg)) && msg.type == PC_HELLO)
		pc_recv(fd, &theirs, sizeof(theirs));
	return theirs;
}

/*
 * What else the destination has to say isn't of interest, but that it hangs up is:
 * by then, it has said why.
 */
static void hang_up(int fd)
{
	char buf[SZ_4K];

	shutdown(fd, SHUT_WR);
	while (recv(fd, buf, sizeof(buf), 0) > 0)
		;
	close(fd);
}

/* It's refused, and nothing is touched. */
static void send_bad(const struct config *config, const struct pc_layout *layout,
		     const void *message, size_t len, const char *error)
{
	u64 received = shared->stats.received, pages = shared->stats.pages;
	u64 refused = shared->stats.refused;
	int fd = connect_to_destination();

	if (layout)
		say_hello(fd, layout);
	send(fd, message, len, MSG_NOSIGNAL);
	hang_up(fd);

	JUDGE(config, shared->stats.refused == refused + 1, "not refused: \"%s\"", error);
	JUDGE(config, !strcmp(shared->stats.error, error), "\"%s\" instead of \"%s\"",
	      shared->stats.error, error);
	JUDGE(config, shared->stats.received == received && shared->stats.pages == pages,
	      "a page has been installed");
}

struct bad_message {
	struct pc_msg msg;
	char payload[SZ_4K];
};

/* After a good HELLO: the message, as changed by "how", and a bit of payload. */
#define BAD(how, len, error)							\
do {										\
	struct bad_message bad = { good, { 1 } };				\
	struct pc_msg *msg __maybe_unused = &bad.msg;				\
										\
	how;									\
	send_bad(config, &layout, &bad, sizeof(bad.msg) + (len), error);	\
} while (0)

/* HELLO itself is the bad message. */
#define BAD_HELLO(how, error)							\
do {										\
	struct {								\
		struct pc_msg msg;						\
		struct pc_layout layout;					\
	} bad = {								\
		{ PC_MAGIC, PC_VERSION, PC_HELLO, 0, sizeof(layout) }, layout,	\
	};									\
										\
	how;									\
	send_bad(config, NULL, &bad, sizeof(bad), error);			\
} while (0)

/* The destination waits for the state. */
static void send_bad_beginnings(const struct config *config)
{
	struct pc_layout layout = shared->layout;
	struct pc_msg good = { PC_MAGIC, PC_VERSION, PC_PAGE, 1, layout.slots[1].page_size };

	BAD_HELLO(bad.layout.nr_slots--, "another guest");
	BAD_HELLO(bad.layout.nr_slots = ~0u, "another guest");
	BAD_HELLO(bad.layout.nr_vcpus++, "another guest");
	BAD_HELLO(bad.layout.slots[1].gpa += SZ_64K, "another layout of memory");
	BAD_HELLO(bad.layout.slots[1].size *= 2, "another layout of memory");
	BAD_HELLO(bad.layout.slots[1].page_size /= 2, "another layout of memory");
	BAD_HELLO(bad.msg.len = ~0u, "wrong length");

	BAD((void)0, 0, "page before the state");
	BAD(msg->type = PC_ZERO; msg->len = 0, 0, "page before the state");
	BAD(msg->type = PC_DONE; msg->len = 0, 0, "DONE before the state");
	BAD(msg->type = PC_VM; msg->len = ~0u, SZ_4K, "wrong length");
	BAD(msg->type = PC_VM; msg->len = SZ_8K, SZ_4K,
	    "the connection broke in the middle of the state");
	BAD(msg->type = PC_VCPU; msg->slot = layout.nr_vcpus, 0, "no such vCPU");

	JUDGE(config, !shared->stats.resumed_ns, "the guest runs");
}

/* The connection is broken, and the destination has a session. */
static void send_bad_messages(const struct config *config)
{
	struct pc_layout none = {}, layout = shared->layout, other;
	struct pc_msg good = { PC_MAGIC, PC_VERSION, PC_PAGE, 1, layout.slots[1].page_size };
	int fd;

	/* The destination tells its layout to those who know the session, only. */
	fd = connect_to_destination();
	none = say_hello(fd, &none);
	hang_up(fd);
	JUDGE(config, !none.session, "a stranger was told the session");

	fd = connect_to_destination();
	other = say_hello(fd, &layout);
	hang_up(fd);
	JUDGE(config, other.session == layout.session, "no answer to a good HELLO");

	BAD_HELLO(bad.layout.session++, "another session");

	BAD(msg->magic ^= 1, 0, "wrong magic");
	BAD(msg->version++, 0, "unknown version");
	BAD(msg->type = PC_NR_TYPES, 0, "unknown type");
	BAD(msg->slot = layout.nr_slots, 0, "no such slot");
	BAD(msg->slot = ~0u, 0, "no such slot");
	BAD(msg->offset = layout.slots[1].size, 0, "page outside the guest");
	BAD(msg->offset = -(u64)good.len, 0, "page outside the guest");
	BAD(msg->offset = good.len / 2, 0, "page is not aligned");
	BAD(msg->len = ~0u, SZ_4K, "wrong length");
	BAD(msg->len /= 2, SZ_4K, "wrong length");
	BAD(msg->type = PC_ZERO, SZ_4K, "wrong length");
	BAD(msg->type = PC_VCPU; msg->slot = layout.nr_vcpus, 0, "no such vCPU");
	BAD(msg->type = PC_VM; msg->len = 0, 0, "the state once more");
	BAD(msg->type = PC_RUN; msg->len = 0, 0, "the state once more");
	BAD(msg->type = PC_BYE; msg->len = 0, 0, "a message that is for the source");
	BAD(msg->type = PC_REQUEST; msg->len = 0, 0, "a message that is for the source");
	BAD(msg->type = PC_HELLO; msg->len = sizeof(layout), 0, "HELLO once more");
	BAD((void)0, SZ_2K, "the connection broke in the middle of a page");
	BAD((void)0, -(int)sizeof(good) / 2, "the connection broke in a header");

	send_bad(config, NULL, &good, sizeof(good), "no HELLO");
}

/* For loops that wait for the destination. */
static bool destination_is_alive(void)
{
	siginfo_t info = {};

	usleep(1000);
	return !waitid(P_PID, destination, &info, WEXITED | WNOHANG | WNOWAIT) && !info.si_pid;
}

static void inspect_destination(void)
{
	WRITE_ONCE(shared->inspect, shared->inspect + 1);
	while (READ_ONCE(shared->inspected) != shared->inspect && destination_is_alive())
		;
}

static void go_on(void)
{
	WRITE_ONCE(shared->no_push, false);
	WRITE_ONCE(mailbox->no_emulation, false);
	WRITE_ONCE(shared->go, true);
}

/* The connection is broken, and all vCPUs need pages. */
static void broken_connection(const struct config *config)
{
	inspect_destination();

	if (config->by_exits) {
		JUDGE(config, shared->in_user_space == config->nr_vcpus &&
		      shared->have_regs == config->nr_vcpus &&
		      shared->paused == config->nr_vcpus,
		      "%u vCPUs in user space, %u registers read, %u paused",
		      shared->in_user_space, shared->have_regs, shared->paused);
	} else {
		JUDGE(config, shared->in_kernel == config->nr_vcpus && shared->get_regs_blocks,
		      "%u vCPUs sleep in the kernel, registers can%s be read",
		      shared->in_kernel, shared->get_regs_blocks ? "not" : "");
	}
	ksft_print_msg("vCPUs in user space %u, registers read %u, paused %u, asleep %u\n",
		       shared->in_user_space, shared->have_regs, shared->paused,
		       shared->in_kernel);
	if (shared->get_regs_blocks)
		ksft_print_msg("a thread that wants the registers of vCPU 0 sleeps, too\n");

	send_bad_messages(config);
	go_on();
}

static void test_broken_connection(struct config config)
{
	config.beginning = send_bad_beginnings;
	config.nr_breaks = 1;
	config.scenario = broken_connection;
	migrate_well(&config);
}

/* The page that vCPU 0's steal time is in doesn't arrive. */
static void backstop(const struct config *config)
{
	inspect_destination();

	JUDGE(config, shared->in_kernel == 1 && shared->stats.outstanding,
	      "%u vCPUs sleep in the kernel, %d faults outstanding",
	      shared->in_kernel, shared->stats.outstanding);
	JUDGE(config, shared->get_regs_blocks, "vCPU 0 isn't in KVM_RUN");
	JUDGE(config, shared->paused == config->nr_vcpus - 1, "%u paused vCPUs", shared->paused);

	/* All other pages arrive, which isn't the end. */
	go_on();
	while (READ_ONCE(shared->stats.pages) < shared->stats.total - 1 && destination_is_alive())
		;
	JUDGE(config, shared->stats.outstanding == 1 && !shared->stats.finished_ns,
	      "%d faults outstanding, the end after %lu ns",
	      shared->stats.outstanding, shared->stats.finished_ns);
	WRITE_ONCE(shared->hold, false);
}

/* Steal time must be in a page of its own. */
static bool has_backstop(const struct config *config)
{
	return config->by_exits && pv_steal &&
	       backing_page_size(config->src_type) == getpagesize();
}

static void test_backstop(struct config config)
{
	config.nr_breaks = 1;
	config.hold = true;
	config.scenario = backstop;
	migrate_well(&config);
}

/* SIGKILL works, wherever the vCPUs are. */
static void kill_destination(const struct config *config)
{
	int status;

	inspect_destination();
	JUDGE(config, shared->in_user_space + shared->in_kernel == config->nr_vcpus,
	      "not all vCPUs wait");
	kill(destination, SIGKILL);
	JUDGE(config, waitpid(destination, &status, 0) == destination && WIFSIGNALED(status),
	      "the destination has ended with status 0x%x", status);
	destination = 0;
	stop(&source);
	shared->mismatch = true;
}

static void test_kill(struct config config)
{
	config.nr_breaks = 1;
	config.scenario = kill_destination;
	config.hold = has_backstop(&config);
	config.quiet = true;

	JUDGE(&config, !migrate(&config), "the guest is complete, without its destination");
}

/*
 * The test must see it if something goes wrong with a page.  Take two, as a vCPU
 * may have been stopped in the middle of writing its record, i.e. repair one.
 */
static void expect_damage(struct config *config, const char *what)
{
	config->quiet = true;
	JUDGE(config, !migrate(config), "pages that are %s were not noticed", what);
	ksft_print_msg("noticed: %s\n", shared->failure);
}

static void test_damage(struct config config)
{
	config.corrupt = 2;
	expect_damage(&config, "corrupt");
	config.corrupt = 0;
	config.zero = 2;
	expect_damage(&config, "zero");
}

static void test_lost_page(struct config config)
{
	config.lose = 1;
	migrate_well(&config);
	JUDGE(&config, shared->stats.lost == 1, "%lu pages were lost", shared->stats.lost);
}

#define PUSH_PAGES	64

/* What the source is to send if nobody asks for anything after @page. */
static int next_push(const bool *sent, int page)
{
	do {
		page = (page + 1) % PUSH_PAGES;
	} while (sent[page]);

	return page;
}

/*
 * Requested pages come first, and what is pushed are the pages that follow, as
 * whoever has asked for a page is likely to need the next one.
 */
static void test_push_order(struct config config)
{
	size_t size = getpagesize();
	struct pc_source src = {
		.layout = {
			.session = 1,
			.nr_slots = 1,
			.slots[0] = { .size = PUSH_PAGES * size, .page_size = size },
		},
	};
	const int requests[] = { PUSH_PAGES / 2, PUSH_PAGES / 4 };
	bool sent[PUSH_PAGES] = {};
	u8 *memory, *page = malloc(size), have[PUSH_PAGES / 8] = {};
	int fds[2], nr, page_nr, expected = 0, i, status;
	struct pc_layout layout;
	struct pc_msg msg;
	pid_t pid;

	memory = kvm_mmap(PUSH_PAGES * size, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS, -1);
	for (i = 0; i < PUSH_PAGES; i++)
		memory[i * size] = i + 1;
	src.hva[0] = memory;
	src.trouble.rng = new_kvm_random_state(config.seed);
	src.trouble.no_push = &shared->no_push;
	WRITE_ONCE(shared->no_push, true);
	TEST_ASSERT(page && !socketpair(AF_UNIX, SOCK_STREAM, 0, fds), "socketpair() failed");

	pid = fork();
	TEST_ASSERT(pid >= 0, "fork() failed, errno = %d", errno);
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		close(fds[0]);
		_exit(pc_send_guest(&src, fds[1]) ? 1 : 0);
	}
	close(fds[1]);

	layout = say_hello(fds[0], &src.layout);
	JUDGE(&config, layout.session == src.layout.session, "no HELLO of the source");
	pc_send(fds[0], PC_HAVE, 0, 0, have, sizeof(have));

	for (i = 0; i < ARRAY_SIZE(requests); i++)
		pc_send(fds[0], PC_REQUEST, 0, requests[i] * size, NULL, 0);

	for (nr = 0; nr < PUSH_PAGES; nr++) {
		if (nr == ARRAY_SIZE(requests))
			WRITE_ONCE(shared->no_push, false);
		expected = nr < ARRAY_SIZE(requests) ? requests[nr] : next_push(sent, expected);

		if (pc_recv(fds[0], &msg, sizeof(msg)) || msg.type != PC_PAGE ||
		    pc_recv(fds[0], page, size))
			fail(&config, "no page after %d pages", nr);
		page_nr = msg.offset / size;
		JUDGE(&config, page_nr == expected && *page == expected + 1,
		      "page %d with the content of page %d, expected %d",
		      page_nr, *page - 1, expected);
		sent[page_nr] = true;
	}

	JUDGE(&config, !pc_recv(fds[0], &msg, sizeof(msg)) && msg.type == PC_DONE, "no DONE");
	pc_send(fds[0], PC_BYE, 0, 0, NULL, 0);
	JUDGE(&config, waitpid(pid, &status, 0) == pid && !status,
	      "the source has ended with status 0x%x", status);
	close(fds[0]);
	kvm_munmap(memory, PUSH_PAGES * size);
	free(page);
}

/* Pages arrive late, twice, in any order and not at all, and the source is killed. */
static void test_trouble(struct config config)
{
	config.delay = 2;
	config.duplicate = 5;
	config.reorder = 20;
	config.nr_breaks = 3;
	config.lose = 1;
	migrate_well(&config);

	JUDGE(&config, shared->stats.duplicates, "no duplicate page");
	JUDGE(&config, shared->stats.connections == config.nr_breaks + 1,
	      "%lu connections", shared->stats.connections);
}

static const struct test {
	const char *name;
	void (*run)(struct config config);
	/* NULL if it's always possible. */
	bool (*possible)(const struct config *config);
} tests[] = {
	{ "migration", test_migration },
	{ "migration with dirty logging", test_dirty_log },
	{ "broken connection and bad messages", test_broken_connection },
	{ "vCPU asleep on the backstop", test_backstop, has_backstop },
	{ "killed destination", test_kill },
	{ "damaged pages are noticed", test_damage },
	{ "lost page", test_lost_page },
	{ "order of pushes", test_push_order },
	{ "trouble of all kinds", test_trouble },
};

static void help(const char *name)
{
	printf("usage: %s [OPTION]...\n\n"
	       "  --by=exits|userfaultfd  how vCPUs ask for pages, by exits if not said\n"
	       "  --slots=N       memslots, each of which has a userfaultfd of its own (2)\n"
	       "  --readers=N     threads that read a userfaultfd (1)\n"
	       "  --seed=N        of all that is random\n"
	       "  --runs=N        only migrations with trouble, with N seeds from --seed on\n"
	       "  --migrate       only one migration, without trouble\n"
	       "  --dirty-log     with dirty logging in each of them\n"
	       "  --push-delay=US microseconds between pages that nobody has asked for (0)\n"
	       "  --linger=MS     how much longer the guest runs before and after that (0)\n"
	       "  --tcp           on loopback, instead of a Unix socket\n"
	       "  --json=FILE     report in FILE, an object a line; - is stdout, where each\n"
	       "                  line begins with \"json: \"\n"
	       "  --interval=MS   of the report's samples of guest work (100)\n"
	       "  -v N            vCPUs (2)\n"
	       "  -b SIZE         of the guest's memory (2M, or 8 huge pages)\n", name);
	backing_src_help("-s");
	exit(KSFT_PASS);
}

static void require(const struct config *config)
{
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm = vm_create_with_one_vcpu(&vcpu, guest_code);
	bool supported = has_exit_on_missing(vm->fd);
	void *mem;
	int fd;

	pv_steal = has_steal(vcpu);
	pv_clock = has_clock(vcpu);
	kvm_vm_free(vm);
	__TEST_REQUIRE(!config->by_exits || supported, "KVM_CAP_EXIT_ON_MISSING is not available");

	fd = syscall(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	__TEST_REQUIRE(fd >= 0, "userfaultfd() failed, errno = %d (%s)", errno, strerror(errno));
	close(fd);

	fd = listen_somewhere(config);
	__TEST_REQUIRE(fd >= 0, "no TCP on loopback, errno = %d (%s)", errno, strerror(errno));
	close(fd);

	if (!is_hugetlb(config->src_type))
		return;

	/* For the source and the destination. */
	mem = mmap(NULL, 2 * config->size, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
	__TEST_REQUIRE(mem != MAP_FAILED, "not enough free huge pages");
	munmap(mem, 2 * config->size);
}

int main(int argc, char *argv[])
{
	enum {
		BY = 256, SLOTS, READERS, SEED, RUNS, MIGRATE, DIRTY_LOG, PUSH_DELAY,
		LINGER, TCP, JSON, INTERVAL
	};
	static const struct option options[] = {
		{ "by", required_argument, NULL, BY },
		{ "slots", required_argument, NULL, SLOTS },
		{ "readers", required_argument, NULL, READERS },
		{ "seed", required_argument, NULL, SEED },
		{ "runs", required_argument, NULL, RUNS },
		{ "migrate", no_argument, NULL, MIGRATE },
		{ "dirty-log", no_argument, NULL, DIRTY_LOG },
		{ "push-delay", required_argument, NULL, PUSH_DELAY },
		{ "linger", required_argument, NULL, LINGER },
		{ "tcp", no_argument, NULL, TCP },
		{ "json", required_argument, NULL, JSON },
		{ "interval", required_argument, NULL, INTERVAL },
		{}
	};
	struct config config = {
		.by_exits = true,
		.src_type = VM_MEM_SRC_ANONYMOUS,
		.nr_vcpus = 2,
		.nr_slots = 2,
		.nr_readers = 1,
		.seed = kvm_random_seed,
	};
	int runs = 0, opt, nr, i;
	bool migrate = false, dirty_log = false;
	u64 align;

	while ((opt = getopt_long(argc, argv, "s:v:b:h", options, NULL)) != -1) {
		switch (opt) {
		case BY:
			config.by_exits = !strcmp(optarg, "exits");
			if (!config.by_exits && strcmp(optarg, "userfaultfd"))
				help(argv[0]);
			break;
		case SLOTS:
			config.nr_slots = atoi_positive("slots", optarg);
			break;
		case READERS:
			config.nr_readers = atoi_positive("readers", optarg);
			break;
		case SEED:
			config.seed = strtoul(optarg, NULL, 0);
			break;
		case RUNS:
			runs = atoi_positive("runs", optarg);
			break;
		case MIGRATE:
			migrate = true;
			break;
		case DIRTY_LOG:
			dirty_log = true;
			break;
		case PUSH_DELAY:
			config.push_delay = atoi_non_negative("push-delay", optarg);
			break;
		case LINGER:
			config.linger_ms = atoi_non_negative("linger", optarg);
			break;
		case TCP:
			config.tcp = true;
			break;
		case JSON:
			json = strcmp(optarg, "-") ? fopen(optarg, "w") : stdout;
			TEST_ASSERT(json, "Can't write %s, errno = %d", optarg, errno);
			break;
		case INTERVAL:
			interval_ms = atoi_positive("interval", optarg);
			break;
		case 's':
			config.src_type = parse_backing_src_type(optarg);
			break;
		case 'v':
			config.nr_vcpus = atoi_positive("vCPUs", optarg);
			break;
		case 'b':
			config.size = parse_size(optarg);
			break;
		default:
			help(argv[0]);
		}
	}

	/* Each slot has whole huge pages, also if they are transparent. */
	align = config.nr_slots * max_t(u64, get_backing_src_pagesz(config.src_type), SZ_64K);
	config.size = config.size ?: is_hugetlb(config.src_type) ?
		      8 * get_backing_src_pagesz(config.src_type) : SZ_2M;
	config.size = (config.size + align - 1) / align * align;

	TEST_ASSERT(config.nr_vcpus <= PC_MAX_VCPUS && config.nr_slots < PC_MAX_SLOTS &&
		    config.nr_readers <= PC_MAX_READERS, "Too many vCPUs, slots or readers");

	ksft_print_header();
	require(&config);
	ksft_print_msg("seed %u\n", config.seed);

	shared_size = sizeof(*shared) + (config.size + SZ_64M) / getpagesize() * sizeof(u64);
	shared = kvm_mmap(shared_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1);
	mailbox_size = align_up(sizeof(*mailbox) + config.nr_vcpus * config.size / BLOCK_SIZE,
				SZ_64K);
	mailbox = kvm_mmap(mailbox_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1);

	config.dirty_log = dirty_log;
	if (migrate) {
		ksft_set_plan(1);
		migrate_well(&config);
		ksft_test_result_pass("migration by %s, seed %u\n", by_name(&config), config.seed);
		ksft_finished();
	}

	if (runs) {
		config.quiet = true;
		ksft_set_plan(runs);
		for (i = 0; i < runs; i++, config.seed++) {
			config.dirty_log = dirty_log || config.seed & 1;
			test_trouble(config);
			ksft_test_result_pass("migration by %s, seed %u\n", by_name(&config),
					      config.seed);
		}
		ksft_finished();
	}

	for (i = nr = 0; i < ARRAY_SIZE(tests); i++)
		nr += !tests[i].possible || tests[i].possible(&config);

	ksft_set_plan(nr);
	for (i = 0; i < ARRAY_SIZE(tests); i++) {
		if (tests[i].possible && !tests[i].possible(&config))
			continue;
		tests[i].run(config);
		ksft_test_result_pass("%s, by %s\n", tests[i].name, by_name(&config));
	}
	ksft_finished();
}
