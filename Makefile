# make serve [ARGS="--port 8080"]   install textmill into .serve-venv and serve the default model
# make test                         install textmill and what tests need into .test-venv, run the tests
# PYTHON=python3.12 chooses the interpreter (3.11 or newer) that environments are made from.

PYTHON ?= python3
ARGS ?=
PYTEST_ARGS ?=
SERVE_VENV ?= .serve-venv
TEST_VENV ?= .test-venv
PIP_FLAGS = -qq --disable-pip-version-check --no-input

SOURCES := pyproject.toml CMakeLists.txt \
	$(shell find src -type f -not -name '*.pyc' -not -name '*.so' -not -path '*/__pycache__/*')

.PHONY: serve test clean

serve: $(SERVE_VENV)/.installed
	@exec $(SERVE_VENV)/bin/textmill launch $(ARGS)

test: $(TEST_VENV)/.installed
	@echo "textmill: running the tests"
	@$(TEST_VENV)/bin/pytest -m "not slow and not gpu" $(PYTEST_ARGS)

$(SERVE_VENV)/.installed: $(SOURCES)
	@$(MAKE) --no-print-directory .install VENV=$(SERVE_VENV) WHAT=.

$(TEST_VENV)/.installed: $(SOURCES)
	@$(MAKE) --no-print-directory .install VENV=$(TEST_VENV) WHAT='.[test]'

.PHONY: .install
.install:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "textmill needs Python 3.11 or newer; set PYTHON")'
	@[ -x $(VENV)/bin/pip ] || { echo "textmill: making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "textmill: building and installing into $(VENV) (the first time this fetches PyTorch, some minutes)"
	@$(VENV)/bin/pip install $(PIP_FLAGS) --upgrade '$(WHAT)'
	@touch $(VENV)/.installed
	@echo "textmill: installed"

clean:
	rm -rf $(SERVE_VENV) $(TEST_VENV) build
