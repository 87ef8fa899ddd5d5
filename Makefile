# Everything runs in an environment of its own in .venv, made on first use.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow lint clean

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt -e '.[dev]'
	touch $(STAMP)

# The main job: train a ViT on the embedded digits within 350 MiB, evaluate, export, predict with onnxruntime alone.
demo: $(STAMP)
	rm -rf demo
	$(BIN)/edgetrain train demo/session --recipe vit-digits --memory-budget 350MiB
	$(BIN)/edgetrain evaluate demo/session
	$(BIN)/edgetrain export demo/session --to demo/onnx
	$(BIN)/edgetrain predict demo/onnx --data digits

# Two processes: most of a test's time is that of the commands that it runs.
test: $(STAMP) lint
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo build *.egg-info
