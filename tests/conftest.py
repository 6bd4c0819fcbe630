"""Fixtures shared by all tests. The environment has effect only when set before torch and transformers load."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and tests run two at a time

import pytest  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[1]


def shared_data(name: str) -> Path:
    path = REPOSITORY.parent / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"real data not present: ../shared/data/{name}")
    return path


@pytest.fixture(scope="session")
def challenge() -> Path:
    """Folder with the real train.csv, test.csv and images/; skips where it is absent."""
    return shared_data("challenge")


@pytest.fixture(scope="session")
def sample_workspace(tmp_path_factory) -> Path:
    """A prepared workspace of 400 + 60 generated products; read only, copy what a test changes."""
    from data import prepare, sample_catalog

    folder = tmp_path_factory.mktemp("sample")
    sample_catalog.main(["--out", str(folder / "catalogue"), "--train-rows", "400", "--test-rows", "60"])
    prepare.main(["--data", str(folder / "catalogue"), "--workspace", str(folder)])
    return folder


class Killed(BaseException):
    """What a killed process looks like from inside: no `except Exception` may catch it."""


@pytest.fixture
def killed_at(monkeypatch):
    """`with killed_at(RunFolder, "log", 5): main([...])` ends the program at the fifth call of that method.

    The call itself does not happen, and the method is itself again after the block.
    """

    @contextmanager
    def kill(owner: object, name: str, call_number: int):
        method = getattr(owner, name)
        calls = 0

        def counted(*positional, **named):
            nonlocal calls
            calls += 1
            if calls == call_number:
                raise Killed
            return method(*positional, **named)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, name, counted)
            yield

    return kill


@pytest.fixture(scope="session")
def picture_system(sample_workspace, tmp_path_factory):
    """The fusion of both frozen SigLIP towers, hardly trained, as the only member; read only."""
    from contracts.workspace import Workspace
    from ensemble.saved import Ensemble, Member
    from fusion.all_embeddings import predict_test
    from fusion.all_embeddings import train as fusion
    from siglip_extract import extract_embeddings

    root = tmp_path_factory.mktemp("picture_system")
    shutil.copytree(sample_workspace / "data", root / "data")
    workspace = ["--workspace", str(root), "--device", "cpu"]
    for table in ("train", "test"):
        extract_embeddings.main([table, "--preset", "tiny", *workspace])
    fusion.main(["--preset", "tiny", "--epochs", "2", "--use", "siglip_text", "siglip_image", *workspace])
    predict_test.main(workspace)
    # the ensemble of a single hold-out cannot be fitted, so its only weight is written down
    name = "fusion_all_embeddings"
    score = {"smape": 70.0, "standard_error": 2.0, "rows": 400, "coverage": {"80%": 0.8, "95%": 0.95}}
    member = Member(name, "fusion.all_embeddings", name)
    only = Ensemble((member,), (1.0,), {0.8: 1.0, 0.95: 2.0}, score)
    only.save(Workspace(root).path("run", name="ensemble"))
    return root
