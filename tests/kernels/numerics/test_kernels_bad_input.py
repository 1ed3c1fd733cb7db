"""What does not fit is refused before any launch, with what was expected and what was found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import DEVICE

from moeinf.checkpoint.formats import FORMATS
from moeinf.kernels import (
    ExpertForm,
    ExpertMatrices,
    Gate,
    Matrix,
    combine,
    expert_routes,
    fused_experts,
    launch_plan,
    paths,
)

T, K, S, H, I = 2, 2, 3, 16, 8  # noqa: E741


def good() -> dict[str, Any]:
    """A call; `gate`, `up`, `down`, their biases and scales, `format` and `form` become objects."""
    return {
        "hidden": zeros(T, H),
        "ids": zeros(T, K, dtype=torch.int64),
        "topk_weights": zeros(T, K),
        "gate": zeros(S, I, H),
        "up": zeros(S, I, H),
        "down": zeros(S, H, I),
        "form": ExpertForm(),
    }


def arguments_of(call: dict[str, Any]) -> dict[str, Any]:
    call = dict(call)
    matrices: dict[str, Any] = {}
    formats = {"gate": "f32", "up": "f32", "down": "f32"} | call.pop("formats", {})
    for name in ("gate", "up", "down"):
        parts = call.pop(name), call.pop(f"{name}_scales", None), call.pop(f"{name}_bias", None)
        matrices[name] = None if parts[0] is None else Matrix(*parts, formats[name])
    return call | {"matrices": ExpertMatrices(**matrices)}


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


@pytest.fixture(autouse=True)
def no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    def launched(*_: object, **__: object) -> None:
        raise AssertionError("launched")

    monkeypatch.setattr(launch_plan.LaunchPlan, "launch", launched)
    monkeypatch.setattr(paths, "run_grouped", launched)
    monkeypatch.setattr(launch_plan, "PLANS", {})


def test_what_fits_would_be_launched() -> None:
    with pytest.raises(AssertionError, match="launched"):
        fused_experts(**arguments_of(good()))


ids_of = {"dtype": torch.int64}
BIASES: dict[str, Callable[[], Any]] = {
    "form": lambda: ExpertForm(has_bias=True), "gate_bias": lambda: zeros(S, I),
    "up_bias": lambda: zeros(S, I), "down_bias": lambda: zeros(S, H),
}  # fmt: skip
CASES: list[tuple[str, dict[str, Callable[[], Any]], type[Exception], str]] = [
    ("slot id too large", {"ids": lambda: zeros(T, K, **ids_of) + 3}, ValueError,
     r"ids: expected -1 or 0 to 2, found 3"),
    ("slot id too small", {"ids": lambda: zeros(T, K, **ids_of) - 2}, ValueError,
     r"found -2"),
    ("expert id beyond the map", {"ids": lambda: zeros(T, K, **ids_of) + 4,
      "expert_map": lambda: zeros(4, **ids_of)}, ValueError,
     r"expert ids: expected -1 or 0 to 3, found 4"),
    ("map beyond the slots", {"expert_map": lambda: zeros(4, **ids_of) + 3}, ValueError,
     r"expert_map: expected -1 or 0 to 2, found 3"),
    ("negative expert id", {"ids": lambda: zeros(T, K, **ids_of) - 2,
      "expert_map": lambda: zeros(4, **ids_of)}, ValueError,
     r"expert ids: expected -1 or 0 to 3, found -2"),
    ("negative slot in the map", {"expert_map": lambda: zeros(4, **ids_of) - 2}, ValueError,
     r"expert_map: expected -1 or 0 to 2, found -2"),
    ("map of floats", {"expert_map": lambda: zeros(4)}, TypeError,
     r"expert_map: expected torch.int32 or torch.int64, found torch.float32"),
    ("map of two dimensions", {"expert_map": lambda: zeros(2, 2, **ids_of)}, ValueError,
     r"expert_map: expected \[E\], found \(2, 2\)"),
    ("strided map", {"expert_map": lambda: zeros(8, **ids_of)[::2]}, ValueError,
     r"expert_map: expected a contiguous"),
    ("map elsewhere", {"expert_map": lambda: torch.zeros(4, device="meta", **ids_of)}, ValueError,
     r"expert_map: expected (cpu|cuda:0), found meta"),
    ("no tokens", {"hidden": lambda: zeros(0, H), "ids": lambda: zeros(0, K, **ids_of),
      "topk_weights": lambda: zeros(0, K)}, ValueError, r"expected at least 1 token, found 0"),
    ("k above the bound", {"ids": lambda: zeros(T, 33, **ids_of),
      "topk_weights": lambda: zeros(T, 33)}, ValueError, r"expected 1 to 32 .* found 33"),
    ("no routes", {"ids": lambda: zeros(T, 0, **ids_of)}, ValueError, r"found 0"),
    ("hidden has three dimensions", {"hidden": lambda: zeros(1, T, H)}, ValueError,
     r"hidden: expected 2 dimensions, found shape \(1, 2, 16\)"),
    ("ids for other tokens", {"ids": lambda: zeros(T + 1, K, **ids_of)}, ValueError,
     r"ids: expected shape \(2, 2\), found \(3, 2\)"),
    ("weights for other routes", {"topk_weights": lambda: zeros(T, K + 1)}, ValueError,
     r"topk_weights: expected shape \(2, 2\), found \(2, 3\)"),
    ("gate of another width", {"gate": lambda: zeros(S, I, H + 1)}, ValueError,
     r"gate: expected shape \(3, 8, 16\), found \(3, 8, 17\)"),
    ("up of another height", {"up": lambda: zeros(S, I + 1, H)}, ValueError,
     r"up: expected shape \(3, 8, 16\), found \(3, 9, 16\)"),
    ("fused weights as gate", {"gate": lambda: zeros(S, 2 * I, H)}, ValueError,
     r"gate: expected shape \(3, 8, 16\), found \(3, 16, 16\)"),
    ("no up", {"up": lambda: None}, ValueError, r"up: expected has_gate=True .* found None"),
    ("an up too many", {"form": lambda: ExpertForm(Gate("plain"), has_gate=False)}, ValueError,
     r"up: expected has_gate=False .* found a matrix"),
    ("gate of two dimensions", {"gate": lambda: zeros(I, H)}, ValueError,
     r"gate: expected 3 dimensions"),
    ("down of another width", {"down": lambda: zeros(S, H + 1, I)}, ValueError,
     r"down: expected shape \(3, 16, 8\), found \(3, 17, 8\)"),
    ("fewer down slots", {"down": lambda: zeros(S - 1, H, I)}, ValueError, r"gate"),
    ("a bias without has_bias", {"gate_bias": lambda: zeros(S, I)}, ValueError,
     r"gate bias: expected has_bias=False to agree, found a bias"),
    ("has_bias without a bias", {"form": lambda: ExpertForm(has_bias=True)}, ValueError,
     r"gate bias: expected has_bias=True to agree, found None"),
    ("bias of another width", BIASES | {"up_bias": lambda: zeros(S, I + 1)}, ValueError,
     r"up bias: expected shape \(3, 8\), found \(3, 9\)"),
    ("up bias with other strides", BIASES | {"up_bias": lambda: zeros(S, 2 * I)[:, ::2]},
     ValueError, r"up bias: expected the strides of gate"),
    ("up bias of another dtype", BIASES | {"hidden": lambda: zeros(T, H).half(),
      "gate": lambda: zeros(S, I, H).half(), "up": lambda: zeros(S, I, H).half(),
      "down": lambda: zeros(S, H, I).half(), "up_bias": lambda: zeros(S, I).half(),
      "formats": lambda: {"gate": "f16", "up": "f16", "down": "f16"}}, TypeError,
     r"up bias: expected torch.float32, found torch.float16"),
    ("unknown format", {"formats": lambda: {"down": "fp7"}}, ValueError,
     r"down: expected a weight format of bf16, f16, f32, e4m3, .*found 'fp7'"),
    ("format of another dtype", {"formats": lambda: {"gate": "f16"}}, TypeError,
     r"hidden: expected torch.float16, found torch.float32"),
    ("scales that the format has not", {"down_scales": lambda: zeros(S, 1, 1)}, ValueError,
     r"down scales: expected None for f32, found \(3, 1, 1\)"),
    ("strided hidden rows", {"hidden": lambda: zeros(T, 2 * H)[:, ::2]}, ValueError, r"hidden"),
    ("strided ids", {"ids": lambda: zeros(T, 2 * K, **ids_of)[:, ::2]}, ValueError,
     r"ids: expected a contiguous"),
    ("mixed weights", {"down": lambda: zeros(S, H, I, dtype=torch.float16)}, TypeError,
     r"down: expected torch.float32, found torch.float16"),
    ("double", {"hidden": lambda: zeros(T, H, dtype=torch.float64)}, TypeError, r"float64"),
    ("ids that are floats", {"ids": lambda: zeros(T, K)}, TypeError, r"ids"),
    ("weights that are integers", {"topk_weights": lambda: zeros(T, K, **ids_of)}, TypeError,
     r"topk_weights"),
    ("another device", {"down": lambda: torch.zeros(S, H, I, device="meta")}, ValueError,
     r"down: expected (cpu|cuda:0), found meta"),
    ("ids elsewhere", {"ids": lambda: torch.zeros(T, K, device="meta", **ids_of)}, ValueError,
     r"ids: expected (cpu|cuda:0), found meta"),
    ("weights elsewhere", {"topk_weights": lambda: torch.zeros(T, K, device="meta")}, ValueError,
     r"topk_weights: expected (cpu|cuda:0), found meta"),
    ("bias elsewhere", BIASES | {"gate_bias": lambda: torch.zeros(S, I, device="meta")}, ValueError,
     r"gate bias: expected (cpu|cuda:0), found meta"),
    ("out elsewhere", {"out": lambda: torch.zeros(T, H, device="meta")}, ValueError,
     r"out: expected (cpu|cuda:0), found meta"),
    ("hidden of another dtype", {"hidden": lambda: zeros(T, H, dtype=torch.bfloat16)}, TypeError,
     r"hidden: expected torch.float32, found torch.bfloat16"),
    ("bias of another dtype", BIASES | {"down_bias": lambda: zeros(S, H, dtype=torch.float16)},
     TypeError, r"down bias: expected torch.float32, found torch.float16"),
    ("routing weights in double", {"topk_weights": lambda: zeros(T, K, dtype=torch.float64)},
     TypeError, r"topk_weights: expected torch.float32 or .* found torch.float64"),
    ("no slots", {"gate": lambda: zeros(0, I, H), "up": lambda: zeros(0, I, H),
      "down": lambda: zeros(0, H, I)},
     ValueError, r"down: expected no empty dimension"),
    ("no experts", {"num_experts": lambda: 0}, ValueError,
     r"num_experts: expected at least 1, found 0"),
    ("strided out rows", {"out": lambda: zeros(T, 2 * H)[:, ::2]}, ValueError,
     r"out: expected unit stride"),
    ("out of another shape", {"out": lambda: zeros(T, H + 1)}, ValueError, r"out: expected shape"),
    ("out of another dtype", {"out": lambda: zeros(T, H, dtype=torch.float16)}, TypeError, r"out"),
    ("unknown activation", {"form": lambda: ExpertForm(Gate(activation="swish"))}, ValueError,
     r"activation: expected one of silu, .* found 'swish'"),
    ("unknown gate function", {"form": lambda: ExpertForm(Gate("swiglu"))}, ValueError,
     r"gate function: expected one of glu, .* found 'swiglu'"),
    ("unknown path", {"path": lambda: "fast"}, ValueError, r"'fast'"),
    ("decode path for many tokens", {"hidden": lambda: zeros(17, H),
      "ids": lambda: zeros(17, K, **ids_of), "topk_weights": lambda: zeros(17, K),
      "path": lambda: "shared"}, ValueError, r"at most 16 tokens, found 17"),
]  # fmt: skip


@pytest.mark.parametrize("planned", [False, True], ids=["new", "planned"])
@pytest.mark.parametrize("changes,kind,message", [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_refused(
    changes: dict[str, Callable[[], Any]], kind: type[Exception], message: str, planned: bool
) -> None:
    """Also after a good call, and one whose ids nobody checked, have left a plan behind."""
    arguments = good() | {name: make() for name, make in changes.items()}
    if planned:
        for call in (good(), arguments | {"check_ids": False}):
            with pytest.raises((AssertionError, ValueError, TypeError, RuntimeError)):
                fused_experts(**arguments_of(call))
        assert launch_plan.PLANS
    with pytest.raises(kind, match=message):
        fused_experts(**arguments_of(arguments))


def test_ids_are_not_read_when_the_caller_vouches() -> None:
    arguments = good() | {"ids": zeros(T, K, dtype=torch.int64) + 99}
    with pytest.raises(AssertionError, match="launched"):
        fused_experts(**arguments_of(arguments), check_ids=False)


def test_routes_of_the_wrong_dtype() -> None:
    arguments = good()
    del arguments["topk_weights"]
    with pytest.raises(TypeError, match=r"routes: expected torch.float32, found torch.float16"):
        expert_routes(**arguments_of(arguments), routes=zeros(T, K, H, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"routes: expected shape"):
        expert_routes(**arguments_of(arguments), routes=zeros(T, K, H + 1))


def test_combine_refuses_what_does_not_fit() -> None:
    routes, ids, weights = zeros(T, K, H), zeros(T, K, dtype=torch.int64), zeros(T, K)
    with pytest.raises(ValueError, match=r"ids: expected shape \(2, 2\), found \(2, 3\)"):
        combine(routes, zeros(T, K + 1, dtype=torch.int64), weights)
    with pytest.raises(TypeError, match=r"ids: expected torch\.int32 or torch\.int64"):
        combine(routes, weights, weights)
    with pytest.raises(ValueError, match=r"ids: expected (cpu|cuda:0), found meta"):
        combine(routes, ids.to("meta"), weights)
    with pytest.raises(ValueError, match=r"topk_weights: expected shape \(2, 2\), found \(2, 1\)"):
        combine(routes, ids, weights[:, :1].contiguous())
    with pytest.raises(ValueError, match=r"routes: expected a contiguous"):
        combine(zeros(T, K, 2 * H)[..., ::2], ids, weights)
    with pytest.raises(TypeError, match=r"out: expected torch.float32, found torch.float16"):
        combine(routes, ids, weights, dtype=torch.float32, out=zeros(T, H, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"routes: expected \[T, k, H\]"):
        combine(zeros(T, H), ids, weights)


@pytest.mark.parametrize(
    ("name", "bytes_", "view"),
    [
        ("q8_0", 34, lambda raw: raw[:, :, 1:35]),
        ("q4_k", 144, lambda raw: raw[:, :, 8:152]),
        ("q5_1", 24, lambda raw: raw[:, :, ::2][:, :, :24]),
        ("palette3", 112, lambda raw: raw[:, :, 2:114]),
    ],
)
def test_blocks_at_places_that_words_do_not_have(
    name: str, bytes_: int, view: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    columns = {"q4_k": 256, "palette3": 64}.get(name, 32)
    gate = view(torch.zeros(S, I, 4 * bytes_, dtype=torch.uint8, device=DEVICE))
    arguments = good() | {
        "hidden": zeros(T, columns), "gate": gate, "up": gate, "down": zeros(S, columns, I),
        "formats": {"gate": name, "up": name},
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"gate: expected (blocks at multiples of|unit stride)"):
        fused_experts(**arguments_of(arguments))


@pytest.mark.parametrize("name,bytes_", [("q8_0", 34), ("palette3", 112)])
def test_columns_that_are_no_whole_blocks(name: str, bytes_: int) -> None:
    """Not even where the bytes are those of the whole blocks."""
    gate = torch.zeros(S, I, bytes_, dtype=torch.uint8, device=DEVICE)
    columns = FORMATS[name].pack + 8
    arguments = good() | {
        "hidden": zeros(T, columns), "gate": gate, "up": gate, "down": zeros(S, columns, I),
        "formats": {"gate": name, "up": name},
    }  # fmt: skip
    with pytest.raises(ValueError, match=rf"gate: expected a multiple of .*, found {columns}"):
        fused_experts(**arguments_of(arguments))
