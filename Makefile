# Needs python3 (3.11 or newer) and make; everything else is installed into .venv, once per requirements.txt.

PYTHON ?= python3
GPU ?= --results .cache/gpu
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Compiled files are kept: a process of the tests starts in half the time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo online frontier losses test test-oldest test-docs soak mutants lint docs gpu bench FORCE

demo: .venv/.installed  ## SFT and then DPO on the embedded model and data
	$(BIN)/python benchmarks/demo.py

online: .venv/.installed  ## GRPO on the embedded films; fails if it misses its goal; make online ONLINE="--seed 1"
	$(BIN)/python benchmarks/online_demo.py $(ONLINE)

frontier: .venv/.installed  ## reward against KL of every method on the embedded films; under two hours on two cores
	$(BIN)/python benchmarks/frontier.py $(FRONTIER)

losses: .venv/.installed  ## every loss on the embedded films, three learning rates each; under two hours on two cores
	$(BIN)/python benchmarks/losses.py

# In the order of the files: those with the longest tests come first, and no process waits long for the last ones.
test: .venv/.installed  ## the tests that every change must pass
	$(BIN)/python -m pytest -m "not slow and not gpu and not alone" -n 3 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -m "alone and not slow and not gpu" -n 2 --dist loadfile `grep -rl --include="*.py" "mark\.alone" tests`

OLDEST_TESTS := $(addprefix tests/, test_attention.py test_batching.py invariants/test_packing.py test_triton_head.py \
	test_vocabulary_shards.py test_quantization.py test_lora_linear.py test_trainers.py test_sharding.py test_sharded_peft.py)

test-oldest: .venv-oldest/.installed  ## the same under the oldest torch and transformers, of what depends on them most
	.venv-oldest/bin/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile $(OLDEST_TESTS)

test-docs: .venv/.installed  ## the slow tests of README, docs/ and benchmarks/
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile tests/test_docs.py tests/test_extend.py tests/test_experiments.py tests/test_benchmarks.py

soak: .venv/.installed  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

mutants: .venv/.installed .mutmut/.installed  ## small changes of the code that quick tests do not notice
	PYTHONPATH=.mutmut $(BIN)/python -m mutmut run --max-children 2
	PYTHONPATH=.mutmut $(BIN)/python -m mutmut results

lint: .venv/.installed  ## ruff, mypy and the order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: .venv/.installed  ## docs/config.md, from the comments of config/
	$(BIN)/python -m docs.make_config

gpu: .venv/.installed  ## tests and benchmarks of a GPU; make gpu GPU="--results DIR --limit 600"
	$(BIN)/python benchmarks/gpu_plan.py $(GPU)

bench: .venv/.installed .venv-bench/.installed  ## a step beside TRL's; make bench BENCH="--data DIR --model pythia-70m"
	$(BIN)/python benchmarks/step.py $(BENCH)

.venv-bench/.installed: benchmarks/requirements-trl.txt
	rm -f $@ && $(PYTHON) -m venv .venv-bench && .venv-bench/bin/python -m pip install -r $< && cp $< $@

# The pins of requirements.txt, but for those in tests/requirements-oldest.txt.
.venv-oldest/.installed: requirements.txt tests/requirements-oldest.txt
	@echo "make: downloads about 2.8 GB into .venv-oldest, as this torch brings CUDA libraries; 5.5 GB on disk"
	rm -f $@ && $(PYTHON) -m venv .venv-oldest
	sed -n 's/==.*//p' tests/requirements-oldest.txt | sed 's/.*/^&==/' | grep -v -f - requirements.txt | \
		cat - tests/requirements-oldest.txt > .venv-oldest/requirements.txt
	.venv-oldest/bin/python -m pip install -r .venv-oldest/requirements.txt && cp .venv-oldest/requirements.txt $@

# Beside .venv and not in it: mutmut brings its own versions of common packages.
.mutmut/.installed: benchmarks/requirements-mutmut.txt | .venv/.installed
	rm -rf .mutmut && $(BIN)/python -m pip install --target .mutmut -r $< && cp $< $@

# The stamp is a copy of the requirements that are installed: it is their content that counts, not the age of the file.
.venv/.installed: requirements.txt FORCE
	@cmp -s requirements.txt $@ || { \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
			{ echo "make: Python 3.11 or newer is needed as $(PYTHON); to use another: make PYTHON=python3.11" >&2; exit 1; }; \
		rm -f $@ && $(PYTHON) -m venv .venv && $(BIN)/python -m pip install -r requirements.txt && cp requirements.txt $@; \
	}

FORCE:
