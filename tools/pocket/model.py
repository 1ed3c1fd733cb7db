"""The built-in model as it is trained: the arithmetic of Qwen3-MoE, laid out for a CPU.

Parameters are float32, the arithmetic is `work`: bfloat16, or float32 to compare. Experts of a
layer are stacked in one tensor; `export.py` writes them apart under the names a Qwen3-MoE
checkpoint has, loads them through transformers and compares the predictions.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.pocket.experts import experts, head_loss
from tools.pocket.shape import Shape


def rope(length: int, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    half = torch.arange(0, shape.head_dim, 2) / shape.head_dim
    angle = torch.outer(torch.arange(length), shape.rope_theta**-half).repeat(1, 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * turn[0] + torch.cat((-right, left), dim=-1) * turn[1]


class Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.q = nn.Parameter(torch.empty(s.heads * s.head_dim, s.hidden))
        self.k = nn.Parameter(torch.empty(s.kv_heads * s.head_dim, s.hidden))
        self.v = nn.Parameter(torch.empty(s.kv_heads * s.head_dim, s.hidden))
        self.o = nn.Parameter(torch.empty(s.hidden, s.heads * s.head_dim))
        self.q_norm = nn.Parameter(torch.ones(s.head_dim))
        self.k_norm = nn.Parameter(torch.ones(s.head_dim))

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        s, (b, n, _) = self.s, x.shape
        wide = x @ torch.cat((self.q, self.k, self.v)).to(x.dtype).T
        q, k, v = wide.view(b, n, -1, s.head_dim).split((s.heads, s.kv_heads, s.kv_heads), dim=2)
        scale = s.head_dim**-0.5
        q = F.rms_norm(q, q.shape[-1:], (self.q_norm * scale).to(x.dtype), s.eps)
        k = F.rms_norm(k, k.shape[-1:], self.k_norm.to(x.dtype), s.eps)
        q, k = rotate(q.transpose(1, 2), turn), rotate(k.transpose(1, 2), turn)
        # Heads that share a key lie next to each other: fold them into the query's length.
        group = s.heads // s.kv_heads
        q = q.reshape(b * s.kv_heads, group * n, s.head_dim)
        k = k.reshape(b * s.kv_heads, n, s.head_dim)
        v = v.transpose(1, 2).reshape(b * s.kv_heads, n, s.head_dim)
        p = torch.softmax(torch.baddbmm(mask, q, k.transpose(1, 2)), dim=-1)
        y = torch.bmm(p, v).view(b, s.heads, n, s.head_dim).transpose(1, 2)
        return y.reshape(b, n, -1) @ self.o.to(x.dtype).T


class Router(nn.Module):
    """Chooses `top_k` experts per token and keeps what the two router losses need."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.weight = nn.Parameter(torch.empty(s.experts, s.hidden))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = (x @ self.weight.to(x.dtype).T).float()
        p = logits.softmax(dim=-1)
        weight, chosen = p.topk(self.s.top_k, dim=-1)
        load = torch.bincount(chosen.flatten(), minlength=self.s.experts) / chosen.numel()
        balance = self.s.experts * (load * p.mean(0)).sum()
        size = logits.logsumexp(dim=-1).square().mean()
        return chosen, weight / weight.sum(-1, keepdim=True), balance, size


class Layer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.norm_in = nn.Parameter(torch.ones(s.hidden))
        self.attention = Attention(s)
        self.norm_mid = nn.Parameter(torch.ones(s.hidden))
        self.router = Router(s)
        self.gate = nn.Parameter(torch.empty(s.experts, s.intermediate, s.hidden))
        self.up = nn.Parameter(torch.empty(s.experts, s.intermediate, s.hidden))
        self.down = nn.Parameter(torch.empty(s.experts, s.hidden, s.intermediate))

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor):
        s = self.s
        y = F.rms_norm(x, (s.hidden,), self.norm_in.to(x.dtype), s.eps)
        x = x + self.attention(y, turn, mask)
        y = F.rms_norm(x, (s.hidden,), self.norm_mid.to(x.dtype), s.eps).flatten(0, 1)
        chosen, weight, balance, size = self.router(y)
        both = torch.cat((self.gate, self.up), dim=1).to(x.dtype)
        return x + experts(y, chosen, weight, both, self.down.to(x.dtype)).view_as(x), balance, size


class Pocket(nn.Module):
    def __init__(self, s: Shape, work: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.s, self.work = s, work
        self.embed = nn.Parameter(torch.empty(s.vocab, s.hidden))
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm_out = nn.Parameter(torch.ones(s.hidden))
        for name, p in self.named_parameters():
            if p.dim() > 1:
                out = name.endswith((".down", "attention.o"))
                fan = p.shape[-1] * (2 * s.layers if out else 1)
                nn.init.normal_(p, std=0.02 if "embed" in name or "router" in name else fan**-0.5)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids[b,n] to (final states [b,n,h], balance loss, router size loss)."""
        n = ids.shape[1]
        turn = rope(n, self.s, self.work)
        mask = torch.full((n, n), float("-inf"), dtype=self.work).triu(1)
        mask = mask.repeat(self.s.heads // self.s.kv_heads, 1)
        x = F.embedding(ids, self.embed).to(self.work)
        balance = size = torch.zeros(())
        for layer in self.layers:
            x, b, z = layer(x, turn, mask)
            balance, size = balance + b, size + z
        x = F.rms_norm(x, (self.s.hidden,), self.norm_out.to(self.work), self.s.eps)
        return x, balance / self.s.layers, size / self.s.layers

    def loss(self, ids: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, balance, size = self(ids)
        return head_loss(x.flatten(0, 1), self.embed.to(self.work), target.flatten()), balance, size
