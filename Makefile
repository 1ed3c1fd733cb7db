# `make demo` and `make test` work on a fresh clone with nothing prepared; CONTRIBUTING.md has the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt
CPP := 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/*.h' 'tests/*.cpp'

.PHONY: demo test lint fmt sanitize bench clean

demo: $(VENV)/.demo
	$(BIN)/moeinf run --memory 25% --max-new-tokens 120 --temperature 0.7 --verify

test: $(VENV)/.test
	PATH="$(CURDIR)/$(BIN):$$PATH" tests/cpp/run.sh
	$(BIN)/python -m pytest

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files $(CPP) | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

fmt: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files $(CPP) | xargs $(BIN)/clang-format -i

sanitize: $(VENV)/.test
	PATH="$(CURDIR)/$(BIN):$$PATH" tests/cpp/sanitize.sh

bench: $(VENV)/.test
	for name in ffn_cpu transfer cache_overhead policies end_to_end; do \
		$(BIN)/python -m benchmarks.$$name --json benchmarks/results/$$name.json || exit 1; \
	done

clean:
	rm -rf build $(VENV) *.egg-info moeinf/_core*.so

# Editable installs: pytest runs in the source tree, where the compiled core must lie too. Each
# install builds the core once; the one for tests has all that the demo needs.
$(VENV)/.demo: pyproject.toml setup.py CMakeLists.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[hf]'
	touch $@

$(VENV)/.test: pyproject.toml setup.py CMakeLists.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[hf,report,test]' cmake ninja
	touch $(VENV)/.demo $@

$(VENV)/.lint: $(VENV)/.demo
	$(INSTALL) ruff mypy clang-format
	touch $@
