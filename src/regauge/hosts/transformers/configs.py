"""A model directory's config.json: read and checked before anything else, so that each fault is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from regauge.errors import ModelError, UnsafeWeights
from regauge.hosts.transformers.columns import table_for
from regauge.hosts.transformers.skeleton import skeleton


def first_line(error: BaseException) -> str:
    """What an exception of another library says, cut to one line."""
    return str(error).strip().split("\n")[0]


def read_config(folder: Path) -> Any:
    """transformers' config of a directory, after every check that its JSON allows."""
    path = folder / "config.json"
    if not path.is_file():
        adapter = (
            " (it holds an adapter: merge it into its base model first)" * (folder / "adapter_config.json").exists()
        )
        raise ModelError(f"{folder} has no config.json, so it is no transformers model{adapter}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not JSON: {first_line(error)}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise ModelError(f"{path} names no model_type, so it is no transformers model")
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder} holds an adapter (adapter_config.json) beside a model, and transformers would load the base "
            "model that the adapter names, not this one; merge the adapter, or take its files out of a copy"
        )
    if raw.get("quantization_config"):
        said = raw["quantization_config"]
        method = said.get("quant_method", "an unnamed method") if isinstance(said, dict) else "a method not said"
        raise ModelError(f"{folder} is quantised already (by {method}); give the original model in bf16, fp16 or fp32")
    if raw.get("auto_map"):
        raise UnsafeWeights(
            f"{path} asks to run code of its own (auto_map), and regauge never runs it; "
            f"if transformers has the class itself, remove auto_map from a copy of the model"
        )
    table_for(raw["model_type"])
    return _load(folder)


def _load(folder: Path) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        why = first_line(error.__cause__ or error)
        raise ModelError(f"transformers cannot read {folder / 'config.json'}: {why}") from error


def build_skeleton(config: Any, folder: Path) -> Any:
    """The meta skeleton of a config, or an error that says why transformers cannot build it."""
    rows = getattr(config, "vocab_size", None)
    padding = getattr(config, "pad_token_id", None)
    if isinstance(padding, int) and isinstance(rows, int) and not -rows <= padding < rows:
        raise ModelError(
            f"{folder / 'config.json'} has pad_token_id {padding}, and the model's table has {rows} rows, from 0"
        )
    try:
        return skeleton(config)
    except (AssertionError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"transformers cannot build the model of {folder / 'config.json'} ({why})") from error
