# SPDX-License-Identifier: GPL-2.0
"""How often a page takes which lock, on a kernel with LOCK_STAT, and for how long."""

import re

from runs import BUILD, TOP, WAYS, boot, paging

MIB = 32
VCPUS = 4
PAGES = (MIB << 20) // 2 // 4096
MODES = {"missing_anon": ("kernel", "uffd1", "uffd", "exits"), "minor_shmem": ("uffd1", "uffd", "exits")}
# Who takes a lock of a class: "process", all vCPUs of a VM and whoever else is of its
# process; "userfaultfd", who shares one; "page table", who maps memory of the same 2 MiB;
# "own", nobody else; "set-up", before and after the pages are missed, as a run is counted
# as a whole. "no lock" is what only lockdep takes for one, or what readers don't write to.
# What is not listed is the machine's or a CPU's.
SHARED = {
    "mmap_lock": "process", "vm_lock": "process", "mmu_lock": "process",
    "xa_lock": "set-up", "i_lock_key": "set-up", "info->lock": "set-up",
    "ctx->fault_pending_wqh": "userfaultfd", "ctx->fault_wqh": "userfaultfd",
    "ctx->fd_wqh": "userfaultfd", "ctx->map_changing_lock": "userfaultfd",
    "ep->lock": "userfaultfd", "ep->mtx": "userfaultfd", "ep->wq": "userfaultfd",
    "ptlock": "page table", "vcpu->mutex": "own",
    "rcu_read_lock": "no lock", "kvm->srcu": "no lock", "rcu_callback": "no lock",
    "fs_reclaim": "no lock", "mmu_notifier_invalidate_range_start": "no lock",
    "sched_map": "no lock", "seqcount": "no lock",
}


def statistics(samples):
    """Acquisitions and microseconds held, by class, of a run's lines."""
    result = {}
    for line in samples[-1].lines:
        found = re.match(r"lock_stat \S+:\s+(\S.*?)(-[RW])?:((?:\s+[0-9.]+){12})$", line)
        if found:
            numbers = found[3].split()
            name = found[1] + (found[2] or "")
            acquired, held = result.get(name, (0, 0))
            result[name] = acquired + int(numbers[7]), held + float(numbers[10])
    return result


def shared(name):
    """Who shares locks of a class."""
    return next((who for part, who in SHARED.items() if part in name), "machine")


def measure(arch):
    """By memory and way, by class: [acquisitions a page, instructions held a page]."""
    commands = {f"{memory}_{way}_{n}": paging(arch, memory, way, VCPUS, mib)
                for memory, ways in MODES.items() for way in ways
                for n, mib in (("n", MIB // 2), ("2n", MIB))}
    samples = boot(arch, commands,
                   variables=["ICOUNT=1", f"FRAGMENT={TOP}/scripts/bench.d/lockstat.config"],
                   out=f"{BUILD}/bench/{arch}-lockstat")
    result = {}
    for memory, ways in MODES.items():
        for way in ways:
            short, long = (statistics(samples[f"{memory}_{way}_{n}"]) for n in ("n", "2n"))
            cpu = (samples[f"{memory}_{way}_2n"][0].cpu - samples[f"{memory}_{way}_n"][0].cpu)
            classes = {}
            for name, (acquired, held) in long.items():
                before = short.get(name, (0, 0))
                per_page = (acquired - before[0]) / PAGES, (held - before[1]) * 1e3 / PAGES
                if per_page[0] >= 0.01:
                    classes[name] = [round(n, 3) for n in per_page]
            result[f"{memory}/{way}"] = {"instructions": round(cpu * 1e9 / PAGES), "classes": classes}
    return result


def show(result):
    """Prints a table for each kind of memory: acquisitions a page."""
    for memory, ways in MODES.items():
        rows = {}
        for way in ways:
            for name, (acquired, _) in result[f"{memory}/{way}"]["classes"].items():
                rows.setdefault(name, {})[way] = acquired
        print(f"{memory:42} {'shared by':12} " + " ".join(f"{WAYS[way][0]:>23}" for way in ways))
        most = sorted(rows, key=lambda n: -max(rows[n].values()))
        for name in (n for n in most if max(rows[n].values()) >= 0.05):
            print(f"{name:42} {shared(name):12} "
                  + " ".join(f"{rows[name].get(way, 0):23.2f}" for way in ways))
        print()
