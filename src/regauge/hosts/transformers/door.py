"""transformers' own door: `AutoModel….from_pretrained(ARTIFACT, trust_remote_code=True)`.

Every argument is honoured, or refused by its name: none is swallowed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from regauge.artifact.config import CLASSES, WEIGHTS
from regauge.errors import SettingError
from regauge.hosts.transformers.hub import model_folder
from regauge.hosts.transformers.load import load
from regauge.hosts.transformers.owned import stock

FETCHING = frozenset(
    [
        "token",
        "use_auth_token",
        "cache_dir",
        "force_download",
        "resume_download",
        "proxies",
        "local_files_only",
        "trust_remote_code",
        "code_revision",
        "low_cpu_mem_usage",
        "use_safetensors",
        "weights_only",
        "adapter_kwargs",
        "ignore_mismatched_sizes",
        "name_or_path",
        "_from_auto",
        "_commit_hash",
        "_from_pipeline",
    ]
)
"""Arguments about how files are fetched and opened, which regauge does its own way: packed, from safetensors."""
SETTABLE = frozenset(
    [
        "use_cache",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    ]
)
"""Fields of a config that may differ from the artifact's: they change no tensor."""
UNSAID = frozenset(("dtype", "torch_dtype", "transformers_version", "_name_or_path", "name_or_path", "architectures"))
UNSAID |= {"quantization_config", "auto_map", WEIGHTS, "_attn_implementation_autoset"}
ALL: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


def from_pretrained(auto: str, path: str | Path, **options: Any) -> Any:
    """The model of an artifact, opened as an Auto class opens it.

    Args:
        auto: name of the Auto class.

    Raises:
        SettingError: an argument that cannot be honoured, by name; or the artifact is a model of another class.
    """
    config, asked = options.pop("config", None), {k: v for k, v in options.items() if k not in FETCHING}
    folder = model_folder(str(path), asked.pop("revision", None))
    dtype, old = asked.pop("dtype", None), asked.pop("torch_dtype", None)
    cache = asked.pop("cache", None)
    device, attention = _device(asked.pop("device_map", None)), asked.pop("attn_implementation", None)
    told = asked.pop("output_loading_info", False)
    named = {name: asked.pop(name) for name in list(asked) if name in SETTABLE}
    refused = sorted(name for name, value in asked.items() if value not in (None, False, "") or name == "state_dict")
    if refused:
        raise SettingError(f"{refused[0]}= cannot be honoured for an artifact of regauge; leave it out")
    model = load(folder, device=device, dtype=dtype if dtype is not None else old, cache=cache)
    _check_class(auto, model)
    for name, value in (_changes(config, model) | named).items():
        setattr(model.config, name, value)
    attention = attention or getattr(config, "_attn_implementation_internal", None)
    if attention and attention != model.config._attn_implementation:
        model.set_attn_implementation(attention)
    return (model, {name: type(value)() for name, value in ALL.items()}) if told else model


def _device(device_map: Any) -> str:
    """One device for the whole model.

    Raises:
        SettingError: several devices, or the disk.
    """
    if isinstance(device_map, dict):
        if device_map.keys() != {""}:
            raise SettingError("device_map= spreads the model over several places; an artifact goes to one device")
        device_map = device_map[""]
    if device_map in (None, "auto", "balanced", "sequential"):
        return "cuda" if device_map and torch.cuda.is_available() else "cpu"
    if device_map == "disk":
        raise SettingError("device_map= sends the model to the disk; regauge.load(path, memory='2GB') keeps a window")
    return f"cuda:{device_map}" if isinstance(device_map, int) else str(device_map)


def _check_class(auto: str, model: Any) -> None:
    """Refuses to give a model of another class than the Auto class gives elsewhere."""
    import transformers

    if auto == "AutoModel":
        return
    found = stock(model)
    fits = [name for name in CLASSES if found in _classes(getattr(transformers, name), model)]
    if auto not in fits:
        instead = f"open it with {fits[0]}, or " if fits else ""
        raise SettingError(f"the artifact is a {found.__name__}, which {auto} does not give; {instead}use regauge.load")


def _classes(auto: Any, model: Any) -> tuple[type, ...]:
    try:
        found = auto._model_mapping[type(model.config)]
    except KeyError:
        return ()
    return found if isinstance(found, tuple) else (found,)


def _changes(config: Any, model: Any) -> dict[str, Any]:
    """What a config that was given says otherwise than the artifact's.

    Raises:
        SettingError: a field that decides what the tensors are.
    """
    if config is None:
        return {}
    own, given = model.config.to_dict(), config.to_dict()
    found = {name: value for name, value in given.items() if name not in UNSAID and own.get(name) != value}
    wrong = sorted(found.keys() - SETTABLE)
    if wrong:
        raise SettingError(f"config= has another {wrong[0]} than the artifact, whose tensors it would contradict")
    return found
