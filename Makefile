# Every target works as the first command on a fresh machine with Python >= 3.11 and make: it sets up .venv by itself.

PYTHON ?= python3
UV ?= uv
VENV := .venv
BIN := $(VENV)/bin

# CUDA 13 needs driver 580 or newer; `make BACKEND=default` keeps to mlx's own choice (Metal, or the CPU on Linux).
BACKEND ?= $(shell v=$$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d. -f1); \
	test "$${v:-0}" -ge 580 2>/dev/null && echo cuda13 || echo default)
READY := $(VENV)/.installed-$(BACKEND)

# torch and peft live apart: they are larger than all the rest, and only comparisons need them.
PEERS := .venv-peers
PEERS_READY := $(PEERS)/.installed-default

# Ray and what it brings are as large as all the rest.
RAY := .venv-ray
RAY_READY := $(RAY)/.installed-default

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test test-fast test-all test-long test-blas test-fleet test-gpu test-peers test-nvrtc test-ray test-schema test-page test-otel pictures docs api newcomer golden golden-encoders golden-vision golden-recurrent golden-families check format bench bench-peers bench-pushes wheel sbom containers lock clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# A dependency group that no lock holds, beside what is in .venv.
ADD = sh .ci/install $(PYTHON) $(VENV) $(BACKEND)

$(READY): pyproject.toml requirements.lock.txt requirements.cuda13.lock.txt .ci/install
	@sh .ci/install $(PYTHON) $(VENV) $(BACKEND)
	@touch $@

setup: $(READY)  ## create .venv from the locked versions, with a fast BLAS where that is allowed

demo: $(READY)  ## train the embedded model against a real server: result.json and reward.png (ARGS="--steps 3")
	$(BIN)/rollout-server demo $(ARGS)

serve: $(READY)  ## serve the embedded model (ARGS="--model DIR")
	$(BIN)/rollout-server serve $(ARGS)

# Wherever it is set, every process that a test starts would compile the sources anew, and pytest its tests.
export PYTHONDONTWRITEBYTECODE :=

# Files of tests side by side, those that are likely to take long first (tests/laws/marks.py). Three processes keep two
# cores busy while a test waits; each more costs ten seconds of imports and collection.
SPREAD := -n $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$((n < 4 ? n + 1 : 4))) \
	--dist loadfile --no-loadscope-reorder

# A step of a tiny model is hundreds of operations that one thread hands to another. Where Linux is told that nobody waits
# for either, the one that is woken lets the other go on: a fifth less of the processor for tests of the engine.
BATCH := $(shell chrt --batch 0 true 2>/dev/null && echo chrt --batch 0)
PYTEST := $(BATCH) $(BIN)/python -m pytest -q
# More processes than cores: a BLAS whose threads wait for one another by spinning took a fifth of the time.
ALONE := env OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1

test: $(READY)  ## run the tests but those of test-long (ARGS="tests/engine -k swap")
	$(if $(ARGS),,$(ALONE)) $(PYTEST) $(or $(ARGS),-m "not long" $(SPREAD))

test-fast: $(READY)  ## a minute's worth of them: no server, no kill, no model that is loaded
	$(ALONE) $(PYTEST) -m "not server and not model and not numeric and not long" $(SPREAD) $(ARGS)

test-all: $(READY)  ## test and test-long in one run, which is shorter than both: what CI runs
	$(ALONE) $(PYTEST) $(SPREAD) $(ARGS)

test-long: $(READY)  ## the slowest: kill -9 at random moments, restarts, a full disk, the demo to its end, grids to their corners
	$(ALONE) $(PYTEST) -m long $(SPREAD) $(ARGS)

test-blas: $(READY)  ## the numeric tests under the kernels of other processors (ARGS="Haswell Zen")
	$(BIN)/python -m tests.support.numbers.kernels $(ARGS)

test-fleet: $(READY)  ## the tests over HTTP against a server of two engines, or of one that is cut over ranks (RANKS=2)
	$(if $(RANKS),TEST_TENSOR_PARALLEL=$(RANKS),TEST_REPLICAS=2) $(BIN)/python -m pytest -q -m "not long" $(or $(ARGS),tests/fleet tests/end_to_end tests/openai_sdk)

test-gpu: $(READY)  ## the engine's and the adapters' tests on this machine's GPU, float32 in full precision
	@$(BIN)/python -c 'import sys, mlx.core as mx; sys.exit(mx.default_device() == mx.cpu and "mlx has no GPU here")'
	MLX_ENABLE_TF32=0 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile $(or $(ARGS),tests/engine tests/adapters tests/machine/test_doctor.py)

$(PEERS_READY): pyproject.toml requirements.lock.txt .ci/install
	@sh .ci/install $(PYTHON) $(PEERS) default peers
	@touch $@

test-peers: $(PEERS_READY)  ## compare with PEFT, lm-eval, TRL, verifiers, litellm and cohere, over HTTP; sets up .venv-peers with torch (ARGS="-k llama")
	$(PEERS)/bin/python -m pytest -q tests/peers $(ARGS)

$(RAY_READY): pyproject.toml requirements.lock.txt .ci/install
	@sh .ci/install $(PYTHON) $(RAY) default ray
	@touch $@

test-ray: $(RAY_READY)  ## replicas placed by a Ray cluster of several nodes, cut off from every network; sets up .venv-ray (ARGS="-k node")
	$(RAY)/bin/python -m tests.support.fleet.alone -m pytest -q --timeout 600 tests/ray $(ARGS)

golden: $(PEERS_READY)  ## write tests/golden anew from torch and PEFT (ARGS="llama phi3")
	$(PEERS)/bin/python -m tests.golden.make_golden $(ARGS)

golden-encoders: $(PEERS_READY)  ## write tests/golden/encoders anew from torch (ARGS="bert deberta-v3")
	$(PEERS)/bin/python -m tests.golden.encoders.make_golden $(ARGS)

golden-vision: $(PEERS_READY)  ## write tests/golden/vision anew from torch (ARGS="qwen3_vl gemma3")
	$(PEERS)/bin/python -m tests.golden.vision.make_golden $(ARGS)

golden-recurrent: $(PEERS_READY)  ## write tests/golden/recurrent anew from torch
	$(PEERS)/bin/python -m tests.golden.recurrent.make_golden

golden-families: $(PEERS_READY)  ## write tests/golden/families anew from torch, in float64 (ARGS="qwen3_next")
	$(PEERS)/bin/python -m tests.golden.families.make_golden $(ARGS)

test-schema: $(READY)  ## 2,000 requests made up from the OpenAPI document; installs schemathesis into .venv
	@$(BIN)/python -c "import schemathesis" 2>/dev/null || $(ADD) schema
	$(BIN)/python -m tests.schema

PAGE = $(BIN)/python -c "import selenium" 2>/dev/null || $(ADD) page
CHROMIUM = command -v chromedriver >/dev/null || test "$$(id -u)" != 0 \
	|| { apt-get -qq update && apt-get -qq install --yes chromium chromium-driver >/dev/null; } || true

test-nvrtc: $(READY)  ## the kernels' texts through NVIDIA's compiler, which needs no GPU; installs it into .venv on Linux
	@$(BIN)/python -c "import nvidia.cu13" 2>/dev/null || $(ADD) nvrtc
	$(BIN)/python -m pytest -q tests/support/numbers/test_nvrtc.py $(ARGS)

test-page: $(READY)  ## the live page in headless Chromium; installs selenium into .venv, and as root on Debian Chromium
	@$(PAGE)
	@$(CHROMIUM)
	$(BIN)/python -m pytest -q -rs tests/page $(ARGS)

test-otel: $(READY)  ## traces of requests; installs OpenTelemetry, which is an extra, into .venv
	@$(BIN)/python -c "import opentelemetry.sdk" 2>/dev/null || $(ADD) otel
	$(BIN)/python -m pytest -q -rs tests/http/observing/test_tracing.py $(ARGS)

pictures: $(READY)  ## the page's pictures in docs/pictures, of the demo as it trains
	@$(PAGE)
	@$(CHROMIUM)
	$(BIN)/python -m tests.page.make_pictures $(ARGS)

docs: $(READY)  ## the site of README and docs/, in site/html; a dead link fails; installs zensical into .venv
	@$(BIN)/python -c "import zensical, mermaidx" 2>/dev/null || $(ADD) docs
	$(BIN)/python -m tests.docs.build_site

api: $(READY)  ## docs/api.md anew, from the document that a server gives
	$(BIN)/python -m tests.docs.api_page

newcomer: $(READY)  ## the quick start in an empty environment, timed by the commands of its page
	$(BIN)/python -m benchmarks.studies.newcomer $(ARGS)

check: $(READY)  ## formatting, lint, types, import contracts and the laws of the house
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/laws/test_house.py tests/laws/test_rooms.py

format: $(READY)  ## format the code and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)  ## every benchmark, then docs/benchmarks.md and its charts (ARGS="--full", ARGS="decode http")
	$(BIN)/python -m benchmarks $(ARGS)
	$(BIN)/python -m benchmarks.report

bench-peers: $(PEERS_READY)  ## generate of transformers against the engine; sets up .venv-peers (ARGS="--full")
	$(PEERS)/bin/python -m benchmarks generate $(ARGS)
	$(PEERS)/bin/python -m benchmarks.report

bench-pushes: $(READY)  ## what pushes cost the rows that run (ARGS="--rounds 1")
	$(BIN)/python -m benchmarks.pushes $(ARGS)

wheel: $(READY)  ## build dist/*.whl and dist/*.tar.gz, of the version in rollout_server/__init__.py
	$(BIN)/python -m hatchling build

# $(call tool,PROGRAM,GROUP): what only one target needs is installed when it is asked for.
tool = test -x $(BIN)/$(1) || $(ADD) $(2)

# $(call sbom,FILE,LOCKS)
sbom = $(BIN)/python packaging/shipped.py $(2) | $(BIN)/cyclonedx-py requirements --pyproject dist/pyproject.toml \
	--output-reproducible --of JSON -o dist/$(1) -

sbom: $(READY)  ## what the server brings, as CycloneDX in dist/sbom.json and dist/sbom.cuda13.json; installs cyclonedx-bom into .venv
	@$(call tool,cyclonedx-py,sbom)
	@mkdir -p dist
	@version=$$($(BIN)/python -c 'import rollout_server; print(rollout_server.__version__)') \
		&& sed "s/^dynamic = \[\"version\"\]/version = \"$$version\"/" pyproject.toml >dist/pyproject.toml
	$(call sbom,sbom.json,requirements.lock.txt)
	$(call sbom,sbom.cuda13.json,requirements.lock.txt requirements.cuda13.lock.txt)
	@rm dist/pyproject.toml

containers: $(READY)  ## lint the container files; installs hadolint into .venv. Building them needs docker (see each file's head)
	@$(call tool,hadolint,containers)
	$(BIN)/hadolint packaging/containers/*.Dockerfile

LOCK = $(UV) pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
	--no-emit-index-url --custom-compile-command "make lock" $(ARGS)

lock:  ## resolve the locks anew; needs uv (ARGS="--upgrade" takes newer versions)
	$(LOCK) pyproject.toml --extra demo --group test --group check --output-file requirements.lock.txt
	$(LOCK) --group cuda13 --constraints requirements.lock.txt --output-file requirements.cuda13.lock.txt

clean:  ## remove .venv, builds and caches
	rm -rf $(VENV) $(PEERS) $(RAY) dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
