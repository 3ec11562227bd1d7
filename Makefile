# `make demo` and `make test` are all a newcomer needs; both set up .venv on their first run.
VENV ?= .venv
JOBS ?= 2  # tests at a time; each uses a core or two
PYTHON_IN_VENV := $(VENV)/bin/python
READY := $(VENV)/.ready-dev
READY_PARITY := $(VENV)/.ready-parity
READY_RAY := $(VENV)/.ready-ray
READY_TRAIN := $(VENV)/.ready-train
SOURCES := runtime convert models cli
# The strict editable install links file by file: a file added or removed asks for a new install.
PACKAGE_FILES := $(shell find $(SOURCES) -type d -not -name __pycache__ 2>/dev/null)

# The levels of kernels for this kind of processor (runtime/native/dispatch.c).
KERNELS_HERE := $(if $(filter arm64 aarch64,$(shell uname -m)),QVL_HAVE_NEON QVL_HAVE_NEONI8MM,\
	QVL_HAVE_AVX2 QVL_HAVE_AVXVNNI QVL_HAVE_AVX512VNNI QVL_HAVE_AVX512BF16)

.DEFAULT_GOAL := help
.PHONY: help setup demo test parity ray lint sanitize format package readme nano bench clean fuzz kills cases

help:  ## say what there is to make
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt .ci/setup $(PACKAGE_FILES)
	.ci/setup $(VENV) dev
	@touch $@

$(READY_PARITY): $(READY)
	.ci/setup $(VENV) parity
	@touch $@

$(READY_RAY): $(READY)
	.ci/setup $(VENV) ray
	@touch $@

$(READY_TRAIN): $(READY)
	.ci/setup $(VENV) train
	@touch $@

setup: $(READY)  ## install qvl and its tools into .venv

demo: $(READY)  ## convert the small model, then chat about and caption sample pictures
	@VENV=$(VENV) models/demo.sh

test: $(READY)  ## run the tests that need no torch
	$(PYTHON_IN_VENV) -m pytest -m "not parity" -n $(JOBS) --dist loadfile

parity: $(READY_PARITY)  ## run the tests against transformers
	$(PYTHON_IN_VENV) -m pytest -m parity -n $(JOBS) --dist loadfile

ray: $(READY_RAY)  ## run the tests of captions on a local Ray cluster
	$(PYTHON_IN_VENV) -m pytest tests/caption/test_distributed.py

SHARED_CASES ?= ../shared/cases
cases: $(READY)  ## run the inputs that failed others' tools, where they are checked out beside this folder
	@if [ ! -x $(SHARED_CASES)/run_all.sh ]; then echo "no $(SHARED_CASES): nothing to run"; exit 0; fi; \
	QVL=$(abspath $(VENV))/bin/qvl $(SHARED_CASES)/run_all.sh $(ONLY) | tee .cases.log; \
	! grep -q '^FAIL ' .cases.log; failed=$$?; rm -f .cases.log; exit $$failed

CASES ?= 10000
fuzz: $(READY)  ## feed qvl mutated files of every kind: CASES of each (10,000)
	cd tests && $(abspath $(PYTHON_IN_VENV)) -m fuzz --cases $(CASES)

kills: $(READY)  ## kill every command that writes at fifty random instants
	QVL_KILLS=50 $(PYTHON_IN_VENV) -m pytest tests/fuzz/test_kills.py tests/caption/test_kill.py

lint: $(READY)  ## check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy $(addprefix -p qvl.,$(SOURCES))

sanitize:  ## run the C kernels with random shapes under AddressSanitizer and UBSan
	@mkdir -p build
	$(CC) -g -O1 -std=c11 -ffp-contract=fast -fsanitize=address,undefined -fno-sanitize-recover=all \
		$(addprefix -D,$(KERNELS_HERE)) -Iruntime/native runtime/native/*.c tests/native/harness.c -lm -o build/sanitize
	build/sanitize 40

format: $(READY)  ## apply ruff's fixes and layout
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

package: $(READY)  ## build the wheel and check what is in it
	rm -rf dist
	$(PYTHON_IN_VENV) -m pip wheel --quiet --no-deps -w dist .
	$(PYTHON_IN_VENV) .ci/check_wheel.py dist/qvl-*.whl

readme: $(READY)  ## run what the README shows, and write what comes out into it
	$(PYTHON_IN_VENV) .ci/refresh_readme.py

nano: $(READY_TRAIN)  ## train the embedded model again, from nothing (hours)
	$(PYTHON_IN_VENV) -m qvl.models.nano.train.run --work build/nano

bench: $(READY)  ## measure against the peers and write benchmarks/README.md
	$(PYTHON_IN_VENV) benchmarks/vision.py --whole --peers "$$(benchmarks/peers.sh)"

clean:  ## remove what building and testing left
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -exec rm -rf {} +
