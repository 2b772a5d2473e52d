"""An artifact opened beside its original, and written anew with what was learnt: the same files, but for the tensors
that changed, the receipt and the card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from regauge.artifact import files
from regauge.artifact.card import CARD, card
from regauge.artifact.codec.base import REGAUGE, Wire
from regauge.artifact.codec.packed import Packed
from regauge.artifact.folder import RECEIPT, RUN_LOG
from regauge.artifact.ownership import LISTED
from regauge.artifact.reader import Artifact, open_artifact
from regauge.artifact.receipt import Receipt
from regauge.artifact.staging import Staging
from regauge.engine.pupil import Pupil
from regauge.engine.receipts import text_of
from regauge.errors import ArtifactError, ModelError
from regauge.hosts import host_of
from regauge.hosts.base import Runner, Source
from regauge.learn.base import Parameters
from regauge.parts import Spec

INDEX = "model.safetensors.index.json"
PAGE = "regauge/report.html"


@dataclass(frozen=True, eq=False)
class Opened:
    """An artifact and what it was made of.

    Attributes:
        artifact: as it is.
        wire: as it will be written, with the low-rank terms that are added.
        runner: of the artifact's anatomy; teacher: of the original's.
    """

    artifact: Artifact
    wire: Wire
    receipt: Receipt
    source: Source
    source_hash: str
    runner: Runner
    teacher: Runner


def opened(folder: Path, original: str | Path | None, rank: int) -> Opened:
    """Opens an artifact and its original.

    Raises:
        ArtifactError: it is none of ours, or says nothing that can be trained.
        ModelError: the original is not what it was made of, or cannot be fed.
    """
    artifact = open_artifact(folder)
    receipt = artifact.receipt
    if receipt is None:
        raise ArtifactError(f"{folder} has no receipt, so it was not made by regauge; compress its original anew.")
    host = host_of(str(original or receipt.source))
    source = host.open(original or receipt.source)
    if (seen := source.digest()) != receipt.source_hash:
        raise ModelError(
            f"{source.path} is not what {folder} was made of (its hash is {seen[:12]}…, the receipt has "
            f"{receipt.source_hash[:12]}…); name the original with --original."
        )
    layout = artifact.layout
    if why := host.why_not_fed(source):
        raise ModelError(f"a recovery reads text through the model, and {why}.")
    if not source.anatomy.causal or "head" not in {site.name for site in source.anatomy.sites}:
        raise ModelError(
            f"a recovery trains towards the next-token logits of the original, and {source.anatomy.family} has none."
        )
    if layout.attention or [site.name for site in layout.source.sites] != [site.name for site in source.anatomy.sites]:
        raise ArtifactError(
            f"{folder} attends otherwise than its original, and a recovery cannot train that; leave it as it is."
        )
    wire = _with_terms(artifact, rank) if rank else artifact.wire
    runner = host.runner(source, anatomy=artifact.layout.anatomy)
    return Opened(artifact, wire, receipt, source, seen, runner, host.runner(source))


def _with_terms(artifact: Artifact, rank: int) -> Wire:
    """The wire with a low-rank term for every matrix in codes that has none."""
    if artifact.wire.name != REGAUGE:
        raise ArtifactError(
            f"{artifact.path} is in the format {artifact.wire.name}, which has no low-rank terms; leave --rank out, or "
            "apply its recipe with --wire regauge first."
        )
    layout, choices = artifact.layout, dict(artifact.layout.choices)
    for name, point in layout.quantised.items():
        if not point.name("compensator") and layout.anatomy.site(name).block is not None:
            choices[name] = point.but(compensator=Spec("lorc", (("rank", rank),)))
    return Packed(replace(layout, choices=choices))


def write(
    found: Opened,
    pupil: Pupil,
    learnt: Parameters,
    staging: Staging,
    told: Mapping[str, object],
    log: Mapping[str, Any],
) -> Receipt:
    """Every shard with what was learnt, and the small files; the output is in its place then."""
    artifact, folder = found.artifact, found.artifact.path
    changed: dict[int | None, dict[str, Tensor]] = {}
    for path in artifact.shards:
        if staging.has(path.name):
            continue
        tensors = files.read(path)
        for block in [block for block, where in artifact.where.items() if path in where]:
            if block not in changed:
                changed[block] = _packed(found.wire, pupil, learnt, block)
            tensors |= {key: changed[block].pop(key) for key in list(changed[block]) if key in tensors}
            codes = any(key.startswith(f"{name}.") for name in pupil.lesson(block).matrices for key in tensors)
            if codes or block is None:  # new terms lie beside the codes
                tensors |= {key: changed[block].pop(key) for key in list(changed[block]) if ".low-rank." in key}
        staging.write(path.name, tensors)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if quantisation := found.wire.config():
        config["quantization_config"] = quantisation
    receipt = found.receipt.model_copy(update={"recovered": dict(told)})
    return finish(folder, receipt, found.source, config, staging, log)


def finish(
    folder: Path,
    receipt: Receipt,
    source: Source,
    config: Mapping[str, Any],
    staging: Staging,
    log: Mapping[str, Any],
) -> Receipt:
    """The small files of an artifact that is written anew; its shards are there, and the output is in its place then.

    Args:
        folder: the artifact as it was.
        source: what it was made of.
        config: its config.json.
    """
    index = staging.index()
    metadata: Any = index["metadata"]
    after = int(metadata["total_size"])
    receipt = receipt.model_copy(
        update={
            "bytes_after": after,
            "ratio": after / receipt.bytes_bf16,
            **{name: log[name] for name in ("seconds", "peak_bytes", "machine", "command")},
        }
    )
    extra: dict[str, bytes | str | Path] = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in staging.shards
    }
    for name in (LISTED, PAGE):
        extra.pop(name, None)
    extra |= {
        "config.json": json.dumps(config, indent=2, sort_keys=True) + "\n",
        RECEIPT: text_of(receipt),
        CARD: card(receipt, source.path, config),
        RUN_LOG: json.dumps(dict(log), indent=1) + "\n",
    }
    if INDEX in extra:
        extra[INDEX] = json.dumps(index, indent=1, sort_keys=True) + "\n"
    staging.finish(extra)
    return receipt


def _packed(wire: Wire, pupil: Pupil, learnt: Parameters, block: int | None) -> dict[str, Tensor]:
    """The tensors of a block as a shard holds them."""
    lesson = pupil.lesson(block)
    weights, codes = lesson.finish({name: learnt[name] for name in lesson.rates})
    return wire.pack(weights, codes)
