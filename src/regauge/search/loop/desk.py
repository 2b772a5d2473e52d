"""The desk of a search: what was asked, what is read, where it is kept, who is told. Every step takes this record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from regauge.engine.watchdog import Clock
from regauge.measure.subject import Facts
from regauge.search.budgets import Budget
from regauge.search.drafting import AT_MOST
from regauge.search.kept import Folder
from regauge.search.loop.pace import Stopwatch as Stopwatch
from regauge.search.losses.trials import STATES
from regauge.search.menus import Menu
from regauge.search.pictures import Material
from regauge.search.profile import Timing
from regauge.search.subject import Subject
from regauge.text.split import Sizes, Texts

AMOUNTS = ("calibration", "search", "evaluation", "gradient", "seen")
TURNS = 3  # rounds of the interleaved timing that are made in any case
LARGE = 500_000_000  # parameters from which a variant is dear


@dataclass(frozen=True)
class Effort:
    """Amounts of work. `--time` takes fewer candidates before it takes less text.

    Attributes:
        calibration, search, evaluation: tokens.
        gradient: tokens of the backward pass.
        checks: single-group variants whose true KL is measured.
        neighbours, rounds: whole allocations compared around the best, and how often.
        points: sizes tried for the frontier.
        builds: artifacts made before a budget is given up.
        turns: rounds of the interleaved timing.
        seen: tokens that options are rounded by while they are compared; the artifact is made with `calibration`.
        draws: jittered programs whose solutions say which options are rounded.
        shown: points of the frontier whose true KL is measured, those nearest to the artifact first.
        uniforms: baselines that are measured beside it.
        held: the user said how many calibration tokens, so that less time takes no fewer.
    """

    calibration: int = 32768
    search: int = 2048
    evaluation: int = 12288
    gradient: int = 4096
    checks: int = 32
    neighbours: int = 6
    rounds: int = 2
    points: int = 7
    builds: int = 4
    turns: int = 7
    memory: bool = True  # fresh processes that load the model
    seen: int = 8192  # told in report/figures.py
    draws: int = 16
    shown: int = 100
    samples: bool = True  # prompts continued by both models
    uniforms: int = 100
    held: bool = False

    @staticmethod
    def most() -> Effort:
        """What is made where nothing bounds it; what a time suffices for is found out once the model is known."""
        return Effort()

    def lesser(self) -> tuple[Effort, ...]:
        """This and less, from most to least."""
        half = {"calibration": 16384, "checks": 20, "neighbours": 4, "rounds": 1, "evaluation": 8192, "points": 6}
        half |= {"turns": 5}
        few = {"calibration": 8192, "evaluation": 6144, "gradient": 2048, "seen": 4096, "checks": 8, "neighbours": 2}
        few |= {"rounds": 1, "points": 6, "builds": 3, "turns": 5, "memory": False, "draws": 8}
        least = {"calibration": 4096, "evaluation": 3072, "gradient": 1024, "seen": 2048, "search": 1024, "checks": 4}
        least |= {"neighbours": 1, "rounds": 1, "points": 4, "builds": 2, "turns": TURNS, "memory": False, "draws": 4}
        least |= {"shown": 1, "uniforms": 1, "samples": False}
        return (self, *(self.at_most(one) for one in (half, few, least)))

    def at_most(self, amounts: Mapping[str, int]) -> Effort:
        """The same, no amount above those named."""
        fewer = {name: min(amount, getattr(self, name)) for name, amount in amounts.items()}
        return replace(self, **fewer | ({"calibration": self.calibration} if self.held else {}))

    def calibrating(self, tokens: int | None) -> Effort:
        """The same with so many calibration tokens, where the user says how many."""
        if tokens is None:
            return self
        fewer = {name: min(tokens, getattr(self, name)) for name in ("seen", "gradient")}
        return replace(self, calibration=tokens, held=True, **fewer)

    def reading(self, amounts: Mapping[str, int]) -> Effort:
        """The same on other amounts of text."""
        read: dict[str, Any] = {name: amounts[name] for name in AMOUNTS}
        return replace(self, **read)

    def imaged(self, amounts: Mapping[str, int]) -> Effort:
        """The same for a model of images: amounts are images, and nothing is continued."""
        return replace(self.reading(amounts), samples=False)

    def needed(self) -> Effort:
        """What is done in any case: the artifact and its figures."""
        least = {"checks": 0, "neighbours": 0, "shown": 0, "uniforms": 0, "turns": TURNS}
        least |= {"memory": False, "samples": False}
        return self.at_most(least)

    @property
    def amounts(self) -> dict[str, int]:
        """How much text each step reads: what findings depend on."""
        return {name: getattr(self, name) for name in AMOUNTS}

    def sized(self, parameters: int) -> Effort:
        """The same for a model of so many parameters: where a token is dear, fewer variants are tried and shown."""
        if parameters < LARGE:
            return self
        most = {"evaluation": 6144, "checks": 12, "neighbours": 4, "shown": 1, "uniforms": 1, "draws": 8, "turns": 5}
        if parameters >= 4 * LARGE:
            most |= {"evaluation": 4096, "checks": 8, "neighbours": 3, "rounds": 1}
        return self.at_most(most)


@dataclass(frozen=True)
class Limits:
    """What is done at once, so that memory stays within a bound. The bytes of what comes out do not depend on it.

    Attributes:
        at_once: matrices that are rounded at the same time; None: as many as there are threads.
        states: bytes of hidden states that one pass over variants holds.
        bound: bytes that the process may take; None: as many as it needs.
    """

    at_once: int | None = None
    states: int = STATES
    bound: int | None = None


@dataclass(frozen=True)
class Ask:
    """What the user asks of a search.

    Attributes:
        model: as the user wrote it.
        floors: `kl` → nats a token.
        given: texts, revision and menu as the record keeps them, so that `pick` can read them again.
        menu: what may be chosen from.
        length: tokens of a window; None: by the model.
        notes: what was found before the search began, a sentence each.
        cache: the recipe of what the artifact keeps of the past; None: everything, as it comes.
        drafts: what may draft where it is decoded, as `search.drafting.asked` has it.
    """

    model: str
    budgets: tuple[Budget, ...] = ()
    floors: Mapping[str, float] = field(default_factory=dict)
    effort: Effort = field(default_factory=Effort)
    seed: int = 0
    command: str = ""
    given: Mapping[str, object] = field(default_factory=dict)
    menu: Menu = field(default_factory=Menu)
    length: int | None = None
    notes: tuple[str, ...] = ()
    cache: str | None = None
    drafts: tuple[str, ...] = ()

    @property
    def drafting(self) -> float:
        """How many times as fast decoding may become by drafts, where the weights alone do not suffice."""
        return AT_MOST if self.drafts and self.text else 1.0

    @property
    def text(self) -> bool:
        """Whether the user gave any."""
        return any(self.given.get(name) is not None for name in ("calibration", "eval"))

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.effort.calibration, self.effort.search, self.effort.evaluation)


@dataclass(frozen=True, eq=False)
class Desk:
    """One search.

    Attributes:
        timing: what the machine said of every option, where a speed is asked for.
        limits: what is done at once.
        facts: of a model of images; None: of text.
    """

    ask: Ask
    subject: Subject
    texts: Material
    folder: Folder
    timing: Timing | None
    clock: Clock
    watch: Stopwatch
    limits: Limits = Limits()
    facts: Facts | None = None

    @property
    def words(self) -> Texts:
        """The texts of a search of a model of text."""
        assert isinstance(self.texts, Texts), "models of images are asked for nothing of text"
        return self.texts
