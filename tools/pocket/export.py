"""Writes a trained checkpoint as a Qwen3-MoE model that `from_pretrained` loads.

Every expert's matrices stand apart under the names such checkpoints have on the Hub; everything
is bfloat16. `--compare` loads the result through transformers and compares the two
implementations' predictions on held-out text.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from tools.pocket.batches import windows
from tools.pocket.corpus import documents
from tools.pocket.model import Pocket
from tools.pocket.shape import Shape
from tools.pocket.tokenizer import EOS, PAD

PLAIN = {  # ours, of one layer, to the Hub's
    "norm_in": "input_layernorm",
    "norm_mid": "post_attention_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "router.weight": "mlp.gate",
}
STACKED = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def hub_tensors(model: Pocket) -> dict[str, Tensor]:
    ours = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
    out = {
        "model.embed_tokens.weight": ours["embed"],
        "model.norm.weight": ours["norm_out"],
    }
    for n in range(model.s.layers):
        for name, hub in PLAIN.items():
            out[f"model.layers.{n}.{hub}.weight"] = ours[f"layers.{n}.{name}"]
        for name, hub in STACKED.items():
            for e, matrix in enumerate(ours[f"layers.{n}.{name}"]):
                out[f"model.layers.{n}.mlp.experts.{e}.{hub}.weight"] = matrix.clone()
    return out


def load(checkpoint: Path, work: torch.dtype = torch.bfloat16) -> Pocket:
    state = torch.load(checkpoint, weights_only=True)
    model = Pocket(Shape(**state["shape"]), work)
    model.load_state_dict(state["model"])
    return model


def export(model: Pocket, out: Path) -> None:
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    eos, pad = tokenizer.token_to_id(EOS), tokenizer.token_to_id(PAD)
    save_file(hub_tensors(model), out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    config = model.s.config(eos_token_id=eos, pad_token_id=pad)
    generation = {
        "eos_token_id": eos,
        "pad_token_id": pad,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.95,
        "max_new_tokens": 128,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


@torch.no_grad()
def compare(model: Pocket, out: Path) -> None:
    """Both implementations in float32 on the rounded weights must predict the same."""
    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    problems = {key: names for key, names in info.items() if names}
    assert not problems, problems
    for p in model.parameters():
        p.copy_(p.bfloat16())
    unseen = [d for d in documents() if d.held_out]
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    x, y = (part[:8] for part in windows(unseen, tokenizer, model.s.context))
    states, _, _ = model(x)
    ours = (states @ model.embed.T).log_softmax(-1)
    theirs = loaded(input_ids=x).logits.log_softmax(-1)
    gap = (ours - theirs).abs().max().item()
    losses = [F.nll_loss(p.flatten(0, 1), y.flatten()).item() for p in (ours, theirs)]
    print(f"loss {losses[0]:.5f} trained, {losses[1]:.5f} loaded, largest difference {gap:.1e}")
    assert abs(losses[0] - losses[1]) < 1e-3, "the two implementations differ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("build/pocket/checkpoint.pt"))
    parser.add_argument("--out", type=Path, default=Path("moeinf/pocket"))
    parser.add_argument("--compare", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    model = load(args.checkpoint, torch.float32)
    export(model, args.out)
    if args.compare:
        compare(model, args.out)


if __name__ == "__main__":
    main()
