# SPDX-License-Identifier: GPL-2.0
# What the scripts of this directory share; to be sourced, not run.
# shellcheck shell=bash

set -euo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
release=7.3
build=$top/build/$release
tree=$build/linux
# What was said to the top-level Makefile is not meant for the kernel's.
export -n ARCH TESTS TREE OUT KERNEL ROWS N
unset MAKEFLAGS MFLAGS
# Committer of every imported commit, so that the same series gives the same
# commit ids everywhere; authors come from the patches.
export GIT_COMMITTER_NAME=series GIT_COMMITTER_EMAIL=series@localhost
# What ccache has seen in one work tree is good for all others.
export CCACHE_BASEDIR=$top/build CCACHE_NOHASHDIR=1

# say TEXT...: one line of progress, on stderr.
say()
{
	echo "$*" >&2
}

# die TEXT...: one line saying what is wrong and what to do; exit status 1.
die()
{
	say "error: $*"
	exit 1
}

# base_field NAME [FILE]: a value from bases/$release, or of another package's file.
base_field()
{
	sed -n "s/^$1=//p" "${2:-$top/bases/$release}"
}

# sum_is PATH [FILE]: whether PATH is what bases/$release, or FILE, has the SHA256 of.
sum_is()
{
	[[ $(sha256sum <"$1" | cut -d' ' -f1) == $(base_field sha256 "${@:2}") ]]
}

# git_base DIR LINE...: makes the files in DIR a git tree whose only commit, which
# LINE... describe, is refs/series/base. The same files give the same commit id.
git_base()
{
	local dir=$1 line message=()

	shift
	for line; do
		message+=(-m "$line")
	done
	git -C "$dir" -c init.defaultBranch=series init -q
	git -C "$dir" config gc.auto 0
	git -C "$dir" add -A -f
	GIT_AUTHOR_NAME=series GIT_AUTHOR_EMAIL=series@localhost \
	GIT_AUTHOR_DATE='2000-01-01T00:00:00Z' GIT_COMMITTER_DATE='2000-01-01T00:00:00Z' \
		git -C "$dir" commit -q "${message[@]}"
	git -C "$dir" update-ref refs/series/base HEAD
}

# need PACKAGE...: installs the Debian packages that are missing; not root,
# prints the command that does so and stops.
need()
{
	local p missing=()

	if ! command -v dpkg-query >/dev/null; then
		say "note: no dpkg here; these Debian packages, or what they hold, are needed: $*"
		return
	fi
	for p; do
		[[ $(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null) == installed ]] ||
			missing+=("$p")
	done
	((${#missing[@]})) || return 0
	[[ $(id -u) == 0 ]] ||
		die "packages are missing; run: sudo apt-get install -y --no-install-recommends ${missing[*]}"

	lock packages
	say "installing ${missing[*]}"
	mkdir -p "$build"
	{
		apt-get -o DPkg::Lock::Timeout=600 update &&
		DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 \
			install -y --no-install-recommends "${missing[@]}"
	} >"$build/apt.log" 2>&1 </dev/null ||
		die "apt-get could not install ${missing[*]} (no network?); see $build/apt.log"
	unlock packages
}

# own_apt DIR SUITES ELSE [OPTION]...: sets the array apt to options that make
# apt-get use one or more suites of the machine's mirror, with lists and cache in DIR,
# so that the machine's own configuration is neither used nor changed. ELSE is the
# advice for those who can't. The variable types can be "deb deb-src"; OPTION is more
# for apt-get.
own_apt()
{
	local dir=$1 suites=$2 else=$3 mirror type suite

	shift 3

	command -v apt-get >/dev/null || die "no apt-get here: $else"
	# shellcheck disable=SC2016 # apt's own variables
	mirror=$(apt-get indextargets --format '$(REPO_URI) $(COMPONENT)' 'Created-By: Packages' |
		awk '$2 == "main" && $1 !~ /security/ { print $1; exit }')
	[[ -n $mirror ]] || die "apt knows no mirror: run apt-get update, $else"

	mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial"
	for type in ${types:-deb}; do
		for suite in $suites; do
			echo "$type [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main"
		done
	done >"$dir/sources.list"
	# What is installed here is none of its business, e.g. a version that a suite lacks.
	: >"$dir/status"
	apt=(-o "Dir::Etc::sourcelist=$dir/sources.list"
		-o Dir::Etc::sourceparts=/dev/null -o "Dir::State::status=$dir/status"
		-o "Dir::State::lists=$dir/lists" -o "Dir::Cache=$dir/cache"
		-o APT::Sandbox::User=root -o Acquire::Retries=3 "$@")
	apt-get "${apt[@]}" -o APT::Update::Error-Mode=any update >"$dir/apt.log" 2>&1 ||
		die "apt-get update failed (no network?); see $dir/apt.log, $else"
}

# outdir ARCH: the name below build/$release of what is built for ARCH, and for DEBUG.
outdir()
{
	local debug=${DEBUG:-}

	echo "$1${debug:+-${debug/#1/debug}}"
}

passed=0 failed=0 skipped=0 failures=()

# keep_logs ARCH: keeps the logs of a run that failed, which the next one would replace.
keep_logs()
{
	local dir

	mkdir -p "$build/failed"
	dir=$(mktemp -d "$build/failed/$(outdir "$1").XXXXXX")
	cp "$build/$(outdir "$1")"/{ktap,console,qemu}.log "$dir" || true
	say "logs are kept in ${dir#"$top/"}"
}

# counted ARGUMENT...: runs the harness, and adds what it counted to passed, failed and
# skipped, and what it says of what failed to failures. If it counted nothing, or failed
# for what it does not count, one test has failed. Returns the harness's exit status.
counted()
{
	local log status=0 counts p f s

	log=$(mktemp "$build/run.XXXXXX")
	"$top/scripts/harness" "$@" 2>&1 </dev/null | tee "$log" || status=$?
	counts=$(grep -E '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$' "$log" | tail -n 1 | tr -dc '0-9 ' || true)
	mapfile -t -O ${#failures[@]} failures < <(sed -n "s/^failed[ :]/$1: &/p" "$log")
	rm "$log"
	read -r p f s <<<"${counts:-0 0 0}"
	((status == 0 && p + s > 0 || f)) || f=1
	((!f)) || keep_logs "$1"
	passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
	return $status
}

declare -A lock_fds

# lock NAME: waits for, then holds build/.NAME.lock until unlock or exit, so
# that two runs at once take turns. A killed run leaves no lock behind.
lock()
{
	local fd

	mkdir -p "$top/build"
	exec {fd}>>"$top/build/.$1.lock"
	if ! flock -n "$fd"; then
		say "waiting for another run that holds build/.$1.lock"
		flock "$fd"
	fi
	lock_fds[$1]=$fd
}

# unlock NAME: gives back what lock took.
unlock()
{
	local fd=${lock_fds[$1]}

	exec {fd}>&-
	unset "lock_fds[$1]"
}

# space PATH GIB: stops if the file system of PATH has less than GIB free.
space()
{
	local free

	free=$(($(df --output=avail -k "$1" | tail -n 1) >> 20))
	((free >= $2)) ||
		die "$2 GiB of free space are needed under $1, $free are there"
}

# tgit ARGUMENT...: git in the kernel tree. Its refs/series/base is the
# unmodified kernel; refs/series/saved the commit that the files of this
# repository stood for at the last import or export; refs/series/importing is
# there while an import changes the work tree.
tgit()
{
	git -C "$tree" "$@"
}

# unsaved: prints what make tree or make clean would throw away, if anything.
unsaved()
{
	[[ -d $tree/.git ]] || return 0
	! tgit rev-parse -q --verify refs/series/importing >/dev/null || return 0
	if [[ -n $(tgit status --porcelain | head -n 1) ]]; then
		echo "uncommitted work"
	elif [[ $(tgit rev-parse HEAD) != $(tgit rev-parse -q --verify refs/series/saved) ]]; then
		echo "unexported commits"
	fi
}

# series_patches DIR: the patches of the series in DIR, in order, one a line.
series_patches()
{
	sed -e 's/#.*//' -e 's/[[:space:]]*$//' -e '/^$/d' "$1/series"
}

# worktree DIR COMMIT: makes DIR a second work tree of the kernel's git tree, at
# COMMIT, without changes or new files.
worktree()
{
	if [[ ! -f $1/Makefile ]]; then
		rm -rf "$1"
		tgit worktree prune
		tgit worktree add -q --detach "$1" "$2"
	fi
	git -C "$1" checkout -q -f --detach "$2"
	git -C "$1" clean -q -fd
}
