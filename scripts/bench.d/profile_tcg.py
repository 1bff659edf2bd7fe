# SPDX-License-Identifier: GPL-2.0
"""Where the instructions of a page go, by function, by a plugin of QEMU (profile.c)."""

import bisect
import os
import re
import subprocess
import sys

from runs import BUILD, TOP, WAYS, boot, paging

MIB = 32
VCPUS = 4
PAGES = (MIB << 20) // 2 // 4096
# Where the test's threads wait for each other, busily, before they page.
WAITS = {"user: vcpu_thread_main", "user: memstress_start_vcpu_threads"}
MODES = {"missing_anon": ("kernel", "uffd", "exits"), "minor_shmem": ("uffd", "exits")}


def symbols(path, prefix):
    """Addresses and names of a binary's functions."""
    listing = subprocess.run(["nm", "-n", path], check=True, stdout=subprocess.PIPE, text=True).stdout
    return [(int(address, 16), prefix + name) for address, kind, name in
            (line.split() for line in listing.splitlines() if len(line.split()) == 3)
            if kind in "tTwW"]


def plugin(directory, qemu):
    """Builds the plugin for a QEMU, whose API has a version of its own."""
    path = f"{directory}/profile.so"
    version = subprocess.run([qemu, "--version"], check=True, stdout=subprocess.PIPE, text=True).stdout
    api = 1 if int(re.search(r"version (\d+)", version)[1]) < 9 else 2
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", f"-DVERSION={api}",
                    "-o", path, f"{TOP}/scripts/bench.d/profile.c"], check=True)
    return path


def functions(path, table):
    """Instructions by function of what the plugin has counted."""
    starts, result = [address for address, _ in table], {}
    with open(path, encoding="utf-8") as counts:
        for line in counts:
            address, number = int(line.split()[0], 16), int(line.split()[1])
            i = bisect.bisect_right(starts, address) - 1
            # What is far from a symbol is of no binary that is known: firmware, modules.
            near = i >= 0 and address - starts[i] < 1 << 20
            name = table[i][1] if near else "elsewhere"
            if name not in WAITS:
                result[name] = result.get(name, 0) + number
    return result


def measure(arch):
    """By memory and way, instructions a page by function: the difference of two boots."""
    directory = f"{BUILD}/bench/{arch}-profile"
    os.makedirs(directory, exist_ok=True)
    # The machine's own, not what scripts/qemu finds: the API of 11 is another one.
    package, qemu = {"x86": ("qemu-system-x86", "qemu-system-x86_64"),
                     "arm64": ("qemu-system-arm", "qemu-system-aarch64")}[arch]
    subprocess.run(["bash", "-c", f". {TOP}/scripts/lib.sh; need {package}"], check=True)
    so, result = plugin(directory, qemu), {}
    for memory, ways in MODES.items():
        for way in ways:
            counted = []
            for mib in MIB // 2, MIB:
                out = f"{directory}/counts"
                if os.path.exists(out):
                    os.remove(out)
                boot(arch, {f"{memory}_{way}": paging(arch, memory, way, VCPUS, mib)},
                     variables=["ICOUNT=1", f"QEMU={qemu} -plugin {so},out={out}"])
                if not os.path.exists(out):
                    sys.exit(f"error: the plugin has written nothing, see {BUILD}/{arch}/qemu.log")
                # Not those of the guest: the test's binary is its kernel, too.
                table = sorted(symbols(f"{BUILD}/{arch}/linux/vmlinux", "")
                               + symbols(f"{BUILD}/{arch}/tests/demand_paging_test", "user: "))
                counted.append(functions(out, table))
            result[f"{memory}/{way}"] = {
                name: round((counted[1].get(name, 0) - counted[0].get(name, 0)) / PAGES, 1)
                for name in set(counted[0]) | set(counted[1])}
    return result


def show(result):
    """Prints the functions with the most instructions, for each kind of memory."""
    for memory, ways in MODES.items():
        profiles = [result[f"{memory}/{way}"] for way in ways]
        print(f"{memory:42} " + " ".join(f"{WAYS[way][0]:>23}" for way in ways))
        print(f"{'all':42} " + " ".join(f"{sum(p.values()):23.0f}" for p in profiles))
        print(f"{'of these in user space and in the guest':42} " + " ".join(
            f"{sum(n for name, n in p.items() if name.startswith('user: ')):23.0f}" for p in profiles))
        names = sorted(set().union(*profiles), key=lambda n: -max(p.get(n, 0) for p in profiles))
        for name in names[:40]:
            print(f"  {name:40} " + " ".join(f"{p.get(name, 0):23.0f}" for p in profiles))
        print()
