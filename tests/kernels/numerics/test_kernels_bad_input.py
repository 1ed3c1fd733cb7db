"""What does not fit is refused before any launch, with what was expected and what was found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import DEVICE

from moeinf.kernels import launch, plans
from moeinf.kernels.experts import ReadThrough, combine, expert_routes, experts

T, K, S, H, I = 2, 2, 3, 16, 8  # noqa: E741


def good() -> dict[str, Any]:
    return {
        "hidden": torch.zeros(T, H, device=DEVICE),
        "slot_ids": torch.zeros(T, K, dtype=torch.int64, device=DEVICE),
        "topk_weights": torch.zeros(T, K, device=DEVICE),
        "gate_up": torch.zeros(S, 2 * I, H, device=DEVICE),
        "down": torch.zeros(S, H, I, device=DEVICE),
    }


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


@pytest.fixture(autouse=True)
def no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    def launched(*_: object, **__: object) -> None:
        raise AssertionError("launched")

    monkeypatch.setattr(plans.Plan, "launch", launched)
    monkeypatch.setattr(launch, "run_grouped", launched)
    monkeypatch.setattr(plans, "PLANS", {})


def test_what_fits_would_be_launched() -> None:
    with pytest.raises(AssertionError, match="launched"):
        experts(**good())


ids_of = {"dtype": torch.int64}
CASES: list[tuple[str, dict[str, Callable[[], Any]], type[Exception], str]] = [
    ("slot id too large", {"slot_ids": lambda: zeros(T, K, **ids_of) + 3}, ValueError,
     r"slot_ids: expected -1 or 0 to 2, found 3"),
    ("slot id too small", {"slot_ids": lambda: zeros(T, K, **ids_of) - 2}, ValueError,
     r"found -2"),
    ("expert id beyond the map", {"slot_ids": lambda: zeros(T, K, **ids_of) + 4,
      "expert_map": lambda: zeros(4, **ids_of)}, ValueError,
     r"expert ids: expected -1 or 0 to 3, found 4"),
    ("map beyond the slots", {"expert_map": lambda: zeros(4, **ids_of) + 3}, ValueError,
     r"expert_map: expected -1 or 0 to 2, found 3"),
    ("negative expert id", {"slot_ids": lambda: zeros(T, K, **ids_of) - 2,
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
    ("no tokens", {"hidden": lambda: zeros(0, H), "slot_ids": lambda: zeros(0, K, **ids_of),
      "topk_weights": lambda: zeros(0, K)}, ValueError, r"expected at least 1 token, found 0"),
    ("k above the bound", {"slot_ids": lambda: zeros(T, 33, **ids_of),
      "topk_weights": lambda: zeros(T, 33)}, ValueError, r"expected 1 to 32 .* found 33"),
    ("no routes", {"slot_ids": lambda: zeros(T, 0, **ids_of)}, ValueError, r"found 0"),
    ("hidden has three dimensions", {"hidden": lambda: zeros(1, T, H)}, ValueError,
     r"hidden: expected 2 dimensions, found shape \(1, 2, 16\)"),
    ("ids for other tokens", {"slot_ids": lambda: zeros(T + 1, K, **ids_of)}, ValueError,
     r"slot_ids: expected shape \(2, 2\), found \(3, 2\)"),
    ("weights for other routes", {"topk_weights": lambda: zeros(T, K + 1)}, ValueError,
     r"topk_weights: expected shape \(2, 2\), found \(2, 3\)"),
    ("gate_up of another width", {"gate_up": lambda: zeros(S, 2 * I, H + 1)}, ValueError,
     r"gate_up .*expected shape \(3, 16, 16\), found \(3, 16, 17\)"),
    ("plain weights, gated call", {"gate_up": lambda: zeros(S, I, H)}, ValueError,
     r"expected shape \(3, 16, 16\), found \(3, 8, 16\)"),
    ("down of another width", {"down": lambda: zeros(S, H + 1, I)}, ValueError, r"down"),
    ("fewer down slots", {"down": lambda: zeros(S - 1, H, I)}, ValueError, r"gate_up"),
    ("one bias only", {"gate_up_bias": lambda: zeros(S, 2 * I)}, ValueError, r"both"),
    ("bias of another width", {"gate_up_bias": lambda: zeros(S, I),
      "down_bias": lambda: zeros(S, H)}, ValueError, r"gate_up_bias: expected shape \(3, 16\)"),
    ("no unit stride", {"gate_up": lambda: zeros(S, 4 * I, 2 * H)[:, ::2, ::2]}, ValueError,
     r"gate_up: expected a unit stride .* found strides \(1024, 64, 2\)"),
    ("strided hidden rows", {"hidden": lambda: zeros(T, 2 * H)[:, ::2]}, ValueError, r"hidden"),
    ("strided ids", {"slot_ids": lambda: zeros(T, 2 * K, **ids_of)[:, ::2]}, ValueError,
     r"slot_ids: expected a contiguous"),
    ("mixed weights", {"down": lambda: zeros(S, H, I, dtype=torch.float16)}, TypeError,
     r"down: expected torch.float32, found torch.float16"),
    ("double", {"hidden": lambda: zeros(T, H, dtype=torch.float64)}, TypeError, r"float64"),
    ("ids that are floats", {"slot_ids": lambda: zeros(T, K)}, TypeError, r"slot_ids"),
    ("weights that are integers", {"topk_weights": lambda: zeros(T, K, **ids_of)}, TypeError,
     r"topk_weights"),
    ("another device", {"down": lambda: torch.zeros(S, H, I, device="meta")}, ValueError,
     r"down: expected (cpu|cuda:0), found meta"),
    ("ids elsewhere", {"slot_ids": lambda: torch.zeros(T, K, device="meta", **ids_of)}, ValueError,
     r"slot_ids: expected (cpu|cuda:0), found meta"),
    ("weights elsewhere", {"topk_weights": lambda: torch.zeros(T, K, device="meta")}, ValueError,
     r"topk_weights: expected (cpu|cuda:0), found meta"),
    ("bias elsewhere", {"gate_up_bias": lambda: torch.zeros(S, 2 * I, device="meta"),
      "down_bias": lambda: zeros(S, H)}, ValueError,
     r"gate_up_bias: expected (cpu|cuda:0), found meta"),
    ("out elsewhere", {"out": lambda: torch.zeros(T, H, device="meta")}, ValueError,
     r"out: expected (cpu|cuda:0), found meta"),
    ("hidden of another dtype", {"hidden": lambda: zeros(T, H, dtype=torch.bfloat16)}, TypeError,
     r"gate_up: expected torch.bfloat16, found torch.float32"),
    ("bias of another dtype", {"gate_up_bias": lambda: zeros(S, 2 * I, dtype=torch.float16),
      "down_bias": lambda: zeros(S, H)}, TypeError,
     r"gate_up_bias: expected torch.float32, found torch.float16"),
    ("strided bias", {"gate_up_bias": lambda: zeros(S, 4 * I)[:, ::2],
      "down_bias": lambda: zeros(S, H)}, ValueError, r"gate_up_bias: expected unit stride"),
    ("routing weights in double", {"topk_weights": lambda: zeros(T, K, dtype=torch.float64)},
     TypeError, r"topk_weights: expected float32, bfloat16 or float16, found torch.float64"),
    ("transposed weights, untransposed call", {"gate_up": lambda: zeros(S, H, 2 * I + 2)},
     ValueError, r"gate_up .*expected shape \(3, 16, 16\), found \(3, 16, 18\)"),
    ("no slots", {"gate_up": lambda: zeros(0, 2 * I, H), "down": lambda: zeros(0, H, I)},
     ValueError, r"down: expected no empty dimension"),
    ("no experts", {"num_experts": lambda: 0}, ValueError,
     r"num_experts: expected at least 1, found 0"),
    ("strided out rows", {"out": lambda: zeros(T, 2 * H)[:, ::2]}, ValueError,
     r"out: expected unit stride"),
    ("interleaved without gate", {"interleaved": lambda: True, "gated": lambda: False,
      "gate_up": lambda: zeros(S, I, H)}, ValueError, r"interleaved=True needs gate and up"),
    ("out of another shape", {"out": lambda: zeros(T, H + 1)}, ValueError, r"out: expected shape"),
    ("out of another dtype", {"out": lambda: zeros(T, H, dtype=torch.float16)}, TypeError, r"out"),
    ("unknown activation", {"activation": lambda: "swish"}, ValueError, r"'swish'"),
    ("clamped without gate", {"activation": lambda: "swiglu_clamped", "gated": lambda: False},
     ValueError, r"gated=True"),
    ("unknown path", {"path": lambda: "fast"}, ValueError, r"'fast'"),
    ("decode path for many tokens", {"hidden": lambda: zeros(17, H),
      "slot_ids": lambda: zeros(17, K, **ids_of), "topk_weights": lambda: zeros(17, K),
      "path": lambda: "shared"}, ValueError, r"at most 16 tokens, found 17"),
    ("read-through for two tokens", {"read_through": lambda: ReadThrough(
      zeros(K, **ids_of), zeros(K, **ids_of))}, ValueError, r"expected 1 token, found 2"),
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
                experts(**call)
        assert plans.PLANS
    with pytest.raises(kind, match=message):
        experts(**arguments)


SOURCE = ReadThrough(zeros(K, **ids_of), zeros(K, **ids_of))
READ_THROUGH_CASES: list[tuple[str, dict[str, object], type[Exception], str]] = [
    ("another path", {"path": "shared", "read_through": SOURCE}, ValueError,
     r"read_through: expected path 'vector', found 'shared'"),
    ("addresses of other routes", {"read_through": ReadThrough(
      zeros(K + 1, **ids_of), SOURCE.down)}, ValueError,
     r"read_through.gate_up: expected shape \(2,\), found \(3,\)"),
    ("addresses in 32 bits", {"read_through": ReadThrough(SOURCE.gate_up, SOURCE.down.int())},
     TypeError, r"read_through.down: expected torch.int64, found torch.int32"),
    ("no addresses of biases", {"read_through": SOURCE, "gate_up_bias": zeros(S, 2 * I),
      "down_bias": zeros(S, H)}, ValueError, r"read_through.gate_up_bias: .* found None"),
    ("slots that are not aligned", {"read_through": SOURCE, "gate_up": torch.as_strided(
      zeros(S * 260), (S, 2 * I, H), (257, H, 1))}, ValueError,
     r"gate_up: read_through expects slots aligned to 16 bytes, .* and 1028 bytes from slot"),
]  # fmt: skip


@pytest.mark.parametrize(
    "changes,kind,message",
    [case[1:] for case in READ_THROUGH_CASES],
    ids=[case[0] for case in READ_THROUGH_CASES],
)
def test_read_through_refused(
    changes: dict[str, object], kind: type[Exception], message: str
) -> None:
    arguments = good()
    for name in ("hidden", "slot_ids", "topk_weights"):
        arguments[name] = arguments[name][:1]
    with pytest.raises(kind, match=message):
        experts(**(arguments | changes))


def test_ids_are_not_read_when_the_caller_vouches() -> None:
    arguments = good() | {"slot_ids": zeros(T, K, dtype=torch.int64) + 99}
    with pytest.raises(AssertionError, match="launched"):
        experts(**arguments, check_ids=False)


def test_routes_of_the_wrong_dtype() -> None:
    arguments = good()
    del arguments["topk_weights"]
    with pytest.raises(TypeError, match=r"routes: expected torch.float32, found torch.float16"):
        expert_routes(**arguments, routes=zeros(T, K, H, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"routes: expected shape"):
        expert_routes(**arguments, routes=zeros(T, K, H + 1))


def test_combine_refuses_what_does_not_fit() -> None:
    routes, ids, weights = zeros(T, K, H), zeros(T, K, dtype=torch.int64), zeros(T, K)
    with pytest.raises(ValueError, match=r"ids: expected shape \(2, 2\), found \(2, 3\)"):
        combine(routes, zeros(T, K + 1, dtype=torch.int64), weights)
    with pytest.raises(TypeError, match="ids: expected int32 or int64"):
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
