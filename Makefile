# make train   trains a small language model through a pipeline; ARGS="--help" shows the options
# make test    runs the test suite on all cores; ARGS="-k name" selects tests, ARGS="-n 0" takes one process
# make test-all  runs it with all repetitions of random tests and of combinations
# make fuzz    calls everything with hostile input, for MINUTES; and random plans, with the sanitizers, for as long
# make faults  injects every fault at every moment of a training; writes the table of docs/reliability.md
# make soak    trains for MINUTES through pauses, errors, interrupts and restarts; fails on a wrong step or a leak
# make versions  runs a part of it with the oldest and the newest torch; PART=tests runs all
# make softgpu runs the tests for GPUs on a software GPU, with the CUDA build of torch; HOW=all takes more delays
# make lint    checks style, types and spelling; changes nothing
# make docs    builds the documentation as a site: build/docs/index.html
# make bench   runs the benchmarks; writes bench/results/, and the tables and charts of README and docs
# make gpu     benchmarks and tests on an NVIDIA GPU; writes bench/results/<device>/, tables and charts.
#              Each part runs alone too, in under ten minutes: make gpu-host gpu-pack gpu-step gpu-tests gpu-memory

PYTHON ?= python3
ARGS ?=
HOW ?= quick
MINUTES ?= 20

BIN := .venv/bin
# A plain "torch" may fetch gigabytes of CUDA packages; the package itself accepts a wide range.
# Without numpy torch prints a warning.
TORCH := torch==2.13.0 numpy
# A client of the drop-in, with what it imports: all that it requires would fetch much more.
TORCHTITAN := torchtitan==0.3.0 spmd_types==0.2.3 tyro docstring-parser
# The releases of torch beside it that the suite passes with, and the part of the suite that uses most of torch.
VERSIONS := 2.11.0 2.14.1
PART := $(addprefix tests/,test_pipelining.py test_gradients.py test_split_backward.py test_state_dict.py \
    test_context.py test_scaler.py test_checkpoint.py test_public_names.py test_calls.py \
    test_random_streams.py $(addprefix distributed/,test_drop_in.py \
    test_torchtitan.py test_wrapped_stages.py test_tensor_parallel.py test_process_gradients.py))
LAST_FAILED := --last-failed --last-failed-no-failures none
# The CUDA build of torch, without NVIDIA's libraries, which tests/softgpu plays; what else it and the tests need.
SOFT := .venv-softgpu/bin
SOFT_TORCH := torch==2.14.1
SOFT_NEEDS := filelock typing-extensions sympy networkx jinja2 fsspec numpy 'setuptools>=77' wheel rich matplotlib \
    'triton~=3.8.0' 'pybind11>=2.13' 'pytest>=8' 'pytest-xdist>=3.6' 'hypothesis>=6' 'cupy-cuda13x>=14'
ISSUE_FORMS := $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
SOURCES := setup.py pyproject.toml $(wildcard csrc/*/*)

SOFT_SOURCES := $(wildcard tests/softgpu/*.* tests/softgpu/*/*.* tests/softgpu/plugin/softgpu_torch/*) tests/native_builds.py

GPU_PARTS := gpu-host gpu-pack gpu-step gpu-tests gpu-memory
LIMITED := timeout 590

.PHONY: train test test-all fuzz faults soak versions softgpu lint docs bench gpu gpu-there $(GPU_PARTS) clean

train: .venv/installed
	@$(BIN)/pipeline-ext train $(ARGS)

test: .venv/installed-test
	@$(BIN)/pytest -n auto --dist worksteal $(ARGS)

test-all: .venv/installed-test
	@$(BIN)/pytest -n auto --dist worksteal --all $(ARGS)

# A third of the time each: the entry points, and the core in two builds with sanitizers.
fuzz: .venv/installed-test
	@cd tests && ../$(BIN)/python -m hostile.run --seconds $$(($(MINUTES) * 20)) --core thread --core 'address and undefined' \
	    $(ARGS)

faults: .venv/installed-test
	@cd tests && ../$(BIN)/python -m faults.run --write $(ARGS)

soak: .venv/installed-test
	@cd tests && ../$(BIN)/python -m soak.run --minutes $(MINUTES) $(ARGS)

# A folder on Python's path goes before the torch of .venv. What fails beside others runs again by itself.
versions: $(VERSIONS:%=build/torch-%/installed)
	@for version in $(VERSIONS); do \
	    echo "torch $$version"; \
	    export PYTHONPATH="$(CURDIR)/build/torch-$$version"; \
	    run() { $(BIN)/pytest -o cache_dir=build/torch-$$version/cache $(PART) $(ARGS) "$$@"; }; \
	    run -n auto --dist worksteal || { echo "run again, one at a time:"; run -n 0 $(LAST_FAILED); } || exit 1; \
	done

build/torch-%/installed: .venv/installed-test tools/install_torch
	@rm -rf $(@D)
	@$(BIN)/python tools/install_torch $* $(@D)
	@touch $@

softgpu: .venv-softgpu/built
	@$(SOFT)/python tests/softgpu/run.py $(HOW) $(ARGS)

# The package is the one that .venv has built in this checkout.
.venv-softgpu/installed: .venv/installed
	$(PYTHON) -m venv .venv-softgpu
	$(SOFT)/pip install --quiet --disable-pip-version-check --no-deps $(SOFT_TORCH)
	$(SOFT)/pip install --quiet --disable-pip-version-check $(SOFT_NEEDS)
	$(SOFT)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
	    --editable tests/softgpu/plugin
	@$(SOFT)/python -c 'import pathlib, sysconfig; \
	    pathlib.Path(sysconfig.get_path("purelib"), "checkout.pth").write_text("$(CURDIR)")'
	@touch $@

.venv-softgpu/built: .venv-softgpu/installed $(SOFT_SOURCES)
	@$(SOFT)/python tests/softgpu/build.py
	@touch $@

# .pre-commit-config.yaml runs the same commands.
lint: .venv/installed-lint
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/python tools/lint_cpp
	@$(BIN)/codespell
	@$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms $(ISSUE_FORMS)

docs: .venv/installed-test
	@$(BIN)/python -m sphinx -W --keep-going --quiet -E -a -d build/doctrees docs build/docs
	@echo build/docs/index.html

bench: .venv/installed-test
	@for script in cpu_step dist_step overlap_dp dispatch simulate reaction variability planner_quality pack k_tradeoff recompute any_model default_cut big_model torchtitan_step; do $(BIN)/python bench/$$script.py || exit 1; done
	@$(BIN)/python bench/tables.py

# A part that fails does not keep the others from running. The short ones come first.
gpu: .venv/installed-gpu
	@status=0; for part in $(GPU_PARTS); do $(MAKE) --no-print-directory $$part || status=1; done; \
	$(BIN)/python bench/tables.py || status=1; exit $$status

$(GPU_PARTS): gpu-there

gpu-there: .venv/installed-gpu
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("torch sees no CUDA device")'

gpu-host:
	@$(LIMITED) $(BIN)/python bench/gpu_host.py

gpu-pack:
	@$(LIMITED) $(BIN)/python bench/pack.py --device cuda

gpu-step:
	@$(LIMITED) $(BIN)/python bench/gpu_step.py

gpu-tests:
	@$(LIMITED) $(BIN)/python -m pytest -m gpu tests/gpu $(ARGS)

gpu-memory:
	@if compute-sanitizer --error-exitcode 1 $(BIN)/python -c 'import torch; torch.ones(1).cuda()' >/dev/null 2>&1; \
	then $(LIMITED) compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python tests/gpu/short_run.py; \
	else echo "compute-sanitizer is not here, or does not know this machine: its run is left out"; fi

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "pipeline_ext needs Python 3.11 or newer; make PYTHON=... names one"; exit 1; }
	@command -v g++ >/dev/null || { echo "pipeline_ext needs g++ to build its native core"; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: .venv/created $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[plot]'
	@touch $@

# Of the package that is installed already pip takes what an extra asks for, and does not compile it again.
.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check 'pipeline_ext[test]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(TORCHTITAN)
	@touch $@

.venv/installed-lint: .venv/installed-test
	$(BIN)/pip install --quiet --disable-pip-version-check 'pipeline_ext[lint]'
	@touch $@

# Where $(PYTHON) has what is needed, that is borrowed, and no network is used.
.venv/installed-gpu: $(SOURCES)
	@if $(PYTHON) -c 'import setuptools, pip, pybind11, hypothesis, pytest, torch, triton; \
	    assert int(setuptools.__version__.partition(".")[0]) >= 77' 2>/dev/null; then \
	    $(PYTHON) -m venv --without-pip .venv && \
	    $(PYTHON) -c 'import sys; print(*sys.path[1:], sep="\n")' > \
	        "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth" && \
	    $(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check \
	        --no-deps --no-build-isolation --editable .; \
	else \
	    $(PYTHON) -m venv .venv && \
	    $(BIN)/pip install --quiet --disable-pip-version-check --editable '.[gpu,test]'; \
	fi
	@touch $@

clean:
	rm -rf .venv build *.egg-info pipeline_ext/*.so
