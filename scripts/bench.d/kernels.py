# SPDX-License-Identifier: GPL-2.0
"""What the series costs those who don't use it, and what it costs to set and clear the flag."""

import subprocess

from runs import TOP, boot, median, paging, slopes

PAGES = (64 << 20) // 2 // 4096
EXITS = 4000
TOGGLES = 200


def measure(arch, rounds):
    """Faults in a slot without the flag, and exits to userspace: both kernels, a boot each."""
    commands = {"fault_n": paging(arch, "missing_anon", "kernel", 4, 32),
                "fault_2n": paging(arch, "missing_anon", "kernel", 4, 64),
                "exit_n": f"exit_on_missing_perf_test -t 0 -e {EXITS}",
                "exit_2n": f"exit_on_missing_perf_test -t 0 -e {2 * EXITS}"}
    unpatched = subprocess.run([f"{TOP}/scripts/unpatched", arch], check=True,
                               stdout=subprocess.PIPE, text=True).stdout.strip()
    result = {}
    for which, variables in ("unpatched", [f"KERNEL={unpatched}"]), ("patched", []):
        samples = boot(arch, commands, rounds + 1, ["ICOUNT=1", *variables])
        for what, number in ("fault", PAGES), ("exit", EXITS):
            result[f"{what}/{which}"] = median(
                slopes(samples[f"{what}_n"][1:], samples[f"{what}_2n"][1:], number))
    return result


def show(result):
    """Prints the table."""
    print(f"{'of a VM that does not use the series':40} {'unpatched':>10} {'spread':>8} "
          f"{'patched':>10} {'spread':>8} {'ratio':>7}")
    for what, text in ("fault", "page fault of the kernel alone"), ("exit", "exit to userspace and back"):
        before, after = (result[f"{what}/{which}"] for which in ("unpatched", "patched"))
        print(f"{text:40} {before['instructions']:10.0f} {before['spread_percent']:7.2f}% "
              f"{after['instructions']:10.0f} {after['spread_percent']:7.2f}% "
              f"{after['instructions'] / before['instructions']:7.4f}")


def toggles(arch, rounds):
    """Setting and clearing the flag, by the size of the slot, in MiB, whose pages are all mapped."""
    sizes = (1, 16, 128)
    commands = {f"toggle_{mib}m_{n}": f"exit_on_missing_perf_test -e 0 -t {n} -b {mib}M"
                for mib in sizes for n in (TOGGLES, 2 * TOGGLES)}
    samples = boot(arch, commands, rounds + 1)
    result = {}
    for mib in sizes:
        short, long = (samples[f"toggle_{mib}m_{n}"][1:] for n in (TOGGLES, 2 * TOGGLES))
        # A toggle is to set and to clear.
        result[str(mib)] = median(slopes(short, long, 2 * TOGGLES))
    return result


def show_toggles(result):
    """Prints the table."""
    print(f"{'MiB of the slot':16} {'to set or clear the flag':>26} {'spread':>8}")
    for mib, cost in result.items():
        print(f"{mib:16} {cost['instructions']:26.0f} {cost['spread_percent']:7.2f}%")
