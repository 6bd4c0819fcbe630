import socket
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants

from contracts.errors import InputError, run_entry_point
from training.device import (
    build_accelerator,
    choose_device,
    choose_dtype,
    guard_torchvision,
    prefer_cache_offline,
    require_model_source,
)


def test_open_clip_and_timm_import_after_the_guard():
    guard_torchvision()
    import open_clip  # noqa: F401
    import timm  # noqa: F401


class Broken:
    """Imports of torchvision fail with this error."""

    def __init__(self, error):
        self.error = error

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            raise self.error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operator torchvision::nms does not exist"),
        RuntimeError(
            "Detected that PyTorch and torchvision were compiled with different CUDA major versions."
        ),
        ImportError("torchvision/_C.so: undefined symbol: _ZN5torch3jit"),
        AttributeError("partially initialized module 'torchvision' has no attribute 'extension'"),
        OSError("libcudart.so.12: cannot open shared object file"),
        ModuleNotFoundError("No module named 'torch._six'", name="torch._six"),
    ],
)
def test_builds_that_do_not_match_are_named(monkeypatch, error):
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(error), *sys.meta_path])
    monkeypatch.setattr(torch, "version", SimpleNamespace(cuda="13.0"))
    with pytest.raises(InputError, match="torch and torchvision builds do not match") as caught:
        guard_torchvision()
    assert str(error) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_torchvision_is_one_line(monkeypatch):
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    missing = ModuleNotFoundError("No module named 'torchvision'", name="torchvision")
    monkeypatch.setattr(sys, "meta_path", [Broken(missing), *sys.meta_path])
    with pytest.raises(InputError, match="torchvision is not installed"):
        guard_torchvision()


def test_a_hub_that_does_not_answer_is_not_asked_again(monkeypatch):
    """A server that accepts the connection and says nothing is the slowest of all."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        started = time.monotonic()
        prefer_cache_offline("no-such/model")
        assert constants.HF_HUB_OFFLINE
        assert time.monotonic() - started < 3


def test_a_folder_needs_no_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    prefer_cache_offline(str(tmp_path))
    assert not constants.HF_HUB_OFFLINE


def test_precision_is_full_on_a_cpu():
    cpu = torch.device("cpu")
    assert choose_dtype("auto", cpu) == torch.float32
    assert choose_dtype("bf16", cpu) == torch.bfloat16
    with pytest.raises(InputError, match="--precision int3"):
        choose_dtype("int3", cpu)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_missing_cuda_is_one_line(name):
    with pytest.raises(InputError, match=f"--device {name}: this torch sees no CUDA device"):
        choose_device(name)


def test_an_unknown_device_is_one_line():
    with pytest.raises(InputError, match="--device abacus: choose"):
        choose_device("abacus")


@pytest.fixture
def two_cuda_devices(monkeypatch):
    """What torch says on a machine with two CUDA devices; returns the devices that were made current."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


def test_a_numbered_device_is_that_device(two_cuda_devices, monkeypatch):
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(InputError, match="cuda:2: there are 2 CUDA devices"):
        choose_device("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_device("cuda") == torch.device("cuda:1")
    with pytest.raises(InputError, match="torchrun gives each process its own device"):
        choose_device("cuda:1")


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps its device for the life of a process; a test that asks for another one starts over."""
    from accelerate.state import AcceleratorState, PartialState

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()

    reset()
    yield
    reset()


def test_accelerate_computes_on_the_device_that_was_asked_for(two_cuda_devices, fresh_accelerate):
    accelerator = build_accelerator(torch.device("cuda:1"))
    assert accelerator.device == torch.device("cuda:1")
    assert two_cuda_devices == [torch.device("cuda:1")]
    with pytest.raises(InputError, match="already computes on cuda:1"):
        build_accelerator(torch.device("cuda:0"))


def test_accelerate_on_the_cpu(fresh_accelerate):
    accelerator = build_accelerator(torch.device("cpu"), "auto")
    assert accelerator.device == torch.device("cpu")
    assert accelerator.mixed_precision == "no"


def test_a_local_model_must_exist_and_a_hub_id_passes(tmp_path):
    assert require_model_source("Qwen/Qwen3-Embedding-0.6B") == "Qwen/Qwen3-Embedding-0.6B"
    assert require_model_source(str(tmp_path)) == str(tmp_path)
    with pytest.raises(InputError, match="no such local folder"):
        require_model_source(str(tmp_path / "absent"))


def test_input_error_is_one_line_and_exit_code_2(capsys):
    def main():
        raise InputError("train.csv: no such file")

    with pytest.raises(SystemExit) as caught:
        run_entry_point(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: train.csv: no such file\n"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bf16_is_chosen_on_cuda():
    assert choose_dtype("auto", choose_device("auto")) == torch.bfloat16
