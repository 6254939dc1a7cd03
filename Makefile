PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test venv bench bench-full bench-gpu report lint wheel clean

demo: venv
	$(BIN)/python examples/digits.py

test: venv
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

venv: $(VENV)/.installed

# Python files are used in place; only what is compiled or declared asks for a new installation.
$(VENV)/.installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(PIP) -e '.[bench]'
	touch $@

$(VENV)/.bench-gpu: $(VENV)/.bench
	$(PIP) -e '.[bench-gpu]'
	touch $@

bench: $(VENV)/.bench
	$(BIN)/python -m bench.run --visits 3

bench-full: $(VENV)/.bench
	$(BIN)/python -m bench.run --visits 3 --bench-full

bench-gpu: venv
	$(BIN)/python -m bench.run --gpu --check
	$(MAKE) $(VENV)/.bench-gpu
	$(BIN)/python -m bench.run --gpu
	$(BIN)/python -m bench.profile --model titok-l-32 --device cuda --dtype bfloat16 --no-compile
	$(BIN)/python -m bench.profile --model titok-l-64-512 --device cuda --dtype bfloat16 --no-compile

report: venv
	$(BIN)/python -m bench.report

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/* tests/cuda_simulator/*
	$(BIN)/mypy

wheel: venv
	rm -rf dist
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist demo.png
