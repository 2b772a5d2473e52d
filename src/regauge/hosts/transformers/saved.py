"""A cache in a file, for another process: safetensors with the model's and this build's identity beside the tensors.

    rg.cache.save(model, cache, "chat.safetensors")
    cache = rg.cache.load(model, "chat.safetensors")    # and go on: model.generate(**inputs, past_key_values=cache)

Nothing in it is run, and no tensor is larger than the file. A file of another model, of another plan or of a build that
puts tokens away otherwise is refused in a sentence, before its tensors are read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache

from regauge.artifact.disk import TEMPORARY, check_disk
from regauge.cache.scheme import CachePlan
from regauge.errors import ArtifactError, ModelError, OutputError
from regauge.hosts.transformers.adopting import adopt
from regauge.hosts.transformers.cache import GrowingLayer, SlidingLayer
from regauge.hosts.transformers.caching import asked_by
from regauge.hosts.transformers.packed import PackedCache, PackedLayer, cache_of
from regauge.plan.caches import Asked
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


def save(model: Any, cache: Any, path: str | Path) -> Path:
    """Writes a cache, with what says whose it is: `rg.cache.load` goes on from it, in another process too.

    Args:
        model: whose text it holds.
        cache: a `DynamicCache`, packed or not. It stays as it is, and keeps its place in memory.
        path: a file that is not there yet; it appears when it is whole.

    Raises:
        OutputError: there is a file already, or it cannot be written.
        ModelError: a block keeps its past in another way.
    """
    path = Path(path)
    if path.exists():
        raise OutputError(f"{path} exists; a saved cache does not replace it")
    if type(cache) not in (DynamicCache, PackedCache):
        raise ModelError(f"a {type(cache).__name__} is not saved: only a DynamicCache is, packed or not")
    tensors: dict[str, Tensor] = {}
    numbers: list[dict[str, int]] = []
    layers: list[Any] = _adopted(cache).layers
    for index, layer in enumerate(layers):
        if type(layer) not in (PackedLayer, GrowingLayer, SlidingLayer):
            raise ModelError(f"block {index} keeps its past in a {type(layer).__name__}, which is not saved")
        held, counted = packed_state(layer) if type(layer) is PackedLayer else state(layer)
        tensors |= {f"{index}.{name}": tensor for name, tensor in held.items()}
        numbers.append(counted)
    plan = _plan(cache)
    about = {"version": VERSION, "layout": LAYOUT, "build": __version__, "model": identity(model)}
    about |= {"name": plan.name, "plan": _told(plan), "numbers": numbers}
    check_disk(path, sum(tensor.nbytes for tensor in tensors.values()))
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        held = {name: tensor.cpu() for name, tensor in tensors.items()}
        save_file(held, temporary, {"regauge_cache": json.dumps(about)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path} cannot be written, and nothing is left there: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load(model: Any, path: str | Path, cache: Asked | CachePlan | None = None) -> DynamicCache:
    """A cache again, on the model's device.

    Args:
        model: the one that read the text, compressed as it was then.
        cache: by which it was kept, as `generate` takes `regauge_cache=`; None: as the model keeps its past.

    Raises:
        ArtifactError: it is no file of a cache, or one of another model, plan or build.
        RecipeError: `cache` is no recipe of one.
    """
    path, plan = Path(path), asked_by(model, cache)
    try:
        with safe_open(path, "pt") as file:
            about = _about((file.metadata() or {}).get("regauge_cache", ""), path)
            if plan is None and set(about["plan"]) <= {told(None)}:
                plan = CachePlan("none", (None,) * len(about["plan"]))
            if plan is None:
                raise ArtifactError(
                    f"{path} was kept as {about['name']!r}, and this model has no such cache; load it with cache="
                )
            _check(about, plan, model, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read as a saved cache: {error}") from error
    found = cache_of(plan, model)
    device = next(model.parameters()).device
    layers: list[Any] = found.layers
    for index, (layer, numbers) in enumerate(zip(layers, about["numbers"], strict=True)):
        held = {
            name.partition(".")[2]: tensor.to(device) if name.rpartition(".")[2] not in ("counts", "firsts") else tensor
            for name, tensor in tensors.items()
            if name.partition(".")[0] == str(index)
        }
        restore_packed(layer, held, numbers) if type(layer) is PackedLayer else restore(layer, held, numbers)
        if layer.keys_BHTD is not None:
            layer.lazy_initialization(layer.keys_BHTD, layer.values_BHTD)
    if not plan.plain:
        return found
    plain = DynamicCache(config=model.config.get_text_config(decoder=True))
    plain.layers[:] = layers
    return plain


def _plan(cache: DynamicCache) -> CachePlan:
    return cache.plan if type(cache) is PackedCache else CachePlan("none", (None,) * len(cache.layers))


def _adopted(cache: DynamicCache) -> DynamicCache:
    """A cache of our layers of what transformers' own hold; the cache itself stays as it is."""
    if type(cache) is PackedCache:
        return cache
    found = copy(cache)
    found.layers = [*cache.layers]
    adopt(found, len(found.layers))
    return found


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
        sound = sound and isinstance(about["plan"], list) and all(type(one) is str for one in about["plan"])
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
