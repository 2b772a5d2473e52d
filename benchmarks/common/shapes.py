"""The two models of the benchmarks: their shapes, and checkpoints of unique random weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """A llama: hidden width, FFN width, layers, query and KV heads, vocabulary, and whether the head is the table."""

    name: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(O, I) of the matrices of a block."""
        d, f, kv = self.hidden, self.ffn, self.kv_heads * self.head
        return {"q": (d, d), "k": (kv, d), "v": (kv, d), "o": (d, d), "gate": (f, d), "up": (f, d), "down": (d, f)}

    def weights(self) -> int:
        """Weights that one token multiplies: all blocks and the head."""
        block = sum(rows * columns for rows, columns in self.matrices().values())
        return self.layers * block + self.vocabulary * self.hidden

    def operations(self, tokens: int = 1, heads: int | None = None) -> float:
        """Additions and multiplications of the matrices; the head serves `heads` of the tokens (all by default)."""
        head = self.vocabulary * self.hidden
        return 2.0 * (tokens * (self.weights() - head) + (tokens if heads is None else heads) * head)


SHAPES = {
    "smollm-135m": Shape("smollm-135m", 576, 1536, 30, 9, 3, 49152, True),
    "tinyllama-1.1b": Shape("tinyllama-1.1b", 2048, 5632, 22, 32, 4, 32000, False),
    "pico": Shape("pico", 64, 128, 2, 4, 2, 320, False),
}

PLACES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def config(shape: Shape) -> dict[str, object]:
    """transformers' config. No end-of-sequence token: every runner makes as many tokens as it is asked for."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def checkpoint(shape: Shape, out: Path, seed: int = 0) -> Path:
    """The checkpoint in bf16, written once: normal weights with deviation 1 / √inputs, a shard a block."""
    if (out / "config.json").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(columns**-0.5).bfloat16()

    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    shards = [{"model.embed_tokens.weight": matrix(shape.vocabulary, shape.hidden), "model.norm.weight": ones}]
    if not shape.tied:
        shards[0]["lm_head.weight"] = matrix(shape.vocabulary, shape.hidden)
    index: dict[str, str] = {}
    for number in range(shape.layers + 1):
        if number:
            at = f"model.layers.{number - 1}"
            named = {name: matrix(*size) for name, size in shape.matrices().items()}
            shard = {f"{at}.{PLACES[name]}.weight": tensor for name, tensor in named.items()}
            shard |= {f"{at}.{norm}_layernorm.weight": ones.clone() for norm in ("input", "post_attention")}
        else:
            shard = shards[0]
        name = f"model-{number + 1:05d}-of-{shape.layers + 1:05d}.safetensors"
        save_file(shard, out / name, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, name)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=1))
    (out / "config.json").write_text(json.dumps(config(shape), indent=1))
    return out


def prompt(shape: Shape, tokens: int, seed: int = 1) -> list[int]:
    """Token ids, the same for every runner."""
    generator = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(shape.vocabulary, (tokens,), generator=generator)]
