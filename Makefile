# `make serve` shows the site, `make test` runs the tests. Each first sets up
# what it needs under .venv, once. GNU make and a POSIX shell are enough.

PYTHON      ?=
ADDRESS     ?= 127.0.0.1:8000
GPUS        ?= 1
TOPICS      ?=
GPU_PYTHON  ?= python3
GPU_RECORDS ?= gpu$(if $(filter-out 1,$(GPUS)),-x$(GPUS))

SITE := .venv/site/bin
TEST := .venv/test/bin
# two processes, of one thread each
PYTEST := OMP_NUM_THREADS=1 $(TEST)/python -m pytest src tests \
    -n 2 --dist worksteal

export NO_MKDOCS_2_WARNING := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# uv installs in seconds what takes pip a minute. It looks where pip looks.
UV := uv==0.13.9
export UV_INDEX_STRATEGY ?= unsafe-best-match
export UV_SYSTEM_CERTS ?= true
$(foreach v,INDEX_URL EXTRA_INDEX_URL FIND_LINKS CONSTRAINT,\
    $(if $(PIP_$v),$(eval export UV_$v ?= $(PIP_$v))))

.PHONY: help serve test slow check lint types site browser wheel gpu bench sanitize labs bundle clean
.NOTPARALLEL:

help: ## say what there is to make
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1	\2/p' Makefile

# -- for readers ---------------------------------------------------------------

serve: .venv/site/ready bundle ## serve the site on http://127.0.0.1:8000
	@$(SITE)/mkdocs serve --dev-addr $(ADDRESS) || { \
	    echo "make serve: stopped, see above. Is the address in use? Another:" \
	        "make serve ADDRESS=127.0.0.1:8001" >&2; exit 1; }

test: .venv/test/ready ## run the tests, but for those marked slow
	$(PYTEST) -m "not slow" --report docs/records/cpu/tests.json

slow: .venv/test/ready ## run the tests marked slow: site builds, processes
	$(PYTEST) -m slow

# with what the machine has: nothing is installed
gpu: ## run the tests on the machine's own PyTorch and GPU; GPUS=4 for four
	$(GPU_PYTHON) -m pytest src/warpmap tests --ignore=tests/site \
	    --gpu $(GPUS) --report docs/records/$(GPU_RECORDS)/tests.json

bench: ## measure the topics on the machine's own PyTorch and GPU
	PYTHONPATH=src $(GPU_PYTHON) -m warpmap_site.cli bench $(TOPICS)

# memory of every tensor on its own, so that an access past its end is seen;
# nvjet are the kernels of cuBLAS, whose own races are not ours to mend
sanitize: ## run every kernel's small case under compute-sanitizer
	for tool in memcheck racecheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool \
	        --error-exitcode 1 $(GPU_PYTHON) -m pytest -m sanitize --gpu 1 \
	        tests/kernels tests/hardware tests/tools || exit 1; \
	done

labs: .venv/test/ready ## run the notebooks of docs/labs and store their outputs
	PYTHONPATH=src $(TEST)/python -m warpmap_site.labs

clean: ## remove all that make made, .venv too
	rm -rf .venv build dist site src/*.egg-info docs/records/cpu \
	    src/warpmap_site/theme/assets/bundle web/node_modules \
	    .cache .mypy_cache .pytest_cache .ruff_cache
	find src snippets tests -name __pycache__ -prune -exec rm -rf {} +

# -- for contributors ----------------------------------------------------------

check: lint types test slow browser wheel ## all that must pass
	@echo "make check: everything passed"

lint: .venv/test/ready-dev ## ruff, codespell, actionlint, zizmor
	$(TEST)/ruff check .
	$(TEST)/ruff format --check .
	$(TEST)/codespell
	$(TEST)/python web/build.py workflows
	$(TEST)/zizmor --offline --quiet .github/workflows

types: .venv/test/ready-dev ## mypy and tsc
	$(TEST)/mypy
	$(TEST)/python web/build.py types

site: .venv/site/ready bundle ## build the site strictly, into site/
	$(SITE)/mkdocs build --strict --quiet

browser: .venv/test/ready-dev site ## test the site in a headless Chromium
	$(TEST)/python -m pytest tests/browser -n 2 --dist worksteal --site site

wheel: .venv/test/ready-dev bundle ## build the wheel, try it where nothing else is
	rm -rf build/lib build/bdist.* build/wheel build/clean && mkdir -p build
	$(TEST)/pyproject-build --wheel --outdir build/wheel . >build/wheel.log \
	    || { cat build/wheel.log; exit 1; }
	$(TEST)/python -m venv build/clean
	build/clean/bin/pip install --quiet build/wheel/*.whl
	cd build && clean/bin/python -I ../.ci/check_wheel.py

bundle: | .venv/site/ready
	@$(SITE)/python web/build.py

# -- environments --------------------------------------------------------------

.venv/site/ready: pyproject.toml
	$(call environment,site,docs)

.venv/test/ready: pyproject.toml
	$(call environment,test,test)

.venv/test/ready-dev: .venv/test/ready
	$(call environment,test,dev)

# the machine's own python3 first; others only where that one does not fit
PYTHONS = $(or $(PYTHON),python3 python3.13 python3.12 python3.11)
FITS = import sys, ensurepip, venv; \
    sys.exit(not (3, 11) <= sys.version_info < (3, 14))

# $(call environment,NAME,EXTRA): .venv/NAME holds the package with one extra
define environment
@if ! .venv/$(1)/bin/python -c '' 2>/dev/null; then \
    for python in $(PYTHONS) none; do \
        "$$python" -c '$(FITS)' 2>/dev/null && break; \
    done; \
    if [ "$$python" = none ]; then \
        echo "make: needs Python 3.11, 3.12 or 3.13 with venv (Debian:\
 python3-venv); tried $(PYTHONS); name one: make PYTHON=/path/to/python" >&2; \
        exit 1; \
    fi; \
    "$$python" -m venv --clear .venv/$(1) || exit 1; \
fi; \
echo "installing .[$(2)] into .venv/$(1), once"; \
.venv/$(1)/bin/python -m pip install --quiet $(UV) && \
.venv/$(1)/bin/uv pip install --quiet --python .venv/$(1) \
    --editable '.[$(2)]' || { \
    echo "make: uv could not set up .venv/$(1), see above" >&2; exit 1; }; \
touch $@
endef
