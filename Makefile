# make generate [PROMPT=...] [MODEL=...]: streamed text from a real model.   make test: the tests, in minutes.   make test-all: all of them.
PYTHON ?= python3
PROMPT ?= Explain in two sentences why the sky is blue.
MODEL ?= weights/SmolLM2-135M-Instruct
DEMO := weights/SmolLM2-135M-Instruct
BIN := .venv/bin

.PHONY: generate test test-all lint weights clean

generate: .venv/.tools
	@if [ "$(MODEL)" = "$(DEMO)" ]; then $(BIN)/python -m tools.fetch_smollm2; fi
	@$(BIN)/python -m llama_flex.generate --model "$(MODEL)" --instruct --prompt "$$PROMPT"

export PROMPT

test: .venv/.test weights
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test-all: test
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal -m exhaustive

weights: .venv/.tools
	@$(BIN)/python -m tools.fetch_smollm2
	@$(BIN)/python -m tools.fetch_test_inputs --allow-missing

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/bin/python:
	$(PYTHON) -m venv .venv

# One stamp per extra: a second run installs nothing until the project's own files change.
.venv/.%: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	@touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
