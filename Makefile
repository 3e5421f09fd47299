# Every target sets up .venv by itself: Python 3.11 or newer is all that a fresh machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A file's tests share what they build, so a file stays in one process; the models are too small for threads.
WORKERS ?= logical
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile
# Without a GPU torch's CPU build is a tenth of the download: set this to the CPU wheel index that pytorch.org names.
TORCH_INDEX ?=

.PHONY: help install quickstart test test-all test-lowest docs lint format clean

help:
	@echo "make quickstart   the whole path on a CPU, offline, to quickstart/index.html"
	@echo "make test         the tests (about 8 minutes on two cores)"
	@echo "make test-all     the slow ones too"
	@echo "make test-lowest  a part of them at the lower end of the dependency ranges"
	@echo "make docs         the documentation as a site, build/docs/index.html"
	@echo "make lint         ruff"

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("DentalGemma needs Python 3.11 or newer; name one with PYTHON=…" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -z "$(TORCH_INDEX)" || $(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--extra-index-url "$(TORCH_INDEX)" torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

quickstart: install
	$(BIN)/dentalgemma quickstart --out quickstart

test: install
	$(PYTEST) -m "not slow"

test-all: install
	$(PYTEST)

LOWEST := .venv-lowest
LOWEST_TESTS := tests/test_readers_*.py $(addprefix tests/test_,$(addsuffix .py,audit vqa instruct proof dataset_folder cli recipes \
	merging chain collator evaluation scoring report judge checkpoints cards stacking push push_failures))

test-lowest:
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	test -z "$(TORCH_INDEX)" || $(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt \
		--extra-index-url "$(TORCH_INDEX)" torch
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable . \
		pytest pytest-xdist hypothesis statsmodels pydicom pycocotools supervision
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile -m "not slow" $(LOWEST_TESTS)

# Without --quiet, under which mkdocs counts no warnings and --strict passes.
docs: install
	$(BIN)/python docs/write_cli.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info
