"""A cache in a file, for another process: safetensors with the model's and this build's identity beside the tensors.

    save_cache(cache, "chat.safetensors", model)
    cache = load_cache("chat.safetensors", model)    # and go on: model.generate(**inputs, past_key_values=cache)

Nothing in it is run, and no tensor is larger than the file. A file of another model, of another plan or of a build that
puts tokens away otherwise is refused in a sentence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from regauge.cache.scheme import CachePlan
from regauge.errors import ArtifactError, ModelError, OutputError
from regauge.hosts.transformers.cache import GrowingLayer, SlidingLayer
from regauge.hosts.transformers.packed import PackedCache, PackedLayer, cache_of
from regauge.runtime.store.saving import packed_state, restore, restore_packed, state, told
from regauge.version import __version__

VERSION = 1
"""Of the file."""
LAYOUT = 1
"""Of the bytes of blocks: one more when a build puts the same tokens away otherwise."""
LARGEST = 1 << 20
"""Characters of what is said beside the tensors."""
PASSING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "_attn_implementation")
"""What a config says that changes nothing of what a token's keys and values are."""


def identity(model: Any) -> str:
    """A model's, by its config, the shapes of its tensors, its vectors, and a row of every matrix; 32 hex digits.

    Raises:
        ModelError: its weights are not in memory.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in PASSING}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    seen = 0
    for path, module in model.named_modules():
        for name, tensor in _rows(module):
            if tensor.device.type == "meta":
                continue
            seen += 1
            digest.update(f"{path}.{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    if not seen:
        raise ModelError("the model's weights are not in memory, so a saved cache cannot be told to be its own")
    return digest.hexdigest()[:32]


def _rows(module: nn.Module) -> list[tuple[str, Tensor]]:
    """What is told of one module: its own vectors, and the first row of a matrix, packed or not."""
    own = [
        (name, tensor if tensor.ndim < 2 else tensor[0])
        for name, tensor in module._parameters.items()
        if tensor is not None
    ]
    rows = getattr(module, "rows", None)
    return own if rows is None else [*own, ("rows", rows(0, 1))]


def save_cache(cache: PackedCache, path: str | Path, model: Any) -> Path:
    """Writes a cache with what says whose it is.

    Raises:
        OutputError: there is a file already, or it cannot be written.
        ModelError: a block keeps its past in another way.
    """
    path = Path(path)
    if path.exists():
        raise OutputError(f"{path} exists; a saved cache does not replace it")
    tensors: dict[str, Tensor] = {}
    numbers: list[dict[str, int]] = []
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        if type(layer) not in (PackedLayer, GrowingLayer, SlidingLayer):
            raise ModelError(f"block {index} keeps its past in a {type(layer).__name__}, which is not saved")
        held, counted = packed_state(layer) if type(layer) is PackedLayer else state(layer)
        tensors |= {f"{index}.{name}": tensor for name, tensor in held.items()}
        numbers.append(counted)
    about = {"version": VERSION, "layout": LAYOUT, "build": __version__, "model": identity(model)}
    about |= {"name": cache.plan.name, "plan": _told(cache.plan), "numbers": numbers}
    try:
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, path, {"regauge_cache": json.dumps(about)})
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path} cannot be written: {error}") from error
    return path


def load_cache(path: str | Path, model: Any, plan: CachePlan | None = None) -> PackedCache:
    """A cache again, on the model's device.

    Args:
        plan: by which it was kept; None: the model's own, `model.regauge_cache`.

    Raises:
        ArtifactError: it is no file of a cache, or one of another model, plan or build.
    """
    path, plan = Path(path), plan or getattr(model, "regauge_cache", None)
    try:
        with safe_open(path, "pt") as file:
            about = _about((file.metadata() or {}).get("regauge_cache", ""), path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read as a saved cache: {error}") from error
    if plan is None:
        raise ArtifactError(
            f"{path} was kept as {about['name']!r}, and this model has no such cache; load it with cache="
        )
    _check(about, plan, model, path)
    cache = cache_of(plan, model)
    device = next(model.parameters()).device
    layers: list[Any] = cache.layers
    for index, (layer, numbers) in enumerate(zip(layers, about["numbers"], strict=True)):
        held = {
            name.partition(".")[2]: tensor.to(device) if name.rpartition(".")[2] not in ("counts", "firsts") else tensor
            for name, tensor in tensors.items()
            if name.partition(".")[0] == str(index)
        }
        restore_packed(layer, held, numbers) if type(layer) is PackedLayer else restore(layer, held, numbers)
        if layer.keys_BHTD is not None:
            layer.lazy_initialization(layer.keys_BHTD, layer.values_BHTD)
    return cache


def _told(plan: CachePlan) -> list[str]:
    return [told(None if block is None else block.scheme) for block in plan.blocks]


def _about(text: str, path: Path) -> Mapping[str, Any]:
    """What the file says of itself.

    Raises:
        ArtifactError: nothing, or no sense.
    """
    if not text or len(text) > LARGEST:
        raise ArtifactError(f"{path} is no saved cache: nothing in it says whose tokens these are")
    try:
        about = json.loads(text)
        counts = about["numbers"]
        numbers = [value for one in counts for value in one.values()]
        sound = isinstance(counts, list) and all(type(value) is int and 0 <= value < 1 << 40 for value in numbers)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise ArtifactError(f"{path} says of itself what is no sense; it was changed, or cut off")
    found: Mapping[str, Any] = about
    return found


def _check(about: Mapping[str, Any], plan: CachePlan, model: Any, path: Path) -> None:
    """
    Raises:
        ArtifactError: it is of another build, model or plan.
    """
    if (about.get("version"), about.get("layout")) != (VERSION, LAYOUT):
        raise ArtifactError(
            f"{path} was saved by regauge {about.get('build')}, which puts tokens away otherwise than this one "
            f"({__version__}); read the text again"
        )
    if about.get("model") != identity(model):
        raise ArtifactError(f"{path} holds the past of another model, or of this one otherwise compressed")
    if about.get("plan") != _told(plan) or len(about["numbers"]) != len(plan.blocks):
        raise ArtifactError(
            f"{path} was kept as {str(about.get('name'))!r}, which differs from {plan.name!r} of this model"
        )
