# `make help` lists the commands. Settings: make book DATA=/path/to/camus PROFILE=smoke PYTHON=python3.12
PYTHON ?= python3
PROFILE ?= cpu
DATA ?=
REVISION ?=
PIP_ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
INSTALLED := .venv/.installed

.PHONY: help book pdf course test bench registry lab check clean distclean

help:
	@echo "make book       execute the chapters and build the pages (DATA=folder, PROFILE=smoke|cpu|gpu|paper)"
	@echo "make pdf        the same, and the pages printed into one PDF file (needs Chromium or Chrome)"
	@echo "make course     write student and teacher copies of the chapters to _build/course; they install this"
	@echo "                commit of the package (REVISION=v0.1.0: that one)"
	@echo "make test       run the tests"
	@echo "make bench      time the phantom and the training loop against the usual shape"
	@echo "make lab        open the chapters in JupyterLab"
	@echo "make registry   renew the list of shipped files, after a change under data/"
	@echo "make check      format, lint and spelling"
	@echo "make clean      remove what was built; make distclean removes .venv too"

book: $(INSTALLED)
	$(BIN)/python book/tools/build.py --profile "$(PROFILE)" $(if $(DATA),--data "$(DATA)")

pdf: $(INSTALLED)
	$(BIN)/python book/tools/build.py --pdf --profile "$(PROFILE)" $(if $(DATA),--data "$(DATA)")

course: $(INSTALLED)
	$(BIN)/python book/tools/course.py $(if $(REVISION),--revision "$(REVISION)")

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

bench: $(INSTALLED)
	$(BIN)/python experiments/run.py phantom_speed --again
	$(BIN)/python experiments/run.py training_speed --again

registry: $(INSTALLED)
	$(BIN)/python book/tools/registry.py

lab: $(INSTALLED)
	$(BIN)/jupyter lab notebooks

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell

clean:
	rm -rf _build

distclean: clean
	rm -rf .venv

# Needs the network; everything above does not.
$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "Python 3.11, 3.12 or 3.13 is needed, and $(PYTHON) is not one: name one with PYTHON=python3.12"; \
	  exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(PIP) $(PIP_ARGS) --requirement requirements.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@
