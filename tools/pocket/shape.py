"""The built-in model's shape, and the configuration file a Qwen3-MoE loader reads."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    vocab: int = 3072
    hidden: int = 160
    intermediate: int = 64  # of one expert
    layers: int = 8
    experts: int = 32
    top_k: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    context: int = 512
    rope_theta: float = 10_000.0
    eps: float = 1e-6

    def config(self, *, eos_token_id: int, pad_token_id: int) -> dict[str, Any]:
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate * self.top_k,  # of dense layers: there are none
            "moe_intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "use_sliding_window": False,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "use_cache": True,
            "bos_token_id": None,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
            "torch_dtype": "bfloat16",
        }
