"""Loads an artifact, or a plain transformers directory, as an ordinary transformers model.

The skeleton of transformers' own modules is built without memory, the modules of quantised sites are replaced by packed
ones, and every tensor is read from the files into memory that the model owns. Nothing is ever initialised at random: a
file that is missing, truncated, of another shape or of a newer format is an error before the first tensor is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regauge.anatomy.model import Anatomy
from regauge.errors import ArtifactError
from regauge.formats.base import Codes
from regauge.hosts.transformers.adapt import adapt_modules, put
from regauge.hosts.transformers.hub import model_folder
from regauge.hosts.transformers.packed.install import install
from regauge.hosts.transformers.packed.modules import PackedLinear
from regauge.hosts.transformers.skeleton import model_class, skeleton
from regauge.hosts.transformers.table import anatomy_of
from regauge.hosts.transformers.wire import files
from regauge.hosts.transformers.wire.base import COMPRESSED_TENSORS, REGAUGE, Layout, Wire
from regauge.hosts.transformers.wire.compressed import CompressedTensors
from regauge.hosts.transformers.wire.groups import read_groups
from regauge.hosts.transformers.wire.header import read_header
from regauge.hosts.transformers.wire.packed import Packed

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
NUMBERED = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")


def load(path: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """The model of an artifact: a `PreTrainedModel` whose quantised weights stay packed in memory.

    Args:
        path: an artifact, or any transformers directory or hub id (safetensors only).
        device: where it goes. torch's packed kernels are for `cpu`; elsewhere weights are decoded on the fly.
        dtype: of activations and full-precision tensors; None: as the config says.

    Raises:
        ArtifactError: a file is missing, truncated or of a newer format, or contradicts the config.
        ModelError: it is no model directory, or not one that can be loaded safely.
    """
    folder = model_folder(str(path), None)
    raw = _config(folder)
    quantisation = raw.pop("quantization_config", None)
    if not quantisation:
        return _plain(folder, device, dtype)
    raw.pop("auto_map", None)
    dtype = dtype or DTYPES[str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")]
    config = _config_object(raw, folder)
    model = skeleton(config)
    source = replace(anatomy_of(config, model), tied=bool(model.all_tied_weights_keys))
    wire = _wire(quantisation, source, dtype, model)
    shards = _shards(folder, wire)
    adapt_modules(model, wire.layout.source, wire.layout.anatomy)
    _fill(model, wire, shards, dtype, device)
    _finish(model, folder, wire.name)
    return model.to(device)


def _plain(folder: Path, device: str, dtype: torch.dtype | None) -> Any:
    """An unquantised checkpoint, after the checks that `Source` makes (no pickles, no remote code, nothing missing)."""
    from regauge.hosts.transformers.source import Source

    config = Source.open(folder).config
    found = model_class(config).from_pretrained(
        str(folder), dtype=dtype or "auto", use_safetensors=True, local_files_only=True
    )
    return found.eval().requires_grad_(False).to(device)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ArtifactError(f"{folder} has no config.json, so it is neither an artifact nor a model.") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}.") from error
    if type(raw) is not dict or "model_type" not in raw:
        raise ArtifactError(f"{path} names no model_type, so it is neither an artifact nor a model.")
    return raw


def _config_object(raw: Mapping[str, Any], folder: Path) -> Any:
    import transformers

    if raw["model_type"] not in transformers.CONFIG_MAPPING:
        raise ArtifactError(f"{folder} is of type {raw['model_type']!r}, which this transformers does not have.")
    config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    config._name_or_path = str(folder)
    return config


def _wire(quantisation: Mapping[str, Any], source: Anatomy, dtype: torch.dtype, model: Any) -> Wire:
    method = quantisation.get("quant_method")
    if method == REGAUGE:
        return Packed(read_header(quantisation, source, dtype))
    if method == COMPRESSED_TENSORS:
        linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
        return CompressedTensors(Layout(source, source, read_groups(quantisation, source, linear), dtype))
    raise ArtifactError(f"the checkpoint is quantised by {method!r}, which regauge does not read; load the original.")


def _shards(folder: Path, wire: Wire) -> list[Path]:
    """Every shard, after checking that none is missing or truncated."""
    stem = wire.shard(0, 1).partition("-")[0]
    found = sorted(folder.glob(f"{stem}-?????-of-?????.safetensors")) or sorted(folder.glob(f"{stem}.safetensors"))
    if not found:
        raise ArtifactError(f"{folder} has no {wire.shard(0, 1).replace('00001', '*')} files; build it again.")
    totals = {match[2] for path in found if (match := NUMBERED.search(path.name))}
    if totals and (len(totals) > 1 or int(totals.pop()) != len(found)):
        raise ArtifactError(f"{folder} has {len(found)} shards, and their names speak of more; copy it whole.")
    for path in found:
        files.header(path)
    return found


def _fill(model: Any, wire: Wire, shards: list[Path], dtype: torch.dtype, device: str) -> None:
    """Packed modules first, then every parameter and persistent buffer by its key."""
    layout, missing = wire.layout, set(wire.layout.quantised)
    for path in shards:
        full, codes = wire.unpack(files.read(path))
        if wire.name == COMPRESSED_TENSORS:
            codes = {name: _as_stock(found, dtype, layout, name) for name, found in codes.items()}
        missing -= codes.keys()
        install(model, layout, codes, full, dtype, device)
        for key, tensor in full.items():
            _assign(model, key, tensor, dtype, path)
    if missing:
        raise ArtifactError(f"the artifact lacks the codes of {sorted(missing)[0]}; build or fetch it again.")
    _tie(model)
    lost = [key for key, tensor in model.state_dict().items() if tensor.is_meta]
    if lost:
        raise ArtifactError(f"the artifact lacks the tensor {lost[0]} ({len(lost)} in all); build or fetch it again.")


def _as_stock(codes: Codes, dtype: torch.dtype, layout: Layout, name: str) -> Codes:
    """Steps in the dtype of the model, as stock transformers has them after loading."""
    from regauge.hosts.transformers.wire.base import decoder

    fields = dict(codes.step.fields)
    decoded_at_once = codes.step.zero_G1 is not None  # then stock code multiplies in the dtype of the steps
    if fields["scale"].dtype in (torch.float32, torch.float16, torch.bfloat16) and not decoded_at_once:
        fields["scale"] = fields["scale"].to(dtype)
    choice = layout.quantised[name]
    return replace(codes, step=decoder(choice).load(fields))


def _assign(model: Any, key: str, tensor: Tensor, dtype: torch.dtype, path: Path) -> None:
    """Puts one full-precision tensor where the skeleton has a place for it."""
    parent, _, name = key.rpartition(".")
    try:
        module = model.get_submodule(parent)
    except AttributeError:
        return  # a tensor that no module takes, as in the source
    place = module._parameters.get(name, module._buffers.get(name))
    if place is None:
        return
    if place.shape != tensor.shape:
        raise ArtifactError(
            f"{path.name}: {key} has shape {list(tensor.shape)}, and the config asks for {list(place.shape)}."
        )
    value = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[name] = value


def _tie(model: Any) -> None:
    """Parameters that no file has, tied by transformers to others: one tensor, or one packed table read by both."""
    packed = []
    for target, source in model.all_tied_weights_keys.items():
        path, _, own = target.rpartition(".")
        owner, _, name = source.rpartition(".")
        head, module = model.get_submodule(path), model.get_submodule(owner)
        place = head._parameters.get(own)
        if place is None or not place.is_meta:
            continue
        if module._parameters.get(name) is not None:
            head._parameters[own] = module._parameters[name]
        elif "matrix" in module._modules:
            packed.append((path, module.matrix))
    for path, matrix in packed:
        bias = model.get_submodule(path)._parameters.get("bias")
        put(model, path, PackedLinear([matrix], None, bias, matrix.dtype))


def _finish(model: Any, folder: Path, method: str) -> None:
    """Generation settings, and a mark that keeps `save_pretrained` from writing what stock code would misread."""
    from transformers import GenerationConfig

    from regauge.hosts.transformers.quantizer import mark

    if (folder / "generation_config.json").exists() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    mark(model, method)
    model.eval().requires_grad_(False)
