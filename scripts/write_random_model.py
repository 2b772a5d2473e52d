"""Writes a llama-shaped checkpoint of random bf16 weights, a shard a block, never holding more than one in memory.

    python scripts/write_random_model.py OUT                    # 1.1B parameters, the shape of TinyLlama
    python scripts/write_random_model.py OUT --size 100m

For benchmarks of memory and speed: figures of quality on it mean nothing. Weights are normal with deviation
1 / √inputs, so that activations neither die nor explode; a byte-level tokenizer lies beside them, so that text works.
The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

BOS, EOS = 256, 257


@dataclass(frozen=True)
class Size:
    """A llama: the names of its config."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int


SIZES = {
    "1.1b": Size(2048, 22, 32, 4, 5632, 32000),
    "8b-4": Size(4096, 4, 32, 8, 14336, 128256),
    "135m": Size(576, 30, 9, 3, 1536, 49152),
    "400m": Size(1536, 10, 24, 4, 4096, 32000),
    "100m": Size(768, 10, 12, 4, 2048, 16000),
    "tiny": Size(64, 2, 4, 2, 128, 300),
}


def write(out: Path, size: Size, seed: int = 0) -> int:
    """Writes the checkpoint; how many parameters it has."""
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    head = size.hidden_size // size.num_attention_heads
    keys = head * size.num_key_value_heads

    def matrix(rows: int, columns: int, deviation: float | None = None) -> Tensor:
        scale = columns**-0.5 if deviation is None else deviation
        return torch.randn(rows, columns, generator=generator).mul_(scale).to(torch.bfloat16)

    def block(index: int) -> dict[str, Tensor]:
        d, f, at = size.hidden_size, size.intermediate_size, f"model.layers.{index}"
        ones = torch.ones(d, dtype=torch.bfloat16)
        return {
            f"{at}.self_attn.q_proj.weight": matrix(d, d),
            f"{at}.self_attn.k_proj.weight": matrix(keys, d),
            f"{at}.self_attn.v_proj.weight": matrix(keys, d),
            f"{at}.self_attn.o_proj.weight": matrix(d, d),
            f"{at}.mlp.gate_proj.weight": matrix(f, d),
            f"{at}.mlp.up_proj.weight": matrix(f, d),
            f"{at}.mlp.down_proj.weight": matrix(d, f),
            f"{at}.input_layernorm.weight": ones,
            f"{at}.post_attention_layernorm.weight": ones.clone(),
        }

    total = size.num_hidden_layers + 2
    weight_map: dict[str, str] = {}
    parameters = 0

    def shard(number: int, tensors: dict[str, Tensor]) -> int:
        name = f"model-{number + 1:05d}-of-{total:05d}.safetensors"
        save_file(tensors, out / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        return sum(tensor.numel() for tensor in tensors.values())

    parameters += shard(0, {"model.embed_tokens.weight": matrix(size.vocab_size, size.hidden_size, 1.0)})
    for index in range(size.num_hidden_layers):
        parameters += shard(index + 1, block(index))
    last = {"model.norm.weight": torch.ones(size.hidden_size, dtype=torch.bfloat16)}
    parameters += shard(total - 1, {**last, "lm_head.weight": matrix(size.vocab_size, size.hidden_size)})
    index_file = {"metadata": {"total_size": 2 * parameters}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1))
    (out / "config.json").write_text(json.dumps(config(size), indent=1))
    tokenizer(out)
    return parameters


def config(size: Size) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        **vars(size),
    }


def tokenizer(out: Path) -> None:
    """One token a byte, <s> in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {letter: number for number, letter in enumerate(letters)} | {"<s>": BOS, "</s>": EOS}
    made = Tokenizer(models.BPE(ids, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    made.save(str(out / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (out / "tokenizer_config.json").write_text(json.dumps(settings))


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    words.add_argument("out", type=Path)
    words.add_argument("--size", choices=SIZES, default="1.1b")
    words.add_argument("--seed", type=int, default=0)
    given = words.parse_args()
    parameters = write(given.out, SIZES[given.size], given.seed)
    print(f"{given.out}: {parameters / 1e6:,.1f}M parameters, {2 * parameters / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
