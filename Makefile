# make train: a small DeepSeek-V3 on this machine, in minutes. make test: everything that must hold.
# Both make .venv first. Other options of `lm train`: make train ARGS="--preset nano".
PYTHON ?= python3
ARGS ?=
.PHONY: train test long lint coverage bench experiments notebooks docs tables reason clean

train: .venv/lm
	.venv/bin/lm train $(ARGS)

test: .venv/dev
	.venv/bin/pytest -q -m "not long" -n auto --dist loadfile

long: .venv/dev
	.venv/bin/pytest -q -m long -n auto --dist loadfile

lint: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/mypy

coverage: .venv/dev
	.venv/bin/pytest -q -m "not long" --cov=moe --cov=mla --cov-branch --cov-report=term-missing tests/moe tests/mla

bench: .venv/dev
	.venv/bin/python -m benchmarks.speed
	.venv/bin/python -m benchmarks.scaling
	.venv/bin/python -m benchmarks.memory
	.venv/bin/python -m benchmarks.profile
	.venv/bin/python docs/figures.py --pictures

# hours; trainings in runs/experiments are reused
experiments: .venv/lm
	for name in gate_scale convert faster cache balance architectures fineness shared_expert specialization expert_choice rope rivals projects r1_zero what_rl_adds objectives thinking distillation replay; do .venv/bin/lm experiment $$name || exit 1; done
	.venv/bin/python docs/claims.py

# half an hour: executes every notebook from its source
notebooks: .venv/dev
	cd notebooks && for source in [0-9]*.py; do ../.venv/bin/jupytext --quiet --to ipynb --execute $$source || exit 1; done

# the packaged model rl/models/sums, about ten minutes on one core
reason: .venv/lm
	.venv/bin/lm train --preset reason --seed 2 --out-dir runs/reason
	.venv/bin/lm reason train runs/reason --steps 120 --out-dir runs/reason-rl
	rm -rf rl/models/sums && .venv/bin/python -m rl.pack runs/reason-rl sums

# the site: open build/site/index.html; `.venv/bin/python -m mkdocs serve` also has its search
docs: .venv/dev
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --quiet

# what is generated in docs and README.md
tables: .venv/dev
	.venv/bin/python docs/equations.py
	.venv/bin/python -m docs.pages
	.venv/bin/python docs/names.py
	.venv/bin/python docs/figures.py
	.venv/bin/python docs/claims.py
	.venv/bin/python docs/explorers.py

.venv/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv

.venv/lm: .venv/bin/pip setup.cfg constraints.txt
	.venv/bin/pip install --quiet -c constraints.txt -e '.[lm]'
	touch $@

.venv/dev: .venv/bin/pip setup.cfg constraints.txt
	.venv/bin/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@ .venv/lm

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache
