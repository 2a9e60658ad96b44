# The two commands: `make demo` and `make test`. Each makes its own environment first.
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo
CONSTRAINTS ?= constraints.txt
export TORCH_INDEX PYTHON CONSTRAINTS

.PHONY: help demo test test-slow lint coverage docs docs-serve clean

help:
	@echo "make demo       train a small language model on this machine's own Python sources and read what it writes"
	@echo "make test       check style, types, layers and every claim that needs no GPU"
	@echo "make test-slow  the long sweeps"
	@echo "make coverage   the tests with their line coverage, which has a floor"
	@echo "make docs       build the documentation site into site/, without a warning"
	@echo "make docs-serve the documentation site on http://127.0.0.1:8000, rebuilt when a file changes"

$(VENV)/.demo: pyproject.toml $(CONSTRAINTS) scripts/bootstrap.sh
	@echo "Setting up $(VENV) (once; a few minutes)"
	@scripts/bootstrap.sh $(VENV)
	@touch $@

$(VENV)/.test: pyproject.toml $(CONSTRAINTS) scripts/bootstrap.sh
	@echo "Setting up $(VENV) for the tests (once; a few minutes)"
	@scripts/bootstrap.sh $(VENV) '[test]'
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	@$(BIN)/andromeda demo --out $(DEMO)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One thread for each of the two processes: more threads than cores only wait for each other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# Apart from `make test`, which tracing would slow down by more than a third.
coverage: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --cov --cov-report=term

test-slow: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m slow

# mkdocs-material prints a notice of its own at every start; it is no warning of this build.
docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --strict

clean:
	rm -rf $(VENV) site build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage
