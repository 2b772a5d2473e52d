"""A dense model's checkpoint written anew as a mixture of experts: each feed-forward layer in runs of neurons of one
length, behind a random router that is never trained (SMoE-Dropout, 2303.01610).

A token's experts are weighed by a softmax over those that it goes to. The router's scores differ by `SPREAD` of what it
reads, enough to order experts and no more, so the weights are all but equal; what an expert adds is stored times their
number. So all of them together are the dense layer, and k of N are it scaled up as after dropout. What comes out is an
ordinary checkpoint of a family that stock code knows.

Legend: N experts, F neurons of one, D channels.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regauge.artifact import files
from regauge.artifact.config import carried
from regauge.hosts.transformers.configs import build_skeleton, config_of
from regauge.hosts.transformers.skeleton import block_paths, silent
from regauge.hosts.transformers.source import Source
from regauge.hosts.transformers.table import anatomy_of

SPREAD = 1e-3
"""Of the router's scores, over the size of what it reads: weights differ by less than bfloat16 can tell."""
FORMS = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
"""Dense family → the one whose blocks are its own but for the feed-forward layer."""
CLASSES = {"mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
CARRIED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id",
    "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_dropout", "dtype",
)  # fmt: skip


def why_not(source: Source, experts: int) -> str:
    """Why a model's feed-forward layers cannot be divided into so many experts; "" where they can."""
    anatomy, kind = source.anatomy, source.config.model_type
    if kind not in FORMS:
        return f"a {kind} is not of the dense families that have a mixture of experts beside them ({', '.join(FORMS)})"
    if "head" not in {site.name for site in anatomy.sites}:
        return "it has no head, and a mixture is written as a language model"
    biased = next((site.name for site in anatomy.sites if site.bias is not None), "")
    if biased:
        return f"{biased} has a bias, which a {FORMS[kind]} has not"
    if kind == "qwen3" and anatomy.plumbing.sliding:
        return "some of its blocks look back a bounded window, and others do not"
    widths = {site.shape[1] for site in anatomy.sites if site.kind == "down"}
    if len(widths) > 1 or next(iter(widths)) % experts:
        return f"its layers of {'/'.join(map(str, sorted(widths)))} neurons do not fall into {experts} equal experts"
    return ""


def planned(source: Source, experts: int) -> Source:
    """The source as `write` would make it, without weights."""
    config = config_of(_config(source, experts), source.path)
    meta = build_skeleton(silent(config), source.path)
    anatomy = anatomy_of(config, meta).with_(notes=source.anatomy.notes, tied=source.anatomy.tied)
    return replace(source, config=config, model=meta, anatomy=anatomy, tied=dict(meta.all_tied_weights_keys))


def write(source: Source, folder: Path, experts: int, seed: int) -> None:
    """Writes the checkpoint, into a folder that is there.

    Args:
        seed: of the router.
    """
    blocks, generator = source.anatomy.blocks, torch.Generator().manual_seed(seed)
    for index in range(blocks):
        tensors = _carried(source, index) | _divided(source, index, experts, generator)
        files.write(folder / _file(index, blocks), tensors)
    files.write(folder / _file(blocks, blocks), _carried(source, None))
    (folder / "config.json").write_text(json.dumps(_config(source, experts), indent=2), encoding="utf-8")
    keys = {
        key: name for name in (_file(at, blocks) for at in range(blocks + 1)) for key in files.header(folder / name)
    }
    (folder / files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": keys}), encoding="utf-8")
    for name, content in carried(source.path).items():
        if name != "regauge/SOURCE_README.md" and isinstance(content, Path):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(content, folder / name)


def _divided(source: Source, index: int, experts: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Router and experts of a block, by module key."""
    layer, path = source.block(index), f"{block_paths(source.model)[index]}.mlp"
    gate, up, down = (layer[f"blocks.{index}.mlp.{kind}.weight"] for kind in ("gate", "up", "down"))
    width = source.anatomy.hidden
    gate_NFD, up_NFD = (matrix.reshape(experts, -1, width) for matrix in (gate, up))
    down_NDF = down.reshape(width, experts, -1).transpose(0, 1).float() * experts
    router_ND = torch.randn(experts, width, generator=generator, dtype=torch.float32, device="cpu") * (
        SPREAD / width**0.5
    )
    return {
        f"{path}.gate.weight": router_ND.to(source.dtype),
        f"{path}.experts.gate_up_proj": torch.cat([gate_NFD, up_NFD], 1).contiguous(),
        f"{path}.experts.down_proj": down_NDF.to(source.dtype).contiguous(),
    }


def _carried(source: Source, index: int | None) -> dict[str, Tensor]:
    """What stays, by module key."""
    found = source.scatter(source.anatomy, source.block(index)) | source.extras(index)
    return {key: x.contiguous() for key, x in found.items() if key not in source.tied and ".mlp." not in key}


def _file(index: int, blocks: int) -> str:
    return f"model-{index + 1:05d}-of-{blocks + 1:05d}.safetensors"


def _config(source: Source, experts: int) -> dict[str, Any]:
    given = source.config.to_dict()
    kind, width = FORMS[given["model_type"]], next(s.shape[1] for s in source.anatomy.sites if s.kind == "down")
    found = {key: given[key] for key in CARRIED if given.get(key) is not None}
    found |= {"model_type": kind, "architectures": [CLASSES[kind]], "num_experts_per_tok": experts}
    found["dtype"] = str(source.dtype).removeprefix("torch.")
    if kind == "mixtral":
        window = given.get("sliding_window")
        return found | {"intermediate_size": width // experts, "num_local_experts": experts, "sliding_window": window}
    return found | {
        "intermediate_size": width,
        "moe_intermediate_size": width // experts,
        "num_experts": experts,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
