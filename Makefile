# Everything goes through the virtual environment in .venv, which every target sets up first.
# Python tools are spelled `python -m tool`: the first line of a script cannot hold a path with spaces.

PYTHON ?= python3
BIN := .venv/bin/python
READY := .venv/.ready
CONTRACT := libs/protogen/usameter/usameter.binpb

.DEFAULT_GOAL := help
.PHONY: help run test check bench proto fmt lock clean setup

help: ## What can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' Makefile

run: setup ## Start everything on an embedded PostgreSQL and Valkey; Ctrl-C stops it
	@$(BIN) -m usameter_cli up

test: setup ## Run every test
	@$(BIN) -m pytest --numprocesses 2 --dist loadgroup

check: setup ## Lint, types, generated stubs, contracts
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(BIN) -m mypy
	$(BIN) libs/protogen/generate.py --check
	.venv/bin/buf lint $(CONTRACT) --config buf.yaml
	.venv/bin/buf format --diff --exit-code protos
	.venv/bin/buf breaking $(CONTRACT) --against protos/published.binpb --config buf.yaml

bench: setup ## Measure the numbers of docs/performance.md on this machine
	@$(BIN) -m tests.bench

proto: setup ## Generate libs/protogen from protos/
	.venv/bin/buf format --write protos
	$(BIN) libs/protogen/generate.py

fmt: setup ## Format the code
	$(BIN) -m ruff check --fix-only --quiet .
	$(BIN) -m ruff format --quiet .

lock: setup ## Resolve pyproject.toml into requirements.lock, and what images need into deploy/docker
	$(BIN) -m pip install --quiet uv
	$(BIN) -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
		--no-annotate --extra dev pyproject.toml --output-file requirements.lock
	$(BIN) -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
		--no-annotate --constraint requirements.lock pyproject.toml --output-file deploy/docker/requirements.lock

clean: ## Remove the environment, caches and the data of `make run`
	rm -rf .venv .usameter .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Usameter needs Python 3.11 or later: make PYTHON=python3.12 …")'
	@test -x $(BIN) || $(PYTHON) -m venv .venv || { echo "python3 -m venv failed; Debian and Ubuntu have it in the package python3-venv"; exit 1; }
	@echo "Installing the locked dependencies into .venv (about half a minute, once) …"
	@$(BIN) -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --require-hashes -r requirements.lock
	@$(BIN) -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --no-build-isolation -e .
	@touch $(READY)
