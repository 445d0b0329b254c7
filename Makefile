# One command per intention; each prepares what it needs. `make help` lists them.
# Needs: make, and Python 3.10 or newer with pip. `make PYTHON=python3.12 venv` picks another interpreter.

PYTHON  ?= python3
WORKERS ?= 2
ARGS    ?=

VENV      := .venv
BIN       := $(VENV)/bin
LOCKED    := $(VENV)/.locked
INSTALLED := $(VENV)/.installed
TIMM      := .venv-timm
INSTALL   := -m pip --disable-pip-version-check --retries 10 --timeout 60 install
PIP       := $(BIN)/python $(INSTALL)

# TensorFlow lives in an environment of its own (docs/decisions/0013).
TF        := .venv-tensorflow
TF_LOCKED := $(TF)/.locked
TF_TESTS  := tests/tensorflow $(wildcard tests/integrations/test_keras*.py)

# The site needs no torch, and its packages may not move a version of the tests' (docs/decisions/0039).
DOCS        := .venv-docs
DOCS_LOCKED := $(DOCS)/.locked

# The tests run in WORKERS processes; more threads than one in each would only fight for the same cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# Networks fail for moments, and an install is safe to repeat.
try = for n in 1 2 3; do $(1) && exit 0; echo "attempt $$n of 3 failed: $(1)" >&2; sleep $$((5 * n)); done; exit 1

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-tensorflow test-gpu test-timm check static docs site format bench clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' Makefile

venv: $(INSTALLED) ## set up .venv from requirements.lock (again when the lock changes)

demo: $(INSTALLED) ## train a detector on photographs and a text model, by several methods and by GSO; two tables and a page
	$(BIN)/gradsplit demo $(ARGS)

test: $(INSTALLED) ## run every test; skips are printed with their reasons
	$(PYTEST) $(ARGS)

test-gpu: $(INSTALLED) ## on a graphics card: kernels against the definition, nothing waits; without one, skips
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 -rs tests/gpu/test_on_a_card.py $(ARGS)

test-timm: $(TIMM)/.installed ## timm's NFNet, ResNet and ViT, in .venv-timm: its torchvision wants the torch it was built for
	OMP_NUM_THREADS=1 $(TIMM)/bin/python -m pytest -n 0 tests/integrations/test_timm.py $(ARGS)

test-tensorflow: $(TF_LOCKED) ## run what needs TensorFlow, and the Keras tests on it, in .venv-tensorflow
	KERAS_BACKEND=tensorflow OMP_NUM_THREADS=1 $(TF)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(TF_TESTS) $(ARGS)

check: static docs test ## format, lint, types, docs, tests

static: $(INSTALLED) ## format, lint and types, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(INSTALLED) ## links, README pair and code blocks, doctests, versions in prose
	$(PYTEST) tests/docs $(ARGS)

site: $(DOCS_LOCKED) ## build the site into site/, to be opened from the disk: site/index.html
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --clean

format: $(INSTALLED) ## rewrite the sources in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED) ## what a step costs here, beside a global clip and a fused AdamW
	$(BIN)/gradsplit bench $(ARGS)

clean: ## remove caches and build products; .venv stays
	rm -rf build dist site *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)*/*' -prune -exec rm -rf {} +

# Debian's python3 may lack ensurepip; the system's pip can then install into the new environment.
%/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "gradsplit needs Python 3.10 or newer; try make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $* || { $(PYTHON) -m venv --without-pip --clear $* && \
	  $(PYTHON) -m pip --python $@ install pip; }

# deepforest is installed for its photographs alone; its dependencies would replace torch (docs/decisions/0003).
$(LOCKED): requirements.lock | $(BIN)/python
	@$(call try,$(PIP) -r requirements.lock)
	@$(call try,$(PIP) --no-deps deepforest==2.1.0)
	@touch $@

$(TF_LOCKED): requirements-tensorflow.lock | $(TF)/bin/python
	@$(call try,$(TF)/bin/python $(INSTALL) -r requirements-tensorflow.lock)
	@touch $@

$(DOCS_LOCKED): requirements-docs.lock | $(DOCS)/bin/python
	@$(call try,$(DOCS)/bin/python $(INSTALL) --requirement requirements-docs.lock)
	@touch $@

$(INSTALLED): pyproject.toml $(LOCKED)
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

# timm imports torchvision, which is compiled against one build of one torch: an environment of its own (5.5 GB with CUDA).
TIMM_PACKAGES ?= torch==2.14.1 torchvision==0.29.1 timm==1.0.31
$(TIMM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(TIMM)
	@$(call try,$(TIMM)/bin/python -m pip --disable-pip-version-check install $(TIMM_PACKAGES) "hypothesis>=6.100" "pytest>=8.2" pytest-xdist "numba>=0.60" "setuptools>=77")
	$(TIMM)/bin/python -m pip --disable-pip-version-check install --no-deps --no-build-isolation --editable .
	@$(TIMM)/bin/python -c 'import timm' || { echo "make test-timm: expected torch and torchvision of one build in $(TIMM). Name a pair that your index has: make test-timm TIMM_PACKAGES='torch==… torchvision==… timm==1.0.31'" >&2; exit 1; }
	@touch $@
