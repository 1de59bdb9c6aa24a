# Everything a user or CI runs. PYTHON=exe or SITE=dir name another place than .venv.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.NOTPARALLEL:
.DEFAULT_GOAL := help
# Recipes read them as quoted shell variables, so that a path may hold blanks.
export PYTHON SITE
# SGLang starts four processes; without byte code each of them compiles some 6,000 files first.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv/bin/python
# The one release that the series is for, and what its environment is made from.
SERIES := $(patsubst %/series,%,$(wildcard patches/*/series))
LOCK := $(SERIES)/requirements.lock
# Any Python from 3.9 runs it; the site it works on may belong to another.
PATCHSET := python3 patches/patchset.py

.PHONY: help setup apply unapply status verify port lint test test-sm120 test-gpu test-launch bench profile tune accuracy accuracy-cpu soak mutations demo small-model wheel image lock clean

help:
	@cat <<-'END'
	make setup    .venv with everything in $(LOCK) (Python 3.11 or 3.12; PYTHON=exe names one)
	make demo     a small DeepSeek-V4 served on this machine, no GPU needed
	make small-model DIR=…   the trained small checkpoint as files, to serve it by hand
	make wheel    the package as a wheel in dist/, for `pip install` beside an untouched SGLang
	make image    the container image, with docker, podman or buildah (docs/container.md)
	make test     everything that needs no GPU
	make test-sm120   every kernel compiles for sm_120a, no GPU needed; RENEW=1 writes docs/kernel-resources.md
	make test-launch  the launcher with real servers that are killed and frozen, and the image's steps in a new Debian (root)
	make test-gpu     kernel parity and CUDA-graph replay on this machine's GPU
	make bench        kernel times on this machine's GPU, one JSON object a line
	make profile      a decode step and a cycle of EAGLE, served on this machine's GPU, and where their time goes, into profile/
	make tune         faster kernel configurations for this machine's GPU, into overlay/sglang_sm120/tuned
	make accuracy URL=http://…   scores of a running server against their floors; QUICK=1 (docs/accuracy.md)
	make accuracy-cpu   the trained small model, served on this machine's CPU: scores against their floors
	make soak     the trained small model under load on this machine, CPU or GPU: minutes of everything at once (docs/soak.md)
	make mutations    which test catches which deliberate defect, into docs/mutations.md
	make apply    patch the SGLang of this shell's python, else of .venv; of PYTHON=exe, of SITE=dir; so do unapply, status, verify
	make port WHEEL=…   what another SGLang's wheel asks of the series: hunks, moved names, patches it makes needless
	make lint     the rules of the series, ruff and mypy
	make lock     resolve $(SERIES)/requirements.in again (needs uv)
	make clean    remove .venv and caches
	END

# The mark is written last: an interrupted setup is done again, a finished one is recognised by the lock's hash.
setup:
	@lock=$$(sha256sum < $(LOCK))
	mark=$$(cat .venv/.complete 2> /dev/null || true)
	if [[ -z $$PYTHON && $$mark == *"$$lock" ]]; then exit; fi
	version() { "$$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null || echo "not a Python"; }
	if [[ -n $$PYTHON ]]; then candidates=("$$PYTHON"); else candidates=(python3 python3.12 python3.11); fi
	refused=
	for candidate in "$${candidates[@]}"; do
	    found=$$(version "$$candidate")
	    if [[ $$found == 3.1[12] ]]; then break; fi
	    refused="$${refused:+$$refused; }$$candidate is $$found"
	done
	if [[ $$found != 3.1[12] ]]; then
	    echo "make setup: $$refused, needed Python 3.11 or 3.12: install one or name it with PYTHON=exe" >&2
	    exit 2
	fi
	if [[ $$mark == "$$found $$lock" ]]; then exit; fi
	rm -rf .venv
	echo "make setup: filling .venv (Python $$found) from $(LOCK), 10 GB on disk; this takes minutes"
	if command -v uv > /dev/null; then
	    uv venv --quiet --python "$$candidate" .venv
	    uv pip install --quiet --python $(VENV) --no-deps --only-binary :all: --require-hashes -r $(LOCK)
	else
	    "$$candidate" -m venv .venv
	    # A constraints file of this machine could only contradict the lock.
	    PIP_CONSTRAINT=/dev/null $(VENV) -m pip install --quiet --progress-bar off --disable-pip-version-check \
	        --no-input --no-compile --no-deps --only-binary :all: --require-hashes -r $(LOCK)
	fi
	echo "$$found $$lock" > .venv/.complete

apply unapply status verify:
	@if [[ -n $$SITE && -n $$PYTHON ]]; then
	    echo "make $@: both PYTHON and SITE are given, needed one of them: drop the other" >&2
	    exit 2
	fi
	if [[ -n $$SITE ]]; then exec $(PATCHSET) $@ --site "$$SITE"; fi
	if [[ -n $$PYTHON ]]; then exec $(PATCHSET) $@ --python "$$PYTHON"; fi
	# What `python -m sglang.launch_server` would start here, before what `make setup` has made.
	has_sglang='import importlib.util as u; raise SystemExit(u.find_spec("sglang") is None)'
	if python -c "$$has_sglang" 2> /dev/null; then
	    chosen=python
	elif [[ -x $(VENV) ]]; then
	    chosen=$(VENV)
	else
	    chosen=python3
	fi
	exec $(PATCHSET) $@ --python "$$chosen"

port:
	@exec $(PATCHSET) port --wheel "$${WHEEL:-}"

lint: setup
	@$(VENV) patches/patchset.py lint
	$(VENV) -m ruff check overlay patches launch reference evals bench tests
	$(VENV) -m mypy overlay/sglang_sm120 patches launch/sglang_sm120_launch reference/sglang_sm120_reference \
	    evals/demo.py evals/local_server.py

SERVERS := $(addprefix tests/model/test_,eagle_cpu.py fixes.py) $(wildcard tests/model/test_serving_*.py)

# Two processes, one core each: a server computes in one thread (tests/conftest.py), and its start is imports. Files with
# many tests go out first, or where those are not the long ones the first in the alphabet: both processes are to end together.
# The tests of the patches fork pytest at every step: apart, before the others have made it large.
BOTH_CORES := -n 2 --dist loadfile
AS_NAMED := $(BOTH_CORES) --no-loadscope-reorder

test: setup
	@$(VENV) patches/patchset.py apply
	seconds=
	timed() {
	    local start=$$SECONDS
	    "$${@:2}"
	    seconds+="$${seconds:+, }$$1 $$((SECONDS - start))"
	}
	trap 'echo "seconds: $$seconds; $$SECONDS in all"' EXIT
	timed lint $(MAKE) --no-print-directory PYTHON= lint
	timed patches $(VENV) -m pytest tests/patches $(BOTH_CORES)
	timed "ops and sm120" $(VENV) -m pytest tests/gpu tests/ops tests/sm120 $(BOTH_CORES)
	timed "evals and launch" $(VENV) -m pytest tests/evals tests/launch tests/mutations tests/docs $(AS_NAMED)
	timed model $(VENV) -m pytest $(filter-out $(SERVERS),$(wildcard tests/model/test_*.py)) $(BOTH_CORES)
	timed servers $(VENV) -m pytest $(SERVERS) $(AS_NAMED)

test-sm120: setup
	@$(VENV) patches/patchset.py apply
	exec $(VENV) -m pytest tests/sm120 --all-shapes $${RENEW:+--renew-table}

test-gpu: setup
	@$(VENV) patches/patchset.py apply
	exec $(VENV) -m pytest tests/gpu

test-launch: setup
	@$(VENV) patches/patchset.py apply
	exec $(VENV) -m pytest tests/launch --thorough

bench: setup
	@$(VENV) patches/patchset.py apply
	exec $(VENV) bench/bench.py

profile: setup
	@$(VENV) patches/patchset.py apply
	exec $(VENV) bench/decode_step.py --serve plain eagle --batch 1 8 --context 1024 --out "$${OUT:-profile}" $${ARGS:-}

# Sweeps what the checkout says, and places the table that it wrote.
tune: setup
	@$(VENV) patches/patchset.py apply
	$(VENV) bench/tune.py
	exec $(VENV) patches/patchset.py apply

accuracy: setup
	@if [[ -z $${URL:-} ]]; then
	    echo "make accuracy: no server was named, needed its base URL: give URL=http://HOST:PORT" >&2
	    exit 2
	fi
	$(VENV) patches/patchset.py apply
	exec $(VENV) evals/accuracy.py "$$URL" $${QUICK:+--quick} $${DATA:+--data "$$DATA"} \
	    $${SYNTHETIC:+--synthetic "$$SYNTHETIC"} $${ARGS:-}

accuracy-cpu: setup
	@$(VENV) patches/patchset.py apply
	exec $(VENV) evals/accuracy_cpu.py evals/small-deepseek-v4.xz \
	    evals/questions-cpu.jsonl $${ARGS:-}

soak: setup
	@$(VENV) patches/patchset.py apply
	exec $(VENV) evals/soak.py evals/small-deepseek-v4.xz $${ARGS:-}

mutations: setup
	exec $(VENV) tests/mutations/run.py

demo: setup
	@$(VENV) patches/patchset.py apply
	exec $(VENV) evals/demo.py evals/small-deepseek-v4.xz

small-model: setup
	@if [[ -z $${DIR:-} ]]; then
	    echo "make small-model: no folder was named, needed a new or empty one: give DIR=path" >&2
	    exit 2
	fi
	$(VENV) patches/patchset.py apply
	PYTHONPATH=reference $(VENV) -m sglang_sm120_reference.packed evals/small-deepseek-v4.xz "$$DIR"

# Without the network: setuptools and build are in the lock.
wheel: setup
	@rm -rf build
	trap 'rm -rf build overlay/*.egg-info *.egg-info' EXIT
	$(VENV) -m build --quiet --wheel --no-isolation --outdir dist .
	version=$$(sed -n 's/^__version__ = "\(.*\)"$$/\1/p' overlay/sglang_sm120/__init__.py)
	wheel=dist/sglang_sm120-$$version-py3-none-any.whl
	echo "$$wheel: $$(($$(stat --format %s "$$wheel") / 1000)) KB"

image:
	@version=$$(sed -n 's/^__version__ = "\(.*\)"$$/\1/p' overlay/sglang_sm120/__init__.py)
	found="none of docker, podman and buildah is on PATH"
	for builder in docker podman buildah; do
	    if ! command -v $$builder > /dev/null; then continue; fi
	    if [[ $$builder != docker ]] || docker info > /dev/null 2>&1; then
	        exec $$builder build --file launch/Dockerfile --tag sglang-sm120:$$version .
	    fi
	    found="docker's daemon does not answer this user (docker info says why), and neither podman nor buildah is on PATH"
	done
	echo "make image: $$found: start it or install one of them" >&2
	exit 2

# uv repeats tool.uv.environments behind every requirement; setup refuses other interpreters, so drop it again.
PYTHONS := python_full_version < '3.13' and
LINUX := ((platform_machine == 'aarch64' and sys_platform == 'linux') or (platform_machine == 'x86_64' and sys_platform == 'linux'))

lock:
	@if ! command -v uv > /dev/null; then
	    echo "make lock: uv is not on PATH, needed to resolve for both Pythons: install uv" >&2
	    exit 2
	fi
	draft=$(LOCK).draft
	trap 'rm -f $$draft' EXIT
	if [[ -e $(LOCK) ]]; then cp $(LOCK) $$draft; fi
	uv pip compile $(SERIES)/requirements.in --output-file $$draft --universal --python-version 3.11 \
	    --fork-strategy fewest --prerelease allow --only-binary :all: --generate-hashes --no-header --no-annotate --quiet
	{
	    echo "# Made by \`make lock\` from requirements.in: Python 3.11 and 3.12, Linux on x86_64 and aarch64."
	    sed "s/ ; $(PYTHONS) / ; /; s/ ; $(LINUX) / /" $$draft
	} > $(LOCK)

clean:
	@rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info
	find overlay patches launch reference evals bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
