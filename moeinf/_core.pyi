# Written by `make stubs` from the compiled module: change csrc/bindings, not this file.
"""
Slots, transfers, residency and CPU kernels of moeinf.
"""

from __future__ import annotations

import collections.abc
import typing

import numpy
import numpy.typing
import typing_extensions

class DType:
    __members__: typing.ClassVar[dict[str, DType]]
    bf16: typing.ClassVar[DType]
    f16: typing.ClassVar[DType]
    f32: typing.ClassVar[DType]

class Rows:
    """Bytes from the slot's start to row 0, and from row to row."""

    def __init__(self, offset: int, stride: int) -> None: ...

class ScaleType:
    __members__: typing.ClassVar[dict[str, ScaleType]]
    bf16: typing.ClassVar[ScaleType]
    e4m3: typing.ClassVar[ScaleType]
    e8m0: typing.ClassVar[ScaleType]
    f16: typing.ClassVar[ScaleType]
    f32: typing.ClassVar[ScaleType]

class Scales:
    """A number for each block of rows and columns (0: all)."""

    def __init__(
        self,
        rows: Rows,
        type: ScaleType,
        block_rows: int,
        block_cols: int,
        zeros: Rows | None = None,
    ) -> None: ...

class Matrix:
    def __init__(
        self,
        *,
        format: str,
        rows: int,
        cols: int,
        values: Rows,
        scales: Scales | None = None,
        bias: Rows | None = None,
        bias_dtype: DType = DType.f32,
        multiplier: int | None = None,
    ) -> None: ...

class Gate:
    def __init__(
        self, function: str, activation: str, *, alpha: float = 1.0, limit: float = ...
    ) -> None: ...

class ExpertFfn:
    """What an expert computes, and where its matrices lie in a slot."""

    def __init__(
        self, *, gate: Matrix, up: Matrix | None, down: Matrix, function: Gate
    ) -> None: ...

class FfnInput:
    def __init__(
        self,
        *,
        hidden: int,
        hidden_dtype: DType,
        topk_ids: int,
        ids_are_int64: bool,
        topk_weights: int,
        topk_weights_dtype: DType,
        tokens: int,
        top_k: int,
        num_experts: int,
        whole_tokens: int = 0,
    ) -> None: ...

class CpuEngine:
    """Kernels of one instruction set, threads and scratch memory."""

    def __init__(self, *, threads: int = 0, kernels: str = "") -> None: ...
    def read_all(self, data: int, nbytes: int, *, task_bytes: int, streams: int) -> int:
        """Reads nbytes at address `data` once with all threads; returns the or of its words."""

    @property
    def kernels(self) -> str: ...
    @property
    def threads(self) -> int: ...

class ExpertFfnCall:
    @staticmethod
    def tokens_per_call(
        engine: CpuEngine, expert: ExpertFfn, input: FfnInput, scratch_bytes: int
    ) -> int: ...
    def __init__(self, engine: CpuEngine, expert: ExpertFfn, input: FfnInput) -> None: ...
    def compute(self, ready: collections.abc.Sequence[tuple[int, int]]) -> None:
        """Computes the experts at these (position, slot address) pairs."""

    def finish(self, out: int, out_dtype: DType) -> None: ...
    @property
    def counts(self) -> list[int]: ...
    @property
    def experts(self) -> list[int]: ...

class ByteSource:
    """Bytes of experts that lie in no file."""

    @staticmethod
    def callback(function: typing.Any) -> ByteSource:
        """function(offset, destination) writes all of the memoryview and returns its length."""

    @staticmethod
    def memory(address: int, nbytes: int, owner: typing.Any) -> ByteSource:
        """The bytes at an address, valid while `owner` lives."""

    def close(self) -> None:
        """Of a callback: no call begins after this, and none is under way."""

    def read(self, offset: int, out: typing_extensions.Buffer) -> None: ...

class Catalog:
    """Which ranges of which files make up every expert, and where in a slot each goes."""

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        slot_bytes: int,
        files: collections.abc.Sequence[tuple[str, int]],
        extents: typing.Annotated[numpy.typing.ArrayLike, numpy.uint64],
        transposes: collections.abc.Sequence[
            typing.Annotated[collections.abc.Sequence[int], "FixedSize(4)"]
        ] = [],
        checks: collections.abc.Sequence[tuple[int, int, ScaleType | None, bool, int]] = [],
        tensors: collections.abc.Sequence[tuple[int, int, str]] = [],
        sources: collections.abc.Mapping[int, ByteSource] = {},
        recodes: collections.abc.Sequence[tuple[str, int, int, int, int, int]] = [],
        copies: collections.abc.Sequence[tuple[int, int, str, ByteSource | None]] = [],
        palettes: collections.abc.Sequence[
            typing.Annotated[collections.abc.Sequence[int], "FixedSize(4)"]
        ] = [],
    ) -> None:
        """files: list of (path, bytes). extents: uint64 [experts, extents per expert, 4] as (file,
        file offset, bytes, slot offset), experts by layer * num_experts + expert.
        transposes: (slot offset, rows, columns, bytes of an element), as they are read; in
        the slot they lie as columns x rows. checks: (slot offset, bytes, type, negative,
        step) of numbers that may not be NaN or infinite, and below zero only if negative;
        with None as the type, bytes from -8 to 7. tensors: (file, file offset, name), for
        messages. sources: by index of `files`, of those that are none. recodes: (kind, slot
        offset, rows, columns, bits, plus) of integers that are written again in the slot.
        copies: (index of `files`, place from 1, path, source or None) of the same bytes
        elsewhere. palettes: (slot offset, bytes, bytes of a row, bytes of its tail) of rows
        of bf16 in 12 bits."""

    def extents(self, expert: int) -> numpy.typing.NDArray[numpy.uint64]:
        """uint64 [extents, 4] of one flat expert id, as given to the constructor."""

    @property
    def expert_bytes(self) -> int: ...
    @property
    def files(self) -> list[tuple[str, int]]: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def slot_bytes(self) -> int: ...

class SlotPool:
    """Equal slots in one range of RAM; their address never changes."""

    def __init__(self, slot_bytes: int, slots: int, *, capacity: int | None = None) -> None: ...
    def numpy(self, slot: int) -> numpy.typing.NDArray[numpy.uint8]:
        """The bytes of one slot, uint8 [slot_bytes], not copied."""

    def resize(self, slots: int) -> None: ...
    @property
    def capacity(self) -> int: ...
    @property
    def slot_bytes(self) -> int: ...
    @property
    def slots(self) -> int: ...

class Ticket:
    """One expert on its way."""

    def wait(self, seconds: float | None = None) -> bool:
        """False if it is still on its way."""

    @property
    def error(self) -> str | None: ...
    @property
    def seconds(self) -> float | None: ...
    @property
    def state(self) -> str: ...

class FileReader:
    """Reads experts from files into slots on worker threads."""

    def __init__(
        self, catalog: Catalog, *, threads: int = 0, chunk_bytes: int = 0, direct: bool = True
    ) -> None: ...
    def file_is_direct(self, file: int) -> bool: ...
    def promote(self, ticket: Ticket) -> None: ...
    def submit(
        self, expert: int, pool: SlotPool, slot: int, *, prefetch: bool = False
    ) -> Ticket: ...
    @property
    def chunk_bytes(self) -> int: ...
    @property
    def threads(self) -> int: ...

class CudaDevice:
    """A CUDA device, through the driver library found at run time."""

    def __init__(self, index: int = 0) -> None:
        """Raises UnsupportedError, saying what is missing, or ValueError for a bad index."""

    def time_copies(self, nbytes: int, count: int, gather: bool, rounds: int) -> float:
        """Seconds for `count` runs of `nbytes` from pinned RAM, the best of `rounds`."""

    @property
    def can_gather(self) -> bool:
        """Was the gather kernel built, and does it run on this device?"""

    @property
    def driver_version(self) -> int:
        """13010: CUDA 13.1."""

    @property
    def free_bytes(self) -> int: ...
    @property
    def index(self) -> int: ...
    @property
    def is_fake(self) -> bool:
        """A driver made for tests."""

    @property
    def name(self) -> str: ...
    @property
    def total_bytes(self) -> int: ...

class HostTier:
    """Experts in page-locked RAM, read from files, for the caches of one or several devices."""

    def __init__(
        self,
        catalog: Catalog,
        device: CudaDevice,
        slots: int,
        policy: str = "learned",
        *,
        exclusive: bool = False,
        threads: int = 0,
        chunk_bytes: int = 0,
        direct: bool = True,
    ) -> None: ...
    def reset_stats(self) -> None: ...
    def stats(self) -> dict: ...

class EamCollection:
    """Activation matrices of finished requests; see csrc/policy/eam.h."""

    def __init__(self, num_layers: int, num_experts: int, capacity: int) -> None: ...
    def __len__(self) -> int: ...
    def add(self, matrix: typing.Annotated[numpy.typing.ArrayLike, numpy.float32]) -> None: ...
    def entries(self) -> numpy.typing.NDArray[numpy.float32]: ...
    def predict(
        self, arg0: collections.abc.Sequence[int]
    ) -> numpy.typing.NDArray[numpy.float32]: ...
    @property
    def capacity(self) -> int: ...
    @property
    def shape(self) -> tuple[int, int]:
        """Layers, and experts per layer."""

class Eamc:
    """Two collections: of prompts, and of decoding."""

    PAPER_CAPACITY: typing.ClassVar[int] = 120

    def __init__(self, prefill: EamCollection, decode: EamCollection) -> None: ...
    @property
    def decode(self) -> EamCollection: ...
    @property
    def prefill(self) -> EamCollection: ...

class EamMatch:
    """A growing matrix against a collection."""

    def __init__(self, collection: EamCollection) -> None: ...
    def add_row(
        self,
        layer: int,
        experts: collections.abc.Sequence[int],
        counts: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
    ) -> None: ...
    def nearest(self, count: int) -> list[int]: ...
    def restart(self) -> None: ...

class StepLease:
    """The experts of one step. Their slots keep their bytes until release(); use it as a context
    manager."""

    def __enter__(self) -> typing.Any: ...
    def __exit__(self, *args: typing.Any) -> None: ...
    def acquire_all(self) -> list:
        """Waits for all and returns their slots in the order of `experts`."""

    @typing.overload
    def release(self) -> None:
        """All slots of the step may be reused."""

    @typing.overload
    def release(self, position: int) -> None:
        """The slot of that position may be reused."""

    def wait_ready(self) -> list[tuple[int, int]] | None:
        """Waits for experts and returns those that became ready as [(position, slot)]; None once
        all have been handed out. Raises ReadError or CapacityError."""

class ExpertCache:
    """Experts in the slots of one pool, filled from files. Thread-safe."""

    staging_slots: typing.ClassVar[int] = 2

    def __dlpack__(
        self,
        *,
        stream: typing.Any = None,
        max_version: typing.Any = None,
        dl_device: typing.Any = None,
        copy: typing.Any = None,
    ) -> typing_extensions.CapsuleType:
        """uint8 [staging_slots + slots, slot_bytes], not copied; slot numbers are those that leases
        give. Keeps the memory, not the cache, alive: also of slots that go."""

    def __dlpack_device__(self) -> tuple: ...
    def __init__(
        self,
        catalog: Catalog,
        slots: int,
        policy: str = "learned",
        *,
        threads: int = 0,
        chunk_bytes: int = 0,
        direct: bool = True,
        prefetch: str = "off",
        device: CudaDevice | None = None,
        host_slots: int = 0,
        exclusive: bool = False,
        gather_below: int = 0,
        eamc: Eamc | None = None,
        host_tier: HostTier | None = None,
        shared: str = "",
    ) -> None: ...
    def acquire(self, layer: int, experts: typing.Any) -> tuple[StepLease, list]:
        """Starts a step, waits until all its experts sit in slots at once, and returns the lease
        and their slots in the order of `experts`. Raises CapacityError where they
        cannot."""

    def begin_step(self, layer: int, experts: typing.Any) -> StepLease:
        """Starts a step and never waits. experts: distinct ids within the layer. What slots cannot
        hold passes through two staging slots."""

    def eamc(self) -> Eamc:
        """A copy of what 'eam' has collected, the request in progress as it is included."""

    def host_stats(self) -> typing.Any:
        """Counts of the pinned RAM and of the link to the device; None where slots lie in RAM."""

    def leased_rows(self) -> typing_extensions.CapsuleType:
        """The same for who reads leased slots alone: keeps no memory of slots that go."""

    def places(self) -> list:
        """What was read from the files themselves, then from each place of copies."""

    def predict(self, layer: int, experts: typing.Any) -> None:
        """What the next step of that layer is expected to use, best first. Read ahead within the
        budget, where that pays."""

    def prediction_stats(self) -> dict:
        """Counts of predictions; see PredictionStats in csrc/prefetch/prefetcher.h."""

    def prefetch(self, layer: int, experts: typing.Any) -> int:
        """Starts reading what is absent, best first. Returns the number of reads started."""

    def reset_stats(self) -> None: ...
    def resident(self, layer: int) -> list[int]:
        """Ids within the layer whose bytes are in slots."""

    def resize(self, slots: int) -> None:
        """Waits for leases on slots that go. Views of them may not be touched any more; after
        growing, take a new view to see the new slots."""

    def set_priors(self, priors: numpy.typing.NDArray[numpy.float32]) -> None:
        """How likely each expert is to come, by flat id."""

    def stats(self) -> list:
        """One dict per layer."""

    def wait_for_slots(self, slots: collections.abc.Sequence[int]) -> None:
        """The host waits until the bytes of leased slots are there; at once where slots lie in
        RAM."""

    @property
    def address(self) -> int:
        """Of slot 0. The same for the life of the cache."""

    @property
    def files_direct(self) -> list[bool]:
        """For each file of the catalog: is it read with O_DIRECT?"""

    @property
    def policy(self) -> str: ...
    @property
    def slot_bytes(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def wants_predictions(self) -> bool:
        """Is a call of predict() worth making now?"""

class Wave:
    """The experts of a step that can be computed now."""

    @property
    def names_past_the_end(self) -> bool:
        """Is num_experts, which means no expert, among the ids?"""

    @property
    def slots(self) -> int:
        """Experts that the cache can hold now."""

    @property
    def whole(self) -> bool:
        """Are they all experts of the step?"""

class StepStream:
    """Steps of one stream of a device; see csrc/cache/stream_step.h. Not thread-safe."""

    def __init__(self, cache: ExpertCache, stream: int) -> None: ...
    def begin(self) -> Wave | None:
        """Waits for the ids, starts the step and returns its first wave, or None where no id names
        an expert. In the stream's order the map will hold the slots of the wave, -1
        elsewhere, and the stream waits for their bytes."""

    def copy_ids(
        self,
        layer: int,
        ids_address: int,
        ids_are_int64: bool,
        tokens: int,
        top_k: int,
        map_address: int,
        prefill: bool,
        new_sequence: bool,
        caller: int,
    ) -> None:
        """Enqueues the way of the ids [tokens, top_k] from a device address to the host. The map is
        int32 [num_experts + 1] on the device."""

    def ids(self) -> numpy.ndarray:
        """The ids of the step, a copy."""

    def next(self) -> Wave | None:
        """The next wave, or None at the end of the step. Slots of the wave before may be reused
        behind what the stream has been given so far."""

    def release(self) -> None:
        """Ends the step early."""

    def synchronize(self) -> None:
        """The host waits for the stream."""

class LinearWeight:
    """A matrix that the kernels can multiply; ValueError for any other."""

    def __init__(self, matrix: Matrix) -> None: ...

class RmsNorm:
    """How a norm is computed; see csrc/compute/rms_norm.h."""

    def __init__(self, epsilon: float, offset: float, rounds_first: bool) -> None: ...

class AttentionForm:
    """How an attention computes; see csrc/bindings/attention_inputs.cpp."""

    def __init__(
        self,
        *,
        projections: typing.Annotated[collections.abc.Sequence[typing.Any], "FixedSize(3)"],
        packed: typing.Annotated[collections.abc.Sequence[bool], "FixedSize(3)"],
        norms: typing.Annotated[collections.abc.Sequence[typing.Any], "FixedSize(2)"] | None,
        norms_rows: bool,
        half: bool,
        whole: bool,
        heads_outside: bool,
        head_dim: int,
    ) -> None: ...
    @property
    def heads_outside(self) -> bool: ...

def activations() -> list[str]:
    """The activations of the gate functions."""

def add_rms_norm(
    engine: CpuEngine,
    type: typing.Any,
    module: typing.Any,
    residual: typing.Any,
    hidden: typing.Any,
) -> typing.Any:
    """(residual + hidden, its norm) by a module of that type that `serve_norms` serves. None where
    it has hooks, and for tensors that are not rows of numbers of one type and shape in RAM."""

def attention_inputs(
    engine: CpuEngine,
    form: AttentionForm,
    attention: typing.Any,
    hidden: typing.Any,
    cos: typing.Any,
    sin: typing.Any,
    most: int,
    most_of_bf16: int,
) -> typing.Any:
    """(queries, keys, values) of [batch, tokens, columns], each [batch, heads, tokens, head_dim].
    None, and nothing is done, for more tokens than the most, where a part of the attention has
    hooks or another class, and for tensors that are not rows of numbers of one type in RAM."""

def available_memory() -> int:
    """Bytes of RAM that this process could still take, or fewer in a control group."""

def check_trace(
    experts: typing.Annotated[numpy.typing.ArrayLike, numpy.int16],
    sequence: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
    phase: typing.Annotated[numpy.typing.ArrayLike, numpy.uint8],
    num_experts: int,
    name: str,
) -> None: ...
def cpu_kernels() -> list[tuple[str, bool]]:
    """(name, whether this CPU can run it) of every set of CPU kernels, best first."""

def decode(
    engine: CpuEngine,
    dtype: DType,
    weight: LinearWeight,
    base: int,
    first: int,
    count: int,
    out: int,
) -> None:
    """Writes rows of such a weight to [count, cols] at the address `out`."""

def fused_experts(
    cache: ExpertCache,
    engine: CpuEngine,
    expert: ExpertFfn,
    hidden: typing.Any,
    topk_ids: typing.Any,
    topk_weights: typing.Any,
    layer: int,
    prefill: bool,
    new_sequence: bool,
    caller: int,
    sequences: int,
    scratch_bytes: int,
) -> typing.Any:
    """A new tensor [tokens, hidden]; see moeinf.fused_experts. None for tensors that are not
    contiguous ones in RAM of the right shapes and types."""

def fused_experts_raw(
    engine: CpuEngine,
    expert: ExpertFfn,
    input: FfnInput,
    *,
    slots: collections.abc.Sequence[int],
    out: int,
    out_dtype: DType,
) -> None:
    """One whole call; slots[e] is the address of expert e, 0 where it has no route."""

def gate_functions() -> list[str]:
    """The gate functions that the CPU computes."""

def linear(
    engine: CpuEngine,
    x: typing.Any,
    weight: typing.Any,
    bias: typing.Any,
    out: typing.Any,
    most: int,
    most_of_bf16: int,
) -> typing.Any:
    """x @ weight^T + bias as a tensor [..., rows]: `out`, or a new one where that is None. None for
    more tokens than the most, and for tensors that are not rows of numbers of one type in
    RAM."""

def packed_linear(
    engine: CpuEngine,
    x: typing.Any,
    weight: LinearWeight,
    packed: typing.Any,
    bias: typing.Any,
    out: typing.Any,
) -> typing.Any:
    """The same with a weight whose offsets count from the first byte of `packed`."""

def policy_names() -> list[str]:
    """What `policy` may be."""

def policy_parameters(policy: str) -> dict:
    """name: (usual value, least, greatest), for `policy="NAME:name=value"`."""

def prefetch_names() -> list[str]:
    """What `prefetch` may be."""

def promised_memory() -> int:
    """Bytes of RAM that caches of this process have and that nothing has touched so far."""

def read_bandwidth(path: str, seconds: float = 1.0) -> dict:
    """Sequential read rates of a file, or of a folder's largest file: path, direct,
    bytes_per_second (the best) and ways (request_bytes, in_flight, bytes_per_second each)."""

def rms_norm(engine: CpuEngine, norm: RmsNorm, x: typing.Any, weight: typing.Any) -> typing.Any:
    """The norm of each row of x as a new tensor. None for tensors that are not rows of numbers of
    one type in RAM."""

def simulate(
    experts: typing.Annotated[numpy.typing.ArrayLike, numpy.int16],
    sequence: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
    phase: typing.Annotated[numpy.typing.ArrayLike, numpy.uint8],
    router: typing.Annotated[numpy.typing.ArrayLike, numpy.uint16] | None,
    num_experts: int,
    policy: typing.Any,
    slots: int,
    eamc: Eamc | None = None,
    priors: typing.Any = None,
    progress: typing.Any = None,
    step_misses: bool = False,
) -> dict: ...
def time_cache_hits(
    cache: ExpertCache,
    layer: int,
    experts: collections.abc.Sequence[int],
    rounds: int,
    steps_per_round: int,
) -> list[float]:
    """Seconds of a step of resident experts without Python, a mean per round."""

def time_cache_misses(
    policy: str,
    num_layers: int,
    num_experts: int,
    slots: int,
    misses: int,
    rounds: int,
    steps_per_round: int,
) -> list[float]:
    """Seconds to plan a step whose experts all miss, no bytes moved, a mean per round."""

def top_k(probabilities: typing.Any, like: typing.Any, k: int, share_out: bool) -> typing.Any:
    """(weights, ids) of the k largest of each row, of the type of `like` and int64. None for
    tensors that are not plain ones in RAM."""

def weight_formats() -> list[str]:
    """The weight formats that the CPU computes with."""

LINEAR_TOKENS: int = 16
