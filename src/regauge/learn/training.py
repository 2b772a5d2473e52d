"""How a family is trained: what a recipe says under `train:`. Imports no torch.

    train: {sampler: sandwich:2, distiller: kl, teacher: original, steps: 400, rate: 3e-4, schedule: warmed}

Five questions with an answer each: which members a step trains (`samplers.py`), what they are taught by and how that is
measured (`distillers.py`), how the learning rate runs and what steps (`settings.py`). A published way of training is
one answer to each of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from regauge.errors import nearest
from regauge.learn.samplers import SAMPLERS, Sampler, sampler_of
from regauge.learn.settings import Settings

FRONTS = "fronts"
DISTILLERS = ("none", "kl", "alpha", "features", FRONTS, "relations", "embedding")
ORIGINAL, LARGEST, LARGER = TEACHERS = ("original", "largest", "larger")
ALIKE, EACH = LAYERS = ("alike", "each")
PLUS = "+"
"""Between distillers that are added up; the first decides what is kept."""
SHARED = "shared"
EMBED = "embed"
FROZEN = ("", EMBED)
FIXED, TRAINED = ROUTERS = ("fixed", "trained")
ADAPTERS = (EACH, SHARED)
MOST_RANK, MOST_EXPERTS = 1024, 256


@dataclass(frozen=True)
class Training:
    """How a family is trained.

    Attributes:
        sampler: which members a step trains, `name` or `name:number`.
        distiller: how far a member is from its teacher, `name` or the sum of several, `name+name`.
        teacher: the model as it was (`original`), the largest member of the same step (`largest`), or of each member
            the one before it in size (`larger`); the largest learns from the text alone in the last two.
        labels: weight of the cross-entropy with the text, beside a teacher.
        layers: whether a member drawn at random has the same width in all blocks (`alike`) or one for each (`each`).
        steps, batch: of the optimiser, and tokens of each; of a model of images, images.
        moved: pixels that images are moved by at most, mirrored by chance too; 0: they are read as they are.
        rate: the learning rate at its highest.
        optimiser, schedule: by name (`settings.py`).
        clip: the most that the norm of a gradient may be; 0: as it is.
        rank: of low-rank terms beside weights that hold several precisions, whose codes stay (arXiv 2405.20202); 0: the
            weights themselves are trained.
        route: the mean share of the whole's products that a router, trained last, may send prompts to members for
            (arXiv 2406.12042); 0: no router.
        gates: the mean share of its neurons that gates, trained last, let a token through in each feed-forward layer
            (arXiv 2312.10193); 0: no gates.
        experts: that each feed-forward layer of a dense model is divided into first, behind a random router (arXiv
            2303.01610); 0: the model stays as it is. router: whether such a router is `fixed` or `trained`.
        adapters: whether `each` precision has terms of its own, or all have one (`shared`).
        frozen: what stays as it is: the tables of embeddings (`embed`), or nothing.
    """

    sampler: str = "sandwich:2"
    distiller: str = "kl"
    teacher: str = ORIGINAL
    labels: float = 0.0
    layers: str = ALIKE
    steps: int = 400
    batch: int = 2048
    rate: float = 3e-4
    optimiser: str = "adamw"
    schedule: str = "warmed"
    clip: float = 1.0
    moved: int = 0
    rank: int = 0
    adapters: str = EACH
    experts: int = 0
    router: str = FIXED
    gates: float = 0.0
    route: float = 0.0
    frozen: str = ""

    def __post_init__(self) -> None:
        sampler_of(self.sampler)
        for value, known, what in (
            *((name, DISTILLERS, "distiller") for name in self.distiller.split(PLUS)),
            (self.teacher, TEACHERS, "teacher"),
            (self.layers, LAYERS, "layers"),
            (self.adapters, ADAPTERS, "adapters"),
            (self.router, ROUTERS, "router"),
            (self.frozen, FROZEN, "frozen"),
        ):
            if value not in known:
                raise ValueError(f"{what} is one of {', '.join(known)}, not {value!r}{nearest(str(value), known)}")
        if not 0 < self.rate <= 1:
            raise ValueError(f"a learning rate lies above 0 and is 1 at most, not {self.rate}")
        if not (0 <= self.labels <= 1e6 and 0 <= self.clip <= 1e6):
            raise ValueError("labels and clip are 0 or more")
        if not 0 <= self.moved <= 64:
            raise ValueError(f"images are moved by 0 to 64 pixels, not {self.moved}")
        if not 0 <= self.rank <= MOST_RANK:
            raise ValueError(f"the rank of adapters is 0 (none) to {MOST_RANK}, not {self.rank}")
        if self.experts != 0 and not 2 <= self.experts <= MOST_EXPERTS:
            raise ValueError(f"a layer is divided into 2 to {MOST_EXPERTS} experts, or 0 (none), not {self.experts}")
        if self.rank and self.frozen:
            raise ValueError("with adapters every weight stays as it is, so frozen says nothing more: leave it out")
        if self.rank and self.teacher != ORIGINAL:
            raise ValueError(f"adapters are taught by the model as it was, so teacher is {ORIGINAL}")
        for share, what in ((self.route, "router"), (self.gates, "gates")):
            if not 0 <= share < 1:
                raise ValueError(f"the mean share of the whole lies between 0 (no {what}) and 1, not {share}")
        self.settings(self.steps)

    def settings(self, steps: int, every: int = 0) -> Settings:
        """What the loop is told."""
        return Settings(steps, self.batch, self.optimiser, self.schedule, patience=0, every=every)

    @property
    def held(self) -> tuple[str, ...]:
        """Kinds of sites that are not trained."""
        found = ("router",) if self.experts and self.router == FIXED else ()
        return (*found, EMBED, "position", "type") if self.frozen == EMBED else found

    @property
    def draws(self) -> Sampler:
        """Which members a step trains."""
        return sampler_of(self.sampler)


POWER = re.compile(r"[0-9]{1,9}e[-+]?[0-9]{1,2}")
"""A number that YAML 1.1 takes for text, for it has no point: 3e-4."""
KEYS: Mapping[str, type] = {field.name: type(field.default) for field in fields(Training)}
"""What `train:` may hold, and of which kind it is."""


def training_of(raw: Mapping[str, object]) -> Training:
    """What a recipe says, each value of its kind.

    Raises:
        ValueError: it is none, in a sentence.
    """
    return Training(**{key: value_of(key, value) for key, value in raw.items()})  # type: ignore[arg-type]  # checked


def value_of(key: str, value: object) -> str | int | float:
    """A value of the kind that a key takes.

    Raises:
        ValueError: it is of another.
    """
    kind = KEYS[key]
    if kind is str and isinstance(value, str):
        return value
    if kind is int and type(value) is int:
        return value
    if kind is float and type(value) in (int, float):
        return float(value)  # type: ignore[arg-type]  # one of these
    if kind is float and isinstance(value, str) and POWER.fullmatch(value):
        return float(value)
    what = {str: "a name", int: "a whole number", float: "a number"}[kind]
    raise ValueError(f"{key} is {what}, not {str(value)[:40]!r}")


__all__ = ["DISTILLERS", "KEYS", "SAMPLERS", "TEACHERS", "Training", "training_of", "value_of"]
