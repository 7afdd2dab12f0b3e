# Everything a developer or CI runs. Needs GNU make 3.81 or later, a POSIX sh and Python 3.11 or later; nothing else.
# A line `target: ## text` is what bare `make` lists.

SHELL := /bin/sh
.DEFAULT_GOAL := help
BIN := .venv/bin
export PYTHON

# More arguments for the program: make run ARGS="--log-format json"; make test ARGS="-k relay -x"
ARGS ?=

setup_dev = python=$$(scripts/find-python) && "$$python" scripts/setup_venv.py dev
setup_test = python=$$(scripts/find-python) && "$$python" scripts/setup_venv.py test

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

.PHONY: run
run: ## everything on this machine: PostgreSQL, a broker and all roles; Ctrl-C ends it
	@$(setup_dev)
	@exec $(BIN)/orderflow dev $(ARGS)

.PHONY: demo
demo: ## the walk-through: eight parts, each result checked
	@$(setup_dev)
	@exec $(BIN)/orderflow demo $(ARGS)

.PHONY: test
test: ## the whole test suite, in three processes, as it waits a lot; ARGS="-k relay -x -n 0" for a part, in one
	@$(setup_test)
	@exec $(BIN)/python -m pytest -n 3 --dist worksteal $(ARGS)

.PHONY: campaign
campaign: ## benchmark, torture and mutation gate in their short form, as CI runs them
	@$(setup_test)
	@exec $(BIN)/python -m pytest -m campaign $(ARGS)

.PHONY: check
check: lint ## what CI asks before the tests: lint, types, import directions, known vulnerabilities
	$(BIN)/python scripts/audit.py --unreachable-is-a-note

.PHONY: lint
lint: ## ruff, mypy --strict and the architecture test; changes nothing
	@$(setup_test)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

.PHONY: fix
fix: ## let ruff mend what it can, and format
	@$(setup_test)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: audit
audit: ## the locked packages against the database of known vulnerabilities (network)
	@$(setup_test)
	$(BIN)/python scripts/audit.py $(ARGS)

.PHONY: sbom
sbom: ## the bill of materials of the locked packages, CycloneDX, in build/
	@python=$$(scripts/find-python) && "$$python" scripts/sbom.py build/sbom.cdx.json

.PHONY: smoke
smoke: ## `make run` as a person would: one order until it is PAID, Ctrl-C, nothing left behind
	@python=$$(scripts/find-python) && "$$python" .ci/smoke.py $(ARGS)

.PHONY: bench
bench: ## the benchmarks of the README
	@$(setup_dev)
	@exec $(BIN)/orderflow bench $(ARGS)

.PHONY: bench-peers
bench-peers: ## the same order flow on other Python stacks, beside ours; ARGS="--quick celery orderflow"
	@$(setup_dev)
	@exec $(BIN)/python -m bench.peers.measure $(ARGS)

.PHONY: torture
torture: ## load, a seeded plan of crashes and faults, then the audit; ARGS="--seconds 60 --seed 7"
	@$(setup_dev)
	@exec $(BIN)/orderflow torture $(ARGS)

.PHONY: mutants
mutants: ## each safeguard switched off, one at a time: some test has to notice; ARGS="--quick", or names
	@$(setup_test)
	@exec $(BIN)/python -m tests.mutants $(ARGS)

.PHONY: setup
setup: ## .venv with everything for running, testing and linting; repairs a half-made one
	@$(setup_test)

.PHONY: lock
lock: ## write requirements/*.txt from pyproject.toml; ARGS=--upgrade takes the newest versions
	@python=$$(scripts/find-python) && "$$python" scripts/lock.py $(ARGS)

.PHONY: kafka
kafka: ## a real Apache Kafka in the foreground (Java 17, and Maven once); ARGS="--port 9092"
	@$(setup_dev)
	@exec $(BIN)/python -m orderflow.embedded.kafka $(ARGS)

.PHONY: clean
clean: ## remove caches and build results; .venv and the data of `make run` stay
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## clean, and remove .venv and the local data (orders included) too
	rm -rf .venv .orderflow .kafka
