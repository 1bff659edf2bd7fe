# SPDX-License-Identifier: GPL-2.0
"""
A model of pages per second against vCPUs. It is no measurement: it has the measured
instructions a page and the measured acquisitions of shared locks, and two constants
that are stated here and not fitted to anything.

Each vCPU in turn works on its own for Z and then visits each lock that it shares with
all others for D, one at a time: a closed network of queues, whose throughput mean value
analysis gives. Z are the instructions outside of these locks. D are those inside, plus a
transfer of the lock's cache line for each acquisition, two if the lock is held for
reading, as the release writes to the line that others have taken meanwhile. No line
has to be transferred if there is one vCPU, or if it was its last user.

Who wakes a vCPU on a userfaultfd looks, with fault_pending_wqh held, at the entry of each
that waits there, for whatever page (userfaultfd_wake_function()). The entry is on the
stack of another CPU, thus a transfer for each other vCPU, all of which wait: paging is
all they do.
"""

from locks import shared
from runs import boot, paging

# What an instruction takes, and what a cache line that another CPU has written does, in ns.
INSTRUCTION = 1 / 3
TRANSFER = 100
MEMORY = "minor_shmem"
# Acquisitions a page that are of the set-up, i.e. of the host's first write to it.
SET_UP = {"vm_lock-R": 1}
VCPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

# What was measured on hardware: thousands of pages a second of all vCPUs together,
# demand_paging_test -b 64M -u MINOR -s shmem, with the code of earlier proposals.
PUBLIC = {
    # 256 CPUs, -a, a reader a vCPU: "Improve KVM + userfaultfd performance via
    # KVM_EXIT_MEMORY_FAULTs on stage-2 faults", v7, February 2024.
    ("x86", "uffd1"): {1: 150, 2: 191, 4: 210, 8: 155, 16: 130, 32: 108, 64: 86, 128: 62, 256: 36},
    ("x86", "exits"): {1: 340, 2: 477, 4: 809, 8: 1239, 16: 1595, 32: 2299, 64: 3482, 128: 4134,
                       256: 4012},
    # 96 CPUs: "KVM: Introduce KVM Userfault", December 2024, there per vCPU; its exits
    # are those of a bitmap, with userfaultfd in place.
    ("x86", "uffd"): {2: 205, 8: 456, 64: 723},
    ("x86", "exits, bitmap"): {2: 324, 8: 910, 64: 2149},
    ("arm64", "uffd1"): {2: 170, 8: 348, 64: 85},
    ("arm64", "uffd"): {2: 167, 8: 605, 64: 1024},
    ("arm64", "exits, bitmap"): {2: 329, 8: 1120, 64: 792},
}
NAMES = {"uffd1": "userfaultfd, one", "uffd": "userfaultfd, one a vCPU", "exits": "exits"}


def demands(pages, locks, way):
    """Instructions outside of shared locks; a list of (those inside, line transfers, looks at all waiters)."""
    total = pages[f"{MEMORY}/{way}/4"]["instructions"]
    counted = locks[f"{MEMORY}/{way}"]
    # The kernel that counts locks executes more instructions, inside of locks, too.
    scale = total / counted["instructions"]
    inside = []
    for name, (acquired, held) in counted["classes"].items():
        who = shared(name)
        if who == "process" or who == "userfaultfd" and way == "uffd1":
            acquired -= SET_UP.get(name, 0)
            reading = name.endswith("-R")
            inside.append((0 if reading else held * scale, acquired * (2 if reading else 1),
                           "fault_pending_wqh" in name))
    return total - sum(held for held, *_ in inside), inside


def throughput(own, inside, vcpus):
    """Thousands of pages a second."""
    remote = (vcpus - 1) / vcpus
    service = [held * INSTRUCTION + TRANSFER * (transfers * remote + looks * (vcpus - 1))
               for held, transfers, looks in inside]
    queue, rate = [0] * len(service), 0
    for n in range(1, vcpus + 1):
        times = [d * (1 + q) for d, q in zip(service, queue)]
        rate = n / (own * INSTRUCTION + sum(times))
        queue = [rate * t for t in times]
    return rate * 1e6


def predict(pages, locks):
    """By way, by number of vCPUs."""
    return {way: {n: throughput(*demands(pages, locks, way), n) for n in VCPUS} for way in NAMES}


def show(arch, prediction, rates):
    """Prints what the model predicts, next to what was measured on hardware and here."""
    print(f"model, {MEMORY}: thousands of pages a second, all vCPUs together; "
          f"{INSTRUCTION:.2f} ns an instruction, {TRANSFER} ns a transfer of a cache line")
    print(f"{'vCPUs':>5} " + " ".join(f"{NAMES[way]:>24}" for way in NAMES) + f" {'exits to the first':>20}")
    for n in VCPUS:
        print(f"{n:5} " + " ".join(f"{prediction[way][n]:24.0f}" for way in NAMES)
              + f" {prediction['exits'][n] / prediction['uffd1'][n]:20.1f}")
    print(f"\n{'public figures':32} {'vCPUs':>5} {'measured':>9} {'model':>9} {'error':>7}")
    for (where, way), points in PUBLIC.items():
        for n, measured in points.items():
            if where == arch:
                model = prediction[way.split(",")[0]][n]
                print(f"{NAMES.get(way, way):32} {n:5} {measured:9} {model:9.0f} {100 * (model / measured - 1):6.0f}%")
    print(f"\n{'emulated here, not to be compared':40} " + " ".join(f"{n:>8}" for n in next(iter(rates.values()))))
    for way, by_vcpus in rates.items():
        print(f"{NAMES[way]:40} " + " ".join(f"{rate / 1e3:8.1f}" for rate in by_vcpus.values()))


def measure_rates(arch):
    """Pages a second on an emulated machine of two CPUs: their shape, no more."""
    commands = {f"rate_{way}_{n}": paging(arch, MEMORY, way, n, 32)
                for way in ("uffd1", "exits") for n in (1, 2, 4, 8)}
    # One node, as a NUMA hint makes a page that is there exit now and then.
    samples = boot(arch, commands, variables=["SMP=2", "NUMA=1"])
    return {way: {n: samples[f"rate_{way}_{n}"][-1].rate for n in (1, 2, 4, 8)}
            for way in ("uffd1", "exits")}


def data(arch, prediction):
    """Lines that gnuplot reads: vCPUs, way, rate, and whether it is a model or was measured."""
    for way, rates in prediction.items():
        for n, rate in rates.items():
            yield f"{n} {way} {rate:.1f} model"
        yield ""
    for (where, way), points in PUBLIC.items():
        for n, rate in points.items():
            if where == arch:
                yield f"{n} {way.replace(', ', '_')} {rate} measured"
