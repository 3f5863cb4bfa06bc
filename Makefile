# Everything from nothing: each target makes .venv and installs what it needs, once.
#
#   make demo            train one small model in five ways and compare (ARGS=--exit ends without waiting for Ctrl-C)
#   make test            everything, as CI runs it (REQUIRE_ALL=1: a missing system tool is a failure)
#   make test-fast       the part under three minutes
#   make check           linters and types
#   make serve           the controller on http://127.0.0.1:8000

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest
FAST := not slow and not browser and not prometheus
# One file stays in one process, because its fixtures hold servers.
IN_PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile
# Debian keeps initdb and pg_ctl out of PATH.
export PATH := $(PATH)$(addprefix :,$(lastword $(wildcard /usr/lib/postgresql/*/bin)))

.PHONY: demo serve test test-fast check tools clean

$(STAMP): pyproject.toml deploy/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint deploy/constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/gns-controller demo $(ARGS)

serve: $(STAMP)
	@$(BIN)/gns-controller serve $(ARGS)

test: $(STAMP) tools check
	$(PYTEST) $(IN_PARALLEL) $(ARGS)

test-fast: $(STAMP)
	$(PYTEST) $(IN_PARALLEL) -m '$(FAST)' $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Chromium and Prometheus come from the system: installed if the user may, else their tests are reported as not run.
tools:
	@sh deploy/install-test-tools.sh

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output .gns
