import numpy as np
import pytest

from contracts.embeddings import Embeddings, iterate_embeddings, read_embeddings
from contracts.errors import InputError
from contracts.splits import fitted_on
from training.extraction import ShardedExtraction

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


def refused(path, *words):
    with pytest.raises(InputError) as caught:
        read_embeddings(path)
    assert "\n" not in str(caught.value)
    for word in (path.name, *words):
        assert word in str(caught.value)


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
    """The extraction as each of `number` torchrun processes has it; they take turns here, so nobody can wait."""
    monkeypatch.setattr(ShardedExtraction, "_barrier", lambda self: None)
    jobs = []
    for rank in range(number):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(number))
        jobs.append(ShardedExtraction(path, content.sample_ids, META, shard_rows))
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    return jobs


def fill_together(jobs, matrix, valid):
    shares = [
        job.pending() for job in jobs
    ]  # as the barrier has it: all list what is missing, then all write
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
    assert most <= -(-rows // 3) + len(ranges)  # rounding up costs less than a row a shard


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
