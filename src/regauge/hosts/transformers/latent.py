"""A llama's checkpoint written anew as one of DeepSeek-V3's form, whose attention is latent (TransMLA, 2502.07864).

What comes out is an ordinary checkpoint: stock transformers (and what else serves DeepSeek) keeps the latent and the
turned key of a token, one row for all heads. Three things are said in that form's own words:

* **The norm on the latent** would divide by its size. One more channel holds a constant that is much larger than the
  rest, so that what it divides by is a constant too, which the matrices behind it take in; the channel is read by none.
  Its weight in the cache is one number a token.
* **Biases of queries**, which the form has none of, come through its narrow layer for queries: as wide as the residual,
  it hands its input on, with the constant of its norm as the channel that the biases are read from.
* **Rotary frequencies**: several slots of one frequency and none of another are a table of factors (`longrope`, whose
  base is 1 and whose two tables are the same).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regauge.anatomy.factoring import Grouped, Latent, kept, latent, loss, mixed
from regauge.artifact import files
from regauge.artifact.config import carried
from regauge.errors import RecipeError
from regauge.hosts.latent import LatentSizes
from regauge.hosts.transformers.configs import build_skeleton, config_of
from regauge.hosts.transformers.skeleton import silent
from regauge.hosts.transformers.source import Source
from regauge.hosts.transformers.table import anatomy_of

KINDS = ("llama", "mistral", "qwen2", "seed_oss")
"""Families whose blocks are DeepSeek-V3's dense ones but for attention."""
LARGE = {torch.float64: 2.0**22, torch.float32: 2.0**12}
"""The constant over the size of what it stands beside; its square over two is the relative error. Else 2⁷."""
CARRIED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id",
    "eos_token_id", "tie_word_embeddings", "dtype",
)  # fmt: skip


def why_not(source: Source) -> str:
    """Why a model's attention cannot be written as latent; "" where it can."""
    config, anatomy = source.config, source.anatomy
    if config.model_type not in KINDS:
        return f"a {config.model_type} is not of the families that are written as latent ({', '.join(KINDS)})"
    if "head" not in {site.name for site in anatomy.sites}:
        return "it has no head, and latent attention is written as a language model"
    if anatomy.plumbing.sliding:
        return "some of its blocks look back a bounded window, which latent attention does not"
    if any(site.kind in ("gate", "up", "down") and site.bias for site in anatomy.sites):
        return "its feed-forward layers have biases, which DeepSeek-V3's have not"
    shapes = {(one.heads, one.kv_heads, one.head_dim, one.value_dim) for one in anatomy.attentions if one is not None}
    if len(shapes) != 1:
        return "its blocks differ in heads"
    if anatomy.plumbing.rotary != next(iter(shapes))[2]:
        return "its rotary embedding turns a part of each head alone"
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        return f"its rotary embedding is of the kind {kind!r}, whose scores are scaled or whose frequencies change"
    return ""


def numbers(source: Source, sizes: LatentSizes) -> tuple[int, int]:
    """(turned channels, numbers of the latent beside its constant) of a block.

    Raises:
        RecipeError: there is no room for both.
    """
    one = next(one for one in source.anatomy.attentions if one is not None)
    if sizes.keep >= 1:
        return one.kv_heads * one.head_dim, one.kv_heads * one.value_dim
    total = int(sizes.keep * one.cached)
    turned = one.head_dim if sizes.published else max(2, 2 * round(sizes.rotary * total / 2))
    turned = min(turned, one.kv_heads * one.head_dim)
    if total - turned - 1 < 1:
        raise RecipeError(
            f"a latent of {sizes.keep:g} of {one.cached} numbers leaves none beside {turned} turned channels; keep more"
        )
    return turned, total - turned - 1


def write(source: Source, folder: Path, moments: Sequence[Tensor], sizes: LatentSizes) -> list[str]:
    """Writes the checkpoint; what it did, a sentence each.

    Args:
        moments: for each block E[x xᵀ] of what its attention reads, a 1 behind it: (D + 1, D + 1), float64.

    Raises:
        RecipeError: there is no room for a latent beside what is turned.
    """
    turned, rank = numbers(source, sizes)
    plain = not sizes.published
    losses = []
    for index, moment in enumerate(moments):
        block = grouped(source, index)
        losses.append(loss(mixed(block, moment, not plain), block.rates, sizes.reach))
    frequencies = len(losses[0])
    ones_F = torch.ones(frequencies, dtype=torch.int64, device="cpu")
    turned_F = kept(losses, turned // 2) if plain or turned // 2 > frequencies else ones_F
    biased = _biased(source)
    made: Latent | None = None
    for index, moment in enumerate(moments):
        block = grouped(source, index)
        mix = mixed(block, moment, not plain)
        made = latent(block, mix, moment, turned_F, rank, sizes.reach)
        tensors = _carried(source, index) | {
            f"model.layers.{index}.self_attn.{key}": tensor.to(source.dtype).contiguous()
            for key, tensor in _attention(source, index, made, moment, biased).items()
        }
        files.write(folder / _file(index, len(moments)), tensors)
    assert made is not None, "a model has blocks"
    files.write(folder / _file(len(moments), len(moments)), _carried(source, None))
    raw = _config(source, biased, (*made.up_keys.shape, made.up_values.shape[1]), made.rates.tolist())
    (folder / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
    _index(folder, len(moments))
    for name, content in carried(source.path).items():
        if name != "regauge/SOURCE_README.md" and isinstance(content, Path):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(content, folder / name)
    one = next(one for one in source.anatomy.attentions if one is not None)
    slots = ", ".join(str(int(count)) for count in turned_F)
    return [
        f"latent: a token leaves {turned + rank + 1} numbers a block in the cache where it left {one.cached}: {turned} "
        f"turned by their position and a latent of {rank} with a constant",
        f"latent: slots that are turned, of {one.kv_heads}, from the highest frequency to the lowest: {slots}",
    ]


def grouped(source: Source, index: int) -> Grouped:
    """The attention of a block as maps with their biases."""
    one = source.anatomy.attentions[index]
    assert one is not None, "its attention was found to be of heads"
    weights = source.block(index)

    def affine(kind: str) -> Tensor:
        weight = weights[f"blocks.{index}.attn.{kind}.weight"].double()
        bias = weights.get(f"blocks.{index}.attn.{kind}.bias")
        column = weight.new_zeros(len(weight)) if bias is None else bias.double()
        return torch.cat([weight, column[:, None]], 1)

    pairs = torch.arange(one.head_dim // 2, dtype=torch.int64, device="cpu")
    rates = source.model.model.rotary_emb.inv_freq.double()
    return Grouped(
        affine("q"), affine("k"), affine("v"), one.heads, one.kv_heads, pairs, pairs + one.head_dim // 2, rates
    )


def _attention(source: Source, index: int, made: Latent, moment: Tensor, biased: bool) -> dict[str, Tensor]:
    """The tensors of DeepSeek-V3's attention, in float64."""
    heads, free, rank = made.up_keys.shape
    scale = float(source.model.model.layers[index].self_attn.scaling) * math.sqrt(free + made.rotary.shape[0])
    q_OD = torch.cat([made.q_free, made.q_rotary], 1).flatten(0, 1) * scale
    inputs, width = moment[:-1, :-1].diagonal().sum(), moment.shape[0] - 1
    own = (made.down @ moment @ made.down.T).diagonal().sum()
    held, gain, back, _ = _constant(float(own), rank + 1, source.dtype)
    down = torch.cat([made.down, made.down.new_zeros(1, width + 1), made.rotary])
    down[rank, -1] = held
    values = made.up_values.repeat_interleave(heads // len(made.up_values), 0)
    up = torch.cat([made.up_keys, values], 1).flatten(0, 1) / back
    norm = torch.full((rank + 1,), gain, dtype=torch.float64, device="cpu")
    norm[rank] = 0.0
    found = {
        "kv_a_proj_with_mqa.weight": down[:, :-1],
        "kv_a_proj_with_mqa.bias": down[:, -1],
        "kv_a_layernorm.weight": norm,
        "kv_b_proj.weight": torch.cat([up, up.new_zeros(len(up), 1)], 1),
    }
    weights = source.block(index)
    found["o_proj.weight"] = weights[f"blocks.{index}.attn.o.weight"]
    bias = weights.get(f"blocks.{index}.attn.o.bias")
    found["o_proj.bias"] = q_OD.new_zeros(source.anatomy.hidden) if bias is None else bias
    if not biased:
        return found | {"q_proj.weight": q_OD[:, :-1]}
    held, gain, back, one = _constant(float(inputs), width + 1, source.dtype)
    norm = torch.full((width + 1,), gain, dtype=torch.float64, device="cpu")
    norm[width] = 2.0 ** round(-math.log2(one))
    through = torch.eye(width + 1, width, dtype=torch.float64, device="cpu")
    constant = torch.zeros(width + 1, dtype=torch.float64, device="cpu")
    constant[width] = held
    return found | {
        "q_a_proj.weight": through,
        "q_a_proj.bias": constant,
        "q_a_layernorm.weight": norm,
        "q_b_proj.weight": torch.cat([q_OD[:, :-1] / back, q_OD[:, -1:] / (one * norm[width])], 1),
    }


def _constant(square: float, size: int, dtype: torch.dtype) -> tuple[float, float, float, float]:
    """(constant, gain, what becomes of the other channels, what the norm makes of the constant itself) of a norm over
    channels whose squares sum to `square` in the mean, and the constant. All stored numbers are powers of two."""
    held = 2.0 ** round(math.log2(LARGE.get(dtype, 2.0**7) * math.sqrt(max(square, 1e-12))))
    root = math.sqrt((held * held + square) / size + 1e-6)
    gain = 2.0 ** round(math.log2(root))
    return held, gain, gain / root, held / root


def _carried(source: Source, index: int | None) -> dict[str, Tensor]:
    """What stays, by module key."""
    found = source.scatter(source.anatomy, source.block(index)) | source.extras(index)
    gone = ("q_proj", "k_proj", "v_proj", "o_proj")
    return {
        key: tensor.contiguous()
        for key, tensor in found.items()
        if key not in source.tied and not (".self_attn." in key and key.split(".")[-2] in gone)
    }


def _file(index: int, blocks: int) -> str:
    return f"model-{index + 1:05d}-of-{blocks + 1:05d}.safetensors"


def _index(folder: Path, blocks: int) -> None:
    names = [_file(index, blocks) for index in range(blocks + 1)]
    found = {key: name for name in names for key in files.header(folder / name)}
    text = json.dumps({"metadata": {}, "weight_map": found})
    (folder / files.INDEX).write_text(text, encoding="utf-8")


def planned(source: Source, sizes: LatentSizes) -> Source:
    """The source as `write` would make it, without weights: of the channels that lose their turn, one of each of a head
    is counted, which is the most that there can be."""
    turned, rank = numbers(source, sizes)
    one = next(one for one in source.anatomy.attentions if one is not None)
    free = 2 if sizes.keep >= 1 else one.head_dim
    raw = _config(source, _biased(source), (one.heads, free, rank, one.value_dim), [1.0] * (turned // 2))
    config = config_of(raw, source.path)
    meta = build_skeleton(silent(config), source.path)
    anatomy = anatomy_of(config, meta).with_(notes=source.anatomy.notes, tied=source.anatomy.tied)
    return replace(source, config=config, model=meta, anatomy=anatomy, tied=dict(meta.all_tied_weights_keys))


def _biased(source: Source) -> bool:
    return "blocks.0.attn.q.bias" in source.anatomy.slots(0)


def _config(source: Source, biased: bool, shape: tuple[int, int, int, int], rates: Sequence[float]) -> dict[str, Any]:
    """config.json; `shape` is heads, keys' channels that are not turned, numbers of the latent, channels of a value."""
    raw = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    given = source.config.to_dict()
    heads, free, rank, values = shape
    inverse = [_inverse(rate) for rate in rates]
    most = int(given["max_position_embeddings"])
    found = {key: given[key] for key in CARRIED if key in given}
    found["dtype"] = raw.get("dtype") or raw.get("torch_dtype") or str(source.dtype).removeprefix("torch.")
    return found | {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_key_value_heads": heads,
        "kv_lora_rank": rank + 1,
        "q_lora_rank": source.anatomy.hidden + 1 if biased else None,
        "qk_rope_head_dim": 2 * len(rates),
        "qk_nope_head_dim": free,
        "v_head_dim": values,
        "first_k_dense_replace": int(given["num_hidden_layers"]),
        "n_routed_experts": 1,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 1,
        "num_nextn_predict_layers": 0,
        "attention_bias": True,
        "rope_interleave": False,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1.0,
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": most,
            "short_factor": inverse,
            "long_factor": inverse,
        },
    }


def _inverse(rate: float) -> float:
    """The float32 whose inverse in float32 is nearest to a frequency."""
    guess = torch.tensor(1 / rate, dtype=torch.float32, device="cpu")
    ends = [torch.tensor(end, dtype=torch.float32, device="cpu") for end in (0.0, math.inf)]
    tries = [guess, *(torch.nextafter(guess, end) for end in ends)]
    return float(min(tries, key=lambda one: abs(float(1 / one) - rate)))
