"""Loads an artifact, or a plain transformers directory, as an ordinary transformers model.

The skeleton of transformers' own modules is built without memory, the modules of quantised sites are replaced by packed
ones, and every tensor is read from the files into memory that the model owns. Nothing is ever initialised at random: a
file that is missing, truncated, of another shape or of a newer format is an error before the first tensor is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from regauge.anatomy.inner import inner_taps
from regauge.artifact import files
from regauge.artifact.codec.base import Wire
from regauge.artifact.cutting import read_cut, with_cut
from regauge.artifact.families import with_widths
from regauge.artifact.folder import shards, wire_of
from regauge.artifact.gains import read_gains
from regauge.elastic.subnet import FULL, Subnet
from regauge.errors import ArtifactError, ModelError, SettingError, nearest
from regauge.hosts.transformers.adapt import adapt_modules
from regauge.hosts.transformers.apart import load_member
from regauge.hosts.transformers.checkpoint import finite
from regauge.hosts.transformers.coded import method
from regauge.hosts.transformers.configs import FOREIGN, build_skeleton, coded_by, config_of, first_line, read_raw
from regauge.hosts.transformers.drafting import draftable
from regauge.hosts.transformers.experts import plain_experts
from regauge.hosts.transformers.finishing import finish, keeping, kept_by, offered, running_at
from regauge.hosts.transformers.forms import form_modules
from regauge.hosts.transformers.hub import model_folder
from regauge.hosts.transformers.inside import check_whole, read_inside
from regauge.hosts.transformers.overflow import watch
from regauge.hosts.transformers.placing import lay_by_columns, of_head, place, tie
from regauge.hosts.transformers.skeleton import model_class
from regauge.hosts.transformers.table import anatomy_of
from regauge.hosts.transformers.windowed import by_block, window_of_artifact, window_of_checkpoint
from regauge.kernels.cpu.matrix import ACTIVATIONS
from regauge.plan.caches import Asked
from regauge.plan.passing import passing
from regauge.runtime.device import Placed, on_the_cpu, placed, warn_without_triton
from regauge.runtime.rows import CPU, CUDA
from regauge.runtime.window.figure import Figure, check_room, read_figure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def load(
    path: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | str | None = None,
    memory: str | int | None = None,
    activations: str | None = None,
    cache: Asked | None = None,
    subnet: str | Subnet | None = None,
) -> PreTrainedModel:
    """The model of an artifact: a `PreTrainedModel` whose quantised weights stay packed in memory.

    With `memory="2GB"` a model may be larger than memory: as many blocks as fit stay, and the others are read from disk
    for each token, ahead of the computation. `print(model.regauge_window.report())` tells first-token time, steady
    rate, bytes read and the most memory in use; where everything fits, the model is an ordinary one without it.

    Args:
        path: an artifact, or any transformers directory or hub id (safetensors only).
        device: `cpu`, or `cuda` (`cuda:1`): where the Triton kernels multiply by packed weights, as `regauge explain`
            tells of each preset.
        dtype: of activations and full-precision tensors, or its name; None and "auto": as the config says.
        memory: the most anonymous memory that loading and running may add to the process: `"2GB"`, `"500MB"`, bytes, or
            `"0.5x"` of the model's bytes as bf16. It covers weights, the window, and the cache and activations of 1024
            tokens, batch 1 (`"2GB@8k"`: of 8192); a longer context comes on top. None: everything is resident.
        activations: how what packed weights are multiplied by is rounded on a CPU, one step a group of channels:
            `"int8"` (fastest, an error of some 6e-3 of a product's size), `"int16"` (2e-5), `"float32"` (not at all,
            and slow). None: `int16`, or `int8` beside weights of 4 bits and fewer in a model of 16-bit floats. What
            the artifact itself says of its inputs (W8A8) is kept.
        cache: what is kept of the past: a preset's name (`"kivi-4"`), several (`"snapkv+kivi-4"`), a recipe file, a
            recipe as a mapping or its rule alone (`{"keys": "int4-asym/time:32"}`), or `"none"`. None: as the artifact
            says. One request may ask for another: `model.generate(..., regauge_cache="kv8")`.
        subnet: one member of a family alone, `"depth=6,ffn=0.5"` or the name of one: what it does not need is not kept
            in memory. None: the whole, of which every member can run (`rg.use`, `generate(..., subnet=...)`).

    Raises:
        ArtifactError: a file is missing, truncated or of a newer format, or contradicts the config; with `memory` also
            while the model runs, where a file is cut off then.
        BudgetError: `memory` is malformed, too little (it names the least that works) or more than there is; or the
            model needs more than is available.
        ModelError: it is no model directory, or not one that can be loaded safely.
        RecipeError: `cache` is no recipe of one, or does not fit the model.
        SettingError: there are no such `activations`, or they cannot be had together with `memory` or on a GPU; there
            is no such device here; or the subnet is not legal, in a sentence that names the nearest that is.
    """
    figure = None if memory is None else read_figure(memory, str(device))
    at = placed(device)
    if activations is not None and activations not in ACTIVATIONS:
        raise SettingError(f"there are no activations {activations!r}{nearest(activations, ACTIVATIONS)}")
    if activations is not None and memory is not None:
        raise SettingError(f"activations={activations!r} is not for models in a window; leave it or memory= out")
    if activations is not None and at.kind != CPU:
        raise SettingError(
            f"activations={activations!r} is how a CPU rounds; leave it out, a GPU rounds nothing by itself"
        )
    if subnet is not None and memory is not None:
        raise SettingError("subnet= is not for models in a window; leave it or memory= out")
    dtype = _dtype(dtype)
    with on_the_cpu():  # where the model goes is said
        return _loaded(model_folder(str(path), None), at, dtype, figure, Said(activations, cache, subnet))


@dataclass(frozen=True)
class Said:
    """What a user says of how a model runs, beside where."""

    activations: str | None = None
    cache: Asked | None = None
    subnet: str | Subnet | None = None


def _loaded(folder: Path, at: Placed, dtype: torch.dtype | None, figure: Figure | None, said: Said) -> Any:
    if not (folder / "config.json").exists():
        raise ArtifactError(f"{folder} has no config.json, so it is neither an artifact nor a model.")
    raw = read_raw(folder, ArtifactError)
    quantisation = raw.pop("quantization_config", None)
    if said.subnet is not None:
        dtype = dtype or _dtype(raw.get("dtype") or raw.get("torch_dtype")) or torch.float32
        return load_member(folder, said.subnet, at, dtype, (said.activations, said.cache))
    if not quantisation or method(quantisation):
        return _plain(folder, at, dtype, figure, said.cache)
    if type(quantisation) is not dict:
        raise ArtifactError(f"{folder / 'config.json'} has a quantization_config that is no mapping; fetch it again.")
    raw.pop("auto_map", None)
    dtype = dtype or _dtype(raw.get("dtype") or raw.get("torch_dtype")) or torch.float32
    config = config_of(raw, folder)
    model = build_skeleton(config, folder)
    source = replace(anatomy_of(config, model), tied=bool(model.all_tied_weights_keys))
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    wire = wire_of(quantisation, source, dtype, linear)
    taken = read_cut(folder, wire.layout.anatomy)
    wire = with_widths(with_cut(wire, taken), folder)
    found = shards(folder, wire)
    kept = kept_by(folder, wire.layout.anatomy, wire.layout.cache, said.cache)
    if at.kind == CUDA:
        warn_without_triton()
    elif figure is None:
        check_room(str(folder), sum(path.stat().st_size for path in found))
    plain_experts(model.config, wire.layout.anatomy)  # those that are not quantised
    adapt_modules(model, wire.layout.source, wire.layout.anatomy)
    if wire.layout.attention and figure is not None:
        raise SettingError(
            "blocks of this artifact take another's attention map, or heads see a window, and a window of blocks in "
            "memory runs each by itself: leave memory= out"
        )
    form_modules(model, wire.layout)
    if figure is not None and inner_taps(wire.layout.anatomy).keys() & wire.layout.inputs.keys():
        raise SettingError(
            "what attention or the residual of this artifact reads is rounded inside blocks, and a window of blocks in "
            "memory runs each by itself: leave memory= out"
        )
    read_inside(model, wire.layout)
    if figure is None or not window_of_artifact(model, wire, found, folder, dtype, figure):
        _fill(model, wire, found, dtype, at.kind, said.activations)
    finish(model, folder, wire.name)
    if taken is not None and not wire.layout.quantised:  # as the family that it was taken out of
        model = keeping(model.to(at.where), folder, wire.layout.anatomy, kept, at)
    else:
        own = read_gains(folder, wire.layout.anatomy).get(FULL)
        model = running_at(model, wire.layout.anatomy, kept, at, own)
        if wire.layout.tokens:
            model.pass_by(passing(wire.layout.tokens, wire.layout.anatomy))
        offered(model, folder, wire.layout.anatomy)
        draftable(model)
    if dtype is torch.float16:
        watch(model)
    return model


def _dtype(asked: object) -> torch.dtype | None:
    """The dtype that a user or a config names; None for "auto".

    Raises:
        SettingError: models do not compute in it.
    """
    if asked is None or asked == "auto":
        return None
    name = str(asked).removeprefix("torch.")
    if name not in DTYPES:
        raise SettingError(f"models do not compute in dtype {name[:40]!r}{nearest(name, DTYPES)}")
    return DTYPES[name]


def _plain(
    folder: Path, at: Placed, dtype: torch.dtype | None, figure: Figure | None, cache: Asked | None = None
) -> Any:
    """An unquantised checkpoint, after the checks that `Source` makes (no pickles, no remote code, nothing missing)."""
    from regauge.hosts.transformers.sampling import whole_model
    from regauge.hosts.transformers.source import Source

    source = Source.open(folder)
    plain_experts(source.model.config, source.anatomy)
    anatomy = source.anatomy
    kept = kept_by(folder, anatomy, {}, cache)
    if figure is not None and coded_by(folder):
        raise SettingError(
            f"{folder} is stored in codes, which a window does not decode; leave memory= out, or apply a recipe"
        )
    if figure is not None:
        model = window_of_checkpoint(source, dtype, figure)
        if model is not None:
            finish(model, folder, None)
            return keeping(model, folder, anatomy, kept, at)
    elif at.kind == CPU:
        check_room(str(folder), source.parameters() * (dtype or source.dtype).itemsize)
    config, stored = source.config, source.dtype
    plain_experts(config, source.anatomy)
    dtype = dtype or _dtype(getattr(config, "dtype", None)) or stored
    if coded_by(folder):
        decoded = whole_model(source, dtype)
        finish(decoded, folder, None)
        return keeping(decoded.to(at.where), folder, anatomy, kept, at)
    del source
    try:
        with _no_bar():
            found = model_class(config).from_pretrained(
                str(folder), config=config, dtype=dtype, use_safetensors=True, local_files_only=True
            )
    except FOREIGN as error:
        raise ModelError(f"transformers cannot load {folder} ({type(error).__name__}: {first_line(error)})") from error
    if dtype is torch.float16 and stored is not dtype:
        for key, tensor in found.state_dict().items():
            if not finite(tensor):
                raise ModelError(f"{key} of {folder} has values that float16 cannot hold; load with dtype='bfloat16'")
    return keeping(found.eval().requires_grad_(False).to(at.where), folder, anatomy, kept, at)


@contextmanager
def _no_bar() -> Iterator[None]:
    """transformers' own bar of loading stays away: whoever measures has one for the whole."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _fill(
    model: Any, wire: Wire, paths: Sequence[Path], dtype: torch.dtype, device: str, activations: str | None
) -> None:
    """Every shard, a block after another."""
    missing = set(wire.layout.quantised)
    head = of_head(wire, paths)
    for path in paths:
        for keys in by_block(wire, files.header(path)):
            missing -= place(model, wire, files.read(path, keys), dtype, device, path, activations, head)
    if missing:
        raise ArtifactError(f"the artifact lacks the codes of {sorted(missing)[0]}; build or fetch it again.")
    tie(model)
    lay_by_columns(model, wire.layout, device)
    check_whole(model, wire.layout)
    lost = [key for key, tensor in model.state_dict().items() if tensor.is_meta]
    if lost:
        raise ArtifactError(f"the artifact lacks the tensor {lost[0]} ({len(lost)} in all); build or fetch it again.")
