"""Opens the device of a name in the core, and checks that torch can see it."""

from __future__ import annotations

import torch

from moeinf import _core
from moeinf.errors import UnsupportedError


def open_device(device: str | torch.device) -> _core.CudaDevice | None:
    """The GPU behind "cuda" or "cuda:N"; None for "cpu".

    Raises:
        UnsupportedError: another kind of device, no usable driver, or a torch without CUDA.
        ValueError: not a device, or no device has that number.
    """
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device={str(device)!r}: expected cpu, cuda or cuda:N") from None
    if wanted.type == "cpu":
        return None
    if wanted.type != "cuda":
        raise UnsupportedError(f"device={str(device)!r}: slots lie on the cpu or a cuda device")
    index = wanted.index
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    opened = _core.CudaDevice(index)
    if not opened.is_fake and not torch.cuda.is_available():
        raise UnsupportedError(
            f"device={str(device)!r}: the driver has {opened.name}, but this build of torch "
            f"({torch.__version__}) has no CUDA"
        )
    return opened


def pick_device(device: str | torch.device | None) -> str | torch.device:
    """What "auto" means here: the GPU where torch and the core can both use one, else the cpu.

    Raises ValueError for None.
    """
    if device is None:
        raise ValueError("device=None: expected auto, cpu, cuda or cuda:N")
    if str(device) != "auto":
        return device
    if torch.cuda.is_available():
        try:
            _core.CudaDevice(torch.cuda.current_device())
        except UnsupportedError:
            return "cpu"
        return "cuda"
    return "cpu"


def torch_device(opened: _core.CudaDevice | None) -> torch.device:
    """The torch device of tensors for that device; the fake driver's is the CPU."""
    if opened is None or opened.is_fake:
        return torch.device("cpu")
    return torch.device("cuda", opened.index)
