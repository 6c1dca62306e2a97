# Set-up is a stamp file: it runs again only when the dependencies change. PYTHON may name another Python 3.11+.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0
# pip passes on a note about editable installs in general; nothing here is in its way
PIP := PYTHONWARNINGS=ignore $(BIN)/pip

.PHONY: quickstart test test-fast test-soak test-nightly test-fresh lint bench-retrieval bench-learning proto help clean

help:
	@echo "make quickstart   set up, then run the whole platform on the sample corpus (report: runs/quickstart/report.html)"
	@echo "make test         set up, then linters, type checks and tests"
	@echo "make test-fast    the tests that need neither Ray nor minutes"
	@echo "make test-soak    what takes minutes: the smoke recipe from end to end, killed workers and nodes, full disks"
	@echo "make test-nightly nothing beside it: floods, hostile images, killed parts; every fault of the disk; random histories"
	@echo "make test-fresh   both commands on fresh Debian systems, for hours; needs root and debootstrap"
	@echo "make lint         ruff (rules and format), mypy, import-linter, buf"
	@echo "make bench-NAME   tests/benchmarks/NAME.py (ARGS=--quick for a short one): retrieval, learning, labels, training ..."
	@echo "make proto        regenerate the gRPC stubs"

$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --upgrade pip setuptools wheel
	$(PIP) install -q -c constraints.txt -e '.[cpu,labels,sample]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --upgrade pip setuptools wheel
	$(PIP) install -q -c constraints.txt -e '.[cpu,labels,sample,dev]'
	@$(PIP) install -q -c constraints.txt -e '.[oracles]' >$(VENV)/oracles.log 2>&1 \
		|| echo "the extra oracles is not installed, it needs a C++ compiler; the tests run without it"
	touch $@ $(VENV)/.run

quickstart: $(VENV)/.run
	$(BIN)/lookalike quickstart deploy/recipes/quickstart.yaml $(ARGS)

# .typing is the package as it is imported, in one real tree: what static tools can follow (data/samples is no part)
.PHONY: .typing
.typing:
	rm -rf .typing && mkdir -p .typing
	cp -pR platform/lookalike .typing/lookalike
	for part in data train serve; do cp -pR $$part .typing/lookalike/$$part && touch .typing/lookalike/$$part/__init__.py; done
	rm -rf .typing/lookalike/data/samples

lint: $(VENV)/.dev .typing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.typing $(BIN)/mypy -p lookalike -p tests.benchmarks
	PYTHONPATH=.typing $(BIN)/lint-imports
	cd serve/proto && $(abspath $(BIN))/buf lint

test: lint
	$(BIN)/python -m pytest tests -m 'not soak' $(ARGS)

test-soak: $(VENV)/.dev
	$(BIN)/python -m pytest tests -m 'soak and not nightly' -vv --durations=20 $(ARGS)

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest tests -m 'not slow and not ray and not soak' $(ARGS)

test-nightly: $(VENV)/.dev
	$(BIN)/python -m pytest tests -m nightly -vv
	$(BIN)/python -m tests.trials.storage
	$(BIN)/python -m tests.trials.machine --num 100000

test-fresh: $(VENV)/.dev
	$(BIN)/python -m tests.fresh_system $(ARGS)

proto: $(VENV)/.dev
	$(BIN)/python -m lookalike.serve.proto.generate

bench-%: $(VENV)/.dev
	$(BIN)/python -m tests.benchmarks.$* $(ARGS)

clean:
	rm -rf $(VENV) build dist .typing runs
