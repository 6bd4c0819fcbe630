import sys
from types import SimpleNamespace

import pytest
import torch

from contracts.errors import InputError, run_entry_point
from training.device import choose_device, choose_dtype, guard_torchvision, require_model_source


def test_open_clip_and_timm_import_after_the_guard():
    guard_torchvision()
    import open_clip  # noqa: F401
    import timm  # noqa: F401


def test_builds_that_do_not_match_are_named(monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    monkeypatch.setattr(torch, "version", SimpleNamespace(cuda="13.0"))
    with pytest.raises(InputError, match="torch and torchvision builds do not match"):
        guard_torchvision()


def test_precision_is_full_on_a_cpu():
    cpu = torch.device("cpu")
    assert choose_dtype("auto", cpu) == torch.float32
    assert choose_dtype("bf16", cpu) == torch.bfloat16
    with pytest.raises(InputError, match="--precision int3"):
        choose_dtype("int3", cpu)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_cuda_is_one_line():
    with pytest.raises(InputError, match="--device cuda"):
        choose_device("cuda")


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
