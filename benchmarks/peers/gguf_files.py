"""A llama checkpoint of safetensors as a GGUF file: bf16 by our own writer, the rest by llama.cpp's quantiser.

    out/bench/venvs/llama/bin/python benchmarks/peers/gguf_files.py CHECKPOINT OUT.gguf Q4_0

Needs gguf and, for other kinds than BF16, llama-cpp-python; neither torch nor transformers. The file has no vocabulary,
only its size, unless the caller writes one: token ids go in and come out. llama.cpp turns pairs of neighbours in rotary
embeddings, transformers turns halves of a head, so the rows of q and k are put in its order.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}

Words = NDArray[np.uint16]  # bf16 as its bits


def tensors(folder: Path) -> Iterator[tuple[str, Words]]:
    """Name and bits of every tensor of the checkpoint's bf16 shards."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            start = file.tell()
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                if entry["dtype"] != "BF16":
                    raise SystemExit(f"{path}: {name} is {entry['dtype']}, not BF16")
                low, high = entry["data_offsets"]
                file.seek(start + low)
                words = np.frombuffer(file.read(high - low), dtype=np.uint16)
                yield name, words.reshape(entry["shape"])


def renamed(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    if name in OUTER:
        return f"{OUTER[name]}.weight"
    _, _, block, rest = name.split(".", 3)
    return f"blk.{block}.{NAMES[rest.removesuffix('.weight')]}.weight"


def paired(words: Words, heads: int) -> Words:
    """Rows of q or k with the two halves of each head interleaved."""
    rows, columns = words.shape
    return words.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def no_vocabulary(writer: gguf.GGUFWriter, folder: Path) -> None:
    writer.add_tokenizer_model("no_vocab")


def write_bf16(folder: Path, out: Path, vocabulary: Callable[[gguf.GGUFWriter, Path], None] = no_vocabulary) -> None:
    """The checkpoint as it is; norms in float32, as llama.cpp wants them."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_BF16))
    vocabulary(writer, folder)
    for name, words in tensors(folder):
        if words.ndim == 1:
            writer.add_tensor(renamed(name), (words.astype(np.uint32) << 16).view(np.float32))
            continue
        for part, key in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if part in name:
                words = paired(words, config[key])
        raw = np.ascontiguousarray(words).view(np.uint8)
        writer.add_tensor(renamed(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(full: Path, out: Path, kind: str) -> None:
    """llama.cpp's own quantiser, without importance data."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    code = llama_cpp.llama_model_quantize(str(full).encode(), str(out).encode(), parameters)
    if code:
        raise SystemExit(f"llama.cpp could not write {kind}: code {code}")


def main() -> None:
    folder, out, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    part = out.with_name(out.name + ".partial")
    full = out.with_name("BF16.gguf")
    if kind == "BF16":
        write_bf16(folder, part)
    else:
        if not full.exists():
            write_bf16(folder, part)
            part.replace(full)
        quantise(full, part, kind)
    part.replace(out)


if __name__ == "__main__":
    main()
