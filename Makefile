PYTHON ?= python3.11
BIN := .venv/bin
INSTALLED := .venv/.installed
BENCHMARKS := $(filter-out __init__,$(basename $(notdir $(wildcard tests/benchmarks/*.py))))

# Without bytecode files every Ray worker would compile TensorFlow's Python sources again: seconds for each start.
unexport PYTHONDONTWRITEBYTECODE

# Two of these at once would share one machine, and a benchmark would measure the other.
.NOTPARALLEL:

.PHONY: install demo test test-long check bench $(BENCHMARKS:%=bench-%) clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || \
		{ echo "$(PYTHON) was not found: install Python 3.11, or name another with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/helio run quickstart

test: install
	$(BIN)/pytest -m "not long"

test-long: install
	$(BIN)/pytest -m long

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(BENCHMARKS:%=bench-%)

$(BENCHMARKS:%=bench-%): bench-%: install
	$(BIN)/python -m tests.benchmarks.$*

clean:
	rm -rf build dist *.egg-info .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
