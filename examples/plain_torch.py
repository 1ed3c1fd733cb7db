"""A MoE layer in plain torch, whose experts lie in RAM and are computed out of a cache.

python examples/plain_torch.py
"""

import torch

import moeinf


class SparseMoE(torch.nn.Module):
    """A router of your own, and experts out of `cache`; a graph of it has no breaks."""

    def __init__(self, cache: moeinf.ExpertCache, layer: int, top_k: int = 2) -> None:
        super().__init__()
        self.cache, self.layer, self.top_k = cache, layer, top_k
        self.router = torch.nn.Linear(cache.layout.hidden, cache.store.num_experts, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        scores = self.router(hidden).softmax(-1)
        weights, ids = scores.topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        return moeinf.fused_experts(hidden, ids, weights, self.cache, self.layer)


def main() -> None:
    experts, hidden, intermediate = 8, 64, 128
    layers = [
        {
            "gate_up": torch.randn(experts, 2 * intermediate, hidden) / hidden**0.5,
            "down": torch.randn(experts, hidden, intermediate) / intermediate**0.5,
        }
        for _ in range(2)
    ]
    store = moeinf.ExpertStore.from_tensors(layers, top_k=2)
    cache = moeinf.ExpertCache(store, memory="50%", name="example")
    model = torch.nn.Sequential(SparseMoE(cache, 0), SparseMoE(cache, 1))
    tokens = torch.randn(5, hidden)
    with torch.inference_mode():
        expected = model(tokens)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(tokens), expected)
        assert torch.equal(compiled(tokens[:1]), model(tokens[:1]))
    stats = cache.stats()
    print(f"{tuple(expected.shape)}: {stats['hits']} of {stats['accesses']} experts were in slots")


if __name__ == "__main__":
    main()
