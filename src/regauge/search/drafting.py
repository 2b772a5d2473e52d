"""Drafts in a search: whether they are asked for, what they gave on what was built, and where that is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from regauge.artifact.card import CARD, card
from regauge.artifact.disk import put
from regauge.artifact.folder import RECEIPT, read_receipt
from regauge.artifact.preferring import SETTINGS, prefer
from regauge.artifact.receipt import DraftsReceipt
from regauge.documents import read_json
from regauge.engine.drafting import LOOKUP, NONE, Drafting, refused, run, stretches, weighed
from regauge.engine.receipts import text_of
from regauge.errors import ArtifactError, SettingError
from regauge.hosts import host_of
from regauge.hosts.base import Source
from regauge.measure.cost import prompt_of
from regauge.measure.several import together
from regauge.runtime.drafts.worth import MOST
from regauge.search.budgets import Budget
from regauge.text.split import Texts

ANY = "any"
DECODE = "decode"
AT_MOST = 2.0
"""Times as fast as without drafts: a budget that would need more of them is refused before any work."""
TURNS = 5
ENOUGH = 10
"""Stretches of the search text by which drafts are chosen: some texts end before they count."""


def asked(drafts: str | None, budgets: Sequence[Budget], text: bool) -> tuple[str, ...]:
    """What may draft: of `fit --drafts`, or where a budget is of decoding; nothing: drafts are not weighed.

    Args:
        drafts: `any`, `none`, `lookup`, or a member; None: `any` where a budget is of decoding.
        text: whether the user gives any.

    Raises:
        SettingError: they are asked for and there is no text to tell what they are worth.
    """
    if drafts is None:
        return (ANY,) if any(one.resource == DECODE for one in budgets) else ()
    if drafts == NONE:
        return ()
    if not text:
        raise SettingError(
            f"--drafts {drafts} is decided by how often guesses are right on text of yours: give --eval or "
            "--calibration, or leave --drafts out"
        )
    return (drafts,)


def alone(wanted: Sequence[str]) -> None:
    """Refuses a member of a search that makes no family.

    Raises:
        SettingError: names it.
    """
    wrong = [name for name in wanted if name not in (ANY, LOOKUP)]
    if wrong:
        raise SettingError(
            f"--drafts {wrong[0][:60]}: without --members the artifact has no members to draft for it; say "
            f"{LOOKUP}, {ANY} or {NONE}, or make a family with --members"
        )


def found(source: Source, folder: Path, texts: Texts, wanted: Sequence[str], names: Sequence[str] = ()) -> Drafting:
    """What drafts give on an artifact: chosen on the search text, or where that is short on half of the evaluation
    text, and told on the rest of it.

    Args:
        wanted: of `asked`.
        names: members that may draft.
    """
    host, vocabulary = host_of(source.path), source.anatomy.site("embed").shape[0]
    model: Any = host.load(folder, dtype=torch.bfloat16)
    most = host.context(source)
    ways = names if ANY in wanted else [name for name in wanted if name != LOOKUP]
    windows = (texts.search, texts.evaluation)
    if stretches(texts.search, most) < ENOUGH:
        windows = texts.evaluation.halves()
    try:
        with host.unsaid():
            members: Mapping[str, Any] = {name: model.regauge.member(name) for name in ways}
            times = together(model, members, prompt_of(vocabulary, most), MOST + 1, TURNS)
            chosen = weighed(model, members, windows, times, most, [*([LOOKUP] if _free(wanted) else []), *members])
            return run(model, chosen, windows[1], most)
    except SettingError as error:  # its cache lets tokens go
        return refused(str(error))


def _free(wanted: Sequence[str]) -> bool:
    return bool({ANY, LOOKUP}.intersection(wanted))


def write(source: Source, folder: Path, chosen: Drafting | None, weights: float | None = None) -> None:
    """Writes drafts into the settings, the receipt and the card of an artifact that lies by itself.

    Args:
        weights: times as fast as the source by the same runtime without them.
    """
    way = None if chosen is None else chosen.way
    if chosen is None or way is None:
        return
    prefer(folder, chosen.drafts, _settings(source, folder))
    told = DraftsReceipt(
        drafts=chosen.drafts, gain=chosen.gain, accepted=way.accepted, text=chosen.text, how=chosen.how, weights=weights
    )
    receipt = read_receipt(folder).model_copy(update={"drafts": told})
    put(folder / RECEIPT, text_of(receipt))
    put(folder / CARD, card(receipt, source.path, read_json(folder / "config.json", ArtifactError)))


def _settings(source: Source, folder: Path) -> dict[str, object]:
    """The generation settings that the library takes for an artifact which has no file of them."""
    if (folder / SETTINGS).exists():
        return {}
    model: Any = host_of(source.path).load(folder)
    own: Mapping[str, object] = model.generation_config.to_diff_dict()
    return {name: value for name, value in own.items() if value is not None and not name.startswith("_")}
