# Everything a fresh machine needs: `make demo` runs the main job, `make test` the checks.
# The first of these that runs and is new enough (a name on the path may be a shim that does not run).
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

.PHONY: demo test test-all lint env clean

env: .venv/dev

# What runs models; then what checks them.
.venv/models: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; install it, or run make PYTHON=/path/to/it"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[models]'
	@touch $@

.venv/dev: .venv/models
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: .venv/models
	$(BIN)/python -m meshwright demo

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/pyright --warnings

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-all: lint
	$(BIN)/python -m pytest -m '' -n 2 --dist worksteal

clean:
	rm -rf .venv build dist
