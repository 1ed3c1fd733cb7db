"""Which device each module of a model lies on: a map as accelerate writes it, checked.

A map names module paths. A path stands for all modules under it; of several the longest counts.
Experts lie where their layer lies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from moeinf import _core
from moeinf.cache.devices import open_device
from moeinf.errors import UnsupportedError

DeviceMap = Mapping[str, int | str | torch.device]


class Placement:
    """Where the modules of a model lie, and which GPU serves the experts of each MoE layer."""

    def __init__(
        self, device_map: DeviceMap | str, skeleton: torch.nn.Module, experts: Sequence[str]
    ):
        """`skeleton` is the model on the meta device; `experts` as for `resolve`."""
        self.devices = resolve(device_map, skeleton, experts)
        self.experts = [device_of(self.devices, path) for path in experts]
        different = set(self.devices.values())
        self.only = different.pop() if len(different) == 1 else None
        """The one device, if all lies there."""
        self.dense_bytes: dict[str, int] = {}
        for path, parameter in skeleton.named_parameters():
            where = device_of(self.devices, path)
            nbytes = parameter.numel() * parameter.element_size()
            self.dense_bytes[where] = self.dense_bytes.get(where, 0) + nbytes

    def dispatch(self, model: torch.nn.Module, first: torch.device) -> None:
        """Moves the modules to their devices, but with a driver made for tests, which works in RAM:
        there the first layer computes on the cpu."""
        if first.type == "cpu":
            return
        try:
            from accelerate import dispatch_model
        except ImportError as error:
            raise UnsupportedError(
                "a device_map over several devices needs accelerate: pip install accelerate"
            ) from error
        dispatch_model(model, device_map=dict(self.devices))


def resolve(
    device_map: DeviceMap | str, model: torch.nn.Module, experts: Sequence[str]
) -> dict[str, str]:
    """The map with devices by name, "cuda:N" or "cpu", each of which can be used here.

    `experts` are the paths of the modules that hold all experts of a layer, one for each MoE layer;
    "auto" gives each GPU as many layers as its share of all free GPU memory.

    Raises:
        UnsupportedError: a device of another kind, or one that cannot be used here.
        ValueError: not a map, a device that does not exist, or a module that the map leaves out.
    """
    if isinstance(device_map, str):
        if device_map != "auto":
            raise ValueError(f"device_map={device_map!r}: expected 'auto' or a map")
        return balanced(model, experts, _free_bytes())
    if not isinstance(device_map, Mapping) or not device_map:
        raise ValueError(f"device_map={device_map!r}: expected 'auto', or module paths and devices")
    resolved = {path: _device(path, device) for path, device in device_map.items()}
    for path in experts:
        device_of(resolved, path)
    tensors = [path for path, _ in [*model.named_parameters(), *model.named_buffers()]]
    for path in tensors:
        device_of(resolved, path)
    known = {path for path, _ in model.named_modules()}.union(tensors)
    for path in resolved:
        # Parameters of experts, which the skeleton lacks, may be named too.
        if path not in known and path.rpartition(".")[0] not in experts:
            raise ValueError(f"device_map: expected a module of the model, found {path!r}")
    return resolved


def device_of(resolved: Mapping[str, str], path: str) -> str:
    """The device of the module or parameter of that path. Raises ValueError if the map has none."""
    prefix = path
    while True:
        if prefix in resolved:
            return resolved[prefix]
        if not prefix:
            raise ValueError(f"device_map: expected a device for {path}, found none")
        prefix = prefix.rpartition(".")[0]


def balanced(
    model: torch.nn.Module, experts: Sequence[str], free: Mapping[str, int]
) -> dict[str, str]:
    """Layers in order, each GPU with its share; what comes before the layers on the first GPU, the
    rest on the last that has a layer."""
    stack = stack_of(experts)
    layers = [name for name, _ in model.get_submodule(stack).named_children()]
    devices = list(free)
    total = sum(free.values())
    resolved: dict[str, str] = {}
    used, cumulated = 0, free[devices[0]]
    for i, layer in enumerate(layers):
        while used + 1 < len(devices) and (i + 0.5) * total >= cumulated * len(layers):
            used += 1
            cumulated += free[devices[used]]
        resolved[f"{stack}.{layer}"] = devices[used]
    parent = model
    before = True
    path = ""
    for name in stack.split("."):
        for child, _ in parent.named_children():
            whole = f"{path}{child}"
            if child == name:
                before = False
            elif not stack.startswith(f"{whole}."):
                resolved[whole] = devices[0] if before else devices[used]
        before = True
        parent = parent.get_submodule(name)
        path += f"{name}."
    return resolved


def stack_of(experts: Sequence[str]) -> str:
    """The path of the list of layers, as "model.layers" of "model.layers.3.mlp.experts"."""
    paths = [path.split(".") for path in experts]
    numbers = [i for i, part in enumerate(paths[0]) if part.isdigit()]
    for i in reversed(numbers):  # a layer may have numbered parts, which are alike in all layers
        if any(path[:i] == paths[0][:i] and path[i] != paths[0][i] for path in paths):
            return ".".join(paths[0][:i])
    return ".".join(paths[0][: numbers[-1]])


def _free_bytes() -> dict[str, int]:
    """Free memory of each GPU that can be used here."""
    free: dict[str, int] = {}
    while True:
        try:
            device = _core.CudaDevice(len(free))
        except ValueError:  # no device has that number
            return free
        free[f"cuda:{device.index}"] = device.free_bytes


def _device(path: object, device: object) -> str:
    if not isinstance(path, str):
        raise ValueError(f"device_map: expected a module path, found {path!r}")
    if isinstance(device, bool) or not isinstance(device, (int, str, torch.device)):
        raise ValueError(f"device_map: expected a device for {path!r}, found {device!r}")
    if device == "disk":
        raise UnsupportedError(f"device_map: {path!r} on disk: expected a GPU or the cpu")
    try:
        opened = open_device(f"cuda:{device}" if isinstance(device, int) else device)
    except (ValueError, UnsupportedError) as error:
        raise type(error)(f"device_map: {path!r}: {error}") from error
    return "cpu" if opened is None else f"cuda:{opened.index}"
