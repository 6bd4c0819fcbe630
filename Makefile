# make demo      sample catalogue through every stage to test_out.csv, a score table and a report page
# make test      lint and every test
# make accuracy  DATA=<folder> OUT=<workspace>: the text models and their ensemble, out of fold
# make pipeline  DATA=<folder with train.csv and test.csv> PRESET=tiny|base OUT=<workspace>

PYTHON ?= python3
RUN := .venv/bin/python
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
# Threads that wait by spinning starve each other where cores are shared: measured 20 times slower (LOG.md).
export OMP_WAIT_POLICY := PASSIVE

PRESET ?= base
OUT ?= .

.PHONY: demo test pipeline accuracy clean

# A stamp is newer than the pinned requirements only if they are installed.
.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check -r requirements.txt
	.venv/bin/pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	.venv/bin/pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: .venv/installed
	$(RUN) -m runs.demo --workspace demo

test: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check -q .
	.venv/bin/pytest

pipeline: .venv/installed
	@test -n "$(DATA)" || { echo "error: say DATA=<folder with train.csv and test.csv>"; exit 2; }
	$(RUN) -m runs.pipeline --data "$(DATA)" --preset "$(PRESET)" --workspace "$(OUT)"

# Every text model that fits a CPU, out of fold, and their ensemble.
TEXT_MODELS := ridge neighbours lightgbm mlp mlp_distribution
accuracy: .venv/installed
	@test -n "$(DATA)" || { echo "error: say DATA=<folder with train.csv and test.csv>"; exit 2; }
	$(RUN) -m data.prepare --data "$(DATA)" --workspace "$(OUT)"
	set -e; for model in $(TEXT_MODELS); do $(RUN) -m tfidf_models.train --model $$model --workspace "$(OUT)"; done
	$(RUN) -m fusion.ensemble.train --workspace "$(OUT)" --intervals --members $(TEXT_MODELS:%=tfidf_%)

clean:
	rm -rf demo .pytest_cache .ruff_cache
