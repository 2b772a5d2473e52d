"""What may be chosen of an artifact when it runs, in a file beside its tensors: `regauge/family.json`.

The tensors are those of the whole, so whatever reads the artifact without this file reads the whole, and is right.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from regauge.anatomy.members import Member
from regauge.anatomy.model import Anatomy
from regauge.artifact.codec.base import Wire
from regauge.artifact.cutting import opened
from regauge.artifact.reader import Artifact
from regauge.documents import ordinary, read_json
from regauge.elastic.family import Family, family_of, told
from regauge.elastic.legal import member_in, narrows, reasons, settled, widths_of
from regauge.elastic.subnet import TOKEN, Subnet
from regauge.errors import ArtifactError, SettingError

FILE = "regauge/family.json"
VERSION = 1
KEYS = ("version", "family")


def family_json(family: Family) -> str:
    """A family as its file has it."""
    return json.dumps({"version": VERSION, "family": told(family)}, indent=1, ensure_ascii=False) + "\n"


def read_family(folder: Path, anatomy: Anatomy) -> Family | None:
    """What a directory offers; None where it is one model.

    Raises:
        ArtifactError: the file is damaged, newer, or does not fit the model; in a sentence.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    ordinary(folder, ArtifactError)
    raw = read_json(path, ArtifactError)
    if raw.keys() != set(KEYS) or type(raw["family"]) is not dict:
        raise ArtifactError(f"{path} holds no family; fetch or build the artifact again.")
    if raw.get("version") != VERSION:
        raise ArtifactError(
            f"{path} is of version {str(raw.get('version'))[:20]} and this regauge reads {VERSION}; "
            "upgrade it: pip install -U regauge."
        )
    try:
        family = family_of(raw["family"])
    except ValueError as error:
        raise ArtifactError(f"{path} cannot be read: {error}; fetch or build the artifact again.") from error
    if found := reasons(family, anatomy):
        raise ArtifactError(f"{path} does not fit the model: {found[0]}; fetch or build the artifact again.")
    return family


def with_widths(wire: Wire, folder: Path) -> Wire:
    """The wire whose matrices are laid out for the members that a directory offers."""
    family = read_family(folder, wire.layout.anatomy)
    if family is None:
        return wire
    widths = widths_of(family, wire.layout.anatomy)
    layout = replace(wire.layout, widths=widths, by_columns=bool(wire.layout.quantised) and narrows(family))
    return replace(wire, layout=layout)  # type: ignore[type-var]  # wires are dataclasses


def family_at(folder: Path) -> tuple[Artifact, Family]:
    """A family as data, and what it offers.

    Raises:
        SettingError: the directory is no family.
    """
    if not (folder / FILE).is_file():
        raise SettingError(
            f"{folder} is no family, so it has no members: make one with a recipe that says 'family', such as "
            "'regauge apply family MODEL -o OUT'"
        )
    artifact = opened(folder)
    family = read_family(folder, artifact.layout.anatomy)
    assert family is not None, "its file is there"
    return replace(artifact, wire=with_widths(artifact.wire, folder)), family


def member_at(folder: Path, asked: str | Subnet) -> tuple[Artifact, Subnet, Member]:
    """A family as data, one of its subnets as the family says it, and the anatomy of that.

    Raises:
        SettingError: the directory is no family, or the subnet not legal in it.
    """
    artifact, family = family_at(folder)
    subnet = settled(asked, family, artifact.layout.anatomy)
    if subnet.ffn == TOKEN:
        raise SettingError(
            "tokens choose their neurons in a family alone, so no member is that by itself: load the whole, and run it "
            "with rg.use(model, 'ffn=token')"
        )
    return artifact, subnet, member_in(subnet, family, artifact.layout.anatomy)
