"""The expert cache: which experts sit in the slots of fast memory, and how they get there."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any, NoReturn

import torch

from moeinf import _core
from moeinf.cache import disk_tuning, gather_tuning, live
from moeinf.cache.budget import (
    GPU_RESERVE,
    RAM_RESERVE,
    check_fits,
    free_bytes,
    host_slots_for,
    less_reserve,
    parse_bytes,
    slots_for,
)
from moeinf.cache.devices import open_device, torch_device
from moeinf.cache.host_tier import HostTier, warn_of_refused_slots
from moeinf.cache.lease import Lease
from moeinf.cache.live_priors import LivePriors
from moeinf.cache.passes import ForwardPass, Observer, Passes
from moeinf.cache.recorder import Recorder, RouterSource
from moeinf.cache.statistics import prediction_summary, with_totals
from moeinf.cache.streams import StepStreams, distinct
from moeinf.checkpoint.store import ExpertStore
from moeinf.errors import UnsupportedError
from moeinf.traces.eam import EAMC
from moeinf.traces.priors import PriorsHook

_logger = logging.getLogger("moeinf.cache")
_named: weakref.WeakValueDictionary[str, ExpertCache] = weakref.WeakValueDictionary()
_used_names: set[str] = set()
_naming = threading.Lock()


def named(name: str) -> ExpertCache:
    """The cache of that name. Raises ValueError where there is none: a name is used once."""
    cache = _named.get(name)
    if cache is None:
        which = "it has been released" if name in _used_names else "load its model first"
        raise ValueError(f"no cache is named {name!r}: {which}")
    return cache


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
            there, so that both together hold more; or
        tier: that RAM, shared with other caches on the same store.
        gather_below: experts of at most so many bytes are copied to the GPU by a kernel, several at
            once, where this build has it; 0 leaves every copy to the copy engines. Without it, what
            `moeinf doctor` has measured for this GPU, else 0.
        policy: chooses the expert to evict; one of `moeinf.policies()`, with parameters where
            wanted, as in "decayed_lfu:keep=0.9".
        prefetch: predicts the next experts, to read them while the link is idle, if that pays:
            "off", "previous" (the layer's experts of earlier tokens), "transition" (the experts
            that followed those of the previous layer), "eam" (MoE-Infinity's prediction) or
            "external" (the experts given to `predict`).
        eamc: the collection that "eam", as policy or prefetch, starts from, else an empty one.
            The cache works on a copy: `eamc()` gives it back, grown.
        priors: an object that sees routing once per token and says how likely each expert is to be
            used soon; see `moeinf.traces.priors.PriorsHook`. The policy `learned` learns how far
            to trust them.
        reader_threads, chunk_bytes: of the file reader; 0 for both takes what `moeinf doctor` has
            measured for this disk, else the usual.
        direct: read past the page cache where the file system allows it.
        scratch: on the CPU, what the activations of a prompt may take in one MoE layer, in bytes. A
            prompt that needs more is computed in parts, which read experts again. Without it, what
            the prompt needs, up to a quarter of the memory that is free at that time.
        dense_bytes: of a memory's free bytes, what slots must leave for weights loaded later.
        shared: the name of RAM that several processes of one user share. It has a slot for each
            expert; each expert is read by one process, and the memory is freed when its last user
            ends. For slots on the cpu, without slots and memory.
        layers: how many MoE layers the cache will serve, for shares and "auto"; without it, all.
        name: what compiled graphs know the cache by; without it, the store's `fingerprint`. A
            number is added where it was used before in this process, so that a graph, also one of
            an earlier process, never reaches the cache of another model.

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
        reader_threads: int = 0,
        chunk_bytes: int = 0,
        direct: bool = True,
        host_memory: str | int | None = None,
        exclusive: bool = False,
        tier: HostTier | None = None,
        gather_below: int | None = None,
        scratch: str | int | None = None,
        dense_bytes: int = 0,
        layers: int | None = None,
        name: str | None = None,
        shared: str | None = None,
    ):
        if not isinstance(policy, str):
            raise ValueError(
                f"policy={policy!r}: expected one of {', '.join(_core.policy_names())}"
            )
        opened = open_device(device)
        for_gpu = (host_memory, exclusive or None, tier, gather_below)
        if opened is None and any(option is not None for option in for_gpu):
            raise ValueError(
                "host_memory, exclusive, tier and gather_below say how experts reach a GPU: give "
                "device"
            )
        if opened is not None and scratch is not None:
            raise ValueError("scratch is of prompts on the CPU: leave it out for a GPU")
        self.scratch_bytes = 0 if scratch is None else parse_bytes(scratch)
        if tier is not None and (host_memory is not None or exclusive):
            raise ValueError("host_memory and exclusive are the tier's own: leave them out")
        if shared is not None:
            given = dict(slots=slots, memory=memory, device=opened)
            if wrong := [name for name, value in given.items() if value is not None]:
                raise ValueError(
                    f"shared: RAM with a slot for each expert: leave out {', '.join(wrong)}"
                )
        self.device = torch_device(opened)
        self.store = store
        self.layout = store.layout
        self.policy = policy
        self.prefetch_kind = prefetch
        total = ((not shared and layers) or store.num_layers) * store.num_experts
        if opened is not None and memory is None and slots is None:
            memory = "auto"
        ram = free_bytes(None)
        free = ram if opened is None else free_bytes(opened)
        room = slots_for(
            memory=memory,
            slots=slots,
            slot_bytes=store.slot_bytes,
            total_experts=total,
            free=less_reserve(free, RAM_RESERVE if opened is None else GPU_RESERVE, dense_bytes),
        )
        if shared is None:  # else the core asks, where the memory is not there yet
            check_fits(room, store.slot_bytes, dense_bytes, free)
        file = store.extents(0, 0)[0].entry.file  # that of a first expert stands for all
        at = None if file.source is not None else file.path
        threads, chunk = disk_tuning.settings(at, reader_threads, chunk_bytes)
        make_core = partial(
            _core.ExpertCache,
            store.catalog,
            room,
            policy,
            threads=threads,
            chunk_bytes=chunk,
            direct=direct,
            prefetch=prefetch,
            eamc=None if eamc is None else eamc.to_core(),
        )
        self.streams: StepStreams | None = None
        """Where steps run on a GPU; None where slots lie in RAM."""
        if opened is None:
            self.core = make_core(shared=shared or "")
        else:
            self._copy_path, below = gather_tuning.copy_path(opened, gather_below)
            self.core = make_core(
                device=opened,
                host_tier=None if tier is None else tier.core,
                host_slots=0
                if tier is not None
                else host_slots_for(
                    host_memory=host_memory,
                    slots=room,
                    slot_bytes=store.slot_bytes,
                    total_experts=store.num_layers * store.num_experts,
                    available=less_reserve(ram, RAM_RESERVE, dense_bytes),  # they come through RAM
                    exclusive=exclusive,
                ),
                exclusive=exclusive,
                gather_below=below,
            )
            self.streams = StepStreams(
                self.core, self.device, num_experts=store.num_experts, is_fake=opened.is_fake
            )
            if tier is None:
                warn_of_refused_slots(self.core.host_stats())
        store.check_unchanged()
        self._read_before = [0] * len(store.paths)
        self._opened = opened
        self.observers: list[Observer] = []
        self.passes = Passes(self.observers)
        self.kernels: str | None = None
        """Which kernels compute out of the slots; said by the backend that does."""
        self.routers: RouterSource | None = None
        """Set by an integration that can listen to the routers of the model it serves."""
        if priors is not None:
            shape = (store.num_layers, store.num_experts)
            self.observers.append(LivePriors(priors, self.core, shape))
        self.name = self._take_name(name or store.fingerprint)
        live.listen(_named)
        _logger.info(
            "cache %s: %d of %d experts in slots on %s, policy %s",
            self.name,
            self.slots,
            store.num_layers * store.num_experts,
            self.device_name,
            policy,
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UnsupportedError(
            "an ExpertCache cannot be copied or pickled: make another one on its store"
        )

    def _take_name(self, wanted: str) -> str:
        with _naming:
            names = (wanted if i == 1 else f"{wanted}#{i}" for i in count(1))
            name = next(one for one in names if one not in _used_names)
            _used_names.add(name)
            _named[name] = self
        return name

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
        return self._lease(experts, slots, step.release)

    def waves(self, layer: int, experts: Sequence[int]) -> Iterator[Lease]:
        """Like `acquire`, in as many leases as it takes: each holds what is ready by then.

        Every expert comes exactly once, those already resident first. A lease ends when the next
        one is asked for, so that a budget of one slot serves any number of experts.
        """
        step = self.core.begin_step(layer, experts)
        try:
            while (ready := step.wait_ready()) is not None:
                positions, slots = zip(*ready, strict=True)
                those = [experts[position] for position in positions]
                with self._lease(those, slots, partial(_finish, step, positions)) as lease:
                    yield lease
        finally:
            step.release()

    def _lease(
        self, experts: Sequence[int], slots: Sequence[int], release: Callable[[], None]
    ) -> Lease:
        """On a GPU the bytes are waited for, and at release all work that reads the slots."""
        if self.streams is not None:
            self.core.wait_for_slots(slots)
            release = partial(self._release_on_gpu, release)
        return Lease(experts, slots, release)

    def _release_on_gpu(self, release: Callable[[], None]) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        release()

    def begin_pass(self, one: ForwardPass, *, said: bool = True) -> None:
        """Says what the calling thread's next steps belong to, for policies and traces. Optional.

        Until the thread begins another pass; harmless when called again with the same object. A
        model that `moeinf.load` loaded says it itself (`said=False`), unless its caller has begun a
        pass that no step has used yet.
        """
        if len(self._read_before) > 1:
            self._places()
        self.passes.begin(one, said=said)

    def record(self, *, router: bool = False) -> Recorder:
        """Keeps the routing of every step from now on; `trace()` of what it returns gives it back.

        Only what goes through `fused_experts` is seen. Use it as a context manager, or end it with
        `stop_recording`; several may record at once. With `router` the router's probabilities of
        all experts are kept too: those of a model that `moeinf.load` loaded are taken from it
        (UnsupportedError where it is not known how); any other runtime hands them to
        `Recorder.add_router`.
        """
        recorder = Recorder(self.store.num_layers, self.store.num_experts, router=router)
        return recorder.start([self.observers], self.routers)

    def stop_recording(self) -> None:
        """Ends every `record`; what was recorded stays with the recorders."""
        for one in tuple(self.observers):
            if isinstance(one, Recorder):
                one.stop()

    @property
    def is_observed(self) -> bool:
        """Does anything look at the routing, for a trace or for priors?"""
        return bool(self.observers)

    def eamc(self) -> EAMC:
        """A copy of the collection that "eam" keeps, with the request in progress as it is so far.

        To be saved and started from again: heat that survives a restart. The cache goes on as if
        it had not been asked. Raises ValueError where neither policy nor prefetch is "eam".
        """
        return EAMC.from_core(self.core.eamc())

    def prefetch(self, layer: int, experts: Sequence[int]) -> int:
        """Starts reading absent experts, best first, ahead of need. Returns how many it started.

        Never waits, and never evicts what a lease or a step in progress holds.
        """
        return self.core.prefetch(layer, experts)

    def fill(self) -> int:
        """Starts reading every absent expert, layer by layer, if the slots hold all experts.

        Returns how many it started. Never waits: a step reads what it lacks before these.
        """
        layers, experts = self.store.num_layers, self.store.num_experts
        if self.slots < layers * experts:
            return 0
        return sum(self.prefetch(layer, range(experts)) for layer in range(layers))

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
        elif self.streams is not None:
            self.streams.predict(layer, experts)
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
        """Grows or shrinks the cache in place; shrinking waits for leases on the slots that go.

        Views from before stay valid. While one lives, memory of slots that go is not given back.
        """
        self.core.resize(slots)

    def pool(self) -> torch.Tensor:
        """The pool as uint8 [slots + 2, slot_bytes], zero-copy. A lease says which slot has what.

        Two slots are staging slots. Experts and staging slots may change places. Rows of slots that
        a `resize` has taken away keep their last bytes; there may be more rows while they are kept.
        """
        return torch.from_dlpack(self.core)

    def views(self) -> dict[str, torch.Tensor]:
        """Typed, strided views of the pool by segment: [slots + 2, *shape], zero-copy."""
        return self.layout.views(self.pool())

    def stats(self) -> dict[str, Any]:
        """Counters since the start or the last `reset_stats`, in total and per layer.

        accesses, hits, misses (distinct experts per step), evictions, demand_bytes,
        prefetch_bytes, prefetch_useful_bytes, prefetch_wasted_bytes, stall_seconds; hit_rate is
        hits / accesses; `layers` holds the same for each MoE layer. `prefetch` says how good
        predictions were (see `prediction_summary`), None with prefetch="off". `device` says where
        the slots lie. `host` counts what the RAM between GPU and files did, and says how bytes go
        to the GPU (`copy_path`) and what computes there (`kernels`); None on the cpu. `places` has
        what each disk has read: `path`, `read_bytes`, `bytes_per_second` as of late, and the first
        `failure`, "" without one; a disk that has failed is read only where every other one fails.
        """
        prefetch = None
        if self.prefetch_kind != "off":
            prefetch = prediction_summary(self.core.prediction_stats())
        return {
            **with_totals([dict(layer) for layer in self.core.stats()]),
            "slots": self.slots,
            "policy": self.policy,
            "device": self.device_name,
            "host": self._host_stats(),
            "prefetch": prefetch,
            "places": self._places(),
        }

    @property
    def device_name(self) -> str:
        """Where the slots lie: "cpu", or "cuda:N" and what is there."""
        if self._opened is None:
            return "cpu"
        return f"cuda:{self._opened.index} ({self._opened.name})"

    def _places(self) -> list[dict[str, Any]]:
        """The statistics of each disk. Warns once of each that has failed, where another goes on.

        Disks fail on threads of the core, which know no logger: so it is asked at each pass.
        """
        paths = self.store.paths
        rows = []
        for path, before, row in zip(paths, self._read_before, self.core.places(), strict=True):
            if row["failure"] and len(paths) > 1 and path not in self.store.warned_of:
                self.store.warned_of.add(path)
                others = ", ".join(other for other in paths if other != path)
                _logger.warning(
                    "%s: a read failed, experts are read from %s from now on: %s",
                    path,
                    others,
                    row["failure"],
                )
            rows.append({"path": path, **row, "read_bytes": row["read_bytes"] - before})
        return rows

    def _host_stats(self) -> dict[str, Any] | None:
        if self._opened is None:
            return None
        return {
            **self.core.host_stats(),
            "copy_path": self._copy_path,
            "kernels": self.kernels,
        }

    def reset_stats(self) -> None:
        """Sets every counter to zero; residency and the policy's memory stay."""
        self._read_before = [row["read_bytes"] for row in self.core.places()]
        self.core.reset_stats()


def _finish(step: _core.StepLease, positions: Sequence[int]) -> None:
    for position in positions:
        step.release(position)
