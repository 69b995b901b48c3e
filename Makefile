# Every target makes the virtual environment it needs. PYTHON=python3.12 chooses the interpreter (3.11 or later).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FRAMEWORKS := .venv-frameworks
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help setup demo test test-frameworks test-docs test-slow docs dist release screenshots check format bench clean

help:
	@echo "make demo       set up, and evaluate the two demo models (reports in runs/demo)"
	@echo "make test       set up, and run all fast tests but those of the adapters"
	@echo "make test-frameworks  the same for the adapters, with every framework that they adapt (4 GB)"
	@echo "make test-docs  every command and block of code in README and docs, as it stands (with every framework)"
	@echo "make docs       the documentation as a site, in build/docs"
	@echo "make dist       wheel and sdist, built twice and compared"
	@echo "make release    the same, tried in an environment of its own, with a bill of materials"
	@echo "make test-slow  the tests that take minutes"
	@echo "make check      lint, strict types, import layers"
	@echo "make screenshots  every page that assay makes, as pictures in docs/screens (needs Chromium)"
	@echo "make bench      figures of this machine (see benchmarks/README.md for the peers)"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "assay needs Python 3.11 or later; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(FRAMEWORKS)/.installed: pyproject.toml constraints.txt
	test -x $(FRAMEWORKS)/bin/python || $(PYTHON) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/python -m pip install --quiet --constraint constraints.txt torch numpy
	$(FRAMEWORKS)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[frameworks]'
	touch $@

setup: $(STAMP)

demo: $(STAMP)
	$(BIN)/assay demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --ignore tests/frameworks --ignore tests/documentation

# Keras has one backend in a process, so its tests run once for each.
test-frameworks: $(FRAMEWORKS)/.installed
	OMP_NUM_THREADS=1 ASSAY_FRAMEWORKS=all KERAS_BACKEND=torch $(FRAMEWORKS)/bin/python -m pytest --numprocesses auto --dist loadfile tests/frameworks tests/test_augment.py
	OMP_NUM_THREADS=1 ASSAY_FRAMEWORKS=all KERAS_BACKEND=tensorflow $(FRAMEWORKS)/bin/python -m pytest tests/frameworks/test_keras.py tests/frameworks/test_tensorflow.py

test-docs: $(FRAMEWORKS)/.installed
	OMP_NUM_THREADS=1 ASSAY_FRAMEWORKS=all $(FRAMEWORKS)/bin/python -m pytest --numprocesses auto tests/documentation

docs: $(FRAMEWORKS)/.installed
	OMP_NUM_THREADS=1 $(FRAMEWORKS)/bin/sphinx-build -q -W --keep-going -b html docs build/docs

RELEASE := $(FRAMEWORKS)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[release]' && $(FRAMEWORKS)/bin/python scripts/release.py

dist: $(FRAMEWORKS)/.installed
	$(RELEASE)

release: $(FRAMEWORKS)/.installed
	$(RELEASE) --sbom

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python benchmarks/step_overhead.py
	$(BIN)/python benchmarks/verdict.py --models demo

screenshots: $(FRAMEWORKS)/.installed
	OMP_NUM_THREADS=1 $(FRAMEWORKS)/bin/python scripts/screenshots.py

clean:
	rm -rf $(VENV) $(FRAMEWORKS) runs build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
