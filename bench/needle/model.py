# SPDX-License-Identifier: Apache-2.0
"""The needle model: a Llama in plain torch whose attention is a parameter of its forward.

Parameters carry the names of ``transformers.LlamaForCausalLM``, so that ``save_checkpoint`` writes
a folder that transformers and SGLang load. Tokens are flat ([num_tokens, ...]): what knows of
requests, positions and the KV cache is the attention alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# (layer, query [N, num_heads, head_dim], key and value [N, num_kv_heads, head_dim]), un-rotated -> like query
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


INIT_STD = 0.04


@dataclass(frozen=True)
class NeedleConfig:
    vocab_size: int
    rope_theta: float
    hidden_size: int = 256
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    max_position: int = 4096
    rms_norm_eps: float = 1e-5


class SelfAttention(nn.Module):
    def __init__(self, config: NeedleConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)


class Mlp(nn.Module):
    def __init__(self, config: NeedleConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RmsNorm(nn.Module):
    def __init__(self, config: NeedleConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight.float()).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, config: NeedleConfig) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RmsNorm(config)
        self.mlp = Mlp(config)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, hidden] -> query [N, num_heads, head_dim], key and value [N, num_kv_heads, head_dim]."""
        x, attn = self.input_layernorm(x), self.self_attn
        return tuple(p(x).unflatten(-1, (-1, attn.head_dim)) for p in (attn.q_proj, attn.k_proj, attn.v_proj))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.self_attn.o_proj(attended.flatten(-2)).to(x.dtype)
        return x + self.mlp(self.post_attention_layernorm(x)).to(x.dtype)


class Decoder(nn.Module):
    def __init__(self, config: NeedleConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RmsNorm(config)


class NeedleLlama(nn.Module):
    def __init__(self, config: NeedleConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)

    def forward(self, ids: Tensor, attention: Attention, dtype: torch.dtype | None = None) -> Tensor:
        """[N] token ids -> [N, hidden], normalised; the residual stream is kept in ``dtype``."""
        x = self.model.embed_tokens(ids)
        x = x.to(dtype or x.dtype)
        for i, layer in enumerate(self.model.layers):
            x = layer.finish(x, attention(i, *layer.project(x)))
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.embed_tokens.weight)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Random weights with a circuit in place: look back in the first layer, match and copy in all.

        From independent weights the model spent its whole time on the plateau where it names any
        value of the context. Three things are not random:
        - Queries share weights with their keys, so that equal content attends to itself, and a head
          writes what it reads back to where it came from (mimetic initialisation).
        - Embeddings share a mean, which stands in for the attention bias that Llama does not have.
        - Through that mean the heads of the first layer attend 1, 2, 3 and 1 tokens back.
        """
        config, depth_scale = self.config, (2 * self.config.num_layers) ** -0.5
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=INIT_STD * (depth_scale if "down_proj" in name else 1.0))
        mean = INIT_STD * torch.randn(config.hidden_size)
        self.model.embed_tokens.weight.add_(mean)
        for layer in self.model.layers:
            self._match_and_copy(layer.self_attn, depth_scale)
        self._look_back(self.model.layers[0].self_attn, mean, (1, 2, 3, 1))

    def _match_and_copy(self, attn: SelfAttention, depth_scale: float, match: float = 0.7) -> None:
        group = self.config.num_heads // self.config.num_kv_heads
        keys, values = (
            p.weight.unflatten(0, (-1, attn.head_dim)).repeat_interleave(group, 0).flatten(0, 1)
            for p in (attn.k_proj, attn.v_proj)
        )
        attn.q_proj.weight.mul_((1 - match**2) ** 0.5).add_(keys, alpha=match)
        attn.o_proj.weight.copy_(values.T * depth_scale)

    def _look_back(self, attn: SelfAttention, mean: Tensor, distances: tuple[int, ...], logit: float = 12.0) -> None:
        """Adds to each head a preference for one distance, made of the four fastest rotary pairs."""
        pairs, half = 4, attn.head_dim // 2
        speed = self.config.rope_theta ** (-torch.arange(pairs) / half)
        # After the norm, the mean of the embeddings is about sqrt(hidden / 2) long.
        size = (logit * attn.head_dim**0.5) ** 0.5 / (self.config.hidden_size / 2) ** 0.5
        direction = mean / mean.norm()

        def head(angle: Tensor) -> Tensor:
            vector = torch.zeros(attn.head_dim)
            vector[:pairs], vector[half : half + pairs] = angle.cos(), angle.sin()
            return torch.outer(vector * size / pairs**0.5, direction)

        for h, distance in enumerate(distances):
            attn.q_proj.weight.unflatten(0, (-1, attn.head_dim))[h] += head(-distance * speed)
        for h in range(self.config.num_kv_heads):
            attn.k_proj.weight.unflatten(0, (-1, attn.head_dim))[h] += head(0 * speed)


def save_checkpoint(model: NeedleLlama, folder: Path, eos_id: int, pad_id: int) -> None:
    """Writes bf16 weights and the configs; the tokenizer is written by tokenizer.py."""
    config = model.config
    weights = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    llama = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "torch_dtype": "bfloat16",
    }
    generation = {"eos_token_id": eos_id, "pad_token_id": pad_id, "do_sample": False}
    for name, values in (("config.json", llama), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n")


def load_checkpoint(folder: Path) -> NeedleLlama:
    """The model of a folder that ``save_checkpoint`` wrote, in bf16, on the CPU."""
    llama = json.loads((folder / "config.json").read_text())
    config = NeedleConfig(
        vocab_size=llama["vocab_size"],
        rope_theta=llama["rope_theta"],
        hidden_size=llama["hidden_size"],
        intermediate_size=llama["intermediate_size"],
        num_layers=llama["num_hidden_layers"],
        num_heads=llama["num_attention_heads"],
        num_kv_heads=llama["num_key_value_heads"],
        head_dim=llama["head_dim"],
        max_position=llama["max_position_embeddings"],
        rms_norm_eps=llama["rms_norm_eps"],
    )
    model = NeedleLlama(config).to(torch.bfloat16)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model
