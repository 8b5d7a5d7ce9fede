# make demo   sets up .venv and prunes a small network on handwritten digits
#             (with DATA=DIR and WEIGHTS=FILE: the same on CIFAR-10; MODEL=NAME, OUT=DIR)
# make test   sets up .venv and runs the tests
# make test-all      runs those too that take long, and those of the benches
# make test-lowest   runs them in .venv-lowest with the oldest releases that pyproject.toml allows
# make test-wheel    builds the wheel, installs it without extras elsewhere and prunes there

# With Python 3.11 to 3.14: make demo PYTHON=python3.14 VENV=.venv-3.14
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
OUT ?= runs/demo
MODEL ?= resnet20
export VENV PYTHON

.PHONY: demo test test-all test-lowest test-wheel check setup

demo: setup
	$(VENV)/bin/secateur demo --out "$(OUT)" $(if $(DATA),--model "$(MODEL)" --data "cifar10:$(DATA)" --weights "$(WEIGHTS)")

test: setup
	scripts/test

test-all: setup
	scripts/test --all

test-lowest:
	scripts/test-lowest

test-wheel: setup
	scripts/test-wheel

check: setup
	scripts/check

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable ".[dev,lint,libraries]"
	touch $@
