# SPDX-License-Identifier: GPL-2.0
"""Instructions per page, by way of paging, number of vCPUs and kind of memory."""

import sys

from runs import MEMORY, TOP, WAYS, boot, median, paging, slopes

# By size of the pages, MiB that the longer run pages in, all vCPUs together; the shorter
# one half of it. Of huge pages there have to be enough to be seen at all.
MIB = {4 << 10: 64, 2 << 20: 512}
HUGE = ["CMDLINE=sysctl.vm.nr_hugepages=300"]


def rows(size, quick):
    """(memory, way, vCPUs) of what is measured; all vCPUs have whole pages."""
    for vcpus in (4,) if quick else (1, 4, 16):
        for memory, (mode, _, bytes_of_page) in MEMORY.items():
            for way in WAYS:
                if bytes_of_page != size:
                    continue
                # Of what is in the page cache, the kernel alone maps several pages at once.
                if way == "kernel" and mode == "MINOR":
                    continue
                if quick and (way == "uffd1" or memory not in ("missing_anon", "minor_shmem")):
                    continue
                yield memory, way, vcpus


def measure(arch, size, rounds, quick=False):
    """
    For pages of so many bytes, in one boot, a dictionary "memory/way/vcpus" of medians;
    the first round warms up, and isn't counted.
    """
    commands, sizes = {}, (MIB[size] // 2, MIB[size])
    for memory, way, vcpus in rows(size, quick):
        for mib in sizes:
            commands[f"{memory}_{way}_v{vcpus}_{mib}m"] = paging(arch, memory, way, vcpus, mib)
    samples = boot(arch, commands, rounds + 1, ["ICOUNT=1"] + (HUGE if size > 4 << 10 else []))

    result = {}
    for memory, way, vcpus in rows(size, quick):
        short, long = (samples[f"{memory}_{way}_v{vcpus}_{mib}m"][1:] for mib in sizes)
        pages = (sizes[1] - sizes[0] << 20) // size
        result[f"{memory}/{way}/{vcpus}"] = dict(
            median(slopes(short, long, pages)), exits=long[-1].exits, messages=long[-1].messages)
    return result


def ratio(result, memory, vcpus, of, to):
    """The ratio of two ways, or None if one of them was not measured."""
    a, b = (result.get(f"{memory}/{way}/{vcpus}") for way in (of, to))
    return a["instructions"] / b["instructions"] if a and b else None


def show(result, against):
    """Prints the table; against: that of an earlier run, or None."""
    print(f"{'memory':16} {'vCPUs':>5}  {'way':24} {'per page':>9} {'spread':>7} {'exits':>6} "
          f"{'messages':>8} {'ratio to userfaultfd':>21} {'to kernel':>9}"
          + (f" {'to before':>9}" if against else ""))
    for key, cost in result.items():
        memory, way, vcpus = key.split("/")
        line = (f"{memory:16} {vcpus:>5}  {WAYS[way][0]:24} {cost['instructions']:9.0f} "
                f"{cost['spread_percent']:6.1f}% {cost['exits']:6} {cost['messages']:8}")
        for other, width in ("uffd", 21), ("kernel", 9):
            value = ratio(result, memory, vcpus, way, other) if way != other else None
            line += f" {'' if value is None else f'{value:.3f}':>{width}}"
        if against and key in against:
            line += f" {cost['instructions'] / against[key]['instructions']:9.3f}"
        print(line)


def check(arch, result):
    """Compares ratios with bases/bench-bounds; returns how many are above."""
    bad = 0
    with open(f"{TOP}/bases/bench-bounds", encoding="utf-8") as bounds:
        for line in bounds:
            if line.startswith("#") or not line.strip():
                continue
            where, memory, of, to, bound = line.split()
            if where != arch:
                continue
            value = ratio(result, memory, "4", of, to)
            if value is None:
                sys.exit(f"error: bench-bounds: {memory} {of}/{to} was not measured")
            good = value <= float(bound)
            bad += not good
            print(f"{'ok' if good else 'not ok':6} {memory}: {of} / {to} = {value:.3f}, at most {bound}")
    return bad


def data(result):
    """Lines that gnuplot reads: for each kind of memory, for 1, 4 and 16 vCPUs, the cost of each way."""
    for memory in MEMORY:
        yield f"# {memory}: {' '.join(WAYS)}"
        for i, vcpus in enumerate((1, 4, 16)):
            costs = [result.get(f"{memory}/{way}/{vcpus}") for way in WAYS]
            yield " ".join([str(i + 1), *(f"{c['instructions']:.0f}" if c else "NaN" for c in costs)])
        yield "\n"
