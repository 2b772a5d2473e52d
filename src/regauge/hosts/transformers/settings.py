"""What a config says where a family table asks it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from regauge.errors import ModelError
from regauge.hosts.transformers.columns import Refusal, Table, When


def own_config(table: Table, config: Any) -> Any:
    """The config of the model that a table describes: a part of the whole one where that wraps it."""
    return getattr(config, table.part) if table.part else config


def sliding_blocks(config: Any, blocks: int) -> tuple[int, ...]:
    """Blocks whose cache does not grow by every token, as transformers builds it from a config: behind a sliding window
    or in chunks, shared with another block, or a state."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    kinds, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    return tuple(number for number, kind in enumerate(kinds[:blocks]) if kind != "full_attention")


def lookup(config: Any, path: str, default: Any) -> Any:
    """A dotted path through attributes and mappings of a config; the default where a step is missing or None."""
    value = config
    for step in path.split("."):
        value = value.get(step) if isinstance(value, Mapping) else getattr(value, step, None)
        if value is None:
            return default
    return value


def holds(config: Any, when: When) -> bool:
    """Whether a config has the settings with which a row holds."""
    return all(lookup(config, path, None) == value for path, value in when.items())


def refuse(table: Table, config: Any) -> None:
    """Raises ModelError, with the reason, where a config has a setting that its table does not describe."""
    for refusal, seen, wanted in _unmet(table, config, table.refuse):
        raise ModelError(
            f"{config.model_type} with {refusal.attribute}={seen!r} cannot be used (it must be {wanted!r}): "
            f"{refusal.why}"
        )


def why_together(table: Table, config: Any) -> str:
    """Why the blocks of a model cannot be run one by one; "" where they can."""
    for refusal, seen, _ in _unmet(table, config, table.together):
        setting = f"{config.model_type} with {refusal.attribute}={seen!r}"
        return f"the blocks of a {setting} cannot be run one by one: {refusal.why}"
    return ""


def _unmet(table: Table, config: Any, refusals: list[Refusal]) -> Iterator[tuple[Refusal, Any, Any]]:
    """Each condition that a config does not meet, with what was seen and what it must be."""
    own = own_config(table, config)
    for refusal in refusals:
        seen = lookup(own, refusal.attribute, None)
        wanted = refusal.must_be if refusal.must_match is None else lookup(own, refusal.must_match, None)
        if seen != wanted:
            yield refusal, seen, wanted
