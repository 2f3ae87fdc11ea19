# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

# What computes; `make processors` runs it as older processors would: without vector instructions, without AVX-512.
NUMERICS := tests/bounds tests/lipschitz tests/certification tests/training tests/networks \
	tests/test_attacks.py tests/test_ball.py tests/test_scores.py

.PHONY: demo test suite figures models faults fuzz audit oldest newest soundness mutants oracle processors lint env clean

demo: env
	$(BIN)/grood-cert demo --out runs/demo --force

# Lint and types run beside the tests; what fails in either fails all.
test: env
	@$(MAKE) --no-print-directory --jobs=2 lint suite

# worksteal keeps the tests of a file in one process, where they share what they have made
suite: env
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

processors: env
	ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest -q -n $(JOBS) $(NUMERICS)
	ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest -q -n $(JOBS) $(NUMERICS)

faults: env
	$(BIN)/python -m tests.faults

fuzz: env
	$(BIN)/python -m tests.fuzz

# Known vulnerabilities of the versions that are pinned; it asks a service for them.
audit: env
	@$(BIN)/pip install --quiet --constraint constraints.txt pip-audit 2> /dev/null \
		|| { echo 'make audit: pip-audit cannot be installed; it needs the network'; exit 1; }
	@$(BIN)/pip-audit --strict --no-deps --disable-pip --progress-spinner off --requirement constraints.txt 2> .audit || { \
		tail -n 1 .audit; rm -f .audit; echo 'make audit: not passed, or the service was not reached'; exit 1; }
	@rm -f .audit

# The numerics with the oldest releases that pyproject.toml allows, and with the newest there are.
oldest: EXTRA := --constraint constraints-oldest.txt
oldest newest:
	$(PYTHON) -m venv --clear .venv-$@
	.venv-$@/bin/pip install --quiet $(EXTRA) hatchling editables
	.venv-$@/bin/pip install --quiet $(EXTRA) --no-build-isolation --editable '.[export,safetensors]' \
		'pytest>=8' 'pytest-xdist>=3' 'hypothesis>=6'
	.venv-$@/bin/pip install --quiet $(EXTRA) --no-deps auto-LiRPA
	.venv-$@/bin/python -m pytest -q -n $(JOBS) -p no:cacheprovider $(NUMERICS)

# random networks against every bound; nightly size
SEED ?= 0
soundness: env
	$(BIN)/python -m tests.soundness --nets 10000 --seed $(SEED) --out runs/soundness

# the figures of docs/ that stand on numbers kept in results/
figures: env
	$(BIN)/python analysis/objective_to_radius.py results/lambda-grad.csv --out docs/sweep-objective.png
	$(BIN)/python analysis/pareto.py results/digits-pareto.csv --out docs/digits-pareto.png
	$(BIN)/python analysis/fine_tuning.py results/resnet20.csv --out docs/resnet20.png
	$(BIN)/python analysis/mnist_good.py results/mnist-good.csv --out docs/mnist-good.png

models: env
	$(BIN)/python -m benchmarks.models --out runs/models.md

mutants: env
	$(BIN)/python -m tests.mutants --jobs $(JOBS)

oracle: env
	$(BIN)/python -m tests.marabou --seeds 3
	$(BIN)/python -m tests.planted check

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

env: $(VENV)/installed

# auto-LiRPA 0.3 asks for torch < 1.13 in its metadata, so it comes without its dependencies (pyproject.toml names them).
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("grood-cert needs Python 3.11 or newer; try: make PYTHON=python3.11") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt hatchling editables
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps auto-LiRPA==0.3
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest runs .mypy_cache .pytest_cache .ruff_cache .hypothesis
