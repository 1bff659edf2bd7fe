# SPDX-License-Identifier: GPL-2.0
#
# The front door: every target is a script of a few dozen lines in scripts/.

ARCH ?= x86
export ARCH TESTS LINUX V DEBUG N ROWS KERNEL QEMU_SOURCE

# Two architectures unless one was asked for, the one that takes longer first.
ifeq ($(origin ARCH),file)
test fuzz regress mutants client-qemu: ARCH := arm64 x86
endif

SHELL := /bin/bash
MAKEFLAGS += --no-print-directory

help:
	@echo 'KVM memory-fault exits: a patch series for Linux 7.3'
	@echo
	@echo '  make demo     build the patched kernel, boot it under QEMU, page a guest and migrate'
	@echo '                one, by userfaultfd and by exits; prints tables, draws out/demo-*'
	@echo '  make test     lint, build, boot and test, x86 and arm64'
	@echo
	@echo '  make tree     build/7.3/linux: a git tree, the kernel plus one commit a patch'
	@echo '  make export   write the commits of build/7.3/linux back to the patches'
	@echo '  make mbox     out/7.3/*.patch with a cover letter, for git am or git send-email'
	@echo '  make lint     check the series: round trip, git am, checkpatch, sparse, W=1,'
	@echo '                the inventory of -EFAULT, the documentation'
	@echo '  make builds   build KVM and its selftests at each commit, in many configurations'
	@echo '  make bench    instructions per page by each way, vCPUs and memory, where they go, locks,'
	@echo '                a model of many vCPUs (PARTS="pages locks ..."); AGAINST=file.json'
	@echo '                compares with an earlier result; make bench-check: with the bounds'
	@echo '  make fuzz     random calls against a model, SECONDS=n SEED=s, on a DEBUG kernel'
	@echo '  make regress  all KVM selftests of the base, on the unpatched and on the patched kernel'
	@echo '  make mutants  break KVM line by line, and see that a test notices'
	@echo '  make bisect   build, boot and test each commit'
	@echo '  make docs     out/docs: the documentation as HTML'
	@echo '  make client-qemu  build QEMU with the patches of clients/qemu, for both or ARCH'
	@echo '  make client-test  migrate a guest by it in the patched kernel, N times by each way and'
	@echo '                memory (x86: in boots of two); KERNEL=base: the unpatched one, both: in turns'
	@echo '  make clean    remove build/ and out/ (refused while the tree has unexported work)'
	@echo
	@echo '  ARCH=x86|arm64    one architecture; default: x86 for demo, bench and client-test, else both;'
	@echo '                    make test: arm64-16k, too, i.e. 16K pages'
	@echo '  TESTS="a b"       make test: only these tests, without lint'
	@echo '  DEBUG=1|kcsan     make test: kernels with KASAN, lockdep and kmemleak; with KCSAN'
	@echo '  LINUX=path        a 7.3.y kernel, tarball or directory, instead of the package'
	@echo '  N=n ROWS=pattern  make client-test: migrations a row (2), and only these rows'
	@echo '  V=1               show the commands of the kernel build'
	@echo
	@echo 'The kernel side is in virt/ and arch/, the tests in tools/, the order in series.'

tree export mbox lint builds docs demo test regress mutants bisect clean client-test:
	@scripts/$@

client-qemu:
	@scripts/$@ $(ARCH)

bench:
	@scripts/$@ $(if $(AGAINST),--against '$(AGAINST)') $(ARCH) $(PARTS)

bench-check:
	@scripts/bench --quick --check $(ARCH)

fuzz:
	@scripts/$@ '$(SECONDS)' '$(SEED)'

.PHONY: help tree export mbox lint builds docs demo test bench bench-check fuzz regress mutants bisect \
	client-qemu client-test clean
