#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# list.sh ARCH KARCH LIMIT FACTOR ARGS [NAME]...: look the names up in the table, which
# is "tests" or the file that $TABLE names, and print one line "name seconds binary
# [argument]..." for each run that they stand for. Seconds are LIMIT if not empty, else
# 60 and FACTOR times those of the table. ARGS are added to the arguments of each.
set -euo pipefail

arch=$1 karch=$2 limit=$3 factor=$4 args=${5:+ $5}
shift 5
cd "$(dirname "$0")"

[ $# -gt 0 ] || { echo "no test was named" >&2; exit 1; }

# A selftest without a row has its source here.
has_source() {
	[[ $1 =~ ^[a-zA-Z0-9_-]+$ ]] && { [ -e "../$1.c" ] || [ -e "../$karch/$1.c" ]; }
}

for name; do
	rows=$(awk -v arch="$arch" -v name="$name" -v limit="$limit" -v factor="$factor" '
		BEGIN { column = arch == "x86_64" ? 3 : 4 }
		/^#/ || NF < 5 || $1 == "skip" { next }
		name == $1 || name == $2 || name == "all" {
			if ($column != "-") {
				printf "%s %d", $1, limit ? limit : 60 + factor * $column
				for (i = 5; i <= NF; i++)
					printf " %s", $i
				print ""
			}
			known = 1
		}
		END { exit !known }' "${TABLE:-tests}") || {
		base=${name#"$karch"/}
		has_source "$base" || {
			echo "no test '$name': no row or group of $PWD/tests, no selftest" >&2
			exit 1
		}
		rows="$base ${limit:-$((60 + factor * 60))} $base"
	}
	[ "$rows" ] || {
		echo "test '$name' does not run on $arch" >&2
		exit 1
	}
	echo "${rows//$'\n'/$args$'\n'}$args"
done
