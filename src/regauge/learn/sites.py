"""From parts to what a loop trains: a part on each of its sites, and several together on one block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy
from regauge.anatomy.moves import apply
from regauge.formats.base import Format
from regauge.formats.learnt import straight_through
from regauge.formats.readings import Reading, clipped
from regauge.formats.transforms import Same, Transform
from regauge.learn.base import (
    Finished,
    Learned,
    LearntRewrite,
    LearntShare,
    LearntTransform,
    Parameters,
    Rates,
    Taught,
    Trial,
)
from regauge.learn.joint import OnReading

RANGER, ROUNDER = "ranger", "rounder"


@dataclass(frozen=True, eq=False)
class OnSite:
    """What is learnt of one matrix: the range first, then how the matrix is rounded on it, straight through at least.

    Attributes:
        stats: of the site's input, where the rounder wants some to begin with.
    """

    site: str
    taught: Taught
    fmt: Format
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    scope: str = "site"

    @property
    def rates(self) -> Rates:
        held = {RANGER: self.taught.ranger, ROUNDER: self.taught.rounder}
        return {
            f"{axis} › {own}": rate
            for axis, part in held.items()
            if part is not None
            for own, rate in part.rates.items()
        }

    def init(self, trial: Trial) -> Parameters:
        w_OI, found, fmt = self._of(trial), dict[str, Tensor](), self.fmt
        ranger, rounder = self.taught.ranger, self.taught.rounder
        if ranger is not None:
            begins = ranger.init(w_OI, fmt)
            found |= {f"{RANGER} › {own}": value for own, value in begins.items()}
            fmt = ranger.apply(begins, w_OI, fmt)
        if rounder is not None:
            begins = rounder.init(w_OI, fitted(fmt, w_OI), self.stats)
            found |= {f"{ROUNDER} › {own}": value for own, value in begins.items()}
        return found

    def apply(self, parameters: Parameters, trial: Trial, progress: float) -> Trial:
        w_OI, rounder, penalty = self._of(trial), self.taught.rounder, trial.penalty
        fmt = self._format(parameters, w_OI)
        if rounder is None:
            levels: Mapping[int, Tensor] = {}
            w_hat_OI = fmt.grain.join(straight_through(fmt.grain.split(w_OI).float(), fmt.fit(w_OI), fmt.grid), w_OI)
        else:
            own = self._own(ROUNDER, rounder.rates, parameters)
            w_hat_OI = rounder.apply(own, w_OI, fmt, progress)
            levels, more = rounder.beside(own, w_OI, fmt, progress), rounder.penalty(own, progress)
            penalty = more if penalty is None else penalty if more is None else penalty + more
        key = f"{self.site}.weight"
        read = {**trial.levels, **{bits: {**trial.levels.get(bits, {}), key: w_hat} for bits, w_hat in levels.items()}}
        return replace(trial, weights={**trial.weights, key: w_hat_OI}, penalty=penalty, levels=read)

    def finish(self, parameters: Parameters, trial: Trial) -> Finished:
        w_OI, rounder = self._of(trial), self.taught.rounder
        with torch.no_grad():
            fmt = self._format(parameters, w_OI)
            if rounder is None:
                return Finished({self.site: fmt})
            codes = rounder.finish(self._own(ROUNDER, rounder.rates, parameters), w_OI, fmt)
        return Finished({self.site: fmt}, {self.site: codes})

    def _of(self, trial: Trial) -> Tensor:
        return trial.weights[f"{self.site}.weight"]

    def _format(self, parameters: Parameters, w_OI: Tensor) -> Format:
        """The format with its step under these parameters."""
        ranger = self.taught.ranger
        if ranger is None:
            return fitted(self.fmt, w_OI)
        return ranger.apply(self._own(RANGER, ranger.rates, parameters), w_OI, self.fmt)

    @staticmethod
    def _own(axis: str, names: Iterable[str], parameters: Parameters) -> Parameters:
        return {own: parameters[f"{axis} › {own}"] for own in names}


@dataclass(frozen=True, eq=False)
class OnTap:
    """How one tap is read, learnt: its transform, of which each matrix that reads it takes the inverse, and how much of
    the input's range is kept when it is rounded behind it.

    Attributes:
        sites: that read the tap, whose weights the trial holds as they are without a transform that is learnt.
        channels: of the tap.
        fmt: how it is read.
        maker, clip: what is learnt of it, one of them at least.
        known: the transform where none is learnt.
    """

    tap: str
    sites: tuple[str, ...]
    channels: int
    fmt: Format
    maker: LearntTransform | None = None
    clip: LearntShare | None = None
    known: Transform = Same()  # noqa: RUF009  # frozen, and holds nothing
    scope: str = "block"

    @property
    def rates(self) -> Rates:
        held = self.maker, self.clip
        return {own: rate for part in held if part is not None for own, rate in part.rates.items()}

    def init(self, trial: Trial) -> Parameters:
        begins = {} if self.maker is None else dict(self.maker.init(self.channels))
        return begins if self.clip is None else begins | dict(self.clip.init())

    def apply(self, parameters: Parameters, trial: Trial, progress: float) -> Trial:
        transform, share_1 = self._made(parameters)
        weights = dict(trial.weights)
        if self.maker is not None:
            weights |= {f"{site}.weight": transform.inverse_on(trial.weights[f"{site}.weight"]) for site in self.sites}
        reading = Reading(self.fmt, transform) if share_1 is None else clipped(self.fmt, transform, share_1)
        return replace(trial, weights=weights, inputs={**trial.inputs, **dict.fromkeys(self.sites, reading.passed)})

    def finish(self, parameters: Parameters, trial: Trial) -> Finished:
        transform, share_1 = self._made({own: parameters[own].detach() for own in parameters})
        transforms = {} if self.maker is None else {self.tap: transform}
        return Finished(transforms=transforms, shares={} if share_1 is None else {self.tap: share_1})

    def _made(self, parameters: Parameters) -> tuple[Transform, Tensor | None]:
        transform = self.known if self.maker is None else self.maker.apply(parameters)
        return transform, None if self.clip is None else self.clip.share(parameters)


@dataclass(frozen=True, eq=False)
class OnStreams:
    """The moves of a rewrite, learnt: every tensor of the block takes its part in them."""

    rewrite: LearntRewrite
    anatomy: Anatomy
    block: int
    scope: str = "block"

    @property
    def rates(self) -> Rates:
        return self.rewrite.rates(self.anatomy, self.block)

    def init(self, trial: Trial) -> Parameters:
        return self.rewrite.init(self.anatomy, self.block)

    def apply(self, parameters: Parameters, trial: Trial, progress: float) -> Trial:
        weights = dict(trial.weights)
        moves = self.rewrite.moves(parameters, self.anatomy, weights, self.block)
        return replace(trial, weights=apply(moves, self.anatomy, weights, torch.float32))

    def finish(self, parameters: Parameters, trial: Trial) -> Finished:
        found = {own: parameters[own].detach().double() for own in parameters}
        return Finished(moves=tuple(self.rewrite.moves(found, self.anatomy, dict(trial.weights), self.block)))


def fitted(fmt: Format, w_OI: Tensor) -> Format:
    """The format with the step that training leaves as it is."""
    return fmt if fmt.step is not None else replace(fmt, step=fmt.fit(w_OI.detach()))


@dataclass(frozen=True, eq=False)
class Together:
    """Several, by name, trained as one; each sees what those before it made. Parameters are called `name › own`."""

    parts: Mapping[str, Learned]
    scope: str = "block"

    @property
    def rates(self) -> Rates:
        return {f"{name} › {own}": rate for name, part in self.parts.items() for own, rate in part.rates.items()}

    def init(self, trial: Trial) -> Parameters:
        found: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            begins = part.init(trial)
            found |= {f"{name} › {own}": value for own, value in begins.items()}
            if part.scope == "block":
                trial = part.apply(begins, trial, 0.0)  # as those after it will see the block
        return found

    def apply(self, parameters: Parameters, trial: Trial, progress: float) -> Trial:
        for name, part in self.parts.items():
            trial = part.apply(self._own(name, parameters), trial, progress)
        return trial

    def finish(self, parameters: Parameters, trial: Trial) -> Finished:
        found = Finished()
        for name, part in self.parts.items():
            own = self._own(name, parameters)
            found |= part.finish(own, trial)
            trial = part.apply(own, trial, 1.0)  # as those after it saw the block in training
        return found

    def _own(self, name: str, parameters: Parameters) -> Parameters:
        return {own: parameters[f"{name} › {own}"] for own in self.parts[name].rates}


def on_sites(
    taught: Mapping[str, Taught],
    formats: Mapping[str, Format],
    stats: Mapping[str, Mapping[str, Tensor]] | None = None,
    taps: Iterable[OnTap | OnReading] = (),
    streams: Mapping[str, OnStreams] | None = None,
) -> Together:
    """What is learnt of some sites, of the taps that they read and of the streams between them, trained together.

    Args:
        stats: site → statistics of its input, of those whose rounder wants some to begin with.
        taps: whose transforms or steps are learnt; the sites see their weights behind them.
        streams: rewrite → its moves that are learnt, which come before all else.
    """
    seen = stats or {}
    matrices = {site: OnSite(site, own, formats[site], seen.get(site, {})) for site, own in taught.items()}
    return Together({**(streams or {}), **{one.tap: one for one in taps}, **matrices})
