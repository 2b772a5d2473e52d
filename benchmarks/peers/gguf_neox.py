"""A GPT-NeoX checkpoint of safetensors as a GGUF file in bf16, and its matrices back in the order of transformers.

llama.cpp keeps queries, keys and values of all heads apart in the fused matrix; the checkpoint has them head by head.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from gguf_files import Words, tensors
from torch import Tensor

NAMES = {
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {"gpt_neox.embed_in": "token_embd", "gpt_neox.final_layer_norm": "output_norm", "embed_out": "output"}


def renamed(name: str) -> str:
    """`gpt_neox.layers.3.mlp.dense_4h_to_h.bias` -> `blk.3.ffn_down.bias`; "" of what is no parameter."""
    stem, _, what = name.rpartition(".")
    if stem in OUTER:
        return f"{OUTER[stem]}.{what}"
    block, _, rest = stem.removeprefix("gpt_neox.layers.").partition(".")
    return f"blk.{block}.{NAMES[rest]}.{what}" if rest in NAMES else ""


def apart(words: Words, heads: int) -> Words:
    """Rows by head, each with its queries, keys and values → all queries, all keys, all values."""
    size = words.shape[0] // heads // 3
    return words.reshape(heads, 3, size, -1).swapaxes(0, 1).reshape(words.shape)


def together(w_OI: Tensor, heads: int) -> Tensor:
    """The inverse of `apart`."""
    size = w_OI.shape[0] // heads // 3
    return w_OI.view(3, heads, size, -1).transpose(0, 1).reshape(w_OI.shape)


def write_bf16(folder: Path, out: Path, vocabulary: Callable[[gguf.GGUFWriter, Path], None]) -> None:
    """The checkpoint as it is; norms and biases in float32, as llama.cpp wants them."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads, rotary = config["num_attention_heads"], config["rope_parameters"]
    writer = gguf.GGUFWriter(str(out), "gptneox")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_parallel_residual(config["use_parallel_residual"])
    writer.add_rope_dimension_count(int(rotary["partial_rotary_factor"] * config["hidden_size"] // heads))
    writer.add_rope_freq_base(rotary["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_BF16))
    vocabulary(writer, folder)
    for name, words in tensors(folder):
        called = renamed(name)
        if not called:
            continue
        if "query_key_value" in name:
            words = apart(words, heads)
        if words.ndim == 1:
            writer.add_tensor(called, (words.astype(np.uint32) << 16).view(np.float32))
        else:
            raw = np.ascontiguousarray(words).view(np.uint8)
            writer.add_tensor(called, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def back(name: str, w_OI: Tensor, config: dict[str, int]) -> Tensor:
    """A decoded matrix in the order of transformers."""
    return together(w_OI, config["num_attention_heads"]) if "query_key_value" in name else w_OI
