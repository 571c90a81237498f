# `make demo` and `make test` do everything on a fresh machine with Python 3.11+. The plain commands are in the README.
PYTHON ?= python3
VENV ?= .venv
NEWEST = .venv-newest
RUN = OMP_NUM_THREADS=1 $(VENV)/bin/python

.PHONY: demo test test-newest fuzz faults lint bench plan tables assets clean
demo: $(VENV)/installed
	$(RUN) tools/demo.py

test: $(VENV)/installed-test
	$(RUN) -m pytest -n 2 --dist worksteal

# the same code with the newest versions that pip finds (torch as pinned), on the tests that touch other libraries' insides;
# make test-newest WITH="transformers==5.23.0": with those
INSIDES = $(addprefix tests/test_,models.py logprobs.py value_heads.py rewards.py rollout.py lora.py t5.py offload.py checkpoints.py resume.py data.py trl.py)
test-newest:
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	sed -E -e '/^torch==/!s/==.*//' requirements.txt requirements-test.txt > $(NEWEST)/requirements.txt
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check -r $(NEWEST)/requirements.txt $(WITH)
	$(NEWEST)/bin/python -m pip list --format freeze | grep -E '^(torch|transformers|tokenizers|datasets|numpy|safetensors|peft|trl)=='
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n 2 --dist worksteal $(INSIDES)

# mutated data files and command lines: each is read right, or refused in one line; FILES=3000 COMMANDS=1000: more
FILES = 300
COMMANDS = 150
fuzz: $(VENV)/installed-test
	$(RUN) tests/fuzz_data.py --count $(FILES)
	$(RUN) tests/fuzz_commands.py --count $(COMMANDS)
	FUZZ=all $(RUN) -m pytest -q tests/fuzz_models.py

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(VENV)/installed
	$(RUN) paper/variants.py

# the figures of docs/reliability.md: kills, signals, damaged checkpoints, full disks; an hour or more on two cores
faults: $(VENV)/installed-test
	$(RUN) benchmarks/faults.py

# memory on 8 GPUs, planned without one, beside 2502.16944's figures
plan: $(VENV)/installed
	$(RUN) tools/plan_memory.py --table

# the papers' tables, an hour or more on two cores; QUICK=1: one seed and a tenth of the steps, 9 minutes
tables: $(VENV)/installed
	$(RUN) paper/tables.py $(if $(QUICK),--quick,--docs docs) $(if $(TABLE),--only $(TABLE))

# the stamp is written last, so that an interrupted installation is done again
$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or later is needed; make demo PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-test: $(VENV)/installed requirements-test.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

# the embedded models that `--model reviews` and `--gvm reviews` name
assets: $(VENV)/installed
	$(RUN) assets/make.py

clean:
	rm -rf $(VENV) $(NEWEST) runs
