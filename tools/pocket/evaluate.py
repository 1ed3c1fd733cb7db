"""Measures the built-in model as shipped: loaded by transformers, in bfloat16, on held-out files.

Writes one JSON file with perplexity per token, bits per byte, the routing of every layer and
texts the model writes. A token is scored with at least half a window of context before it.
"""

import argparse
import datetime
import json
import math
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.pocket.corpus import Document, documents
from tools.pocket.routing import Routing

PROMPTS = ("def ", "class ", "import os\n", '"""Return the', "    def __init__(self", "try:\n")


def token_bytes(tokenizer: Any) -> Tensor:
    """A byte-level token spells each byte as one character; special tokens stand for none."""
    special = set(tokenizer.all_special_tokens)
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return torch.tensor([0 if name in special else len(name) for name in names])


@torch.no_grad()
def score(model: Any, tokenizer: Any, docs: list[Document], routing: list[Routing]) -> dict:
    width, batch = model.config.max_position_embeddings, 16
    flat = [tokenizer.eos_token_id]
    for doc in docs:
        flat += [*tokenizer.encode(doc.text, verbose=False), tokenizer.eos_token_id]
    ids, sizes = torch.tensor(flat), token_bytes(tokenizer)
    starts = list(range(0, len(ids) - width, width // 2))
    nats, tokens, size = 0.0, 0, 0
    for i in tqdm(range(0, len(starts), batch), unit="batch", leave=False):
        some = starts[i : i + batch]
        x = torch.stack([ids[a : a + width] for a in some])
        y = torch.stack([ids[a + 1 : a + width + 1] for a in some])
        out = model(input_ids=x, output_router_logits=True)
        fresh = torch.ones_like(y, dtype=torch.bool)
        fresh[1 if i == 0 else 0 :, : width // 2] = False
        loss = F.cross_entropy(out.logits.float().transpose(1, 2), y, reduction="none")
        nats += loss[fresh].sum().item()
        tokens += int(fresh.sum())
        size += int(sizes[y[fresh]].sum())
        for layer, logits in zip(routing, out.router_logits, strict=True):
            chosen = logits.float().topk(layer.top_k, dim=-1).indices.view(*x.shape, -1)
            for row in chosen[:, width // 2 :]:
                layer.add(row)
    return {
        "files": len(docs),
        "tokens": tokens,
        "bytes": size,
        "loss": round(nats / tokens, 4),
        "perplexity": round(math.exp(nats / tokens), 3),
        "bits_per_byte": round(nats / math.log(2) / size, 4),
    }


def write(model: Any, tokenizer: Any, prompt: str, *, sample: bool) -> str:
    torch.manual_seed(1)
    x = tokenizer(prompt, return_tensors="pt")
    how = {"temperature": 0.7, "top_p": 0.95} if sample else {"temperature": None, "top_p": None}
    out = model.generate(**x, do_sample=sample, max_new_tokens=120, **how)
    return tokenizer.decode(out[0])


def machine() -> dict[str, Any]:
    cpu = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0].split(":", 1)[1].strip() if lines else cpu
    head = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(head, check=False, capture_output=True, text=True)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("moeinf/pocket"))
    parser.add_argument("--log", type=Path, default=Path("build/pocket/log.json"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pocket.json"))
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    c = model.config
    routing = [Routing(c.num_experts, c.num_experts_per_tok) for _ in range(c.num_hidden_layers)]
    unseen = [d for d in documents() if d.held_out]
    held_out = {
        "library": score(model, tokenizer, [d for d in unseen if not d.is_test], routing),
        "tests": score(model, tokenizer, [d for d in unseen if d.is_test], routing),
    }
    samples = [
        {"prompt": p, "sampled": sample, "text": write(model, tokenizer, p, sample=sample)}
        for p in PROMPTS
        for sample in (False, True)
    ]
    training = json.loads(args.log.read_text()) if args.log.exists() else None
    result = {
        **machine(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out": held_out,
        "routing": [layer.summary() for layer in routing],
        "samples": samples,
        "training": training and {"arguments": training["arguments"], "end": training["log"][-1]},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(held_out, indent=1))


if __name__ == "__main__":
    main()
