# Needs Python 3.11 or later with pip and venv, nothing else; name another one with `make test PYTHON=python3.12`.
PYTHON ?= python3

# The tests compare with PyTorch on the CPU. Where plain pip would fetch a large CUDA build of it, say what to install
# instead, as pip's arguments: make test TORCH="torch==2.13.0 --index-url <an index of CPU builds>".
TORCH ?= torch==2.13.0

# What is installed for the tests. Those on a real Ray (240 MB) run with it, and are skipped without: make test EXTRAS=dev,ray
EXTRAS ?= dev

BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help demo test quick aot newest wheel docs lint format clean

help:  ## list these targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: .venv/.installed  ## SFT, reward model and PPO of a tiny model, about three minutes; ends with a report
	@# transformers would remark that it found no PyTorch, which nothing here needs
	TRANSFORMERS_NO_ADVISORY_WARNINGS=1 $(BIN)/python -m realjax.apps.demo

test: lint  ## lint, types and all tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

quick: .venv/.dev  ## the tests that take seconds
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not e2e"

# An environment of its own: tests that run programs never meet the CUDA plugin.
aot: .venv-aot/.installed  ## compile the real programs for GPUs, without one, and compare with their budgets
	.venv-aot/bin/python -m pytest -n 2 tests/aot tests/allocation -m aot

# Anew each time: what the ranges of pyproject.toml allow today, which .ci/newest asks for once a week.
newest:  ## the quick tests with the newest versions of everything that realjax builds on
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install $(TORCH)
	.venv-newest/bin/python -m pip install --upgrade --upgrade-strategy eager $(TORCH) -e ".[dev]"
	.venv-newest/bin/python -m pip list --outdated
	.venv-newest/bin/python -m pytest -n 2 --dist worksteal -m "not slow and not e2e"

wheel: .venv/.dev  ## dist/: what pip installs from, checked as PyPI does it
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# Strict: a page that the index lacks, a dead link or anchor fails.
docs: .venv-docs/.installed  ## the pages of docs/ as a site, in site/
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

lint: .venv/.dev  ## ruff and pyright, as in .pre-commit-config.yaml
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/.dev  ## let ruff rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environments and the demo's files
	rm -rf .venv .venv-aot .venv-newest .venv-docs dist site demo_run

# The stamps make a second call quick; a changed pyproject.toml installs again.
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e .
	touch $@

.venv/.dev: .venv/.installed
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -e ".[$(EXTRAS)]"
	touch $@

# Only what makes the site; realjax itself is not needed for it.
.venv-docs/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install "mkdocs-material>=9.6,<10"
	touch $@

.venv-aot/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-aot
	.venv-aot/bin/python -m pip install $(TORCH)
	.venv-aot/bin/python -m pip install -e ".[dev,aot]"
	touch $@
