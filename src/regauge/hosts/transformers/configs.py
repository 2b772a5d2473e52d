"""A model directory's config.json: read and checked before anything else, so that each fault is one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from regauge.artifact.config import WEIGHTS
from regauge.artifact.loading import says_instead
from regauge.documents import read_json
from regauge.errors import ModelError, RegaugeError, UnsafeWeights
from regauge.hosts.regauge import register
from regauge.hosts.transformers.coded import method
from regauge.hosts.transformers.settings import own_config
from regauge.hosts.transformers.skeleton import skeleton
from regauge.hosts.transformers.tables import check_type, table_for

FOREIGN = (
    OSError, AssertionError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, ArithmeticError,
    ImportError,
)  # fmt: skip
"""What transformers raises where a config is none: nothing in it checks what it reads."""
COUNTS = re.compile(r"(?:^|_)(layers?|blocks?|experts?|heads?|labels)(?:_per_tok)?$")
MOST = {"layer": 4096, "block": 4096, "expert": 65536, "head": 65536} | {"labels": 2_000_000}
"""The most modules of a kind: each is made before a tensor is read, so a count must not be believed."""
MOST |= {f"{name}s": most for name, most in MOST.items() if name != "labels"}
INDEX = ("feature_layer",)
"""Names of fields that end as counts do and are none: which layer of a tower is read, counted from its end too."""
ELSEWHERE = (WEIGHTS,)
"""Fields by which transformers would read another file than the one that was checked."""


def first_line(error: BaseException) -> str:
    """What an exception of another library says, cut to one line."""
    return str(error).strip().split("\n")[0][:300]


def read_config(folder: Path) -> Any:
    """transformers' config of a directory, after every check that its JSON allows."""
    path = folder / "config.json"
    if not path.exists():
        adapter = (
            " (it holds an adapter: merge it into its base model first)" * (folder / "adapter_config.json").exists()
        )
        raise ModelError(f"{folder} has no config.json, so it is no transformers model{adapter}")
    raw = read_raw(folder)
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder} holds an adapter (adapter_config.json) beside a model, and transformers would load the base "
            "model that the adapter names, not this one; merge the adapter, or take its files out of a copy"
        )
    quantised = raw.pop("quantization_config", None)
    if quantised and not method(quantised):
        by = quantised.get("quant_method", "an unnamed method") if type(quantised) is dict else "an unnamed method"
        raise ModelError(f"{folder} is quantised already (by {by}); give the original model in bf16, fp16 or fp32")
    if raw.get("auto_map"):
        raise UnsafeWeights(
            f"{path} asks to run code of its own (auto_map), and regauge never runs it; "
            f"if transformers has the class itself, remove auto_map from a copy of the model"
        )
    return config_of(raw, folder)


def coded_by(folder: Path) -> str:
    """In which codes the weights of a directory are stored that are read by decoding; "" where they are plain."""
    return method(read_raw(folder).get("quantization_config"))


def read_raw(folder: Path, error: type[RegaugeError] = ModelError) -> dict[str, Any]:
    """The mapping in config.json, its counts within bounds, without the sentence that ours has for transformers.

    Raises:
        error: it cannot be read, names no model type, or asks for more modules than any model has.
    """
    path = folder / "config.json"
    raw = read_json(path, error)
    if type(raw.get("model_type")) is not str:
        raise error(f"{path} names no model_type, so it is no transformers model")
    if says_instead(raw.get(WEIGHTS)):
        del raw[WEIGHTS]
    for name, value in _fields(raw):
        if name in ELSEWHERE and value is not None:
            raise UnsafeWeights(f"{path} says by {name} where weights or code lie, which regauge takes from no config")
        counted = None if name.endswith(INDEX) else COUNTS.search(name)
        if counted and type(value) in (int, float) and not 0 <= value <= MOST[counted[1]]:
            raise error(f"{path} has {name} {value}, and a model has 0 to {MOST[counted[1]]:,}")
    return raw


def _fields(raw: Any) -> Iterator[tuple[str, Any]]:
    """Every named value of a document, at any depth."""
    if type(raw) is dict:
        for name, value in raw.items():
            yield name, value
            yield from _fields(value)
    elif type(raw) is list:
        for value in raw:
            yield from _fields(value)


def _decoded(raw: Any) -> Any:
    """A copy of a document with the numbers that JSON has no word for, as transformers writes them."""
    if type(raw) is dict and raw.keys() == {"__float__"} and type(raw["__float__"]) is str:
        return float(raw["__float__"])
    if type(raw) is dict:
        return {key: _decoded(value) for key, value in raw.items()}
    return [_decoded(value) for value in raw] if type(raw) is list else raw


def config_of(raw: Mapping[str, Any], folder: Path) -> Any:
    """transformers' config object of what `read_raw` gave.

    Raises:
        ModelError: transformers cannot make it; or no table describes the family.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    check_type(raw["model_type"], folder)
    if not register(raw["model_type"]) and raw["model_type"] not in CONFIG_MAPPING:
        raise ModelError(f"{folder} is of type {raw['model_type']!r}, which this transformers does not have")
    try:
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(_decoded(raw))
    except (*FOREIGN, StrictDataclassError) as error:
        why = first_line(error.__cause__ or error)
        raise ModelError(f"transformers cannot read {folder / 'config.json'}: {why}") from error
    config._name_or_path = str(folder)
    table_for(config)
    return config


def build_skeleton(config: Any, folder: Path) -> Any:
    """The meta skeleton of a config, or an error that says why transformers cannot build it."""
    own = own_config(table_for(config), config)
    rows = getattr(own, "vocab_size", None)
    padding = getattr(own, "pad_token_id", None)
    if isinstance(padding, int) and isinstance(rows, int) and not -rows <= padding < rows:
        raise ModelError(
            f"{folder / 'config.json'} has pad_token_id {padding}, and the model's table has {rows} rows, from 0"
        )
    try:
        return skeleton(config)
    except FOREIGN as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"transformers cannot build the model of {folder / 'config.json'} ({why})") from error
