"""The statements that make queries, keys and values, as families of transformers write them.

All of them compute W x + bias, norms, and a rotary embedding; see csrc/compute/attention_inputs.h.
"""

from __future__ import annotations

from dataclasses import dataclass

SHAPES = [
    "input_shape = hidden_states.shape[:-1]",
    "hidden_shape = (*input_shape, -1, self.head_dim)",
]
TURNS = [
    "cos, sin = position_embeddings",
    "query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)",
]
NAMES = ("query_states", "key_states", "value_states")
LAYERS = ("q_proj", "k_proj", "v_proj")
NORMS = ("q_norm", "k_norm")


def _in_heads(view: str) -> list[str]:
    return [f"{name} = {name}.view({view}).transpose(1, 2)" for name in NAMES]


def _projected(query: str, key: str, then: str = "") -> list[str]:
    parts = (query, key, "self.v_proj(hidden_states)")
    return [f"{name} = {part}{then}" for name, part in zip(NAMES, parts, strict=True)]


PLAIN = ("self.q_proj(hidden_states)", "self.k_proj(hidden_states)")
OF_THEMSELVES = [(name, f"self.{norm}({name})") for name, norm in zip(NAMES, NORMS, strict=False)]
HEADS = ".view(hidden_shape).transpose(1, 2)"
NORMED = [
    f"self.{norm}(self.{layer}(hidden_states))" for norm, layer in zip(NORMS, LAYERS, strict=False)
]
CLIP = "if self.config.clip_qkv is not None:\n" + "\n".join(
    f"    {name}.clamp_(min=-self.config.clip_qkv, max=self.config.clip_qkv)" for name in NAMES
)


@dataclass(frozen=True)
class Written:
    """How families write what is replaced.

    norms: "head" or "row" that they are of, "" without.
    unless: a test; where it holds, the model's own forward runs.
    """

    statements: list[str]
    norms: str
    unless: str = ""


WRITTEN = (
    # Qwen2Moe, Mixtral, gpt-oss, Phi-3.5-MoE, GraniteMoe, MiniMax-Text, Aria, SolarOpen, ...
    Written(_projected(*PLAIN, HEADS), norms=""),
    # Qwen3Moe, Qwen3-VL and Qwen3-Omni, dots.llm1, ...
    Written(
        [
            f"{name} = self.{norm}(self.{layer}(hidden_states).view(hidden_shape)).transpose(1, 2)"
            for name, norm, layer in zip(NAMES, NORMS, LAYERS, strict=False)
        ]
        + [f"value_states = self.v_proj(hidden_states){HEADS}"],
        norms="head",
    ),
    # FlexOlmo, MiniMax-M2
    Written([*_projected(*NORMED), *_in_heads("hidden_shape")], norms="row"),
    # OLMoE
    Written(
        [*_projected(*NORMED), CLIP, *_in_heads("*hidden_shape")],
        norms="row",
        unless="self.config.clip_qkv is not None",
    ),
    # HunYuan-V3
    Written(
        [*_projected(*PLAIN, HEADS), *(f"{name} = {normed}" for name, normed in OF_THEMSELVES)],
        norms="head",
    ),
    # GLM-4.5 and later ones, with norms and without
    *(
        Written(
            [
                *_projected(*PLAIN, ".view(hidden_shape)"),
                "\n    ".join(
                    ["if self.use_qk_norm:"]
                    + [f"{name} = {normed}" for name, normed in OF_THEMSELVES]
                ),
                *(f"{name} = {name}.transpose(1, 2)" for name in NAMES),
            ],
            norms=norms,
            unless=unless,
        )
        for norms, unless in (("head", "not self.use_qk_norm"), ("", "self.use_qk_norm"))
    ),
)
