"""`fit --recover`: the artifact that was chosen, trained towards its original before it is measured for the record."""

from __future__ import annotations

from dataclasses import replace

import torch

from regauge.artifact.folder import read_receipt
from regauge.artifact.ownership import is_artifact
from regauge.engine.recovery import Asked, recover
from regauge.engine.recovery_text import Amounts
from regauge.search.kept import RECOVERED
from regauge.search.loop.build import score
from regauge.search.loop.desk import Desk
from regauge.search.loop.settle import Settled

DONE = f"{RECOVERED}.json"


def recovered(desk: Desk, settled: Settled, seconds: float) -> Settled:
    """The same point with its artifact recovered, on the text that calibrated it; a tenth of that is held out.

    A run that was killed goes on: the artifact that was built is kept, and the one in the making lies beside it.

    Args:
        seconds: that it may take, beyond the search's own time.
    """
    built, folder = settled.built, desk.folder.path / RECOVERED
    if desk.folder.load(DONE) != seconds or not is_artifact(folder):
        asked = Asked(Amounts(time=seconds), seed=desk.ask.seed, out=folder, force=True, command=desk.ask.command)
        source, texts = desk.subject.source.path, list(desk.words.calibration)
        recover(built.folder, texts, source, asked, desk.clock.within("recover"))
        desk.folder.save(DONE, seconds)
    model = desk.subject.host.load(folder, dtype=torch.float32)
    scores = score(model, desk.subject, desk.words.search, built.cache)
    return replace(settled, built=replace(built, folder=folder, receipt=read_receipt(folder), search=scores))
