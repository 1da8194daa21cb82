PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: install demo test lint types docs bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "uncollapse needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	@# Debian's python3 may lack the venv module's pip; virtualenv in a folder of its own needs no root either.
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  $(PYTHON) -m pip install -q --target $(VENV)-boot virtualenv && \
	  PYTHONPATH=$(VENV)-boot $(PYTHON) -m virtualenv -q $(VENV); } || \
	  { rm -rf $(VENV); echo "no virtual environment could be made: $(PYTHON) has neither venv nor pip"; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -e ".[dev,examples,docs]"
	@touch $@

demo: install
	$(BIN)/uncollapse demo $(ARGS)

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet -f website/mkdocs.yml $(ARGS)

bench: install
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[bench]"
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python benchmarks/run.py $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-boot
