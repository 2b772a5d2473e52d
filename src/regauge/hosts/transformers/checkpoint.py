"""What lies in the safetensors files of a checkpoint, and which module parameter each tensor is (part of).

Headers are checked against the file's size before anything is read, so that a truncated file is one clear error and
never a bus error from a memory map. Old names (BERT's `gamma`, ViT's `encoder.layer`, experts one by one) are
translated by transformers' own conversion tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from regauge.artifact import files
from regauge.errors import CorruptWeights, ModelError, UnsafeWeights

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
REBUILT = r"(rotary_emb\.inv_freq|position_ids|\.(attn|attention)\.(masked_)?bias)$"
"""Buffers that old checkpoints hold and the modules of today make themselves: frequencies, positions, masks."""

STEPS = re.compile(r"(?i)scale|absmax|quant_map|quant_state|zero_?points?|qzeros|\.scb$")
"""Names under which quantisers store the steps of codes."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its name there, dtype by safetensors' name, and shape (once decoded, where it is codes).

    Attributes:
        steps: where its steps lie, where it is codes that are decoded when they are read.
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    steps: Stored | None = None


@dataclass(frozen=True)
class Piece:
    """A stored tensor as a parameter: all of it, or of a stack the expert `index`, its slice `part` of `parts`."""

    stored: Stored
    index: int | None = None
    part: int = 0
    parts: int = 1


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model directory, or the error that says what is there instead."""
    if (folder / SINGLE).exists():  # before an index, as transformers does: one may be left over from older shards
        return [folder / SINGLE]
    if (folder / INDEX).exists():
        shards = sorted(set(files.weight_map(folder, CorruptWeights).values()))
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            raise CorruptWeights(
                f"{folder / INDEX} names {len(shards)} files, and {len(missing)} of them are not there: "
                f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}; download the model again"
            )
        return [folder / name for name in shards]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UnsafeWeights(
            f"{folder} has only {pickles[0]}: such a file can run code when it is opened, so regauge reads safetensors "
            f"alone; convert it with transformers' save_pretrained where you trust the file"
        )
    broken = [path.name for path in sorted(folder.iterdir()) if path.is_symlink() and not path.exists()]
    if broken:
        target = (folder / broken[0]).readlink()
        raise ModelError(f"{folder / broken[0]} is a link that leads nowhere ({target}); fetch the model again")
    raise ModelError(f"{folder} has a config.json but no weights: {SINGLE} or {INDEX} was expected")


def stored_tensors(folder: Path, paths: list[Path]) -> dict[str, Stored]:
    """Every tensor of some checked files by its name in them; an index must agree with the files."""
    found: dict[str, Stored] = {}
    for path in paths:
        found |= read_header(path)
    if paths != [folder / SINGLE] and (folder / INDEX).exists():
        lost = [f"{key} ({name})" for key, name in files.weight_map(folder, CorruptWeights).items() if key not in found]
        if lost:
            raise CorruptWeights(
                f"{folder / INDEX} names tensors that its files do not hold: {', '.join(lost[:3])}"
                f"{', …' if len(lost) > 3 else ''}; download the model again"
            )
    return found


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, from its header."""
    found = files.header(path, CorruptWeights)
    return {key: Stored(path, key, files.NAMES[dtype], shape) for key, (dtype, shape, *_) in found.items()}


def locate(model: Any, stored: Mapping[str, Stored]) -> tuple[dict[str, tuple[Piece, ...]], tuple[str, ...]]:
    """Parameter key of the skeleton → its pieces in the files; and the stored tensors that nothing uses."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    shapes = model.state_dict()
    pieces: dict[str, list[Piece]] = {}
    unused = []
    for key, tensor in stored.items():
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, shapes)
        if target not in shapes:
            unused.append(key)
        elif pattern is None:
            pieces.setdefault(target, []).append(Piece(tensor))
        else:
            pieces.setdefault(target, []).append(_expert(tensor, pattern, converters))
    return {key: tuple(some) for key, some in pieces.items()}, tuple(unused)


def left_out(unused: tuple[str, ...]) -> Iterator[str]:
    """A note on the stored tensors that the model has no place for, but for buffers that it makes itself."""
    strange = sorted(key for key in unused if not re.search(REBUILT, key))
    if strange:
        some = ", ".join(strange[:3]) + (", …" if len(strange) > 3 else "")
        yield f"{len(strange)} tensors of the files have no place in config.json's model and are left out: {some}"


def expected(model: Any, key: str) -> bool:
    """Whether transformers knows that checkpoints of this model hold such a tensor beside what the model takes."""
    patterns = (REBUILT, *(model._keys_to_ignore_on_load_unexpected or ()))
    return any(re.search(pattern, key) for pattern in patterns)


def check_scales(model: Any, pieces: Mapping[str, tuple[Piece, ...]], unused: tuple[str, ...], where: Path) -> None:
    """Refuses codes whose steps stand beside them, and whole numbers where weights are due: taken for weights they
    would be another model.

    Raises:
        ModelError: names the first.
    """
    shapes = model.state_dict()
    steps = sorted(key for key in unused if STEPS.search(key))
    for target in sorted(pieces):
        for stored in (piece.stored for piece in pieces[target]):
            if stored.steps is not None:
                continue
            whole = stored.dtype[0] in "IUB" and stored.dtype != "BF16" and shapes[target].is_floating_point()
            if not whole and not (stored.dtype.startswith("F8") and steps):
                continue
            near = [key for key in steps if key.rpartition(".")[0].startswith(stored.key.rpartition(".")[0])]
            beside = f" with their steps beside them ({(near or steps)[0]})" if steps else ""
            raise ModelError(
                f"{stored.key} in {where} is stored as codes ({stored.dtype}){beside}, and config.json has no "
                "quantization_config; give the model in bf16, fp16 or fp32"
            )


def _expert(tensor: Stored, pattern: str, converters: list[Any]) -> Piece:
    """A tensor that transformers would merge: one expert, whole or as one of the parts of a fused matrix."""
    converter = next(c for c in converters if pattern in c.source_patterns)
    steps = [type(step).__name__ for step in converter.operations]
    number = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), tensor.key)
    if number is None or steps not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
        raise ModelError(f"{tensor.key} is stored in a layout that regauge does not read ({', '.join(steps)})")
    parts = len(converter.source_patterns)
    return Piece(tensor, int(number[1]), converter.source_patterns.index(pattern), parts)


def check(model: Any, pieces: Mapping[str, tuple[Piece, ...]], tied: Mapping[str, str], where: Path) -> None:
    """Every parameter of the skeleton is in the files, in its shape (a tied one: under one of its names)."""
    shapes = model.state_dict()
    missing = [
        key for key in shapes if key not in pieces and tied.get(key) not in pieces and not _swapped(key, pieces, tied)
    ]
    if missing:
        raise CorruptWeights(
            f"{where} lacks {len(missing)} of the {len(shapes)} tensors that its config asks for: "
            f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}; "
            f"the config and the weights do not belong together"
        )
    for key, some in pieces.items():
        if len(some) > 1 and some[0].index is None:
            raise CorruptWeights(
                f"{where} holds {key} twice, as {some[0].stored.key} and as {some[1].stored.key}; take one out of a "
                "copy"
            )
        seen = assembled_shape(some)
        if seen[:1] == (0,):
            raise CorruptWeights(
                f"{where} holds {len(some)} pieces of {key} that do not make a stack (an expert is missing, or their "
                f"shapes differ); the config and the weights do not belong together"
            )
        if seen != tuple(shapes[key].shape):
            raise CorruptWeights(
                f"{some[0].stored.key} in {some[0].stored.file} makes a tensor of shape {list(seen)}, and the config "
                f"asks for {list(shapes[key].shape)}; the config and the weights do not belong together"
            )


def _swapped(key: str, pieces: Mapping[str, tuple[Piece, ...]], tied: Mapping[str, str]) -> bool:
    return any(source == key and target in pieces for target, source in tied.items())


def assembled_shape(pieces: tuple[Piece, ...]) -> tuple[int, ...]:
    """Shape of the parameter that some pieces make; (0,) where experts or parts are missing or differ."""
    first = pieces[0]
    if first.index is None:
        return first.stored.shape
    experts = {piece.index for piece in pieces}
    shapes = {piece.stored.shape for piece in pieces}
    if len(shapes) > 1 or len(experts) * first.parts != len(pieces) or experts != set(range(len(experts))):
        return (0,)
    (rows, *rest) = first.stored.shape
    return (len(experts), rows * first.parts, *rest)


def finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity. One pass, no copy; codes and indices are finite by nature."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.itemsize == 1:
        return True
    low, high = tensor.aminmax()
    return bool(low.isfinite() and high.isfinite())
