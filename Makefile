# Every target that needs the environment makes it first; `gpu-check` uses the python3 that is there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest -q -n 2
TRITON_CPU := TRITON_INTERPRET=1 OMP_NUM_THREADS=1

.PHONY: setup demo test test-slow quality style bench gpu-check clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/specvlm demo

# Triton's interpreter and its compiler cannot share a process, hence two runs.
test: setup
	$(TRITON_CPU) $(PYTEST) -m "interpreter and not slow"
	OMP_NUM_THREADS=1 $(PYTEST) -m "not interpreter and not gpu and not slow"

test-slow: setup
	$(TRITON_CPU) $(PYTEST) -m "interpreter and slow"
	OMP_NUM_THREADS=1 $(PYTEST) -m "slow and not interpreter and not gpu"

quality: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m bench.compare

STAGE ?= kernels
gpu-check:
	PYTHONPATH=src:. python3 -m bench.gpu_check $(STAGE) $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
