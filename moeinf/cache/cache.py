"""The expert cache: which experts sit in the slots of fast memory, and how they get there."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import torch

from moeinf import _core
from moeinf.cache import gather_tuning
from moeinf.cache.budget import GPU_RESERVE, RAM_RESERVE, host_slots_for, less_reserve, slots_for
from moeinf.cache.devices import open_device, torch_device
from moeinf.cache.live_priors import LivePriors
from moeinf.cache.observers import PassObserver
from moeinf.cache.recorder import Recorder
from moeinf.checkpoint.store import ExpertStore
from moeinf.experts.cpu import CpuExperts
from moeinf.experts.cuda import CudaExperts, distinct
from moeinf.traces.eam import EAMC
from moeinf.traces.priors import PriorsHook

COUNTERS = (
    "accesses",
    "hits",
    "misses",
    "evictions",
    "demand_bytes",
    "prefetch_bytes",
    "prefetch_useful_bytes",
    "prefetch_wasted_bytes",
    "stall_seconds",
)

# Calls the function given with (layer, probabilities [T, num_experts]) before that layer's experts
# are asked for; returns what ends it.
RouterSource = Callable[[Callable[[int, torch.Tensor], None]], Callable[[], None]]


class Lease:
    """The right to read some slots until released: they are neither evicted nor overwritten.

    A context manager. `slots[i]` is where `experts[i]` lies.
    """

    def __init__(self, experts: Sequence[int], slots: Sequence[int], release: Callable[[], None]):
        self.experts = list(experts)
        self.slots = list(slots)
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Gives the slots back. Harmless when called twice."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class ExpertCache:
    """A pool of slots in fast memory, filled from an `ExpertStore`. Thread-safe.

    Args:
        store: where all experts can be read from.
        device: where the slots lie; "cpu", "cuda" or "cuda:N".
        slots: how many experts are kept, or
        memory: bytes (`"2GiB"`, an int), a share of all experts (`"25%"`), or "auto": what is free
            there, less 2 GiB of RAM or 1 GiB of GPU memory (never more than half of it). Without
            either, all; on a GPU "auto".
        host_memory: what the RAM between a GPU and the files may take, in bytes or as a share of
            all experts. Without it, all experts, or what is available less 2 GiB.
        exclusive: an expert on the GPU need not sit in that RAM too: an evicted one goes back
            there, so that both together hold more.
        gather_below: experts of at most so many bytes are copied to the GPU by a kernel, several at
            once, where this build has it; 0 leaves every copy to the copy engines. Without it, what
            `moeinf doctor` has measured for this GPU, else 0.
        policy: who leaves when a slot is needed; one of `moeinf.policies()`, with
            parameters where wanted, as in "decayed_lfu:keep=0.9".
        prefetch: what guesses which experts come next, to read them while the link is idle, where
            that pays: "off", "previous" (what the layer used for the tokens before), "transition"
            (what followed the experts of the layer before), "eam" (MoE-Infinity's prediction) or
            "external" (what `predict` is told).
        eamc: the collection that "eam", as policy or prefetch, starts from, else an empty one.
            The cache works on a copy: `eamc()` gives it back, grown.
        priors: an object that sees routing once per token and says how likely each expert is to be
            used soon; see `moeinf.traces.priors.PriorsHook`. The policy `learned` learns how far
            to trust them.
        threads, chunk_bytes: of the copy engine; 0 takes the measured defaults.
        direct: read past the page cache where the file system allows it.
        dense_bytes: of a memory's free bytes, what "auto" leaves for weights loaded later.

    Raises:
        CapacityError: the budget is below one slot, or the memory cannot be had.
        ReadError: a file of the store cannot be opened.
        UnsupportedError: the device cannot be used here; the message says why.
        ValueError: an unknown policy, prefetch or device, a budget that makes no sense, or a
            collection of another shape than the store or that nothing would use.
    """

    def __init__(
        self,
        store: ExpertStore,
        *,
        device: str | torch.device = "cpu",
        slots: int | None = None,
        memory: str | int | None = None,
        policy: str = "learned",
        prefetch: str = "off",
        eamc: EAMC | None = None,
        priors: PriorsHook | None = None,
        threads: int = 0,
        chunk_bytes: int = 0,
        direct: bool = True,
        host_memory: str | int | None = None,
        exclusive: bool = False,
        gather_below: int | None = None,
        dense_bytes: int = 0,
    ):
        opened = open_device(device)
        if opened is None and (host_memory is not None or exclusive or gather_below is not None):
            raise ValueError(
                "host_memory, exclusive and gather_below say how experts reach a GPU: give device"
            )
        self.device = torch_device(opened)
        self.store = store
        self.layout = store.layout
        self.policy = policy
        self.prefetch_kind = prefetch
        total = store.num_layers * store.num_experts
        if opened is not None and memory is None and slots is None:
            memory = "auto"
        in_ram = dense_bytes if self.device.type == "cpu" else 0
        ram = less_reserve(_core.available_memory(), RAM_RESERVE, in_ram)
        count = slots_for(
            memory=memory,
            slots=slots,
            slot_bytes=store.slot_bytes,
            total_experts=total,
            free=ram
            if opened is None
            else less_reserve(opened.free_bytes, GPU_RESERVE, dense_bytes),
        )
        options = {
            "threads": threads,
            "chunk_bytes": chunk_bytes,
            "direct": direct,
            "prefetch": prefetch,
            "eamc": None if eamc is None else eamc.to_core(),
        }
        self._experts: CpuExperts | CudaExperts
        if opened is None:
            self.core = _core.ExpertCache(store.catalog, count, policy, **options)
            self._experts = CpuExperts(store, self.core)
        else:
            self._copy_path, below = _copy_path(opened, gather_below)
            self.core = _core.ExpertCache(
                store.catalog,
                count,
                policy,
                **options,
                device=opened,
                host_slots=host_slots_for(
                    host_memory=host_memory,
                    slots=count,
                    slot_bytes=store.slot_bytes,
                    total_experts=total,
                    available=ram,
                    exclusive=exclusive,
                ),
                exclusive=exclusive,
                gather_below=below,
            )
            self._experts = CudaExperts(store, self.core, opened)
            self._warn_of_refused_slots()
        self._opened = opened
        self._prefill = False
        self._new_sequence = False
        self._observers: list[PassObserver] = []
        self.routers: RouterSource | None = None
        """Set by an integration that can listen to the routers of the model it serves."""
        self._stop_listening: Callable[[], None] | None = None
        if priors is not None:
            shape = (store.num_layers, store.num_experts)
            self._observers.append(LivePriors(priors, self.core, shape))

    def _warn_of_refused_slots(self) -> None:
        host = self.core.host_stats()
        if host["slots_refused"]:
            warnings.warn(
                f"host_memory: page-locked RAM for {host['slots'] + host['slots_refused']} experts "
                f"was refused; {host['slots']} are kept there, the others are read from the files",
                stacklevel=3,
            )

    @property
    def slots(self) -> int:
        """Experts that can be resident at once."""
        return self.core.slots

    @property
    def nbytes(self) -> int:
        """Bytes of the cached slots."""
        return self.slots * self.store.slot_bytes

    def acquire(self, layer: int, experts: Sequence[int]) -> Lease:
        """Brings the distinct `experts` of MoE layer `layer` into slots and holds them there.

        Waits for reads in flight. Raises CapacityError if they do not fit in the slots together
        (then use `waves`), ReadError if one cannot be read, ValueError for a bad id.

        On a GPU the host waits for the bytes, and at release for the current stream, so that any
        stream may read meanwhile. `fused_experts` needs neither wait.
        """
        step, slots = self.core.acquire(layer, experts)
        self.core.wait_for_rows(slots)
        return Lease(experts, slots, partial(self._let_go, step.release))

    def waves(self, layer: int, experts: Sequence[int]) -> Iterator[Lease]:
        """Like `acquire`, in as many leases as it takes: each holds what is ready by then.

        Every expert comes exactly once, those already resident first. A lease ends when the next
        one is asked for, so that a budget of one slot serves any number of experts.
        """
        step = self.core.begin(layer, experts)
        try:
            while (ready := step.next()) is not None:
                positions = [position for position, _ in ready]
                self.core.wait_for_rows([slot for _, slot in ready])
                with Lease(
                    [experts[position] for position in positions],
                    [slot for _, slot in ready],
                    partial(self._let_go, partial(_finish, step, positions)),
                ) as lease:
                    yield lease
        finally:
            step.release()

    def _let_go(self, release: Callable[[], None]) -> None:
        """Releases a lease once what reads its slots has run."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        release()

    def begin_pass(self, *, prefill: bool, new_sequence: bool, batch: int = 1) -> None:
        """Says what the next forward pass is, for policies and traces. Optional."""
        self._prefill = prefill
        self._new_sequence = new_sequence
        for observer in self._observers:
            observer.begin_pass(prefill=prefill, new_sequence=new_sequence, batch=batch)

    def record(self, *, router: bool = False) -> Recorder:
        """Keeps the routing of every step from now on; `trace()` of what it returns gives it back.

        Only what goes through `fused_experts` is seen. Use it as a context manager, or end it with
        `stop_recording`. With `router` the router's probabilities of all experts are kept too:
        those of a model that `moeinf.load` loaded are taken from it (UnsupportedError where it is
        not known how); any other runtime hands them to `Recorder.add_router`.
        """
        self.stop_recording()
        recorder = Recorder(self, router=router)
        if router and self.routers is not None:
            self._stop_listening = self.routers(recorder.add_router)
        self._observers.append(recorder)
        return recorder

    def stop_recording(self) -> None:
        """Ends `record`; what was recorded stays with the recorder."""
        self._observers = [one for one in self._observers if not isinstance(one, Recorder)]
        if self._stop_listening is not None:
            self._stop_listening()
            self._stop_listening = None

    def eamc(self) -> EAMC:
        """A copy of the collection that "eam" keeps, with the request in progress as it is so far.

        To be saved and started from again: heat that survives a restart. The cache goes on as if
        it had not been asked. Raises ValueError where neither policy nor prefetch is "eam".
        """
        return EAMC.from_core(self.core.eamc())

    def compute(
        self,
        hidden: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        layer: int,
    ) -> torch.Tensor:
        """`moeinf.fused_experts` without the operator around it."""
        new_sequence, self._new_sequence = self._new_sequence, False
        observe = partial(self._observe, layer, topk_weights) if self._observers else None
        return self._experts.run(
            hidden,
            topk_ids,
            topk_weights,
            layer,
            prefill=self._prefill,
            new_sequence=new_sequence,
            on_ids=observe,
        )

    def _observe(self, layer: int, topk_weights: torch.Tensor, ids: torch.Tensor) -> None:
        for observer in self._observers:
            observer.add(layer, ids, topk_weights)

    def prefetch(self, layer: int, experts: Sequence[int]) -> int:
        """Starts reading absent experts, best first, ahead of need. Returns how many it started.

        Never waits, and never evicts what a lease or a step in progress holds.
        """
        return self.core.prefetch(layer, experts)

    @property
    def on_gpu(self) -> bool:
        """Do the slots lie in GPU memory?"""
        return self._opened is not None

    def predict(self, layer: int, experts: Sequence[int] | torch.Tensor) -> None:
        """Says what the next step of `layer` will likely use, best first; for prefetch="external".

        `experts` are ids, or a router's choices [T, k], first choices first. Those in GPU memory
        are looked at when the ids of the next step have come, so that the host waits for neither.

        What is absent is read ahead within the budget, and only where that pays: what making the
        prediction takes counts too. Elsewhere it does nothing.
        """
        if not isinstance(experts, torch.Tensor):
            self.core.predict(layer, experts)
        elif isinstance(self._experts, CudaExperts):
            self._experts.predict(layer, experts)
        else:
            self.core.predict(layer, distinct(experts))

    @property
    def wants_predictions(self) -> bool:
        """Is a call of `predict` worth making now? Never while a prompt is read."""
        wanted: bool = self.core.wants_predictions
        return wanted

    def resident(self, layer: int) -> list[int]:
        """The experts of a layer that sit in slots now."""
        return self.core.resident(layer)

    def resize(self, slots: int) -> None:
        """Grows or shrinks the cache in place; shrinking waits for leases on the slots that go."""
        self.core.resize(slots)

    def pool(self) -> torch.Tensor:
        """The pool as uint8 [slots, slot_bytes], zero-copy."""
        return torch.from_dlpack(self.core)

    def views(self) -> dict[str, torch.Tensor]:
        """Typed, strided views of the pool by segment: [slots, *shape], zero-copy."""
        return self.layout.views(self.pool())

    def stats(self) -> dict[str, Any]:
        """Counters since the start or the last `reset_stats`, in total and per layer.

        accesses, hits, misses (distinct experts per step), evictions, demand_bytes,
        prefetch_bytes, prefetch_useful_bytes, prefetch_wasted_bytes, stall_seconds; hit_rate is
        hits / accesses; `layers` holds the same for each MoE layer. `prefetch` says how good
        predictions were (see `prediction_summary`), None with prefetch="off". `device` says where
        the slots lie. `host` counts what the RAM between GPU and files did, and says how bytes go
        to the GPU (`copy_path`) and what computes there (`kernels`); None on the cpu.
        """
        layers = [dict(layer) for layer in self.core.stats()]
        total = {name: sum(layer[name] for layer in layers) for name in COUNTERS}
        for counters in (total, *layers):
            accesses = counters["accesses"]
            counters["hit_rate"] = counters["hits"] / accesses if accesses else 0.0
        prefetch = None
        if self.prefetch_kind != "off":
            prefetch = prediction_summary(self.core.prediction_stats())
        return {
            **total,
            "slots": self.slots,
            "policy": self.policy,
            "device": self.device_name,
            "host": self._host_stats(),
            "prefetch": prefetch,
            "layers": layers,
        }

    @property
    def device_name(self) -> str:
        """Where the slots lie: "cpu", or "cuda:N" and what is there."""
        if self._opened is None:
            return "cpu"
        return f"cuda:{self._opened.index} ({self._opened.name})"

    def _host_stats(self) -> dict[str, Any] | None:
        if not isinstance(self._experts, CudaExperts) or self._opened is None:
            return None
        return {
            **self.core.host_stats(),
            "copy_path": self._copy_path,
            "kernels": self._experts.kernels,
        }

    def reset_stats(self) -> None:
        """Sets every counter to zero; residency and the policy's memory stay."""
        self.core.reset_stats()


def _copy_path(device: _core.CudaDevice, gather_below: int | None) -> tuple[str, int]:
    """How experts reach that GPU: in words, and the size up to which they are gathered."""
    measured = gather_tuning.stored(device) if gather_below is None else None
    below = measured or gather_below or 0
    if not device.can_gather:
        return "dma (this build has no gather kernel)", 0
    if gather_below is None:
        why = "never measured here: moeinf doctor" if measured is None else "measured by doctor"
    else:
        why = "as asked"
    return (f"gather up to {below} bytes, dma above" if below else "dma") + f" ({why})", below


def prediction_summary(counts: dict[str, Any]) -> dict[str, Any]:
    """The cache's counts of predictions, with the ratios that people ask for.

    recall: share of the experts used that had been predicted; precision: share of those predicted
    that were used; precision_among_misses: the same for those that were not resident when they were
    predicted, which are all that a prefetch can win; active_share: of the predicted steps, those in
    passes that did read ahead. None where nothing was counted. `late` prefetches were still being
    read when their step came, and took `late_seconds` more. `gain` is the share of a pass's time
    that reading ahead saves, from passes with and without it in turn, give or take `gain_error`;
    prefetching is on where it is clearly above zero (`state`: "off", "on trial" or "on").
    """

    def ratio(part: str, whole: str) -> float | None:
        return counts[part] / counts[whole] if counts[whole] else None

    return {
        **counts,
        "recall": ratio("correct", "used"),
        "precision": ratio("correct", "predicted"),
        "precision_among_misses": ratio("predicted_absent_used", "predicted_absent"),
        "active_share": ratio("active_steps", "steps"),
    }


def _finish(step: _core.StepLease, positions: list[int]) -> None:
    for position in positions:
        step.done(position)
