# make demo     compress a photograph, show it at six points (demo/)
# make test     linters, types, tests
# make test-oldest  encoding and decoding, with the oldest versions of what they need
# make coverage the tests once more, and which lines and branches they reach
# make docs-check  what the documents say: options, links, examples
# make soak     every cut, thousands of damages (hours)
# make docs     write docs/command-line.md anew from the commands' --help
# make format   put the code into the formatter's shape
# make clean    remove what the above made, except the virtual environment
#
# PYTHON       the interpreter for .venv, 3.10 or newer
# TORCH_INDEX  an extra package index for torch. Left alone: the index of CPU builds where there is
#              no NVIDIA GPU and the index can be reached, else none (PyPI's builds for Linux carry
#              some gigabytes of CUDA). Set it to nothing, or to another, to choose yourself:
#              make TORCH_INDEX= test
PYTHON ?= python3
CPU_INDEX := https://download.pytorch.org/whl/cpu
BIN := .venv/bin
STAMP := .venv/.installed
OLDEST := .venv-oldest
# What needs a newer torch, or the extras: the rest is about encoding and decoding.
TRAINING := $(patsubst %,tests/test_%.py,train optimizer calibrate states tasks crops data \
    benchmarks docs fuzz trust package paper likelihood sampling)
# What a newer Pillow reads, and training once more
NEWER := tests/test_image.py::test_a_psd_is_what_its_layers_make tests/test_cli.py::test_train_dry_run

.PHONY: demo test test-oldest coverage docs-check soak docs format clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/python benchmarks/demo.py

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests --implicit-reexport --no-warn-unused-ignores --allow-untyped-calls
	$(BIN)/python -m pytest

coverage: $(STAMP)
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered

docs-check: $(STAMP)
	$(BIN)/python -m pytest tests/test_docs.py tests/test_package.py -k "test_docs or theory_page"

soak: $(STAMP)
	$(BIN)/python benchmarks/soak.py

docs: $(STAMP)
	$(BIN)/python docs/make.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -m 'not slow' $(addprefix --deselect=,$(NEWER)) \
	    $(filter-out $(TRAINING),$(wildcard tests/test_*.py))

# pip with the index that TORCH_INDEX asks for. $(1): an environment, $(2): what to install
ifeq ($(origin TORCH_INDEX),undefined)
define install
@index=; \
	if ! command -v nvidia-smi >/dev/null && $(1)/bin/python -c \
	    "import urllib.request as u; u.urlopen('$(CPU_INDEX)/torch/', timeout=5)" 2>/dev/null; \
	then index="--extra-index-url $(CPU_INDEX)"; fi; \
	set -x; $(1)/bin/python -m pip install $$index $(2)
endef
else
define install
$(1)/bin/python -m pip install $(addprefix --extra-index-url ,$(TORCH_INDEX)) $(2)
endef
endif

# A comma in a call would end its argument.
EVERYTHING := '.[dev,bench,dask]'

# An interrupted installation leaves no stamp and is repeated.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(call install,.venv,-c constraints.txt -e $(EVERYTHING))
	touch $@

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(call install,$(OLDEST),-c constraints-oldest.txt -e . pytest hypothesis)
	touch $@

clean:
	rm -rf demo dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find ddpm_codec tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
