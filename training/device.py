"""Device, precision, seeds, model sources, and two traps of the installed libraries."""

from __future__ import annotations

import http.client
import os
import random
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from contracts.errors import InputError

if TYPE_CHECKING:
    from datetime import timedelta

    import torch
    from accelerate import Accelerator

_torchvision_library: torch.library.Library
_MISMATCHES = (RuntimeError, ImportError, AttributeError, OSError)
"""How a torchvision of another build fails: an operator, a symbol, a name of torch or a shared library is missing."""
HUB_SECONDS = 2.0
"""How long the hub may take to answer before this machine counts as offline."""


def guard_torchvision() -> None:
    """Make `import torchvision` work on a CPU build of torch; call before open_clip, timm, peft, transformers.

    PyPI's torchvision is a CUDA build. Beside a CPU build of torch its compiled operators do not load, and its
    import fails because it describes `nms` and `qnms` operators that nobody has defined. No stage calls them, so
    defining their schemas is enough. Beside a CUDA build of torch the same failure means mismatched versions.

    Raises:
        InputError: "torch and torchvision builds do not match", or torchvision is not installed.
    """
    import torch

    try:
        import torchvision  # noqa: F401

        return
    except ModuleNotFoundError as error:
        if error.name == "torchvision":
            raise InputError("torchvision is not installed; install it as requirements.txt says") from None
        mismatch: Exception = error
    except _MISMATCHES as error:
        mismatch = error
    if "torchvision::" in str(mismatch) and torch.version.cuda is None:
        _define_torchvision_operators()
        try:
            import torchvision  # noqa: F401

            return
        except _MISMATCHES as error:
            mismatch = error
    reason = str(mismatch).strip().splitlines()[0][:160]
    raise InputError(
        f"torch and torchvision builds do not match (torch {torch.__version__}: {reason}); "
        "install both at the versions of requirements.txt"
    ) from None


def _define_torchvision_operators() -> None:
    import torch

    global _torchvision_library  # the registration lives as long as this object
    _torchvision_library = torch.library.Library("torchvision", "FRAGMENT")
    for name, inputs in (("nms", "Tensor dets, Tensor scores"), ("qnms", "Tensor dets, Tensor scores")):
        try:
            _torchvision_library.define(f"{name}({inputs}, float iou_threshold) -> Tensor")
        except RuntimeError:
            continue  # already defined by a partly loaded build


def choose_device(name: str = "auto") -> torch.device:
    """The device that --device names.

    Args:
        name: auto, cpu, mps, cuda or cuda:<number>. `auto` is CUDA, then Apple's GPU, then the CPU. Under torchrun
            `cuda` gives each process its own device.

    Raises:
        InputError: no such device here, or one numbered device for several processes.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: choose auto, cpu, mps, cuda or cuda:<number>") from None
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps: this torch sees no Apple GPU")
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise InputError(f"--device {name}: this torch sees no CUDA device")
    if device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(f"--device {name}: torchrun gives each process its own device; use --device cuda")
    if device.index >= torch.cuda.device_count():
        raise InputError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
    return device


def build_accelerator(
    device: torch.device, precision: str = "fp32", *, timeout: timedelta | None = None
) -> Accelerator:
    """Accelerate on exactly `device`, in this precision; joins the other processes under torchrun.

    Left to itself, Accelerate takes the first CUDA device, whatever device was asked for.

    Args:
        precision: auto, fp32, bf16 or fp16, as in `choose_dtype`.
        timeout: how long the processes wait for each other; None leaves torch's limits, 10 and 30 minutes.
    """
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    if device.type == "cuda":
        torch.cuda.set_device(device)
    handlers = [] if timeout is None else [InitProcessGroupKwargs(timeout=timeout)]
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    try:
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=mixed_precision(precision, device),
            kwargs_handlers=handlers,
        )
    finally:
        del os.environ["ACCELERATE_TORCH_DEVICE"]
    if accelerator.device != device:
        raise InputError(f"--device {device}: this process already computes on {accelerator.device}")
    return accelerator


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA and float32 elsewhere: bf16 matmul on a CPU is a hundred times slower."""
    import torch

    choices = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if precision not in choices:
        raise InputError(f"--precision {precision}: choose auto, {', '.join(choices)}")
    return choices[precision]


def mixed_precision(precision: str, device: torch.device) -> str:
    """The same choice in Accelerate's words: "no", "bf16" or "fp16"."""
    import torch

    return {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[
        choose_dtype(precision, device)
    ]


def seed_everything(seed: int) -> None:
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def require_model_source(name: str) -> str:
    """Check a model setting before a library sees it: a local folder must exist, else it is a hub id.

    Returns the name, with `~` expanded. Raises InputError for a path that does not exist; without this check
    transformers takes it for a malformed hub id and says so at length.
    """
    path = Path(name).expanduser()
    if path.exists():
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"model {name}: no such local folder")
    return name


def prefer_cache_offline(source: str) -> None:
    """Where the hub does not answer, let its libraries look in their cache only; call before `from_pretrained`.

    Left to themselves they try again for more than a minute, and print a line each time.

    Args:
        source: hub id or local folder; the hub is not asked for a folder.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or Path(source).exists():
        return
    answered = threading.Event()

    def ask() -> None:
        try:
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
            urllib.request.urlopen(request, timeout=HUB_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # an answer, too
        except (OSError, http.client.HTTPException):
            return
        answered.set()

    # in a thread, because the resolver of the operating system has a patience of its own
    threading.Thread(target=ask, daemon=True).start()
    if not answered.wait(HUB_SECONDS):
        constants.HF_HUB_OFFLINE = True


def missing_model(name: str, error: Exception) -> InputError:
    """The one line for a hub model that is neither cached nor reachable."""
    reason = str(error).strip().split("\n")[0][:160]
    return InputError(
        f"model {name}: not in the local cache and not downloadable ({reason}); give a local folder instead"
    )
