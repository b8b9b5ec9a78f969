# Two commands on a fresh machine: `make demo` and `make test`. Each makes its own .venv and installs what it needs.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PY := .venv/bin/python
STAMP := .venv/.installed
GENERATORS := .venv-proto/.installed
TOOLS := .venv/.debian-packages
SOURCES := proto controller worker k8s tests benchmarks examples
SOAK_S ?= 600
PYTEST_ARGS ?=

.PHONY: help demo test gpu check soak format lint types contracts proto proto-check static bench traces dashboards manifests clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt tools/make_venv.sh
	tools/make_venv.sh .venv -c constraints.txt -e '.[dev]'
	touch $@

$(GENERATORS): proto/requirements.txt tools/make_venv.sh
	tools/make_venv.sh .venv-proto -r proto/requirements.txt
	touch $@

$(TOOLS): tools/debian_packages.sh tools/kubernetes_tools.py | $(STAMP)
	tools/debian_packages.sh ip=iproute2 prometheus=prometheus promtool=prometheus chromium=chromium \
	  etcd=etcd-server openssl=openssl
	$(PY) tools/kubernetes_tools.py
	touch $@

demo: $(STAMP) ## train a small CNN on MNIST while nodes come, die and drain (under 4 minutes)
	.venv/bin/stretto demo $(DEMO_ARGS)

test: $(STAMP) $(TOOLS) ## every test but the long ones
	STRETTO_TESTS_COMPLETE=1 $(PY) -m pytest -m 'not soak' -rs -n 2 --dist loadfile $(PYTEST_ARGS)

MARK ?= gpu
gpu: $(STAMP) ## the tests that need a GPU, and a torch for CUDA (MARK=gpus: three GPUs); nothing else runs them
	$(PY) -m pytest -m $(MARK) $(PYTEST_ARGS)

check: static test ## what CI runs, but for the soak

static: format lint types contracts proto-check ## format, lint, types, import contracts, proto freshness

format: $(STAMP) ## fail where the code is not formatted (mend with `make format FIX=1`)
	.venv/bin/ruff format $(if $(FIX),,--check) .

lint: $(STAMP) ## ruff
	.venv/bin/ruff check $(if $(FIX),--fix) .

types: $(STAMP) ## mypy --strict
	.venv/bin/mypy

contracts: $(STAMP) ## who may import whom
	.venv/bin/lint-imports

proto: $(GENERATORS) ## generate the code beside the .proto files
	proto/generate.sh "$(CURDIR)/.venv-proto/bin/python"

proto-check: $(STAMP) $(GENERATORS) ## buf lint, and the committed code is what the .proto files give
	.venv/bin/buf lint proto
	fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && proto/generate.sh "$(CURDIR)/.venv-proto/bin/python" "$$fresh" \
	  && for file in "$$fresh"/stretto_proto/v1/*; do cmp "$$file" "proto/stretto_proto/v1/$$(basename "$$file")"; done

soak: $(STAMP) $(TOOLS) ## the long runs: chaos, then fault loops, each for SOAK_S seconds
	STRETTO_TESTS_COMPLETE=1 STRETTO_SOAK_S=$(SOAK_S) $(PY) -m pytest -m soak -rs -s $(PYTEST_ARGS)

bench: $(STAMP) ## all benchmarks, ours and the peer's side by side
	for file in benchmarks/*.py; do $(PY) "$$file"; done

traces: $(STAMP) ## rewrite the golden traces and the generated parts of the docs, on purpose
	STRETTO_REWRITE_TRACES=1 $(PY) -m pytest tests/core tests/test_docs.py

dashboards: $(STAMP) ## write the Grafana dashboards
	$(PY) tools/dashboards.py deploy/grafana/dashboards

manifests: $(STAMP) $(TOOLS) ## write the kustomize bases from the Helm chart
	$(PY) tools/manifests.py deploy/kustomize

clean: ## remove everything that make made
	rm -rf .venv .venv-proto .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .stretto
