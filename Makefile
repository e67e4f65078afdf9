# `make demo` on a fresh machine is all there is to do; see `make help`.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# The first that runs: a version manager may leave a command that does not.
PYTHON ?= $(shell for p in python3.11 python3; do $$p -c '' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
# Made once, and again when the dependencies change.
INSTALLED := .venv/installed
NEWEST := .venv-newest
# The certificates that the machine trusts, which a site's proxy may have added to; uv looks at its own otherwise.
export UV_SYSTEM_CERTS ?= true
# Where the shell forbids Python to keep what it has compiled, every process would compile torch again: 13 s instead of 6.
unexport PYTHONDONTWRITEBYTECODE

# FROM=scratch trains the miniature from its backbones instead of continuing the shipped checkpoints.
ifeq ($(FROM),scratch)
DEMO_CONFIG := configs/shapes/curriculum.yaml
OUT ?= runs/demo-scratch
else ifeq ($(FROM),)
DEMO_CONFIG := configs/shapes/demo.yaml
OUT ?= runs/demo
else
$(error FROM=$(FROM) is unknown; valid choices: scratch, or nothing)
endif

.PHONY: help install demo ui test test-newest check

help:  ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

install: $(INSTALLED)  ## make .venv with the locked dependencies

$(INSTALLED): requirements.lock pyproject.toml
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v[:2] < (3, 13) else \
	    f"Python 3.11 or 3.12 is needed, {sys.executable} is {v[0]}.{v[1]}; name one with PYTHON=...")'
	test -x $(BIN)/pip || "$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	touch $@

demo: $(INSTALLED)  ## the whole system in miniature; FROM=scratch, OUT=folder, DEMO_ARGS="--set field=value ..."
	$(BIN)/python -m launcher run $(DEMO_CONFIG) --out "$(OUT)" $(DEMO_ARGS)

ui: $(INSTALLED)  ## a page in the browser on which to try the demo's model
	$(BIN)/python -m wemmu ui "$(OUT)/export"

# With the slow ones a third worker: those on Slurm, all in one worker, mostly wait.
test: $(INSTALLED)  ## the tests but the slow ones; SLOW=1 for all, TEST_ARGS="-k name" chooses
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(if $(SLOW),3,2) --dist loadscope --no-loadscope-reorder \
	    $(if $(SLOW),,-m "not slow") $(TEST_ARGS)

test-newest: $(NEWEST)/installed  ## the tests of models with transformers 5 and the newest diffusers, in .venv-newest
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -m "not slow" \
	    -p no:cacheprovider tests/backbones tests/export/test_export.py tests/models tests/published tests/sampling $(TEST_ARGS)

# Everything that is not in its lock comes from .venv, which stands behind it on the path.
$(NEWEST)/installed: requirements-newest.lock $(INSTALLED)
	$(BIN)/python -m venv --clear --without-pip $(NEWEST)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	    > "$$($(NEWEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	$(BIN)/uv pip install --quiet --python $(NEWEST)/bin/python --no-deps -r requirements-newest.lock
	touch $@

check: $(INSTALLED)  ## linter, format, types, who imports whom, shell scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck -x slurm/*.sh .ci/run .ci/slurm
