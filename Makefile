# make demo     compress a photograph, show it at six points (demo/)
# make test     linters, types, tests
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

.PHONY: demo test soak docs format clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/python benchmarks/demo.py

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests --implicit-reexport --no-warn-unused-ignores --allow-untyped-calls
	$(BIN)/python -m pytest

soak: $(STAMP)
	$(BIN)/python benchmarks/soak.py

docs: $(STAMP)
	$(BIN)/python docs/make.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# An interrupted installation leaves no stamp and is repeated.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
ifeq ($(origin TORCH_INDEX),undefined)
	@index=; \
	if ! command -v nvidia-smi >/dev/null && $(BIN)/python -c \
	    "import urllib.request as u; u.urlopen('$(CPU_INDEX)/torch/', timeout=5)" 2>/dev/null; \
	then index="--extra-index-url $(CPU_INDEX)"; fi; \
	set -x; $(BIN)/python -m pip install $$index -c constraints.txt -e '.[dev,bench,dask]'
else
	$(BIN)/python -m pip install $(addprefix --extra-index-url ,$(TORCH_INDEX)) \
	    -c constraints.txt -e '.[dev,bench,dask]'
endif
	touch $@

clean:
	rm -rf demo dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find ddpm_codec tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
