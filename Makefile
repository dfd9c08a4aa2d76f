# make run    trains about a minute on generated Criteo-format data        make run RAW=path/train.txt[.gz]   on your own Criteo file
# make test   sets up, adds the TPU compiler (a requirement file of its own), runs all tests
# The environment takes 7 GB. It is kept in one place, outside the checkout, and made anew only where requirements.txt has changed.
PYTHON ?= python3
VENV ?= $(if $(XDG_CACHE_HOME),$(XDG_CACHE_HOME),$(HOME)/.cache)/dlrm_xla/venv
WORK ?= runs
RAW ?=
DEVICE ?= auto
ROWS ?= 1200000
PY := $(VENV)/bin/python

.PHONY: run test env env-test lint clean

env:
	@bash .ci/make_env "$(PYTHON)" "$(VENV)"

env-test:
	@bash .ci/make_env "$(PYTHON)" "$(VENV)" requirements-tpu-compiler.txt

run: env
	@PYTHON="$(PY)" RAW="$(RAW)" WORK="$(WORK)" DEVICE="$(DEVICE)" ROWS="$(ROWS)" bash .ci/demo

test: env-test
	$(PY) -m pytest $(ARGS)

lint: env
	$(PY) -m ruff check .

clean:
	rm -rf $(WORK)
