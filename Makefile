# Every target sets up what it needs in .venv; stamps make the second run start at once.
#
#   make demo      train the small model, segment scenes and photographs, write demo/report.html
#   make test      the test suite
#   make lint      formatting, ruff, mypy
#   make bench     the benchmark suite and its report.html, an hour; BENCH_ARGS=--quick: under 3 minutes
#   make bench-pytest   depthwise, separable and filters under pytest-benchmark (BENCH_ARGS=--benchmark-json=FILE ...)
#   make study     the papers' findings in miniature: 30 short trainings, half an hour on 4 cores, resumable
#   make install   the package in .venv, editable; `make clean` removes .venv and every build product
#
# PYTHON=python3.12 chooses the Python that .venv is made from; WORKERS=4 the number of test processes. The variables of
# setup.py (DEEPLAB_KERNELS_CUDA=0, MAX_JOBS=2 ...) are passed on.

PYTHON ?= python3
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check --quiet
STAMPS := $(VENV)/stamps
CXX_FILES := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: demo test lint bench bench-pytest study abi install clean
.DELETE_ON_ERROR:

demo: $(STAMPS)/install $(STAMPS)/demo
	$(RUN) -m deeplab_kernels demo

# Two threads a worker, so that the kernels do split their work; passive, because there may be more threads than cores.
test: $(STAMPS)/install $(STAMPS)/test $(STAMPS)/peers
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(RUN) -m pytest --numprocesses $(WORKERS) --dist worksteal $(TESTS)

lint: $(STAMPS)/lint
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(RUN) -m mypy

bench: $(STAMPS)/install $(STAMPS)/bench
	$(RUN) -m deeplab_kernels bench $(BENCH_ARGS)

# The allocator keeps large blocks: otherwise page faults, alike for all contenders, hide the kernels.
bench-pytest: $(STAMPS)/install $(STAMPS)/bench
	MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 \
	  $(RUN) -m pytest benchmarks --benchmark-only $(BENCH_ARGS)

study: $(STAMPS)/install $(STAMPS)/plots
	$(RUN) -m benchmarks.study $(STUDY_ARGS)

# The torch libraries keep to PyTorch's stable ABI.
abi: $(STAMPS)/install $(STAMPS)/test
	$(VENV)/bin/torch-abi-audit --check both deeplab_kernels/_C*.abi3.so

install: $(STAMPS)/install

clean:
	rm -rf $(VENV) build dist *.egg-info demo/report.html deeplab_kernels/*.so deeplab_kernels/_build_info.json
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# One stamp for each file of requirements.
$(STAMPS)/%: requirements/%.txt requirements/base.txt | $(RUN)
	@mkdir -p $(@D)
	$(PIP) install -r $<
	@touch $@

$(STAMPS)/test $(STAMPS)/bench: requirements/demo.txt
$(STAMPS)/test: requirements/train.txt requirements/plots.txt

$(STAMPS)/peers: requirements/peers.txt | $(RUN)
	@mkdir -p $(@D)
	$(PIP) install --no-deps -r $<
	@touch $@

# The sources are compiled by ninja, which knows what changed.
$(STAMPS)/install: $(STAMPS)/base setup.py pyproject.toml $(shell find csrc -type f)
	$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@
