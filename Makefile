# `make demo` runs the whole pipeline, `make test` the tests, `make bench` measures speed; each makes a virtual
# environment first.
PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test bench lint

$(VENV)/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[test]'
	touch $@

demo: $(VENV)/installed
	$(VENV)/bin/python -m minirlhf

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest

bench: $(VENV)/installed
	$(VENV)/bin/python benchmarks/speed_all.py

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
