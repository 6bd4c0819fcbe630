import numpy as np
import pandas as pd
import pytest
import torch

from contracts.embeddings import Embeddings, iterate_embeddings, read_embeddings
from contracts.errors import InputError
from contracts.files import read_json, write_json
from contracts.splits import fitted_on
from training.extraction import ShardedExtraction, embed_shards, print_failures, write_picture_failures

META = {
    "checkpoint": "sha",
    "name": "clip_image", "split": "train", "model": "m", "fitted_on": fitted_on(encoder_folds=(3,)),
    "split_hash": "h", "command": "c",
}  # fmt: skip


def example(rows=20, width=8, dtype=np.float32):
    generator = np.random.default_rng(0)
    ids = np.array([f"{row:03d}" for row in range(rows)])
    valid = generator.random(rows) > 0.2
    return Embeddings(ids, generator.normal(size=(rows, width)).astype(dtype), valid, dict(META))


def extraction(path, content, **meta):
    return ShardedExtraction(path, content.sample_ids, {**META, **meta}, shard_rows=6)


def fill(job, content, limit=99):
    for rows in job.pending()[:limit]:
        job.write(rows, content.embeddings[rows], content.valid[rows])


def test_interrupted_extraction_resumes_where_it_stopped(tmp_path):
    path, content = tmp_path / "e.pkl", example()
    job = extraction(path, content)
    assert len(job.pending()) == 4
    fill(job, content, limit=3)
    with pytest.raises(InputError, match="1 of 4 shards"):
        job.finish()
    resumed = extraction(path, content, command="another command line")
    assert [rows.start for rows in resumed.pending()] == [18]
    assert len(extraction(path, content, model="another model").pending()) == 4
    fill(resumed, content)
    resumed.finish()
    np.testing.assert_array_equal(read_embeddings(path).embeddings, content.embeddings)
    assert not job.folder.exists()


def processes(monkeypatch, path, content, number, shard_rows=6):
    """The extraction as each of `number` torchrun processes has it; they take turns here, so none can wait."""
    jobs = []
    for rank in range(number):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(number))
        jobs.append(ShardedExtraction(path, content.sample_ids, META, shard_rows, barrier=lambda: None))
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    return jobs


def fill_together(jobs, matrix, valid):
    # the barrier makes every process list what is missing before any of them writes
    shares = [job.pending() for job in jobs]
    for job, share in zip(jobs, shares, strict=True):
        for rows in share:
            job.write(rows, matrix[rows], valid[rows])


@pytest.mark.parametrize(("rows", "shard_rows"), [(20, 6), (20, 4096), (21, 7), (1, 6), (1001, 100)])
def test_processes_share_the_rows_evenly(tmp_path, monkeypatch, rows, shard_rows):
    jobs = processes(monkeypatch, tmp_path / "e.pkl", example(rows), 3, shard_rows)
    shares = [job.pending() for job in jobs]
    ranges = sorted((shard.start, shard.stop) for share in shares for shard in share)
    assert ranges[0][0] == 0 and ranges[-1][1] == rows
    assert all(before[1] == after[0] for before, after in zip(ranges, ranges[1:], strict=False))
    assert max(stop - start for start, stop in ranges) <= min(shard_rows, -(-rows // 3))
    most = max(sum(shard.stop - shard.start for shard in share) for share in shares)
    assert most <= -(-rows // 3) + len(ranges)  # rounding up costs less than a row per shard


def test_processes_write_one_file(tmp_path, monkeypatch):
    path, content = tmp_path / "e.pkl", example()
    jobs = processes(monkeypatch, path, content, 2)
    fill_together(jobs, content.embeddings, content.valid)
    assert [job.wait() for job in jobs] == [True, False]
    jobs[0].finish()
    loaded = read_embeddings(path)
    np.testing.assert_array_equal(loaded.embeddings, content.embeddings)
    np.testing.assert_array_equal(loaded.sample_ids, content.sample_ids)


def test_another_number_of_processes_goes_on(tmp_path, monkeypatch):
    """Two processes were interrupted; one process, then three, use what fits and make the rest again."""
    path, content = tmp_path / "e.pkl", example()
    two = processes(monkeypatch, path, content, 2, shard_rows=4096)  # shards of 10
    fill_together(two, content.embeddings + 1, content.valid)
    assert extraction(path, content).pending() == extraction(path, content).shards
    same_size = ShardedExtraction(path, content.sample_ids, META, shard_rows=10)
    assert same_size.pending() == []
    three = processes(monkeypatch, path, content, 3, shard_rows=4096)  # shards of 7, under the same names
    fill_together(three, content.embeddings, content.valid)
    alone = extraction(path, content)
    fill(alone, content)
    alone.finish(keep_shards=True)
    assert len(list(alone.folder.glob("*.pkl"))) == 4
    shards = list(iterate_embeddings(path))
    np.testing.assert_array_equal(np.concatenate([shard.embeddings for shard in shards]), content.embeddings)
    larger = ShardedExtraction(path, content.sample_ids, META, shard_rows=20)
    fill(larger, content)
    with pytest.raises(InputError, match="no such embedding file"):  # not half old, half new
        next(iterate_embeddings(path))
    larger.finish(keep_shards=True)
    assert sorted(file.name for file in larger.folder.glob("0*")) == ["00000.pkl", "00000.pkl.json"]


def test_shards_kept_for_a_large_catalogue(tmp_path):
    path, content = tmp_path / "e.pkl", example()
    job = extraction(path, content)
    fill(job, content)
    job.finish(keep_shards=True)
    shards = list(iterate_embeddings(path))
    assert [len(shard.valid) for shard in shards] == [6, 6, 6, 2]
    np.testing.assert_array_equal(np.concatenate([shard.embeddings for shard in shards]), content.embeddings)


class Numbers:
    """Rows that are their own input; 7 and its multiples cannot be used. Notes the batches that it makes."""

    def __init__(self, rows):
        self.rows = rows
        self.batches = []

    def __len__(self):
        return self.rows

    def __getitem__(self, row):
        return (torch.tensor([float(row)]), "") if row % 7 else (None, f"seventh (row {row})")

    def collate(self, items):
        self.batches.append(len(items))
        inputs = [number for number, _ in items if number is not None]
        return torch.stack(inputs) if inputs else None, [reason for _, reason in items]


class Multiply:
    """An encoder of width 2: the input times `factor`, and one. Notes the batch sizes that it sees."""

    width = 2

    def __init__(self, factor):
        self.factor = factor
        self.sizes = []

    def encode_batch(self, inputs):
        self.sizes.append(len(inputs))
        return np.concatenate([self.factor * inputs.numpy(), np.ones((len(inputs), 1), np.float32)], axis=1)


def embed(shards, rows, encoders, **options):
    options = {"batch_size": 4, "workers": 0, "device": torch.device("cpu"), "quiet": True, **options}
    return list(embed_shards(shards, rows, encoders, **options))


@pytest.mark.parametrize("workers", [0, 2])
def test_each_row_gets_its_embedding_or_a_reason(workers):
    shards = [slice(0, 10), slice(20, 31)]
    embedded = embed(shards, Numbers(40), [Multiply(3)], workers=workers)
    assert [shard.rows for shard in embedded] == shards
    for shard in embedded:
        rows = np.arange(shard.rows.start, shard.rows.stop)
        usable = rows % 7 != 0
        expected = np.where(usable[:, None], np.stack([3 * rows, np.ones_like(rows)], axis=1), 0)
        np.testing.assert_array_equal(shard.embeddings[0], expected)
        assert shard.embeddings[0].dtype == np.float32
        np.testing.assert_array_equal(shard.valid, usable)
        assert shard.reasons == ["" if row % 7 else f"seventh (row {row})" for row in rows]


def test_batches_end_with_their_shard():
    rows = Numbers(40)
    embed([slice(0, 10), slice(10, 15)], rows, [Multiply(1)])
    assert rows.batches == [4, 4, 2, 4, 1]


def test_a_batch_without_inputs_is_not_encoded():
    encoder = Multiply(1)
    [shard] = embed([slice(0, 8)], Numbers(8), [encoder], batch_size=1)
    assert encoder.sizes == [1] * 6 and shard.valid.sum() == 6
    [nothing] = embed([slice(7, 8)], Numbers(8), [encoder])
    assert nothing.embeddings[0].tolist() == [[0, 0]] and not nothing.valid.any()
    assert embed([], Numbers(8), [encoder]) == []


def test_several_encoders_get_their_own_inputs():
    class Pairs(Numbers):
        def collate(self, items):
            inputs, reasons = super().collate(items)
            return (inputs, 100 + inputs), reasons

    [shard] = embed([slice(1, 6)], Pairs(6), [Multiply(1), Multiply(2)])
    first, second = shard.embeddings
    assert first[:, 0].tolist() == [1, 2, 3, 4, 5]
    assert second[:, 0].tolist() == [202, 204, 206, 208, 210]


def test_reasons_outlive_an_interruption(tmp_path, capsys):
    """The failure list covers the shards of every run that took part, in the order of the table."""
    path, content, rows = tmp_path / "e.pkl", example(), Numbers(20)
    for limit in (2, 99):
        job = extraction(path, content)
        for shard in embed(job.pending()[:limit], rows, [Multiply(1)]):
            job.write(shard.rows, shard.embeddings[0], shard.valid, shard.reasons)
    failures = job.failures()
    assert failures == {"000": "seventh (row 0)", "007": "seventh (row 7)", "014": "seventh (row 14)"}
    job.finish()
    assert read_embeddings(path).sample_ids[~read_embeddings(path).valid].tolist() == list(failures)

    table = pd.DataFrame({"sample_id": content.sample_ids, "image": "a.jpg", "price": 1.0})
    write_picture_failures(tmp_path / "f.csv", table, failures)
    lines = (tmp_path / "f.csv").read_text().split("\n")
    assert lines[:2] == ["sample_id,image,reason", "000,a.jpg,seventh (row 0)"] and len(lines) == 5
    print_failures("numbers", failures | {"019": "missing"})
    assert capsys.readouterr().out == "numbers: 4 rows without an embedding: 3 seventh, 1 missing\n"
    print_failures("numbers", {})
    assert capsys.readouterr().out == ""


def test_an_empty_failure_list_has_its_header(tmp_path):
    table = pd.DataFrame({"sample_id": ["1"], "image": ["a.jpg"]})
    write_picture_failures(tmp_path / "f.csv", table, {})
    assert (tmp_path / "f.csv").read_text() == "sample_id,image,reason\n"


def test_shards_of_an_older_version_are_made_again(tmp_path):
    """They do not say why their rows have no embedding."""
    path, content = tmp_path / "e.pkl", example()
    job = extraction(path, content)
    fill(job, content)
    sidecar = job.folder / "00001.pkl.json"
    stored = read_json(sidecar)
    del stored["failures"]
    write_json(sidecar, stored)
    assert [rows.start for rows in job.pending()] == [6]
