# Two commands: `make study` runs every notebook on the real data, `make test` runs every test. `make bench` compares speed.
# Both create .venv first if it is missing or the list of dependencies has changed.
PYTHON ?= python3
BIN := .venv/bin
NOTEBOOKS := $(sort $(wildcard notebooks/[0-9]*.ipynb))
export TQDM_DISABLE ?= 1

.PHONY: study test lab bench
.DELETE_ON_ERROR:

study: .venv/study
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.timeout=1800 \
		--ExecutePreprocessor.record_timing=False $(NOTEBOOKS)

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest tests
	KERAS_BACKEND=jax $(BIN)/pytest tests/test_pruning.py tests/test_repair.py tests/test_training.py
	$(BIN)/pytest --nbval --nbval-current-env --nbval-cell-timeout=900 notebooks

lab: export TQDM_DISABLE =
lab: .venv/study
	$(BIN)/jupyter lab notebooks

bench: .venv-bench/ready
	.venv-bench/bin/python tests/bench_report.py

.venv:
	$(PYTHON) -m venv .venv

.venv/study: pyproject.toml constraints.txt | .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[deploy]'
	touch $@

.venv/test: pyproject.toml constraints.txt | .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[deploy,test]'
	touch $@ .venv/study

.venv-bench/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@
