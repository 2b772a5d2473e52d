"""The small files of an artifact: config.json, what is carried over from the source, recipe and receipt, the shim."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from regauge.anatomy.model import Anatomy
from regauge.anatomy.sizes import resized, sizes
from regauge.artifact.caches import FILE, cache_json
from regauge.artifact.codec.base import REGAUGE, Wire
from regauge.artifact.folder import ANATOMY, anatomy_json
from regauge.artifact.loading import auto_class, instead, says_instead
from regauge.artifact.sentences import module_files

SHIM = "regauge_loader.py"
CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForImageClassification",
)
CARRIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
    "*processor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
    # of a sentence encoder, for sentence-transformers; the folders of its modules come whole
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "1_*/config.json",
    "2_*/config.json",
)
"""What is copied from the source, as globs. Weights, caches and code are not; README.md goes to regauge/."""
WEIGHTS = "transformers_weights"
"""Of config.json: the file of weights that transformers opens before it looks for any other. It refuses a name that is
no safetensors file and repeats it, so here stands what to do instead: see docs/decisions/012."""
UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".py")
"""Endings of files that can run code when they are opened, which are carried nowhere."""
READ = ("model.safetensors.index.json", "config.json", "README.md")
"""What of the source becomes something else in an artifact, beside its weights."""


def carried(source: Path) -> dict[str, bytes | str | Path]:
    """Tokenizer, chat template, generation settings, modules of a sentence encoder and licence of the source; its card
    under another name."""
    found: dict[str, bytes | str | Path] = {}
    for pattern in CARRIED:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path.suffix not in UNSAFE:
                found[path.relative_to(source).as_posix()] = path
    for path in module_files(source):
        if path.suffix not in UNSAFE:
            found[path.relative_to(source).as_posix()] = path
    if (source / "README.md").is_file():
        found["regauge/SOURCE_README.md"] = source / "README.md"
    return found


def left_behind(source: Path, weights: Iterable[str]) -> list[str]:
    """What of a source an artifact will not hold: files and folders beside those weights that are not carried over, by
    name, and what in a module's folder can run code. Hidden ones are of no model."""
    have = carried(source)
    known, found = {*READ, *weights}, []
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name in known:
            continue
        if path.is_dir():
            if not any(name.startswith(f"{path.name}/") for name in have):
                found.append(f"{path.name}/")
        elif path.is_file() and path.name not in have:
            found.append(path.name)
    inside = (path.relative_to(source).as_posix() for path in module_files(source))
    return found + [name for name in inside if name not in have and f"{name.split('/')[0]}/" not in found]


def config_json(source: Path, wire: Wire, more: Mapping[str, object] | None = None) -> str:
    """config.json of the source with what the artifact changes.

    Args:
        more: what else it says otherwise, of a member of a family.
    """
    raw = json.loads((source / "config.json").read_text(encoding="utf-8")) | dict(more or {})
    if says_instead(raw.get(WEIGHTS)):  # of a family of ours
        del raw[WEIGHTS]
        raw.pop("auto_map", None)
    if any(site.name == "head" for site in wire.layout.anatomy.sites):
        raw["tie_word_embeddings"] = wire.layout.anatomy.tied
    if wire.name != REGAUGE:  # ours keeps the source's sizes there, and has its own in the header
        raw |= wire.layout.config
    if not raw.get("dtype") and not raw.get("torch_dtype"):
        raw["dtype"] = str(wire.layout.dtype).removeprefix("torch.")  # else it would load in another than the source
    raw.pop("quantization_config", None)  # of a source that was stored in codes and read by decoding
    quantisation = wire.config()
    if quantisation:
        raw["quantization_config"] = quantisation
    if wire.name == REGAUGE:
        raw[WEIGHTS] = instead(auto_class(raw))
        raw["auto_map"] = {name: f"{SHIM.removesuffix('.py')}.{name}" for name in CLASSES}
    return json.dumps(raw, indent=2, sort_keys=True) + "\n"


def _described(wire: Wire) -> Anatomy:
    """The model that config.json describes: the source, in the sizes that are left where the config says those."""
    source = wire.layout.source
    return source if wire.name == REGAUGE else resized(source, sizes(source, wire.layout.anatomy))


def artifact_files(
    source: Path,
    wire: Wire,
    index: Mapping[str, object],
    recipe: str,
    receipt: str,
    more: Mapping[str, object] | None = None,
) -> dict[str, bytes | str | Path]:
    """Everything beside the shards, for `Staging.finish`.

    Args:
        source: directory of the source model.
        index: `Staging.index()`.
        recipe: YAML that prints back to the plan.
        receipt: JSON.
        more: as `config_json` says.
    """
    found = carried(source)
    found["config.json"] = config_json(source, wire, more)
    found["regauge/recipe.yaml"] = recipe
    found["regauge/receipt.json"] = receipt
    found[ANATOMY] = anatomy_json(_described(wire))
    if wire.layout.cache and wire.name != REGAUGE:
        found[FILE] = cache_json(wire.layout)
    if wire.name == REGAUGE:
        found[SHIM] = Path(__file__).with_name("shim.py.txt")
    else:
        found["model.safetensors.index.json"] = json.dumps(index, indent=1, sort_keys=True) + "\n"
    return found
