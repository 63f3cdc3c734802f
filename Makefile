# `make demo` runs the whole pipeline, `make test` the tests; both make a virtual environment first.
PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test lint

$(VENV)/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[test]'
	touch $@

demo: $(VENV)/installed
	$(VENV)/bin/python -m minirlhf

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
