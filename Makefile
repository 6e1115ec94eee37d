# Every target does its own set-up. Needs Python >= 3.11 (PYTHON=...) and pip; nothing else.
PYTHON ?= python3

VENV := .venv/bin
ORACLES := .venv-oracles/bin
ACCELERATORS := .venv-accelerators/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
PYTEST := -m pytest -q -n 2

.PHONY: demo test test-oracles test-accelerators notebooks benchmark report lint clean help

help:
	@echo "make demo               train S4D on handwritten digits, pixel by pixel, in minutes on a CPU"
	@echo "make test               the tests that a user runs"
	@echo "make test-oracles       the same numbers from independent implementations (installs CPU PyTorch)"
	@echo "make test-accelerators  the tests under Python 3.12 and jax 0.11.2, and kernels through the GPU's and TPUs' compilers"
	@echo "make notebooks          runs the notebooks and writes them, with their figures, to build/notebooks"
	@echo "make benchmark          times every operation on this machine"
	@echo "make report             everything measured, as Markdown"
	@echo "make lint               ruff, as the maintainers run it"

.venv/ready: setup.cfg pyproject.toml
	@echo "Setting up .venv ..."
	@$(PYTHON) -m venv .venv
	@$(VENV)/python $(PIP_INSTALL) -e .[demo]
	@touch $@

.venv/ready-test: .venv/ready
	@$(VENV)/python $(PIP_INSTALL) -e .[demo,datasets,pretrained,test]
	@touch $@

.venv/ready-notebooks: .venv/ready
	@$(VENV)/python $(PIP_INSTALL) -e .[datasets,demo,notebooks]
	@touch $@

.venv-oracles/ready: setup.cfg pyproject.toml
	@$(PYTHON) -m venv .venv-oracles
	@$(ORACLES)/python $(PIP_INSTALL) -e .[pretrained,test,oracles]
	@touch $@

.venv-accelerators/ready: setup.cfg pyproject.toml
	@PYENV_VERSION=$${PYENV_VERSION:-3.12.1} python3.12 -m venv .venv-accelerators
	@$(ACCELERATORS)/python $(PIP_INSTALL) jax==0.11.2 -e .[demo,datasets,pretrained,test]
	@$(ACCELERATORS)/python $(PIP_INSTALL) --no-deps jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2 libtpu==0.0.48.*
	@touch $@

demo: .venv/ready
	@$(VENV)/python -m experiments.train --config=configs/smnist.py:s4d,demo --workdir=runs/demo

test: .venv/ready-test
	$(VENV)/python $(PYTEST) tests --ignore=tests/independent

test-oracles: .venv-oracles/ready
	$(ORACLES)/python $(PYTEST) tests/independent

# The compilers for GPUs and TPUs need neither: kernels are compiled ahead of time, and run in simulators.
# PYENV_VERSION reaches a Python 3.12 behind pyenv; without either this says so and passes.
test-accelerators:
	@if PYENV_VERSION=$${PYENV_VERSION:-3.12.1} python3.12 --version >/dev/null 2>&1; then \
	    $(MAKE) --no-print-directory test-accelerators-found; \
	else \
	    echo "****** SKIPPED: no Python 3.12 on PATH, so nothing was tested under jax 0.11.2 ******"; \
	fi

.PHONY: test-accelerators-found
test-accelerators-found: .venv-accelerators/ready
	$(ACCELERATORS)/python $(PYTEST) tests --ignore=tests/independent

# A pair that differs follows the newer file. CI: what has a knob is drawn once. XLA: as in tests/conftest.py.
notebooks: .venv/ready-notebooks
	@$(VENV)/jupytext --quiet --sync notebooks/*.py
	@CI=1 XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true" \
	    $(VENV)/python -m nbconvert --log-level ERROR --execute --ExecutePreprocessor.timeout=300 --to html \
	    --output-dir build/notebooks notebooks/*.ipynb
	@echo "Every assertion holds. Read build/notebooks/*.html; change notebooks/*.ipynb."

benchmark: .venv/ready
	@$(VENV)/python -m kernels_pallas.benchmark

report: .venv/ready
	@$(VENV)/python -m experiments.report

lint: .venv/ready-test
	$(VENV)/python -m ruff check .
	$(VENV)/python -m ruff format --check .

clean:
	rm -rf .venv .venv-oracles .venv-accelerators .cache build *.egg-info
