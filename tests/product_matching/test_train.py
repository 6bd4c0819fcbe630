import json

import numpy as np
import pytest
import torch

from contracts.errors import InputError
from contracts.files import read_json
from product_matching import loop
from product_matching import train as stage
from product_matching.config import TrainSettings
from product_matching.encoder import encode, load_encoder
from product_matching.evaluate import retrieval
from product_matching.pairs import read_pairs
from training.run_folder import RunFolder


@pytest.fixture
def arguments(shops, tmp_path):
    return [
        "--pairs", str(shops / "pairs"), "--model", str(shops / "encoder"), "--workspace", str(tmp_path),
        "--run", "match", "--lr", "5e-3", "--negatives", "2", "--device", "cpu",
    ]  # fmt: skip


def test_training_improves_retrieval_and_leaves_a_complete_run(shops, arguments, tmp_path, capsys):
    folder = stage.main([*arguments, "--epochs", "10", "--report-to", "tensorboard"])
    run = RunFolder.finished(tmp_path / "checkpoints" / "match", "product_matching")
    scores = [line["valid/mrr"] for line in run.metrics() if "valid/mrr" in line]
    assert len(scores) == 11 and max(scores) > scores[0] + 0.1
    # 2 layers of 4 (64→64), 64→128 and 128→64, rank 8
    assert "trainable parameters: 14,336 of" in capsys.readouterr().out
    tuned, pairs = load_encoder(str(folder), device="cpu"), read_pairs(shops / "pairs")
    assert retrieval(tuned, pairs, "valid")["mrr"] == pytest.approx(max(scores), abs=1e-4)
    assert not any("lora" in name for name in tuned.state_dict())
    assert json.loads((folder / "calibration.json").read_text())["slope"] > 0
    assert list((run.path / "tensorboard").glob("events*")) and (run.path / "training.png").is_file()
    assert json.loads((run.path / "manifest.json").read_text())["inputs"]


def test_a_resumed_run_equals_an_uninterrupted_one(arguments, tmp_path, killed_at):
    arguments = [*arguments, "--epochs", "4", "--lr", "1e-2"]
    whole = stage.main([*arguments, "--run", "whole"])
    summary = read_json(whole.parent / "summary.json")
    assert summary["best_epoch"] > 0  # otherwise two untuned encoders are compared

    # the first validation is that of the untuned encoder, so this ends the fourth epoch before its checkpoint
    with killed_at(loop, "validate", 5):
        stage.main(arguments)
    run = RunFolder(tmp_path / "checkpoints" / "match")
    # a later folder without its marker: what is left of a process that died while saving
    half_saved = run.path / "step_99999999"
    half_saved.mkdir()
    (half_saved / "weights.safetensors").write_bytes(b"half")
    resumed = stage.main([*arguments, "--resume"])

    texts = ["Alderby 19 inch LCD Television", "10MP Point and Shoot Cam BLK"]
    embeddings = [encode(load_encoder(str(folder), device="cpu"), texts) for folder in (whole, resumed)]
    np.testing.assert_allclose(embeddings[0], embeddings[1], atol=1e-5)
    assert read_json(resumed.parent / "summary.json") == pytest.approx(summary, rel=1e-4)
    logged = RunFolder(tmp_path / "checkpoints" / "whole").metrics()
    assert run.metrics() == [pytest.approx(line, rel=1e-4) for line in logged]


def test_a_complete_run_is_not_trained_again(arguments, capsys):
    model = stage.main([*arguments, "--epochs", "1"])
    capsys.readouterr()
    assert stage.main([*arguments, "--epochs", "1", "--resume"]) == model
    assert "this run is complete" in capsys.readouterr().out


def test_resuming_with_another_setting_is_refused(arguments, killed_at):
    with killed_at(loop, "fit", 1):
        stage.main([*arguments, "--epochs", "1"])
    with pytest.raises(InputError, match="--resume: seed was 0 when .* started and is 1 now"):
        stage.main([*arguments, "--epochs", "1", "--seed", "1", "--resume"])


def test_a_nan_loss_ends_in_an_error(arguments, tmp_path, monkeypatch):
    build = loop.build_loss
    steps = []

    def broken_at_step_4(encoder, settings):
        loss = build(encoder, settings)

        def loss_or_nan(features, labels):
            steps.append(len(steps))
            return loss(features, labels) * (float("nan") if steps[-1] == 3 else 1)

        return loss_or_nan

    monkeypatch.setattr(loop, "build_loss", broken_at_step_4)
    with pytest.raises(InputError, match="match: loss is NaN at step 4; lower --lr"):
        stage.main([*arguments, "--epochs", "1"])
    assert not (tmp_path / "checkpoints" / "match" / "model").exists()


def test_the_cached_loss_has_the_same_gradient(shops):
    encoder = load_encoder(str(shops / "encoder"), device="cpu")
    texts = [["a tv", "b camera", "c phone"], ["a television", "b cam", "c telephone"]]
    gradients = []
    for mini_batch in (0, 2):
        settings = TrainSettings(pairs="", cached_mini_batch=mini_batch)
        encoder.zero_grad()
        encoder.eval()  # without dropout
        loop.build_loss(encoder, settings)([encoder.preprocess(column) for column in texts], None).backward()
        gradients.append(encoder[0].auto_model.embeddings.word_embeddings.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


def test_no_text_stands_twice_in_a_batch(shops, tiny_encoder):
    settings = TrainSettings(pairs=str(shops / "pairs"), negatives=3, batch_size=16)
    _, triplets = stage.build_data(tiny_encoder, settings)
    batches = list(loop.build_sampler(triplets, settings))
    assert sorted(row for rows in batches for row in rows) == list(range(len(triplets)))
    for rows in batches:
        texts = [text for row in rows for text in triplets[row].values()]
        assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--target-modules", "q,k,v", "no linear layer is called q, k, v"),
        ("--model", "/no/such/folder", "no such local folder"),
        ("--pairs", "/no/such/folder", "neither pairs.csv nor train.txt"),
        ("--epochs", "0", "--epochs 0: must be above 0"),
        ("--lr", "-1", "--lr -1.0: must be above 0"),
    ],
)
def test_bad_settings_end_before_anything_is_written(arguments, tmp_path, flag, value, message):
    with pytest.raises(InputError, match=message):
        stage.main([*arguments, flag, value])
    assert not (tmp_path / "checkpoints").exists()


def test_settings_of_an_older_run_are_read_under_their_new_names(tmp_path):
    old = {"pairs": "catalogues", "clip_norm": 0.5, "lora_targets": "query,value", "warmup": 0.2}
    (tmp_path / "settings.json").write_text(json.dumps(old))
    settings = RunFolder(tmp_path).settings(TrainSettings)
    assert settings == TrainSettings(max_grad_norm=0.5, target_modules="query,value", warmup_ratio=0.2)


def test_full_fine_tuning_trains_every_weight(arguments, capsys):
    stage.main([*arguments, "--lora-rank", "0", "--epochs", "1"])
    assert "(100.00 %)" in capsys.readouterr().out
