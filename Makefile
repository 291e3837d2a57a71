# Two commands set themselves up on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart

.PHONY: help install optional quickstart small-shapes test test-all test-fast lint check clean

help:
	@echo "make quickstart   install, draw data, train a tiny Align-DETR, evaluate (7 minutes on two cores after the installation)"
	@echo "make test         all tests but the thorough ones (about 15 minutes on two cores)"
	@echo "make test-all     all tests: every backbone, every detector's export, more GPU architectures"
	@echo "make test-fast    tests of losses, matchers and detectors that start no processes and train nothing"
	@echo "make lint         formatting, lint and types"
	@echo "make check        lint and test, as continuous integration runs them"
	@echo "make install      the environment in $(VENV) alone; make PYTHON=python3.12 install takes that Python"
	@echo "make optional     packages for loggers, videos and ONNX; tests that need them skip without"
	@echo "make small-shapes draw the data of configs/shapes/, on which each of the seven detectors learns in minutes"
	@echo "make clean        remove the environment and the caches"

install: $(BIN)/.installed

$(BIN)/.installed: requirements.txt requirements-dev.txt requirements-fast.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, found %s (make PYTHON=python3.12 ...)" % sys.version.split()[0])'
	@echo "Installing PyTorch and what else is needed into $(VENV). This takes some minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-fast.txt || echo "hotcoco cannot be installed: pycocotools evaluates instead, more slowly"
	@touch $@

optional: $(BIN)/.installed
	@for list in export loggers video; do \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-$$list.txt || \
		echo "requirements-$$list.txt cannot be installed: the tests that need it skip"; \
	done

data/shapes/shapes.json: | $(BIN)/.installed
	$(BIN)/python -m tools.make_shapes --out data/shapes

small-shapes: data/small_shapes/shapes.json

data/small_shapes/shapes.json: | $(BIN)/.installed
	$(BIN)/python -m tools.make_shapes --out data/small_shapes --train-images 6000 --image-size 64 --max-objects 3 \
		--min-object-size 14 --max-object-size 40

# One process per core: without a GPU that is faster than threads, and it does not suffer from a busy machine.
quickstart: $(BIN)/.installed data/shapes/shapes.json
	processes=$$($(BIN)/python -c "import os, torch; print(1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1))") && \
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --standalone --nproc-per-node $$processes main.py --cfg configs/quickstart.yaml --resume auto output_dir=$(RUN)
	@echo
	@echo "Look at   $(RUN)/predictions.png    targets beside predictions"
	@echo "          $(RUN)/curves.png         loss, learning rate and AP"
	@echo
	@echo "Try next  every detection by score and IoU; then open explore/index.html in a browser:"
	@echo "              $(BIN)/python -m tools.explore $(RUN) --out explore"
	@echo "          another loss, and both runs in a table:"
	@echo "              $(BIN)/python main.py --cfg configs/quickstart.yaml criterion.classification=focal output_dir=runs/focal"
	@echo "              $(BIN)/python -m tools.compare $(RUN) runs/focal"
	@echo "          a loss of your own: 'Change one thing' in README.md"

# Two worker processes with one thread each use two cores better than one process with two threads.
test: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not thorough"

# Before a release.
test-all: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

# What somebody who changes a loss, a matcher or a detector wants to know every few minutes.
test-fast: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not thorough" \
		--ignore-glob '*/test_backbone*' tests/losses tests/matchers tests/models tests/test_layout.py tests/test_structures.py

lint: $(BIN)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
