"""One member of a family as a model of its own, written: `regauge extract OUT --subnet S -o DIR`.

Where one number for all blocks can say its sizes it is a checkpoint that stock code loads; where blocks differ it is of
regauge's own format, with the loader in it. Its logits are, bit for bit, those of the family run at that subnet.
Cost: reading the family once, a block at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from regauge.amounts import told
from regauge.anatomy.members import Member
from regauge.anatomy.model import Weights
from regauge.anatomy.storage import outer_names
from regauge.artifact.adapters import Adapters, read_adapters
from regauge.artifact.card import CARD, card
from regauge.artifact.codec.base import REGAUGE, Layout, Wire
from regauge.artifact.codec.choose import choose
from regauge.artifact.codec.sizes import site_bytes
from regauge.artifact.config import CARRIED, artifact_files
from regauge.artifact.cutting import FILE, cut_block, cut_json, layout_of
from regauge.artifact.families import member_at
from regauge.artifact.folder import RECIPE, read_receipt
from regauge.artifact.gains import FILE as GAINS
from regauge.artifact.gains import taken_out
from regauge.artifact.ownership import refuse_out
from regauge.artifact.preferring import SETTINGS, unprefer
from regauge.artifact.reader import Artifact, Block
from regauge.artifact.receipt import Receipt, SiteReceipt
from regauge.artifact.staging import Staging
from regauge.artifact.statistics import FILE as STATISTICS
from regauge.artifact.statistics import own as own_statistics
from regauge.artifact.statistics import read_statistics
from regauge.documents import read_text
from regauge.elastic.subnet import Subnet
from regauge.engine.recalibrating import opened, taken
from regauge.engine.receipts import text_of, versions
from regauge.errors import ArtifactError
from regauge.hosts import host_of

BESIDE = ("regauge/family.yaml",)
"""What a host needs beside a model whose architecture a user described."""


class Extracted(BaseModel):
    """What was written.

    Attributes:
        subnet: as the family says it.
        wire: the format of the files; `unsaid` is why stock code does not read them, "" where it does.
        bytes_whole, bytes: of the family's tensors, and of the member's.
        blocks: those of the family that it has.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    subnet: str
    out: str
    wire: str
    unsaid: str
    bytes_whole: int
    bytes: int
    blocks: tuple[int, ...]

    def __str__(self) -> str:
        stock = f"regauge loads it ({self.unsaid})" if self.unsaid else "stock transformers loads it"
        return f"{self.subnet}: {told(self.bytes_whole)} → {told(self.bytes)} at {self.out}; {stock}"


def extract(
    artifact: str | Path,
    subnet: str | Subnet,
    out: str | Path,
    *,
    calibration: str | Path | None = None,
    force: bool = False,
) -> Extracted:
    """Writes a member of a family as a model of its own.

    Args:
        artifact: a directory that a recipe with `family` made.
        subnet: `depth=6,ffn=0.5`, a `Subnet`, the name of a member, or `full`.
        out: the directory to make. It must not exist, unless `force`.
        calibration: images as .npz, on which statistics of the member's batch norms are taken anew; None: it has its
            own, where the family holds some, or the whole's.

    Raises:
        SettingError: the directory is no family, or the subnet not legal in it; the sentence names the nearest that is.
            Or images were given, and it has no batch norms.
        TextError: `calibration` holds no images.
        ArtifactError: the family cannot be read.
        OutputError: `out` cannot be written.
    """
    host, out = host_of(artifact), Path(out).expanduser().absolute()
    folder = host.folder(str(artifact))
    whole, legal, member = member_at(folder, subnet)
    refuse_out(out, force, CARRIED)
    seen = None if calibration is None else opened(folder, member, calibration)
    sizes = host.sized(folder, member)
    adapters = read_adapters(folder, member.whole)
    own = layout_of(whole.layout, member, sizes.sized, sizes.unsaid, adapters)
    chosen = choose(own, REGAUGE if whole.wire.name == REGAUGE else None)
    identity = {"family": str(folder), "subnet": str(legal), "wire": chosen.wire.name, "versions": versions()}
    identity |= {} if seen is None else {"calibration": seen.sha256}
    with Staging(out, identity, force=force) as staging:
        stored = read_statistics(folder, member.whole).get(str(legal), {})
        known = own_statistics(stored if seen is None else taken(folder, legal, seen), member)
        total = _write(whole, member, chosen.wire, staging, (adapters, known))
        receipt = _receipt(whole, member, chosen.wire, legal, total)
        if seen is not None:
            note = f"statistics of its batch norms were taken anew on {seen.description}"
            receipt = receipt.model_copy(update={"notes": (note, *receipt.notes)})
        recipe = read_text(folder / RECIPE, ArtifactError) if (folder / RECIPE).exists() else ""
        more = sizes.fewer if chosen.wire.name == REGAUGE else sizes.sized
        files = artifact_files(folder, chosen.wire, staging.index(), recipe, text_of(receipt), more)
        files[FILE] = cut_json(legal, own)
        files[CARD] = card(receipt, folder, json.loads(str(files["config.json"])))
        if SETTINGS in files:
            files[SETTINGS] = unprefer(read_text(folder / SETTINGS, ArtifactError))
        if (gains := taken_out(folder, str(legal), member)) is not None:
            files[GAINS] = gains
        files.pop(STATISTICS, None)
        files |= {name: folder / name for name in BESIDE if (folder / name).is_file()}
        staging.finish(files)
    unsaid = "; ".join(chosen.refusals) if chosen.wire.name == REGAUGE else ""
    return Extracted(
        subnet=str(legal),
        out=str(out),
        wire=chosen.wire.name,
        unsaid=unsaid or sizes.unsaid * (chosen.wire.name == REGAUGE),
        bytes_whole=sum(path.stat().st_size for path in whole.shards),
        bytes=total,
        blocks=member.blocks,
    )


def _write(artifact: Artifact, member: Member, wire: Wire, staging: Staging, learnt: tuple[Adapters, Weights]) -> int:
    """Every shard; bytes of their tensors."""
    own, total = wire.layout, len(member.blocks) + 2
    first, _ = outer_names(own.anatomy)
    outer = cut_block(artifact.block(None), artifact.layout, own, member, *learnt)
    ends = _part(outer, first, True), _part(outer, first, False)
    written = staging.write(wire.shard(0, total), wire.pack(ends[0].weights, ends[0].codes))
    for index, old in enumerate(member.blocks):
        block = cut_block(artifact.block(old), artifact.layout, own, member, *learnt)
        written += staging.write(wire.shard(index + 1, total), _packed(wire, block))
    return written + staging.write(wire.shard(total - 1, total), _packed(wire, ends[1]))


def _packed(wire: Wire, block: Block) -> dict[str, Any]:
    return wire.pack(block.weights, block.codes) | dict(block.extras)


def _part(block: Block, first: list[str], begins: bool) -> Block:
    """What lies before the first block, or behind the last."""
    weights = {name: tensor for name, tensor in block.weights.items() if (name in first) == begins}
    codes = {name: found for name, found in block.codes.items() if (f"{name}.weight" in first) == begins}
    return replace(block, weights=weights, codes=codes)


def _receipt(artifact: Artifact, member: Member, wire: Wire, subnet: Subnet, total: int) -> Receipt:
    """The family's receipt, of what is left."""
    whole, own = read_receipt(artifact.path), wire.layout
    names = {name: member.name(name) for name in (site.name for site in whole.sites)}
    sites = tuple(_site(site, new, own) for site in whole.sites if (new := names[site.name]) is not None)
    blocks = "/".join(map(str, member.blocks))
    note = f"the member {subnet} of a family, blocks {blocks} of {artifact.layout.anatomy.blocks}"
    taps = tuple(
        tap.model_copy(update={"name": new, "sites": tuple(name for old in tap.sites if (name := member.name(old)))})
        for tap in whole.taps
        if (new := member.name(tap.name)) is not None
    )
    caches = tuple(
        store.model_copy(update={"name": new}) for store in whole.caches if (new := member.name(store.name)) is not None
    )
    changed: Mapping[str, object] = {
        "plan": f"{whole.plan}, {subnet}",
        "wire": wire.name,
        "sites": sites,
        "taps": taps,
        "caches": caches,
        "drafts": None,
        "notes": (note, *whole.notes),
        "bytes_after": total,
        "ratio": total / max(whole.bytes_bf16, 1),
    }
    return whole.model_copy(update=dict(changed))


def _site(site: SiteReceipt, name: str, own: Layout) -> SiteReceipt:
    here = own.anatomy.site(name)
    before = 2 * here.shape[0] * (here.shape[1] + (here.bias is not None))
    after = site_bytes(own, here)
    return site.model_copy(update={"name": name, "shape": here.shape, "bytes_before": before, "bytes_after": after})
