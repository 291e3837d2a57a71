# Two commands set themselves up on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart

.PHONY: help install optional quickstart test test-all test-fast lint check clean

help:
	@echo "make quickstart   make data, train a tiny Align-DETR DINO on it, evaluate, draw (about 7 minutes on two cores)"
	@echo "make test         the test suite"
	@echo "make test-all     the same and what takes too long for every change: every backbone, every detector's export"
	@echo "make test-fast    the parts of a detector and its losses: no processes, no training runs"
	@echo "make optional     what loggers, videos and ONNX need beside it (their tests skip without)"
	@echo "make lint         formatting, lint and types"
	@echo "make check        lint and test, as continuous integration runs them"

install: $(BIN)/.installed

$(BIN)/.installed: requirements.txt requirements-dev.txt requirements-fast.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, found %s (make PYTHON=python3.12 ...)" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-fast.txt || echo "hotcoco cannot be installed: pycocotools evaluates, more slowly"
	@touch $@

optional: $(BIN)/.installed
	@for list in export loggers video; do \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-$$list.txt || \
		echo "requirements-$$list.txt cannot be installed: the tests that need it skip"; \
	done

data/shapes/shapes.json: | $(BIN)/.installed
	$(BIN)/python -m tools.make_shapes --out data/shapes

# One process per core: without a GPU that is faster than threads, and it does not suffer from a busy machine.
quickstart: $(BIN)/.installed data/shapes/shapes.json
	processes=$$($(BIN)/python -c "import os, torch; print(1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1))") && \
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --standalone --nproc-per-node $$processes main.py --cfg configs/quickstart.yaml --resume auto output_dir=$(RUN)
	@echo
	@echo "look at:   $(RUN)/predictions.png (targets beside predictions), $(RUN)/curves.png"
	@echo "try next:  $(BIN)/python -m tools.explore $(RUN) --out explore      and open explore/index.html"
	@echo "           $(BIN)/python main.py --cfg configs/quickstart.yaml criterion.classification=focal output_dir=runs/focal"
	@echo "           $(BIN)/python -m tools.compare $(RUN) runs/focal"

# Two worker processes with one thread each use two cores better than one process with two threads.
test: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not thorough"

# Before a release.
test-all: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

# What somebody who changes a loss, a matcher or a detector wants to know every few minutes.
test-fast: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow" tests/losses tests/matchers tests/models \
		tests/test_layout.py tests/test_structures.py

lint: $(BIN)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
