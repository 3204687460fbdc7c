# WhaleFlux: `make demo` does the main job, `make test` passes the tests; each sets up what it needs.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TORCH  ?= torch==2.13.0

help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml hatch_build.py $(wildcard protos/whaleflux/v1/*.proto)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed; name one with: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Setting up $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check "$(TORCH)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@# xds-protos brings older copies of opentelemetry-proto's modules to the same place: the newer ones have to win.
	@$(BIN)/python -m pip install -q --disable-pip-version-check --force-reinstall --no-deps opentelemetry-proto
	@$(BIN)/python -m compileall -q libs services  # else the first `up` would compile in seven processes at once
	@touch $@

setup: $(STAMP) ## Virtual environment with everything, in .venv

demo: $(STAMP) ## The main job: a training run survives the loss of its node, then its model is served (KEEP=1 leaves it running)
	@$(BIN)/whaleflux demo $(if $(KEEP),--keep)

demo-elastic: $(STAMP) ray ## One pool that breathes: Ray grows and gives back, a training lends GPUs, a machine is rented, a model goes to three sites (KEEP=1)
	@$(BIN)/whaleflux demo-elastic $(if $(KEEP),--keep)

up: $(STAMP) ## The whole suite on this machine, until Ctrl-C
	@$(BIN)/whaleflux up

test: $(STAMP) ## All tests, in two lanes side by side
	@$(BIN)/python -m compileall -q libs services  # each suite starts a dozen processes: none of them should compile
	@$(BIN)/python -m tools.test_lanes $(ARGS)

unit: $(STAMP) ## Tests without sockets and real time
	@$(BIN)/python -m pytest -q tests/unit $(ARGS)

lint: $(STAMP) protos audit-deps checks ## Format, rules, types, contract, known vulnerabilities

checks: $(STAMP) ## Of lint what writes nothing that tests read: format, rules, types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

audit-deps: $(STAMP) ## Known vulnerabilities of what images hold (ADVISORIES=a folder or zip file of OSV records: without network)
	@ADVISORIES="$(ADVISORIES)" $(BIN)/python -m tools.audit_deps $(ARGS)

locks: $(STAMP) ## What goes into each image, by hash, from pyproject.toml (UPGRADE=1: the newest versions that fit), and its SBOM
	@$(BIN)/python -m tools.locks $(if $(UPGRADE),--upgrade)
	@$(BIN)/python -m tools.sbom

sbom: $(STAMP) ## The bill of materials of each image, from its lock
	@$(BIN)/python -m tools.sbom

protos: $(STAMP) ## Generates the stubs, checks the contract, and that it breaks nothing since the newest tag
	@$(BIN)/python hatch_build.py
	@$(BIN)/python tools/googleapis.py .build/googleapis
	@$(BIN)/buf lint
	@$(BIN)/buf format -d --exit-code protos
	@tag=$$(git describe --tags --abbrev=0 2>/dev/null); if [ -n "$$tag" ]; then $(BIN)/buf breaking --against ".git#tag=$$tag" --path protos; else echo "no tag yet: nothing to compare the contract with"; fi

clients: $(STAMP) ## Clients for other languages: make clients LANG=go|typescript (see docs/clients.md)
	@$(BIN)/python tools/clients.py "$(LANG)"

soak: $(STAMP) ## Long forms of tests: a million operations on a plan (PLAN_OPERATIONS=n PLAN_SEED=n), moves and preemptions in whose midst something is killed, the checkpointer over ranks, the fault of each alert, then 1,000 random histories, in hours (HISTORIES=n HISTORY_SEED=n)
	@$(BIN)/python -m tests.support.plan_soak.driver --operations $${PLAN_OPERATIONS:-1000000} --seed $${PLAN_SEED:-1}
	@WHALEFLUX_TEST_MOVES=1 $(BIN)/python -m pytest -q tests/integration/test_moves_suite.py
	@WHALEFLUX_TEST_KILLS=$${WHALEFLUX_TEST_KILLS:-10} $(BIN)/python -m pytest -q tests/integration/sdk/test_ranks.py
	@WHALEFLUX_TEST_ALERTS=1 $(BIN)/python -m pytest -q tests/robustness/test_alerts_fire.py
	@HISTORIES=$${HISTORIES:-1000} $(BIN)/python -m pytest -q -rA tests/robustness/test_random_histories.py $(ARGS)

bench: $(STAMP) ## All benchmarks, or one: make bench NAME=packing
	@$(BIN)/python -m benchmarks.run $(NAME) $(ARGS)

RAY ?= ray[default]==2.60.0
ray: ## Ray in an environment of its own, .venv-ray, for tests and benchmarks against it (RAY="ray[default]==2.60.0")
	@test -x .venv-ray/bin/python || $(PYTHON) -m venv .venv-ray
	@.venv-ray/bin/python -m pip install -q --disable-pip-version-check "$(RAY)"

docs: $(STAMP) ## The docs as a site, in .build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q && echo "open .build/site/index.html"

generate: $(STAMP) ## Writes what docs/ and deploy/ repeat of the code's tables
	@$(BIN)/python -m tools.generate

format: $(STAMP) ## Formats the code and the contract
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix -q . ; $(BIN)/buf format -w protos

clean: ## Removes what make made, and the state of the embedded suite
	@rm -rf $(VENV) .build .whaleflux .tox dist libs/whaleflux/v1

.PHONY: help setup demo demo-elastic up test unit soak lint checks audit-deps locks sbom protos clients bench ray docs generate format clean
