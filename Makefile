# `make chat` talks to the bundled model, `make test` runs all that CI runs. Both need Python 3.10+ and make only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# The tree as it is installed, for the type checker: convert and benchmarks lie beside the package here, inside it there.
TYPES := build/types

.PHONY: chat test clean help
help:
	@echo "make chat   install and chat with the bundled model"
	@echo "make test   lint, types and tests, as CI runs them"
	@echo "make clean  remove the virtual environment and caches"

$(VENV)/ready:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("openelm-mlx needs Python 3.10 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@echo "creating $(VENV) ..." >&2
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade pip
	@touch $@

$(VENV)/installed: pyproject.toml | $(VENV)/ready
	@echo "installing openelm-mlx (once) ..." >&2
	@$(PIP) install --editable .
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/ready
	@echo "installing openelm-mlx with its development tools (once) ..." >&2
	@$(PIP) install --editable '.[dev]'
	@touch $(VENV)/installed $@

chat: $(VENV)/installed
	@$(BIN)/openelm chat openelm-tiny

test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	@rm -rf $(TYPES) && mkdir -p $(TYPES) && cp -R openelm_mlx $(TYPES) && cp -R convert benchmarks $(TYPES)/openelm_mlx
	MYPYPATH=$(TYPES) $(BIN)/mypy -p openelm_mlx
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
