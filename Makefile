# `make demo` and `make test` do everything on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUTPUT ?= outputs/demo
CONCEPT ?= fox
# Two cores: one process with two threads, or two with one (the tests). More threads than cores thrash.
export OMP_NUM_THREADS ?= 2
# A thread that waits for the other one sleeps: spinning it takes the core from whatever else runs (twice as long, measured).
export OMP_WAIT_POLICY ?= PASSIVE
TEST := env OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-all test-oldest test-peers coverage release-check docs lint types format bench clean

# Twice quiet: once leaves pip's warnings, such as those of an index of this machine's that holds no such package.
INSTALL := pip install --quiet --quiet --disable-pip-version-check

# torch first and by its exact version: a range would pull the CUDA build.
define install
	@echo "Installing into $(VENV): some minutes, of which torch (200 MB) takes most"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) -c constraints.txt torch
	$(BIN)/$(INSTALL) -c constraints.txt -e
endef

# The package alone, for who wants to see what it does.
$(VENV)/.package: pyproject.toml constraints.txt
	$(install) .
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt
	$(install) ".[test]"
	touch $(VENV)/.package $@

demo: $(VENV)/.package
	$(BIN)/space-peft demo --concept "$(CONCEPT)" --output $(OUTPUT)

test: $(VENV)/.installed
	$(TEST) -m "not slow"

# DeepSpeed is built without its kernels, which a CPU does not need; its tests are skipped where it is missing.
$(VENV)/.deepspeed: $(VENV)/.installed
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/$(INSTALL) --no-build-isolation \
		-c constraints.txt "deepspeed>=0.19"
	touch $@

test-all: $(VENV)/.installed $(VENV)/.deepspeed
	$(TEST)

# The fast tests with the oldest versions that pyproject.toml allows, in an environment of their own.
OLDEST := .venv-oldest
$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/$(INSTALL) -c constraints-oldest.txt torch
	$(OLDEST)/bin/$(INSTALL) -c constraints-oldest.txt -e ".[test]"
	touch $@

test-oldest: $(OLDEST)/.installed
	$(subst $(BIN),$(OLDEST)/bin,$(TEST)) -m "not slow"

# Which lines of the library the fast tests run; processes that tests start are not counted.
coverage: $(VENV)/.installed
	$(BIN)/$(INSTALL) -c constraints.txt pytest-cov
	$(TEST) -m "not slow" --cov=space_peft --cov=trainers --cov=hub_cards --cov-report=term:skip-covered

# Wheel and sdist: built, their contents looked through, installed in an empty environment and tried there.
release-check:
	$(PYTHON) tests/release_check.py

# PEFT's own LoRA tests with our config; the first time needs the package registry.
test-peers: $(VENV)/.installed
	$(BIN)/python tests/peers/run.py

# The site; a link that leads nowhere is an error. (With --quiet it would not be: mkdocs counts the warnings that it prints.)
docs: $(VENV)/.installed
	$(BIN)/$(INSTALL) -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

lint: $(VENV)/.installed types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy reads the package as it is installed, with `trainers` and `hub_cards` inside: a folder of links.
TYPES := .mypy_cache/package
types: $(VENV)/.installed
	rm -rf $(TYPES) && mkdir -p $(TYPES)/space_peft
	cd $(TYPES)/space_peft && ln -s ../../../space_peft/* ../../../trainers ../../../hub_cards .
	cd $(TYPES) && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir .. -p space_peft

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/erase_demo.py --concepts 12 --seeds 3
	$(BIN)/python benchmarks/engine.py

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info outputs
