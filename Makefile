# `make chat` talks to the bundled model, `make test` runs all that CI runs. Both need Python 3.11+ and make only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOG := $(VENV)/install.log
PIP_FLAGS := --disable-pip-version-check --no-input

# every client that the tests of an ordinary machine use
EXTRAS := dev,plot,grammar,server,evaluate,finetune,tensorboard
comma := ,
# two processes, of one OpenBLAS thread each; a test file stays in one, so that the models its
# tests share are made once
PYTEST := -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
test test-without coverage: export OPENBLAS_NUM_THREADS := 1
# each of the many processes that tests start would compile the package again
test test-without coverage: export PYTHONDONTWRITEBYTECODE :=

.PHONY: chat test test-without docs coverage constraints dist clean help
help:
	@echo "make chat         install and chat with the bundled model"
	@echo "make test         lint, types and tests, as CI runs them"
	@echo "make test-without the tests of what a machine may lack, once more without it"
	@echo "make docs         build the site of the documentation into build/site"
	@echo "make coverage     the lines that no test executes"
	@echo "make constraints  write the newest versions into constraints/known-good.txt"
	@echo "make dist         build wheel and source distribution, and check what they hold"
	@echo "make clean        remove the virtual environment and caches"

# $(call install,WHAT): make the virtual environment where there is no complete one, and install WHAT into it. What pip
# says goes to a log, and the end of the log is shown when something fails. A later run of make finishes what was
# interrupted: the script `activate` is what an environment gets last.
define install
@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("openelm-mlx needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)")'
@mkdir -p $(VENV)
@echo "installing openelm-mlx into $(VENV), once (log: $(LOG)) ..." >&2
@{ { [ -f $(BIN)/activate ] && $(BIN)/python -m pip --version; } || $(PYTHON) -m venv $(VENV); } >$(LOG) 2>&1 && \
	$(BIN)/python -m pip install $(PIP_FLAGS) 'pip>=21.3' >>$(LOG) 2>&1 && \
	$(BIN)/python -m pip install $(PIP_FLAGS) --editable '$(1)' >>$(LOG) 2>&1 || \
	{ tail -n 20 $(LOG) >&2; echo "installing failed; the whole log is $(LOG)" >&2; exit 1; }
endef

# $(call extra,WHAT): install what one target needs beside the rest.
define extra
@$(BIN)/python -m pip install $(PIP_FLAGS) --editable '$(1)' >>$(LOG) 2>&1 || { tail -n 20 $(LOG) >&2; exit 1; }
endef

$(VENV)/installed: pyproject.toml
	$(call install,.)
	@touch $@

$(VENV)/installed-dev: pyproject.toml
	$(call install,.[$(EXTRAS)])
	@touch $(VENV)/installed $@

chat: $(VENV)/installed
	@$(BIN)/openelm chat openelm-tiny

test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy -p openelm_mlx
	$(BIN)/mypy tests/tools
	$(BIN)/python $(PYTEST)

# what tests/helpers/optional.py names: no OpenBLAS, no compiler or browser on the PATH, a home below a file
test-without: $(VENV)/installed-dev
	OPENELM_BLAS=off PATH=$(abspath $(BIN)) HOME=/dev/null/home $(BIN)/python $(PYTEST) \
		-m "(needs or with_or_without) and not matplotlib and not llguidance and not lm_eval and not tensorboard"

docs: $(VENV)/installed-dev
	$(call extra,.[docs])
	$(BIN)/zensical build --strict

coverage: $(VENV)/installed-dev
	$(call extra,.[coverage])
	$(BIN)/coverage erase
	$(BIN)/coverage run $(PYTEST)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# To test with the versions known to be good: PIP_CONSTRAINT=constraints/known-good.txt make test
constraints: $(VENV)/installed-dev
	$(call extra,.[constraints])
	$(BIN)/uv pip compile pyproject.toml $(foreach extra,$(subst $(comma), ,$(EXTRAS)),--extra $(extra)) --upgrade \
		--universal --no-annotate --custom-compile-command "make constraints" --quiet --output-file constraints/known-good.txt

dist: $(VENV)/installed-dev
	$(call extra,.[dist])
	$(BIN)/python packaging/check_distributions.py dist

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .cache .coverage .coverage.*
