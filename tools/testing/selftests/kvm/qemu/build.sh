#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# build.sh WHAT EXPECTED LOG COMMAND...: run a build with its output in LOG, and
# count its steps meanwhile: in place on a terminal, once a minute otherwise.
# EXPECTED is their usual number, or 0. V=1 shows the output itself.
set -euo pipefail

what=$1 expected=$2 log=$3
shift 3

progress() {
	local steps
	steps=$(grep -cE '^  [A-Z]|gcc ' "$log" || true)
	[ "$expected" -le "$steps" ] || steps="$steps of about $expected"
	printf '%s: %s steps, %d:%02d' "$what" "$steps" $((SECONDS / 60)) $((SECONDS % 60))
}

: > "$log"
setpriv --pdeathsig TERM "$@" > "$log" 2>&1 < /dev/null &
pid=$!
trap 'kill $pid 2> /dev/null; wait $pid; exit 143' INT TERM HUP

show=
if [ "${V:-}" ]; then
	tail -n +1 -f --pid=$pid "$log" &
	show=$!
fi

tick=0
while kill -0 $pid 2> /dev/null; do
	sleep 0.5 & wait $! || true
	tick=$((tick + 1))
	if [ "$show" ]; then
		continue
	elif [ -t 1 ]; then
		printf '\r%s\e[K' "$(progress)"
	elif [ $((tick % 120)) = 0 ]; then
		progress; echo
	fi
done
[ -z "$show" ] || wait "$show" || true
if wait $pid; then
	[ ! -t 1 ] || printf '\r'
	progress; echo
else
	status=$?
	[ ! -t 1 ] || echo
	[ "$show" ] || tail -n 40 "$log"
	echo "$what: failed, see $log"
	exit $status
fi
