import json

import pytest
import torch

from contracts.errors import InputError
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


class Killed(Exception):
    pass


def test_a_resumed_run_equals_an_uninterrupted_one(shops, arguments, tmp_path, monkeypatch):
    whole = stage.main([*arguments, "--epochs", "2", "--run", "whole"])

    save = RunFolder.save_checkpoint

    def killed_while_saving(run, step, weights, state):
        save(run, step, weights, state)
        # a later folder without its marker: what is left of a process that died while saving
        half = run.path / f"step_{step + 1:08d}"
        half.mkdir()
        (half / "weights.safetensors").write_bytes(b"half")
        raise Killed

    monkeypatch.setattr(RunFolder, "save_checkpoint", killed_while_saving)
    with pytest.raises(Killed):
        stage.main([*arguments, "--epochs", "2"])
    monkeypatch.undo()
    resumed = stage.main([*arguments, "--epochs", "2", "--resume"])
    texts = ["Alderby 19 inch LCD Television", "10MP Point and Shoot Cam BLK"]
    first, second = (encode(load_encoder(str(folder), device="cpu"), texts) for folder in (whole, resumed))
    assert abs(first - second).max() < 1e-6
    logged = [RunFolder(tmp_path / "checkpoints" / name).metrics() for name in ("whole", "match")]
    assert [line["step"] for line in logged[0]] == [line["step"] for line in logged[1]]


def test_resuming_with_another_setting_is_refused(arguments, monkeypatch):
    def killed(*_, **__):
        raise Killed

    monkeypatch.setattr(stage, "fit", killed)
    with pytest.raises(Killed):
        stage.main([*arguments, "--epochs", "1"])
    with pytest.raises(InputError, match="--resume: seed was 0 when the run started and is 1 now"):
        stage.main([*arguments, "--epochs", "1", "--seed", "1", "--resume"])


def test_a_nan_loss_ends_in_an_error(arguments, tmp_path, monkeypatch):
    build = stage.build_loss

    def broken(encoder, settings):
        loss = build(encoder, settings)
        return lambda features, labels: loss(features, labels) * float("nan")

    monkeypatch.setattr(stage, "build_loss", broken)
    with pytest.raises(InputError, match="train/loss is NaN at step 0; lower --lr"):
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
        stage.build_loss(encoder, settings)([encoder.preprocess(column) for column in texts], None).backward()
        gradients.append(encoder[0].auto_model.embeddings.word_embeddings.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


def test_no_text_stands_twice_in_a_batch(shops, tiny_encoder):
    from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

    _, triplets = stage.build_data(tiny_encoder, TrainSettings(pairs=str(shops / "pairs"), negatives=3))
    batches = list(
        NoDuplicatesBatchSampler(triplets, 16, drop_last=False, seed=0, generator=torch.Generator())
    )
    assert sorted(row for rows in batches for row in rows) == list(range(len(triplets)))
    for rows in batches:
        texts = [text for row in rows for text in triplets[row].values()]
        assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--lora-targets", "q,k,v", "no linear layer is called q, k, v"),
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


def test_full_fine_tuning_trains_every_weight(arguments, capsys):
    stage.main([*arguments, "--lora-rank", "0", "--epochs", "1"])
    assert "(100.00 %)" in capsys.readouterr().out
