"""Loads an artifact, or a plain transformers directory, as an ordinary transformers model.

The skeleton of transformers' own modules is built without memory, the modules of quantised sites are replaced by packed
ones, and every tensor is read from the files into memory that the model owns. Nothing is ever initialised at random: a
file that is missing, truncated, of another shape or of a newer format is an error before the first tensor is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from regauge.anatomy.inner import inner_taps
from regauge.anatomy.model import Anatomy
from regauge.artifact import files
from regauge.artifact.caches import read_cache
from regauge.artifact.codec.base import Wire
from regauge.artifact.folder import shards, wire_of
from regauge.cache.scheme import CachePlan
from regauge.documents import read_json
from regauge.errors import ArtifactError, ModelError, SettingError, nearest
from regauge.hosts.transformers.absorbing import absorb
from regauge.hosts.transformers.adapt import adapt_modules
from regauge.hosts.transformers.caching import keep, planned
from regauge.hosts.transformers.checkpoint import finite
from regauge.hosts.transformers.coded import method
from regauge.hosts.transformers.configs import FOREIGN, build_skeleton, coded_by, config_of, first_line, read_raw
from regauge.hosts.transformers.drafting import draftable
from regauge.hosts.transformers.experts import plain_experts
from regauge.hosts.transformers.forms import form_modules
from regauge.hosts.transformers.hub import model_folder
from regauge.hosts.transformers.inside import check_whole, read_inside
from regauge.hosts.transformers.overflow import watch
from regauge.hosts.transformers.placing import of_head, place, tie
from regauge.hosts.transformers.plug import plug
from regauge.hosts.transformers.skeleton import model_class
from regauge.hosts.transformers.switching import offer
from regauge.hosts.transformers.table import anatomy_of
from regauge.hosts.transformers.windowed import by_block, window_of_artifact, window_of_checkpoint
from regauge.kernels.cpu.matrix import ACTIVATIONS
from regauge.parts import Point
from regauge.plan.caches import Asked, of_points
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

    Raises:
        ArtifactError: a file is missing, truncated or of a newer format, or contradicts the config; with `memory` also
            while the model runs, where a file is cut off then.
        BudgetError: `memory` is malformed, too little (it names the least that works) or more than there is; or the
            model needs more than is available.
        ModelError: it is no model directory, or not one that can be loaded safely.
        RecipeError: `cache` is no recipe of one, or does not fit the model.
        SettingError: there are no such `activations`, or they cannot be had together with `memory` or on a GPU; or
            there is no such device here.
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
    dtype = _dtype(dtype)
    with on_the_cpu():  # where the model goes is said
        return _loaded(model_folder(str(path), None), at, dtype, figure, Said(activations, cache))


@dataclass(frozen=True)
class Said:
    """What a user says of how a model runs, beside where."""

    activations: str | None = None
    cache: Asked | None = None


def _loaded(folder: Path, at: Placed, dtype: torch.dtype | None, figure: Figure | None, said: Said) -> Any:
    if not (folder / "config.json").exists():
        raise ArtifactError(f"{folder} has no config.json, so it is neither an artifact nor a model.")
    raw = read_raw(folder, ArtifactError)
    quantisation = raw.pop("quantization_config", None)
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
    found = shards(folder, wire)
    kept = _kept(folder, wire.layout.anatomy, wire.layout.cache, said.cache)
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
    _finish(model, folder, wire.name)
    model = model.to(at.where)
    if at.kind == CPU:
        plug(model, wire.layout.anatomy)
    _keeping(model, folder, wire.layout.anatomy, kept, at)
    if dtype is torch.float16:
        watch(model)
    return model


def _kept(folder: Path, anatomy: Anatomy, points: Mapping[str, Point], cache: Asked | None) -> CachePlan | None:
    """What a user asks to be kept of the past, or else what the artifact says: in its header, or beside it."""
    points = points or read_cache(folder, anatomy)
    return planned(cache, anatomy, of_points(folder.name, points, anatomy) if points else None)


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
    kept = _kept(folder, anatomy, {}, cache)
    if figure is not None and coded_by(folder):
        raise SettingError(
            f"{folder} is stored in codes, which a window does not decode; leave memory= out, or apply a recipe"
        )
    if figure is not None:
        model = window_of_checkpoint(source, dtype, figure)
        if model is not None:
            _finish(model, folder, None)
            return _keeping(model, folder, anatomy, kept, at)
    elif at.kind == CPU:
        check_room(str(folder), source.parameters() * (dtype or source.dtype).itemsize)
    config, stored = source.config, source.dtype
    plain_experts(config, source.anatomy)
    dtype = dtype or _dtype(getattr(config, "dtype", None)) or stored
    if coded_by(folder):
        decoded = whole_model(source, dtype)
        _finish(decoded, folder, None)
        return _keeping(decoded.to(at.where), folder, anatomy, kept, at)
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
    return _keeping(found.eval().requires_grad_(False).to(at.where), folder, anatomy, kept, at)


def _keeping(model: Any, folder: Path, anatomy: Anatomy, kept: CachePlan | None, at: Placed) -> Any:
    """A model with its plan; a plain one decodes by it as an artifact does, as packed caches are read natively."""
    if kept is not None and not kept.plain and at.kind == CPU and getattr(model, "regauge_step", None) is None:
        plug(model, anatomy)
    keep(model, anatomy, kept, at.kind == CUDA)
    absorb(model)
    offer(model, folder, anatomy)
    draftable(model)
    return model


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
    check_whole(model, wire.layout)
    lost = [key for key, tensor in model.state_dict().items() if tensor.is_meta]
    if lost:
        raise ArtifactError(f"the artifact lacks the tensor {lost[0]} ({len(lost)} in all); build or fetch it again.")


def _finish(model: Any, folder: Path, method: str | None) -> None:
    """Generation settings, and a mark that keeps `save_pretrained` from writing what stock code would misread."""
    from transformers import GenerationConfig

    from regauge.hosts.transformers.quantizer import mark
    from regauge.hosts.transformers.vocabulary import guard

    if (folder / "generation_config.json").exists() and model.can_generate():
        read_json(folder / "generation_config.json", ArtifactError)
        try:
            model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
        except FOREIGN as error:
            raise ArtifactError(
                f"{folder / 'generation_config.json'} cannot be read ({first_line(error)}); fetch or remove it."
            ) from error
    if method is not None:
        mark(model, method)
        guard(model)
    for module in model.modules():
        module._is_hf_initialized = (
            True  # as from_pretrained leaves it: init_weights() draws anew what has no such mark
        )
    model.eval().requires_grad_(False)
