# The two commands: `make demo` and `make test`. Each makes its own environment first.
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo
export TORCH_INDEX PYTHON

.PHONY: help demo test test-slow lint docs clean

help:
	@echo "make demo       train a small language model on this machine's own Python sources and read what it writes"
	@echo "make test       check style, types, layers and every claim that needs no GPU"
	@echo "make test-slow  the long sweeps"

$(VENV)/.demo: pyproject.toml constraints.txt scripts/bootstrap.sh
	@echo "Setting up $(VENV) (once; a few minutes)"
	@scripts/bootstrap.sh $(VENV)
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt scripts/bootstrap.sh
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

test-slow: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m slow

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
