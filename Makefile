# Everything runs in an environment of its own, .venv, which the first target to need it creates.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo compare test test_all style quality

demo: .venv/demo  ## l2 against l2 + LPL on real photographs, about five minutes on two cores
	$(BIN)/python demo/run_demo.py

compare: .venv/demo  ## the demo's model with each of the perceptual objectives, about half an hour on two cores
	$(BIN)/python demo/compare_objectives.py

test: .venv/test .venv/inception/installed  ## the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

test_all: .venv/test .venv/engines .venv/inception/installed  ## the slow ones as well
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile -m ""

style: .venv/test
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

quality: .venv/test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

.venv/base: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	@echo "Installing the libraries; this takes a minute or more."
	$(INSTALL) --requirement requirements.txt
	touch $@

.venv/engines: requirements-engines.txt .venv/base
	DS_BUILD_OPS=0 $(INSTALL) --no-build-isolation --requirement $<
	touch $@

# Apart, and without torchvision, which has to be of the same build as torch: one test does without it.
.venv/inception/installed: requirements-inception.txt .venv/base
	$(INSTALL) --no-deps --target $(@D) --requirement $<
	touch $@

.venv/%: requirements-%.txt .venv/base
	$(INSTALL) --requirement $<
	touch $@
