#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# run.sh ARCH DIR LIMIT SILENCE COMMAND...: run QEMU for at most LIMIT seconds, and
# no longer than SILENCE seconds without a word of it, show the results in
# DIR/ktap.log as they arrive, and judge. Only what was seen to pass has passed: a
# test without a result has failed.
set -euo pipefail

arch=$1 dir=$2 limit=$3 silence=$4
shift 4
here=$(dirname "$0")
list=$dir/tests.list ktap=$dir/ktap.log console=$dir/console.log log=$dir/qemu.log

splat='WARNING:|BUG:|Oops|K[AC]SAN:|KFENCE:|UBSAN:|possible .* detected|suspicious RCU'
splat+='|INFO: task .* blocked|rcu.*detected .*stall|soft lockup|hard LOCKUP|workqueue lockup'
splat+='|Kernel panic|[Uu]nable to handle|general protection|Internal error|Bad page'
splat+='|Call [Tt]race|cut here|sleeping function|while atomic|refcount_t:'
splat+='|new suspected memory leaks'

# Functions of memory-fault exits, but for those through which all of KVM_RUN goes.
ours='memory_fault|exit_on_missing|hva_to_pfn|kvm_handle_error_pfn|kvm_mmu_faultin_pfn'
ours+='|kvm_s2_fault|kvm_replace_memslot'
ours+='|user_mem_abort|commit_memory_region|slot_apply_flags|check_memory_region_flags'
ours+='|ioctl_enable_cap_generic|kvm_hva_is_missing|hva_is_unmapped|complete_missing_page'
ours+='|mmu_invalidate_retry_missing|async_page_ready|nested_svm_vmrun|pkvm_mem_abort|gmem_abort'

# Races that are there without memory-fault exits, too: without mmu_lock, a look at the
# count and the range of invalidations, before another one with mmu_lock; the end of an
# update of memslots.
known='(kvm_mmu_faultin_pfn / kvm_mmu_(invalidate_end|notifier_invalidate_range_start)'
known+='|kvm_swap_active_memslots / kvm_vcpu_gfn_to_memslot)$'

# The first complaint on the console, but for data races that KCSAN found in other
# functions, and for how it came that memory is short, which tests do on purpose.
# To the end, as what stops earlier lets a pipe fail that has a complaint to tell.
complaint() {
	LC_ALL=C awk -v ours="$ours" -v known="$known" -v splat="$splat" '
		function look(text) {
			if (first == "" && text ~ splat)
				first = text
		}
		function judge() {
			if (stacks ~ ours && report !~ known)
				look(report)
			report = stacks = ""
		}
		/BUG: KCSAN:/ { judge(); report = $0; sub(/\r$/, "", report); next }
		report != "" && /=====/ { judge(); next }
		# The name of the process is none of a function.
		report != "" { if (!/ Comm: /) stacks = stacks $0 "\n"; next }
		/ invoked oom-killer: |: (page allocation failure|vmalloc error): / { excused = 1 }
		excused && /Call [Tt]race/ { excused = 0; next }
		{ look($0) }
		END { judge(); print first }' "$console"
}

# The results so far; not by awk, as some wait for a block of input.  Fails if a
# machine that has booted is silent.
progress() {
	local line seconds='' booted=''

	while :; do
		IFS= read -r ${booted:+-t "$silence"} line || { [ $? -le 128 ]; return; }
		booted=y
		case $line in
		"# "*": cpu_us="*" wall_s="*)
			seconds=${line##*wall_s=} ;;
		"ok "* | "not ok "* | "Bail out!"* | "# kvm-qemu: retry"*)
			echo "$line ($seconds s)"
			continue ;;
		esac
		[ -z "${V:-}" ] || echo "$line"
	done
}

: > "$ktap"
: > "$console"
setpriv --pdeathsig KILL "$@" > "$log" 2>&1 < /dev/null &
qemu=$!
trap 'kill -KILL $qemu 2> /dev/null || true' EXIT
trap 'exit 130' INT TERM HUP

timeout "$limit" tail -n +1 -f --pid=$qemu "$ktap" | progress &
why="no end after $limit s"
wait $! || [ $? = 124 ] || why="no sign of life for $silence s"

problems=()
if kill -0 $qemu 2> /dev/null; then
	problems+=("$why: QEMU was killed")
	kill -KILL $qemu
	wait $qemu 2> /dev/null || true
else
	wait $qemu || problems+=("QEMU failed with status $?: $(tail -n 1 "$log")")
fi
[ "$(tail -n 1 "$ktap")" = "# kvm-qemu: end" ] || problems+=("the machine did not live to the end")
races=$(grep -ac 'BUG: KCSAN:' "$console" || true)
[ "$races" = 0 ] || echo "$races reports of data races; those of other functions don't count"
found=$(complaint)
[ -z "$found" ] || problems+=("the kernel complained: $found")

# Lines "status name why", and the last lines that a failed test wrote.
verdict=$(awk -v arch="$arch" '
	function expected(name, why,	i) {
		for (i = 1; i <= nskips; i++)
			if (skip[i] == name && index(why, reason[i]) == 1)
				return 1
		return 0
	}
	function judge(status, why,	i) {
		seen[name] = 1
		for (i = 1; status == "passed" && i <= nparts; i++)
			if (!expected(name, part[i])) {
				status = "failed"
				why = "unexpected SKIP of a part: " part[i]
			}
		print status, name, why
		for (i = lines > 40 ? lines - 39 : 1; status == "failed" && i <= lines; i++)
			print "#", name, line[i]
		lines = nparts = 0
	}
	FILENAME ~ /tests$/ {
		if ($1 == "skip" && $2 == arch) {
			skip[++nskips] = $3
			sub(/^[^ \t]+[ \t]+[^ \t]+[ \t]+[^ \t]+[ \t]+/, "")
			reason[nskips] = $0
		}
		next
	}
	FILENAME ~ /tests.list$/ { plan[++nplan] = $1; next }
	/^# kvm-qemu: alive/ { next }
	/^# / { line[++lines] = $0 }
	/^# +ok [0-9]+.*# SKIP/ { part[++nparts] = $0; sub(/.*# SKIP */, "", part[nparts]) }
	/^(not )?ok / {
		nr++
		name = plan[nr]
		why = $0
		sub(/^[^#]*(# )?/, "", why)
		if ($1 == "not")
			judge("failed", why)
		else if (why !~ /^SKIP/)
			judge("passed", "")
		else if (sub(/^SKIP */, "", why) && expected(name, why))
			judge("skipped", why)
		else
			judge("failed", "unexpected SKIP: " why)
	}
	END {
		while (nr < nplan) {
			name = plan[++nr]
			judge("failed", "no result")
		}
	}' "$here/tests" "$list" "$ktap")

count() {
	grep -c "^$1 " <<< "$verdict" || true
}

grep -E '^(failed|#) ' <<< "$verdict" | cut -c -160 || true
if [ ${#problems[@]} -gt 0 ]; then
	tail -n 40 "$console"
	printf 'failed: %s\n' "${problems[@]}"
fi
failed=$(count failed)
[ "$failed" -gt 0 ] || [ ${#problems[@]} = 0 ] || failed=1
[ "$verdict" ] || failed=1
[ "$failed" = 0 ] || echo "logs: $ktap $console $log"
echo "$(count passed) passed, $failed failed, $(count skipped) skipped"
[ "$failed" = 0 ]
