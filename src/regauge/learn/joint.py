"""What is learnt of a block beside its matrices: static steps of its taps, and scales of its streams. Trained with the
ranges of its weights by one loop, they are what MobileQuant (arXiv 2408.13933) learns together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regauge.anatomy import moves as algebra
from regauge.anatomy.inner import word_of
from regauge.anatomy.model import Anatomy, Stream
from regauge.anatomy.moves import Move
from regauge.anatomy.values import pairs
from regauge.formats.readings import Reading
from regauge.learn.base import Finished, LearntStep, Parameters, Rates, Trial


@dataclass(frozen=True, eq=False)
class OnReading:
    """The static step of one tap, learnt.

    Attributes:
        sites: that read the tap; none of a tap that no matrix reads.
        maker: of steps.
        reading: with the step that calibration gave.
    """

    tap: str
    sites: tuple[str, ...]
    maker: LearntStep
    reading: Reading
    scope: str = "block"

    @property
    def rates(self) -> Rates:
        return self.maker.rates

    def init(self, trial: Trial) -> Parameters:
        assert self.reading.step is not None, "a static step is known once text was read"
        return self.maker.init(self.reading.step)

    def apply(self, parameters: Parameters, trial: Trial, progress: float) -> Trial:
        made = replace(self._under(parameters), soft=True)
        if not self.sites:
            return replace(trial, inside={**trial.inside, word_of(self.tap): made})
        return replace(trial, inputs={**trial.inputs, **dict.fromkeys(self.sites, made.simulate)})

    def finish(self, parameters: Parameters, trial: Trial) -> Finished:
        with torch.no_grad():
            return Finished(readings={self.tap: self._under(parameters)})

    def _under(self, parameters: Parameters) -> Reading:
        step = self.reading.step
        assert step is not None, "as above"
        return replace(self.reading, step=self.maker.apply(parameters, step, self.reading.format))


@dataclass(frozen=True, eq=False)
class OnScales:
    """A scale for each channel of some streams, learnt: what writes them is multiplied, what reads them divided.

    A parameter is the logarithm of its scale, 0 where training begins. Channels that rotary embeddings turn into each
    other share one.

    Attributes:
        anatomy: whose streams they are.
        streams: of one block.
        rate: learning rate.
    """

    anatomy: Anatomy
    streams: Sequence[Stream]
    rate: float
    scope: str = "block"

    @property
    def rates(self) -> Rates:
        return {stream.name: self.rate for stream in self.streams}

    def init(self, trial: Trial) -> Parameters:
        like = next(iter(trial.weights.values()))
        return {s.name: torch.zeros(s.size, dtype=torch.float32, device=like.device) for s in self.streams}

    def apply(self, parameters: Parameters, trial: Trial, progress: float) -> Trial:
        moves = self._moves(parameters)
        return replace(trial, weights=algebra.apply(moves, self.anatomy, dict(trial.weights), dtype=torch.float32))

    def finish(self, parameters: Parameters, trial: Trial) -> Finished:
        with torch.no_grad():
            return Finished(moves=self._moves(parameters))

    def _moves(self, parameters: Mapping[str, Tensor]) -> tuple[Move, ...]:
        return tuple(
            Move("scale", stream.name, self._scale(stream, parameters[stream.name])) for stream in self.streams
        )

    def _scale(self, stream: Stream, log: Tensor) -> Tensor:
        log = log.double()
        if stream.admits["scale"] == "pairs":
            first, second = (index.to(log.device) for index in pairs(self.anatomy.plumbing))
            mean = (log[first] + log[second]) / 2
            log = log.index_copy(0, first, mean).index_copy(0, second, mean)
        return log.exp()
