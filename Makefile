# make test | gate | bench | lint: each makes .venv first, from requirements.txt, where it is missing or out of date.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/python -m

.PHONY: test gate bench lint format clean
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
	@$(RUN) pip install --quiet --disable-pip-version-check -r requirements.txt || \
	  { echo "make: pip could not install requirements.txt (above: why); with the cause gone, run make again" >&2; exit 1; }
	@touch $@

# Two runs side by side, since a process either interprets Triton's kernels or compiles them. With a GPU both compile.
# The second needs the module ptxsim; pytest's status 5 (nothing collected) is what skipping whole files leaves where it
# is absent.
test: $(STAMP)
	@interpret=TRITON_INTERPRET=1; \
	if $(VENV)/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  interpret='-u TRITON_INTERPRET'; \
	fi; \
	env -u TRITON_INTERPRET $(RUN) pytest tests/emulated >$(VENV)/emulated.log 2>&1 & emulated=$$!; \
	status=0; \
	env $$interpret $(RUN) pytest tests --ignore=tests/emulated --ignore=tests/gate || status=1; \
	wait $$emulated; code=$$?; cat $(VENV)/emulated.log; \
	[ $$code -eq 0 ] || { [ $$code -eq 5 ] && ! $(VENV)/bin/python -c 'import ptxsim' 2>/dev/null; } || status=1; \
	exit $$status

# What every kernel asks of four devices, compiled for them: registers, spills, access widths, tensor cores.
gate: $(STAMP)
	@env -u TRITON_INTERPRET $(RUN) pytest tests/gate

bench: $(STAMP)
	@env -u TRITON_INTERPRET $(RUN) pytest benchmarks --benchmark-only

lint: $(STAMP)
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .

format: $(STAMP)
	@$(RUN) ruff check --fix .
	@$(RUN) ruff format .

clean:
	@rm -rf $(VENV)
