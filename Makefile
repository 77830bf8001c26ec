# make demo    two ranks answer demo/prompts.txt       make test    the test suite (CPU; 13 to 20 minutes on two cores)
# make chat    talk to the demo                        make check   lint, types and tests
# make serve   the demo over HTTP, on port 8000        make trust   tests in their long form as well, an hour
# make bench   benchmarks, into README and docs/       make gpu     on a GPU: every test that computes on it
# make house   packages and imports, counted           make clean   remove what these make, but for .venv
# make gpu-proof   nine minutes on one H200, results in build/gpu-proof; DRY=1: every step here, without a GPU
# make two-hosts   the README's command for two nodes, rehearsed on this machine alone (root); MORE="flags", DP=2
#
# The first use of any of them makes .venv and installs the pinned requirements; nothing else is needed beforehand.
# Another Python than python3:  make demo PYTHON=python3.12

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check

# An install is remembered by the contents of the requirements, so that it is repeated when they change, and only then.
INSTALLED := $(VENV)/.installed-$(shell cat requirements.txt | cksum | cut -d' ' -f1)
SERVING   := $(VENV)/.serving-$(shell cat requirements.txt requirements-serve.txt | cksum | cut -d' ' -f1)
DEVELOPER := $(VENV)/.developer-$(shell cat requirements.txt requirements-serve.txt requirements-dev.txt | cksum | cut -d' ' -f1)

# The manifest is what convert.py writes last, so its date is the date of the whole conversion.
CONVERTED := build/demo-mp2/model-mp2.index.json

.PHONY: demo chat serve two-hosts test trust gpu gpu-proof lint types check bench house clean

demo: $(CONVERTED)
	$(BIN)/torchrun --standalone --nproc-per-node 2 inference/generate.py --ckpt-path build/demo-mp2 \
	    --input-file demo/prompts.txt --temperature 0 --max-new-tokens 400

chat: $(INSTALLED)
	@$(BIN)/python inference/generate.py --ckpt-path demo/checkpoint --interactive --temperature 0 --max-new-tokens 400

serve: $(SERVING)
	$(BIN)/python inference/server.py --ckpt-path demo/checkpoint --model-name demo --mtp 1

two-hosts: $(INSTALLED)
	@$(BIN)/python deploy/two_hosts.py generate.py --ckpt-path $(CURDIR)/demo/checkpoint --config configs/config_demo.json \
	    --input-file $(CURDIR)/demo/prompts.txt --temperature 0 --max-new-tokens 400 --device cpu $(if $(DP),--dp $(DP)) $(MORE)

test: $(DEVELOPER)
	$(BIN)/python -m pytest -n 2 --dist worksteal

trust: $(DEVELOPER)
	$(BIN)/python -m pytest -n 2 -m "trust or not trust" --timeout 7200 tests \
	    --record benchmarks/results/trust.json

# Without a GPU these run in Triton's interpreter, as a part of `make test`. Nothing is installed: .venv's Python is used
# where there is one, otherwise $(PYTHON). Kernels are compiled beforehand, and tests run, JOBS at a time.
JOBS ?= 8
ON_GPU = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

gpu:
	@$(ON_GPU) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else \
	    "error: make gpu needs a GPU that this build of torch can use")'
	$(ON_GPU) tests/support/compile_kernels.py --warm $(JOBS) \
	    $$($(ON_GPU) -c 'import sys; sys.path.insert(0, "inference"); import torch; from ops.gpu.device import architecture; \
	    print(architecture(torch.device("cuda", 0)))')
	$(ON_GPU) -m pytest -n $(JOBS) -m "trust or not trust" --timeout 7200 --table tests/ops tests/model tests/engine/test_on_gpu.py

gpu-proof:
	$(ON_GPU) benchmarks/gpu_proof.py $(if $(DRY),--dry)

lint: $(DEVELOPER)
	$(BIN)/ruff check

types: $(DEVELOPER)
	$(BIN)/mypy

check: lint types test

bench: $(DEVELOPER)
	$(BIN)/python benchmarks/bench.py
	$(BIN)/python benchmarks/tables.py

house: $(INSTALLED)
	@$(BIN)/python tests/test_house.py --token

clean:
	rm -rf build/demo-mp2 .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(CONVERTED): $(wildcard demo/checkpoint/*) inference/convert.py $(wildcard inference/checkpoint/*.py) | $(INSTALLED)
	$(BIN)/python inference/convert.py --hf-ckpt-path demo/checkpoint --save-path build/demo-mp2 --model-parallel 2

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] <= (3, 13) else \
	    f"error: Python 3.11 to 3.13 is needed, $(PYTHON) is {v[0]}.{v[1]}; name another one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): | $(BIN)/python
	$(PIP) -r requirements.txt
	@rm -f $(VENV)/.installed-* && touch $@

$(SERVING): | $(BIN)/python
	$(PIP) -r requirements-serve.txt
	@rm -f $(VENV)/.serving-* && touch $@ $(INSTALLED)

$(DEVELOPER): | $(BIN)/python
	$(PIP) -r requirements-dev.txt
	@rm -f $(VENV)/.developer-* && touch $@ $(INSTALLED) $(SERVING)
