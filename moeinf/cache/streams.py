"""The streams of a GPU on which steps of one cache run, one `StepStream` each."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch

from moeinf import _core


class StepStream:
    """What the steps of one stream share. Hold `lock` during a step.

    core: see csrc/cache/stream_step.h. expert_map: int32 [num_experts + 1] on the device, the slot
    of each expert of the wave or -1; the last entry stands for the id that means "no expert".
    """

    def __init__(
        self, core: _core.ExpertCache, stream: int, num_experts: int, device: torch.device
    ):
        self.lock = threading.Lock()
        self.core = _core.StepStream(core, stream)
        self.expert_map = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
        self.map_address = self.expert_map.data_ptr()
        self._cache = core
        self._predictions: list[tuple[int, torch.Tensor]] = []  # layer, choices on their way

    def predict(self, layer: int, on_host: torch.Tensor) -> None:
        """Keeps a router's choices, which the stream is bringing to the host."""
        with self.lock:
            self._predictions.append((layer, on_host))

    def hand_over_predictions(self) -> None:
        """Tells the prefetcher. Called when the stream has passed them."""
        for layer, choices in self._predictions:
            self._cache.predict(layer, distinct(choices))
        self._predictions.clear()


class StepStreams:
    """All of one cache. Thread-safe."""

    def __init__(
        self, core: _core.ExpertCache, device: torch.device, *, num_experts: int, is_fake: bool
    ):
        self.core = core
        self.device = device
        self.num_experts = num_experts
        self.is_fake = is_fake
        self._streams: dict[int, StepStream] = {}
        self._lock = threading.Lock()  # of _streams

    def current(self) -> StepStream:
        """That of the calling thread's current CUDA stream."""
        number = 0 if self.is_fake else torch.cuda.current_stream(self.device).cuda_stream
        stream = self._streams.get(number)
        if stream is None:
            with self._lock:
                stream = self._streams.get(number)
                if stream is None:
                    stream = StepStream(self.core, number, self.num_experts, self.device)
                    self._streams[number] = stream
        return stream

    def predict(self, layer: int, choices: torch.Tensor) -> None:
        """Has the prefetcher told of a router's choices [T, k] right after the ids of the stream's
        next step have come, when the host can look at both without another wait."""
        on_host = choices.clone() if self.is_fake else _to_pinned(choices)
        self.current().predict(layer, on_host)


def distinct(choices: torch.Tensor) -> list[int]:
    """The experts of a router's choices [T, k], each once, first choices first."""
    ids: Iterable[int] = choices.T.flatten().tolist()
    return list(dict.fromkeys(ids))


def _to_pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that the current stream will have made; the host does not wait for it."""
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
