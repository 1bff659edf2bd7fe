# SPDX-License-Identifier: GPL-2.0
"""Runs of the harness in one boot, and what they report."""

import collections
import fcntl
import os
import re
import statistics
import subprocess
import sys

TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BUILD = f"{TOP}/build/7.3"

# A way of paging: what it is called, and the options of demand_paging_test.
WAYS = {
    "kernel": ("kernel alone", ""),
    "uffd1": ("userfaultfd, one", "-u {mode} -a"),
    "uffd": ("userfaultfd, one a vCPU", "-u {mode}"),
    "exits": ("exits", "-u {mode} -w"),
}
# What is paged in: mode and backing of demand_paging_test, and bytes of a page.
MEMORY = {
    "missing_anon": ("MISSING", "anonymous", 4 << 10),
    "missing_shmem": ("MISSING", "shmem", 4 << 10),
    "missing_hugetlb": ("MISSING", "anonymous_hugetlb_2mb", 2 << 20),
    "minor_shmem": ("MINOR", "shmem", 4 << 10),
    "minor_hugetlb": ("MINOR", "shared_hugetlb", 2 << 20),
}

Sample = collections.namedtuple("Sample", "cpu exits messages pages rate lines")


def lock(name):
    """Holds build/.NAME.lock until the end, as lib.sh's lock does; two runs take turns."""
    os.makedirs(f"{TOP}/build", exist_ok=True)
    handle = open(f"{TOP}/build/.{name}.lock", "a", encoding="utf-8")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another run that holds build/.{name}.lock", file=sys.stderr)
        fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def paging(arch, memory, way, vcpus, mib):
    """The command that pages in so many MiB, all vCPUs together, see demand_paging_test -h."""
    mode, backing, _ = MEMORY[memory]
    guest_mode = "-m 3 " if arch == "arm64" else ""
    return (f"demand_paging_test {guest_mode}-v {vcpus} -b {mib // vcpus}M -s {backing} "
            + WAYS[way][1].format(mode=mode))


def sample(name, lines):
    """What a run has reported, and whether it was by exits, or by userfaultfd, only."""
    text = "\n".join(lines)
    cpu = [float(s) for s in re.findall(r"otal CPU time:\s*([0-9.]+)s", text)]
    if not cpu:
        sys.exit(f"error: {name} has not reported its CPU time")
    counts = re.search(r"Memory-fault exits: (\d+), userfaultfd messages: (\d+), pages: (\d+)", text)
    exits, messages, pages = (int(n) for n in counts.groups()) if counts else (0, 0, 0)
    if counts and {exits, messages} != {0, pages}:
        sys.exit(f"error: {name}: {exits} exits and {messages} userfaultfd messages for {pages} pages")
    rate = re.search(r"Overall demand paging rate:\s*([0-9.]+)", text)
    return Sample(sum(cpu), exits, messages, pages, float(rate[1]) if rate else 0, lines)


def boot(arch, commands, rounds=1, variables=("ICOUNT=1",), out=None):
    """
    Runs commands (a dictionary of names) in turn, so many rounds in one boot, and
    returns for each name a list of samples. variables are the harness's.
    """
    out = out or f"{BUILD}/{arch}"
    os.makedirs(out, exist_ok=True)
    table = f"{out}/bench.table"
    with open(table, "w", encoding="utf-8") as rows:
        for name, command in commands.items():
            print(f"{name} bench 20 20 {command}", file=rows)
    tests = " ".join(list(commands) * rounds)
    print(f"{len(commands)} runs in {rounds} rounds, under QEMU", file=sys.stderr)
    if subprocess.run([f"{TOP}/scripts/harness", arch, "run", f"TABLE={table}", f"TESTS={tests}",
                       *variables],
                      env=dict(os.environ, OUT=out), stdout=sys.stderr, check=False).returncode:
        sys.exit("error: the runs failed, see above")

    return results(f"{out}/ktap.log", "|".join(commands))


def results(path, names):
    """For each name that matches, a list of samples, of the harness's log."""
    samples, lines = {}, []
    with open(path, encoding="utf-8", errors="replace") as log:
        for line in log:
            if line.startswith("# "):
                lines.append(line[2:].rstrip())
            elif result := re.match(r"ok \d+ (\w+)", line):
                if re.fullmatch(names, result[1]):
                    samples.setdefault(result[1], []).append(sample(result[1], lines))
                lines = []
    return samples


def slopes(short, long, number):
    """Nanoseconds, i.e. instructions, of each of so many more things that the longer runs do."""
    return [(b.cpu - a.cpu) * 1e9 / number for a, b in zip(short, long)]


def median(values):
    """The median, and the largest distance from it in percent."""
    middle = statistics.median(values)
    return {"instructions": round(middle, 1),
            "spread_percent": round(100 * max(abs(v - middle) for v in values) / middle, 2)}
