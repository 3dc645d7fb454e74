# The task menu: `make` lists it. Every task sets up what it needs; nothing is installed outside .venv,
# but for Debian packages, and those only by root.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory

JOBS ?= 2
FUZZ_SECONDS ?= 60
SEEDS ?= 1000000
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.setup
export PATH := $(PATH):/usr/sbin:/sbin

# The one list of programs that tests and benchmarks start, each with its Debian package.
PROGRAMS := \
	curl:curl \
	dbus-daemon:dbus-daemon \
	dbus-send:dbus-bin \
	docker-credential-ecr-login:amazon-ecr-credential-helper \
	docker-credential-pass:golang-docker-credential-helpers \
	docker-registry:docker-registry \
	gnome-keyring-daemon:gnome-keyring \
	gpg:gpg \
	igzip:isal \
	mkfs.ext4:e2fsprogs \
	mkfs.xfs:xfsprogs \
	nginx:nginx-light \
	openssl:openssl \
	pass:pass \
	skopeo:skopeo \
	strace:strace \
	umoci:umoci \
	zstd:zstd
APT := DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3

.PHONY: help setup packages check format test soak demo bench fuzz

help: ## list the tasks
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with the library and its development tools
	@:

test: setup packages check ## set up, check, then run the whole suite
	@$(PY) fuzz/run.py --seconds 5
	$(PY) -m pytest -n $(JOBS) --dist loadfile

soak: setup packages ## every fault, cut, round and mutant, and SEEDS (1000000) simulated runs: hours
	@LAYERCACHE_SOAK=1 LAYERCACHE_SEEDS=$(SEEDS) $(PY) -m pytest -n $(JOBS) --dist loadfile --timeout=14400 \
		tests/simulation tests/mutants tests/crash tests/multiprocess tests/purge tests/test_registry_failures.py

check: setup ## format, lint, types, import layers, who may touch what
	@failed=0
	run() { "$$@" || failed=1; }  # all of them, so that one run shows everything
	run $(VENV)/bin/ruff format --check --quiet .
	run $(VENV)/bin/ruff check --quiet .
	run $(VENV)/bin/mypy --no-error-summary
	run $(VENV)/bin/lint-imports --no-logo
	run $(PY) -m pytest -q tests/test_lint_rules.py
	exit $$failed

format: setup ## rewrite the sources in the house format
	@$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

demo: setup ## run the main job once on embedded defaults and show each step
	@$(PY) docs/examples/demo.py

bench: setup packages ## a cold pull against skopeo and the floor of curl, openssl and sync
	@$(PY) -m bench.cold_pull

fuzz: setup ## feed made-up input to the parsers for FUZZ_SECONDS (60); see fuzz/README.md
	@$(PY) fuzz/run.py --seconds $(FUZZ_SECONDS)

packages: ## install the Debian packages the tests start (as root), or name the missing ones
	@missing=()
	for pair in $(PROGRAMS); do
		command -v "$${pair%%:*}" >/dev/null || missing+=("$${pair##*:}")
	done
	if [ "$${#missing[@]}" -eq 0 ]; then exit 0; fi
	if [ "$$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
		echo "installing Debian packages: $${missing[*]}"
		$(APT) update
		$(APT) install -y --no-install-recommends "$${missing[@]}" >/dev/null
	else
		echo "not installed, and only root can install them here: $${missing[*]}"
		echo "tests that start them are skipped and say so"
	fi

$(STAMP): pyproject.toml
	@mkdir -p $(VENV)
	exec 9>$(VENV)/.lock
	flock 9
	usable() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
	find_python() {
		for name in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do
			if usable "$$name"; then command -v "$$name"; return; fi
		done
		return 1
	}
	as_root() { [ "$$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; }
	if ! usable $(PY) || ! $(PY) -m pip --version >/dev/null 2>&1; then
		if ! python=$$(find_python); then
			echo "Python 3.11 or later is needed: on Debian 12 or Ubuntu 24.04, apt-get install python3 python3-venv" >&2
			exit 1
		fi
		if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then
			package=$$("$$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
			if ! as_root; then
				echo "$$python cannot make a virtual environment: apt-get install $$package" >&2
				exit 1
			fi
			echo "installing the Debian package $$package"
			$(APT) update
			$(APT) install -y --no-install-recommends "$$package" >/dev/null
		fi
		echo "making $(VENV) with $$("$$python" --version)"
		"$$python" -m venv $(VENV)
	fi
	echo "installing the library and its development tools into $(VENV)"
	$(PY) -m pip install -qq --disable-pip-version-check --editable '.[dev]'
	touch $@
