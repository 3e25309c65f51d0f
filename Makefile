# Two commands: `make study` runs every notebook on the real data, `make test` runs every test. `make bench` compares speed.
# Both create .venv first if it is missing or the list of dependencies has changed.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
CODE := pruning_utils.py notebooks/study.py notebooks/training.py
# A notebook is run again if it or the code has changed since its stamp.
DONE := $(patsubst notebooks/%.ipynb,data/cache/%.done,$(sort $(wildcard notebooks/[0-9]*.ipynb)))
TRAINED := data/cache/01_training.done
TIMED := data/cache/06_speed.done
# What runs side by side shares the cores: with more threads than cores, scores and repair were several times as slow.
THREADS := $(shell $(PYTHON) -c "import os; print(max(1, os.cpu_count() // $(JOBS)))")
SHARED := OMP_NUM_THREADS=$(THREADS) TF_NUM_INTRAOP_THREADS=$(THREADS)
SIDE_BY_SIDE := $(BIN)/pytest --numprocesses=$(JOBS) --dist=loadfile
NBVAL := --nbval --nbval-current-env --nbval-cell-timeout=1800
export TQDM_DISABLE ?= 1

.PHONY: study test lab bench
.DELETE_ON_ERROR:

study: .venv/study
	@$(MAKE) --no-print-directory --jobs=$(JOBS) $(DONE)
	@echo "All notebooks have run. Read README.md first, then notebooks/ in their order: make lab"

$(DONE): data/cache/%.done: notebooks/%.ipynb $(CODE)
	@mkdir -p data/cache
	@$(if $(filter-out $(TRAINED) $(TIMED),$@),$(SHARED)) $(BIN)/python notebooks/run.py $<
	@touch $@

$(filter-out $(TRAINED),$(DONE)): $(TRAINED)
$(TIMED): $(filter-out $(TIMED),$(DONE)) # it measures time: alone

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest $(NBVAL) notebooks/01_training.ipynb # first: it trains what the rest uses, with all cores, as `make study` does
	$(SHARED) $(SIDE_BY_SIDE) tests
	$(SHARED) KERAS_BACKEND=jax $(SIDE_BY_SIDE) $(addprefix tests/test_,convolutions.py masks.py scores.py networks.py shrink.py repair.py)
	$(SHARED) $(SIDE_BY_SIDE) $(NBVAL) --ignore=notebooks/01_training.ipynb notebooks

lab: export TQDM_DISABLE =
lab: .venv/study
	$(BIN)/jupyter lab notebooks

bench: .venv-bench/ready
	.venv-bench/bin/python tests/bench_report.py

.venv:
	$(PYTHON) -m venv .venv

.venv/study: pyproject.toml constraints.txt | .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[study,deploy]'
	touch $@

.venv/test: pyproject.toml constraints.txt | .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[study,deploy,test]'
	touch $@ .venv/study

.venv-bench/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --constraint constraints.txt --editable '.[study,bench]'
	touch $@
