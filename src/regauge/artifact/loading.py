"""What can load an artifact, and with which line."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from regauge.artifact.codec.base import COMPRESSED_TENSORS

CAUSAL = "AutoModelForCausalLM"
KINDS = {
    "ForCausalLM": CAUSAL,
    "LMHeadModel": CAUSAL,
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForImageClassification": "AutoModelForImageClassification",
}
"""Endings of a class in config.json's `architectures` → the Auto class that opens it."""


@dataclass(frozen=True)
class Way:
    """One way to open an artifact.

    Attributes:
        line: what is typed; empty where it cannot be opened so.
        note: what must be there, or why not.
    """

    runtime: str
    line: str
    note: str = ""


def auto_class(config: Mapping[str, object]) -> str:
    """The Auto class of transformers that opens a model with this config.json; `AutoModel` where none is known."""
    named = config.get("architectures")
    first = str(named[0]) if isinstance(named, list) and named else ""
    return next((auto for ending, auto in KINDS.items() if first.endswith(ending)), "AutoModel")


OURS = "regauge_"
"""What the types of models begin with that are regauge's own, and in no other library."""

ALONE = "no other library has models of type "


def ours(model_type: str) -> bool:
    """Whether a model is of a type that only regauge has."""
    return model_type.startswith(OURS)


def drawing(model_type: str) -> bool:
    """Whether a model is of a type that draws images."""
    return model_type == f"{OURS}var"


_INSTEAD = (
    "regauge packed these weights, and transformers alone does not read them; install regauge, then use "
    "regauge.load(PATH) or ",
    ".from_pretrained(PATH, trust_remote_code=True)",
)


def instead(auto: str) -> str:
    """What to open a packed artifact with, for whoever opens it with transformers alone: ends transformers' own error.

    Args:
        auto: see `auto_class`.
    """
    return auto.join(_INSTEAD)


def says_instead(value: object) -> bool:
    """Whether a value of config.json is what `instead` gives, of whichever Auto class."""
    return type(value) is str and value.startswith(_INSTEAD[0][:28]) and value.endswith(_INSTEAD[1])


def ways(wire: str, refusals: tuple[str, ...], place: str, auto: str = CAUSAL) -> tuple[Way, ...]:
    """Every runtime that a reader may ask about.

    Args:
        wire: `Receipt.wire`.
        refusals: `Receipt.refusals`.
        place: the directory, as it would be typed.
        auto: see `auto_class`.
    """
    typed = shlex.quote(place)
    if any(ALONE in why for why in refusals):
        return (Way("regauge, in Python", f"regauge.load({place!r})", "import regauge"),)
    found = [Way("regauge, in Python", f"regauge.load({place!r})", "import regauge")]
    if auto == CAUSAL:
        found.append(Way("regauge, as a server", f"regauge serve {typed}", "pip install 'transformers[serving]'"))
    opened = f"transformers.{auto}.from_pretrained({place!r}"
    if wire == COMPRESSED_TENSORS:
        found.append(Way("transformers", f"{opened})", "import transformers; compressed-tensors installed"))
        found += [Way("vLLM", f"vllm serve {typed}")] if auto == CAUSAL else []
    else:
        found.append(
            Way("transformers", f"{opened}, trust_remote_code=True)", "import transformers; regauge installed")
        )
        why = refusals[0] if refusals else "regauge's own format was asked for"
        found.append(Way("vLLM and others", "", f"no: {why}"))
    return tuple(found)
