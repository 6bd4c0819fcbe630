"""SFT, DPO, evaluation and extraction from command to files."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from attributes import evaluate, extract_attributes, sample_chains, train_dpo, train_sft
from attributes.chains import Question
from attributes.data import Listing
from attributes.loop import Imitation, Training, dpo_loss, require_ln_2, warn_of_steady_fall
from attributes.model import Spec, VisionLanguage, add_lora, load_base, trained_weights
from attributes.pairs import Example
from attributes.sample_world import attribute_of
from attributes.shards import ChainShards
from contracts.embeddings import read_embeddings
from contracts.errors import InputError
from data import prepare

SAMPLING = ["--max-new-tokens", "24", "--batch-size", "32", "--device", "cpu"]


def adapter(workspace, run):
    return load_file(workspace / "checkpoints" / run / "adapter" / "adapter_model.safetensors")


def logged(workspace, run):
    lines = (workspace / "checkpoints" / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def chains(world, sft):
    """Workspace with an SFT run and its chains."""
    sample_chains.main(
        ["--listings", str(world / "train.csv"), "--labels", str(world / "calibration_labels.csv"),
         "--workspace", str(sft), "--shard-listings", "2", "--temperature", "1.0", *SAMPLING]
    )  # fmt: skip
    return sft


@pytest.fixture
def dpo_command(world, chains):
    return [
        "--preset", "tiny", "--listings", str(world / "train.csv"), "--workspace", str(chains), "--device", "cpu",
        "--min-consistency", "0.2", "--batch-size", "4", "--micro-batch", "4",
    ]  # fmt: skip


def test_dpo_loss_by_hand():
    gained, lost = torch.tensor([1.0, 0.0]), torch.tensor([-2.0, 0.0])
    expected = [-math.log(1 / (1 + math.exp(-0.2 * 3))), math.log(2)]
    assert dpo_loss(gained, lost, beta=0.2).tolist() == pytest.approx(expected)


def test_a_first_loss_other_than_ln_2_is_refused():
    require_ln_2({"dpo_loss": math.log(2)}, run="r")
    require_ln_2({}, run="r")  # SFT has none
    with pytest.raises(InputError, match="first DPO loss is 0.6960"):
        require_ln_2({"dpo_loss": 0.696}, run="r")


def test_a_steady_fall_of_the_preferred_chains_is_warned_of():
    assert "steadily less probable" in warn_of_steady_fall(np.linspace(0, -8, 40).tolist())
    assert warn_of_steady_fall(np.linspace(0, 8, 40).tolist()) == ""
    assert warn_of_steady_fall([0, -5, 0, -5] * 10) == ""


def test_a_tiny_batch_is_overfitted(world):
    base, tokenizer, processor = load_base(str(world / "base"), precision="fp32", device=torch.device("cpu"))
    torch.manual_seed(0)
    model = add_lora(base, rank=16, alpha=32)
    language = VisionLanguage(model, tokenizer, processor, Spec("", "", "text", "pad", 64, True), None)
    examples = []
    for text, fact, reply in [("one", "colour", "Answer: jade"), ("two", "shape", "Answer: trio")]:
        question = Question(Listing(text, "buttons", f"Item Name: {text}", ()), attribute_of(fact))
        examples.append(Example(question, tuple(language.reply_ids(reply))))
    imitation = Imitation(language, examples)
    rows = np.arange(len(examples))
    optimizer = torch.optim.AdamW(trained_weights(model).values(), lr=5e-3)
    losses = []
    for _ in range(60):
        loss = imitation.loss(rows)[0] / imitation.size(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]


def test_dpo_starts_at_ln_2_and_leaves_reference_and_base_alone(chains, dpo_command):
    before = adapter(chains, "attributes_sft")
    train_dpo.main([*dpo_command, "--run", "first", "--epochs", "4"])
    lines = logged(chains, "first")
    assert lines[0]["train/dpo_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert lines[-1]["train/reward_margin"] > lines[0]["train/reward_margin"]
    assert {"train/reward_accuracy", "train/chosen_log_probability", "train/rejected_log_probability"} <= set(
        lines[0]
    )
    after = adapter(chains, "attributes_sft")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(before[name], weight) for name, weight in adapter(chains, "first").items())


@pytest.mark.parametrize(
    "flags", [["--unanimous", "sft"], ["--weight", "confidence"], ["--objective", "self_learning"]]
)
def test_the_other_objectives_train(chains, dpo_command, flags):
    train_dpo.main([*dpo_command, "--run", "other", "--max-steps", "2", *flags])
    assert len(logged(chains, "other")) == 2


def test_a_resumed_dpo_run_equals_an_uninterrupted_one(chains, dpo_command, killed_at):
    flags = [*dpo_command, "--max-steps", "6", "--checkpoint-steps", "2"]
    train_dpo.main([*flags, "--run", "whole"])
    with killed_at(Training, "train_step", 6):
        train_dpo.main([*flags, "--run", "broken"])
    train_dpo.main([*flags, "--run", "broken", "--resume"])
    whole, resumed = adapter(chains, "whole"), adapter(chains, "broken")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert logged(chains, "whole") == logged(chains, "broken")


def test_interrupted_sampling_gives_the_same_chains(world, chains, killed_at):
    folder = chains / "attributes" / "chains_attributes_sft_train_3"
    command = [
        "--listings", str(world / "train.csv"), "--labels", str(world / "calibration_labels.csv"), "--workspace",
        str(chains), "--shard-listings", "2", "--round", "3", "--temperature", "1.0", *SAMPLING,
    ]  # fmt: skip
    sample_chains.main(command)
    whole = {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}
    assert len(whole) == 3
    for path in folder.iterdir():
        path.unlink()
    with killed_at(ChainShards, "_write", 2):
        sample_chains.main(command)
    assert len(list(folder.glob("*.jsonl"))) == 1
    sample_chains.main(command)
    assert {path.name: path.read_bytes() for path in folder.glob("*.jsonl")} == whole


def test_chains_of_another_adapter_are_refused(world, chains, dpo_command):
    index = chains / "attributes" / "chains_attributes_sft_train_0" / "index.json"
    content = index.read_text()
    index.write_text(content.replace('"adapter": "', '"adapter": "0'))
    try:
        with pytest.raises(InputError, match="sampled by another adapter"):
            train_dpo.main([*dpo_command, "--run", "refused"])
    finally:
        index.write_text(content)


def test_labelled_listings_that_are_the_test_are_refused(world, sft):
    with pytest.raises(InputError, match="have the same listing"):
        evaluate.main(
            [
                "--listings",
                str(world / "train.csv"),
                "--labels",
                str(world / "labels.csv"),
                "--workspace",
                str(sft),
            ]
        )


def test_a_labelled_listing_without_a_readable_picture_is_refused(world, sft_command, tmp_path):
    for name in pd.read_csv(world / "train.csv")["image_link"]:
        (tmp_path / name).write_bytes(b"<html>")
    with pytest.raises(InputError, match="labels00000.jpg: not a picture"):
        train_sft.main([*sft_command, "--images", str(tmp_path), "--workspace", str(tmp_path)])


def test_from_evaluation_to_the_columns_of_the_price_models(world, sft):
    prepare.main(["--data", str(world), "--workspace", str(sft)])
    scores = evaluate.main(
        ["--listings", str(world / "test.csv"), "--labels", str(world / "test_labels.csv"),
         "--calibration-listings", str(world / "train.csv"),
         "--calibration-labels", str(world / "calibration_labels.csv"), "--workspace", str(sft), *SAMPLING]
    )  # fmt: skip
    assert scores["labels"] == 12
    for name in ("sampled_accuracy", "greedy_accuracy", "vote_accuracy"):
        low, high = scores[f"{name}_95"]
        assert low <= scores[name] <= high
    extract_attributes.main(
        ["--listings", "train", "--workspace", str(sft), "--min-consistency", "0.3", *SAMPLING]
    )
    table = pd.read_csv(sft / "attributes" / "attributes_train.csv", keep_default_na=False)
    assert list(table) == ["sample_id", "attribute", "value", "consistency", "confidence", "abstained"]
    assert len(table) == 16 * 3
    columns = read_embeddings(sft / "data" / "embeddings" / "attributes_train.pkl")
    names = columns.meta["last_columns"]
    assert columns.embeddings.shape == (16, len(names)) == (16, 13)
    row_of = {sample_id: row for row, sample_id in enumerate(columns.sample_ids.tolist())}
    for line in table.itertuples():
        own = {name: columns.embeddings[row_of[line.sample_id], at] for at, name in enumerate(names)}
        of_attribute = {name: value for name, value in own.items() if name.startswith(f"{line.attribute}=")}
        expected = 0 if line.abstained else line.confidence
        assert sum(of_attribute.values()) == pytest.approx(expected, abs=1e-4)
    page = (sft / "attributes" / "gallery_train.html").read_text()
    assert page.count("<article>") == 16
