"""From what the user wrote to a directory: a path as it is, a hub id by download (safetensors, json and tokenizer)."""

from __future__ import annotations

import os
import re
from pathlib import Path

from regauge.artifact.sentences import modules
from regauge.documents import ordinary
from regauge.errors import ModelError, UnsafeWeights, nearest

WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README.md"]
UNWANTED = ["onnx/*", "openvino/*", "*/*.safetensors", "original/*", "*.bin"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def model_folder(model: str, revision: str | None = None) -> Path:
    """The directory of a model.

    Args:
        model: a directory, or a hub id (`org/name`).
        revision: branch, tag or commit of a hub id.
    """
    path = Path(model).expanduser()
    if os.path.isdir(path):  # where a name is too long for the system, there is none
        ordinary(path, ModelError)
        return path
    if os.path.isfile(path):
        raise ModelError(f"{model} is a file; give the directory that holds config.json and the safetensors files")
    if path.is_absolute() or model.startswith((".", "~")) or not HUB_ID.fullmatch(model):
        raise ModelError(f"there is no directory {model}{_near(path)}")
    return _download(model, revision, path)


def _near(path: Path) -> str:
    """A hint from the deepest parent that exists."""
    parent = path.parent
    if not os.path.isdir(parent):
        return ""
    known = [child.name for child in parent.iterdir() if child.is_dir()]
    return nearest(path.name, known) if known else ""


def _download(model: str, revision: str | None, path: Path) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    offline = constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE", "") in ("1", "true", "yes")
    try:
        found = snapshot_download(
            model,
            revision=revision,
            allow_patterns=WANTED,
            ignore_patterns=UNWANTED,
            local_files_only=offline,
            etag_timeout=5,
        )
    except RevisionNotFoundError as error:
        raise ModelError(f"the hub model {model!r} has no revision {revision!r}") from error
    except GatedRepoError as error:  # a RepositoryNotFoundError too
        raise ModelError(
            f"the hub model {model!r} is gated: accept its licence on its page, then log in (hf auth login, HF_TOKEN)"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no directory {model}{_near(path)}, and no model {model!r} on the hub, or it is private: "
            "then log in (hf auth login, or HF_TOKEN)"
        ) from error
    except LocalEntryNotFoundError as error:
        why = "the hub is off (HF_HUB_OFFLINE)" if offline else "the hub could not be reached"
        raise ModelError(
            f"there is no directory {model}{_near(path)}; as a hub id it is not in the local cache, and {why}"
        ) from error
    except (HFValidationError, OSError) as error:
        raise ModelError(f"there is no directory {model}{_near(path)}, and it cannot be fetched: {error}") from error
    folder = Path(found)
    beside = [f"{module.path}/*.safetensors" for module in modules(folder) if module.path]
    if beside and not offline:  # of a sentence encoder's modules, which lie below the model
        snapshot_download(model, revision=revision, allow_patterns=beside, etag_timeout=5)
    if (folder / "config.json").exists() and not any(folder.glob("*.safetensors")):
        raise UnsafeWeights(
            f"the hub model {model!r} has no weights in safetensors; pickled ones (.bin) can run code when they are "
            "opened and are never fetched: convert it with transformers' save_pretrained where you trust it"
        )
    return folder
