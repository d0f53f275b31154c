# make test | test-tools | emulated | gate | bench | lint | gpu-check: each makes .venv first, from requirements.txt,
# where it is missing or out of date. make test-matrix makes an environment for each pair of PyTorch and Triton in
# .venv-matrix.
# pip compiles nothing: Python compiles what is imported, once, and all of it would take half a minute longer.
unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/python -m

.PHONY: test test-tools emulated gate test-matrix gpu-check bench lint format clean
.DEFAULT_GOAL := test

$(STAMP): requirements.txt
	@command -v $(PYTHON) >/dev/null || \
	  { echo "make: no $(PYTHON) here: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: $$($(PYTHON) -V 2>&1) is too old: name a Python 3.10 or newer: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "make: $(PYTHON) has no venv module: install it (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) -V): some minutes, once"
	@$(RUN) pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)  # else brought up to date as it is
	@$(RUN) pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt || \
	  { echo "make: pip could not install requirements.txt (above: why); with the cause gone, run make again" >&2; exit 1; }
	@touch $@

PARALLEL := --numprocesses auto --maxprocesses 8 --dist worksteal

# The kernels as compiled code, which the module ptxsim executes on the CPU.
EMULATED = if $(VENV)/bin/python -c 'import ptxsim' 2>/dev/null; then \
	  env -u TRITON_INTERPRET $(RUN) pytest $(PARALLEL) tests/emulated; \
	else \
	  echo "tests/emulated is left out: it needs the module ptxsim, which is not published"; \
	fi

emulated: $(STAMP)
	@$(EMULATED)

# Where there is a GPU the kernels are compiled, one test after the other; elsewhere they are interpreted.
define RUN_TESTS # PATHS
interpret=TRITON_INTERPRET=1; parallel='$(PARALLEL)'; \
	if $(VENV)/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  interpret='-u TRITON_INTERPRET'; parallel=; \
	fi; \
	env $$interpret $(RUN) pytest $$parallel $(1)
endef

OTHERS := emulated gate benchmarks commands faults# which have a target of their own

# Two runs, since a process either interprets Triton's kernels or compiles them.
test: $(STAMP)
	@status=0; \
	$(call RUN_TESTS,tests $(OTHERS:%=--ignore=tests/%)) || status=1; \
	{ $(EMULATED); } || status=1; \
	exit $$status

# The tests of the benchmarks and of the commands, and whether the suite finds faults that are planted.
test-tools: $(STAMP)
	@$(call RUN_TESTS,tests/benchmarks tests/commands tests/faults)

# The core of the suite, interpreted and, where the module ptxsim is, compiled, with each supported pair of PyTorch and
# Triton: those that are made for each other, and the newest Triton with the PyTorch of requirements.txt.
MATRIX := .venv-matrix
STACKS := 2.11.0+3.6.0 2.13.0+3.7.1 2.13.0+3.9.0 2.14.1+3.8.0 2.15.0+3.9.0
torch_of = $(firstword $(subst +, ,$(1)))
triton_of = $(lastword $(subst +, ,$(1)))
NUMPY_3.6.0 := numpy<2.4# with a newer one its interpreter fails
numpy_of = $(or $(NUMPY_$(call triton_of,$(1))),numpy)

$(MATRIX)/%/.installed: requirements.txt
	@echo "making $(MATRIX)/$* with $$($(PYTHON) -V): some minutes, once"
	@$(PYTHON) -m venv --clear $(@D)
	@grep -Ev '^(torch|triton|numpy|matplotlib|ruff|setuptools)\b' requirements.txt >$(@D)/requirements.txt
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $(@D)/requirements.txt \
	  'torch==$(call torch_of,$*)' 'triton==$(call triton_of,$*)' '$(call numpy_of,$*)'
	@touch $@

test-matrix: $(STACKS:%=$(MATRIX)/%/.installed)
	@failed=; for stack in $(STACKS); do \
	  python=$(MATRIX)/$$stack/bin/python; echo "torch+triton $$stack"; \
	  TRITON_INTERPRET=1 $$python -m pytest -q $(PARALLEL) -m core tests $(OTHERS:%=--ignore=tests/%) || \
	    failed="$$failed $$stack"; \
	  ! $$python -c 'import ptxsim' 2>/dev/null || \
	    env -u TRITON_INTERPRET $$python -m pytest -q $(PARALLEL) -m core tests/emulated || \
	    failed="$$failed $$stack(compiled)"; \
	done; \
	[ -z "$$failed" ] || { echo "failed with$$failed" >&2; exit 1; }

# On a GPU: the whole suite compiled, compute-sanitizer, the benchmark report, in one folder to attach to a bug report.
gpu-check: $(STAMP)
	@env -u TRITON_INTERPRET $(RUN) benchmarks.gpu_check

# What every kernel asks of four devices, compiled for them: registers, spills, access widths, tensor cores. And what a
# replayed step asks of the host. A file is one worker's, since the tests of test_gate.py share a report.
gate: $(STAMP)
	@env -u TRITON_INTERPRET $(RUN) pytest $(PARALLEL) --dist loadfile tests/gate

bench: $(STAMP)
	@env -u TRITON_INTERPRET $(RUN) pytest benchmarks --benchmark-only

lint: $(STAMP)
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .

format: $(STAMP)
	@$(RUN) ruff check --fix .
	@$(RUN) ruff format .

clean:
	@rm -rf $(VENV) $(MATRIX)
