# Each target does all of its own set-up: missing Debian packages (as root) and the virtual environment in .venv.

VENV := .venv/bin
# Namespaces need root; where we are not root, a user namespace gives it, if the system allows that.
AS_ROOT := $(if $(filter 0,$(shell id -u)),,unshare --user --map-root-user --net --mount .ci/with-loopback)

IMAGE ?= kproxy:dev
ENGINE ?= $(notdir $(firstword $(shell command -v docker || command -v podman) docker))
VERSION ?= $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' kproxy/__init__.py)

.PHONY: help setup demo lint test coverage bench image clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup:  ## Debian packages and .venv
	@.ci/setup

demo: setup  ## three nodes, pods and a client on this machine: what kproxy does, step by step
	@$(VENV)/python -m tests.demo

lint: setup  ## ruff, mypy, the layers
	@$(VENV)/ruff check .
	@$(VENV)/ruff format --check .
	@$(VENV)/mypy
	@$(VENV)/lint-imports

test: setup lint  ## everything that .ci/run checks
	@$(AS_ROOT) .ci/tests $(VENV)/python $(ARGS)

coverage: setup  ## all tests once more, with which lines of kproxy they run
	@$(AS_ROOT) .ci/tests $(VENV)/python --cov --cov-report=term:skip-covered

bench: setup  ## start, change, restart and memory at 100 to 30,000 services
	@$(AS_ROOT) $(VENV)/python -m tests.bench $(ARGS)

# The builder uses this machine's network, so that it also works where containers have none.
image:  ## the container image, IMAGE=kproxy:dev, with docker or podman, and what it consists of
	@$(ENGINE) build --network host --build-arg VERSION=$(VERSION) --tag $(IMAGE) .
	@$(ENGINE) run --rm --interactive --network none --entrypoint python3 $(IMAGE) - <tests/image/contents.py

clean:  ## remove .venv and caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .coverage* .hypothesis
