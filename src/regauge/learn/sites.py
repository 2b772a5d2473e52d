"""From parts to what a loop trains: a part on each of its sites, and several together on one block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from regauge.formats.base import Format
from regauge.learn.base import Finished, Learned, Parameters, SiteLearned, Trial


@dataclass(frozen=True, eq=False)
class OnSite:
    """A part of scope `site` on one matrix."""

    site: str
    part: SiteLearned
    fmt: Format
    scope: str = "site"

    @property
    def rates(self) -> Mapping[str, float]:
        return self.part.rates

    def init(self, trial: Trial) -> Parameters:
        return self.part.init(trial.weights[self._weight], self.fmt)

    def apply(self, parameters: Parameters, trial: Trial, progress: float) -> Trial:
        w_OI = self.part.apply(parameters, trial.weights[self._weight], self.fmt, progress)
        return replace(trial, weights={**trial.weights, self._weight: w_OI})

    def finish(self, parameters: Parameters, trial: Trial) -> Finished:
        return Finished({self.site: self.part.finish(parameters, trial.weights[self._weight], self.fmt)})

    @property
    def _weight(self) -> str:
        return f"{self.site}.weight"


@dataclass(frozen=True, eq=False)
class Together:
    """Several, by name, trained as one; each sees what those before it made. Parameters are called `name › own`."""

    parts: Mapping[str, Learned]
    scope: str = "block"

    @property
    def rates(self) -> Mapping[str, float]:
        return {f"{name} › {own}": rate for name, part in self.parts.items() for own, rate in part.rates.items()}

    def init(self, trial: Trial) -> Parameters:
        found: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            found |= {f"{name} › {own}": value for own, value in part.init(trial).items()}
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


def on_sites(sites: Sequence[str], parts: Mapping[str, SiteLearned], formats: Mapping[str, Format]) -> Together:
    """The parts of some sites, trained together."""
    return Together({site: OnSite(site, parts[site], formats[site]) for site in sites})
