"""What is known so far about every option, as the allocation sees it; and the measurements that sharpen it.

A `Problem` is the subject with its options on the shelf, predicted losses, and true KLs as they come in. Every
measurement is kept on disk, so that a search that was killed measures nothing twice. What an earlier run measured is
known only once it is asked for again, so that a run that goes on decides as one that was left alone.
Units: bytes; KL in nats a token; ms a token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from regauge.measure.reading import Read
from regauge.search.allocation import Allocation, Bound, Candidate, allocate
from regauge.search.kept import Folder
from regauge.search.losses.correction import Check, check, corrected
from regauge.search.losses.fisher import Losses
from regauge.search.losses.shelf import Pair, Shelf
from regauge.search.losses.trials import STATES, Picks, true_kl
from regauge.search.options import FULL, Option, SiteGroup, group_bytes
from regauge.search.stores import store_bytes
from regauge.search.subject import Subject

Say = Callable[[str, int, int], None]
Ready = Callable[[Iterable[Pair]], None]
ROUGH = 1e-3  # relative gap where losses are less certain than that
LEDGER = "ledger.json"
CHUNK = 16  # variants measured between two writes of the ledger


@dataclass(frozen=True, eq=False)
class Problem:
    """Losses and costs of every option of every group.

    Attributes:
        predicted: by the backward pass; of groups outside the blocks rudely, or not at all.
        windows: the search text.
        fixed: bytes that no choice changes.
        costs: resource → group → option → ms a token; empty where no speed is asked for.
        folder: where measurements are kept.
        ledger: true KL of the variants that this run asked for, by key; see `key`.
        kept: what this run or an earlier one measured.
        states: bytes of hidden states that one pass over variants holds.
        counted: where stores are chosen, other rows of bytes than `bytes`, which counts stores at their own context:
            name → the context at which it counts them, None where it counts weights alone.
        ready: sees to it that options are on the shelf; release: lets go what can be had again, before other work.
    """

    subject: Subject
    shelf: Shelf
    windows: Read
    predicted: Losses
    fixed: float
    folder: Folder
    costs: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    ledger: dict[str, float] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)
    say: Say = lambda _, __, ___: None
    ready: Ready = lambda _: None
    release: Callable[[], None] = lambda: None
    states: int = STATES
    counted: Mapping[str, int | None] = field(default_factory=dict)

    @property
    def groups(self) -> tuple[SiteGroup, ...]:
        return self.shelf.groups

    def group(self, name: str) -> SiteGroup:
        return next(group for group in self.groups if group.name == name)

    def measure(self, variants: Sequence[Picks]) -> list[float]:
        """True KL of variants on the search text; those that are kept are not run again."""
        keys = [key(picks) for picks in variants]
        missing = {name: picks for name, picks in zip(keys, variants, strict=True) if name not in self.kept}
        names = list(missing)
        self.ready(pairs(missing.values()))
        for start in range(0, len(names), CHUNK):
            self.say("trials", start, len(names))
            part = names[start : start + CHUNK]
            found = true_kl(self.subject, self.shelf, self.windows, [missing[name] for name in part], self.states)
            self.kept.update(zip(part, found, strict=True))
            self.folder.save(LEDGER, self.kept)
        self.ledger.update((name, self.kept[name]) for name in keys)
        return [self.ledger[name] for name in keys]

    def singles(self) -> Losses:
        """True KLs of single-group variants that the ledger holds."""
        found: Losses = {}
        for group in self.groups:
            for option in group.options:
                known = self.ledger.get(key({group.name: option}))
                if known is not None:
                    found.setdefault(group.name, {})[option.name] = known
        return found

    def losses(self) -> Losses:
        """The best that is known of every option: measured, else predicted and corrected."""
        return corrected(self.predicted, self.singles(), self.groups)

    def check(self) -> Check | None:
        """How well predictions of groups in blocks stood up."""
        inner = {group.name: self.predicted.get(group.name, {}) for group in self.groups if group.block is not None}
        return check(inner, self.singles(), self.windows.predicted)

    def candidates(self, losses: Losses | None = None) -> list[list[Candidate]]:
        """As the allocation takes them; `losses` None: the best known."""
        known = self.losses() if losses is None else losses
        return [
            [Candidate(known[group.name][option.name], self.takes(group, option)) for option in group.options]
            for group in self.groups
        ]

    def takes(self, group: SiteGroup, option: Option) -> dict[str, float]:
        size = float(group_bytes(group, option, self.subject.itemsize))
        found = {"bytes": size, **dict.fromkeys(self.counted, size)}
        if group.store is not None:
            at = {"bytes": group.store.tokens, **self.counted}
            found = {name: float(store_bytes(group, option, n)) if n else 0.0 for name, n in at.items()}
        for resource, costs in self.costs.items():
            found[resource] = costs[group.name][option.name]
        return found

    def picks(self, allocation: Allocation) -> dict[str, Option]:
        return {group.name: group.options[pick] for group, pick in zip(self.groups, allocation.picks, strict=True)}

    def uniform(self, name: str) -> dict[str, Option] | None:
        """Every group at the option nearest in spirit to a name such as `int4-g128`: same bits, that grain or the
        coarsest it has; None where some group has no such bits. Stores are as what stands behind a `+`, or whole."""
        name, _, kept = name.partition("+")
        bits, _, grain = name.partition("-")
        found: dict[str, Option] = {}
        for group in self.groups:
            if group.store is not None:
                own = [option for option in group.options if option.name == (kept or FULL)]
                if not own:
                    return None
                found[group.name] = own[0]
                continue
            same = [option for option in group.options if option.name.partition("-")[0] == bits]
            if not same:
                return None
            found[group.name] = next((option for option in same if option.name.endswith(f"-{grain}")), same[0])
        return found

    def size(self, picks: Picks) -> float:
        """Bytes of the artifact, predicted from formats, and of the stores that are chosen, at their context."""
        return self.fixed + sum(self.takes(group, picks[group.name])["bytes"] for group in self.groups)

    def stored(self, picks: Picks) -> float:
        """Bytes of the artifact alone."""
        return self.fixed + sum(group_bytes(g, picks[g.name], self.subject.itemsize) for g in self.groups)

    def sharpen(self, bounds: Sequence[Bound], most: int, rounds: int = 3) -> Allocation:
        """Allocate; measure the single-group KL of the picks that weigh most; allocate again, until nothing changes.

        `most` bounds the variants measured in all. Groups outside the blocks must have been measured before.
        """
        point = allocate(self.candidates(), bounds)
        left = most
        for _ in range(rounds):
            losses, picks = self.losses(), self.picks(point)
            fresh = [
                group
                for group in self.groups
                if picks[group.name].name != FULL and key({group.name: picks[group.name]}) not in self.ledger
            ]
            fresh.sort(key=lambda group: -losses[group.name][picks[group.name].name])
            if not fresh or left <= 0:
                break
            self.measure([{group.name: picks[group.name]} for group in fresh[:left]])
            left -= len(fresh[:left])
            after = allocate(self.candidates(), bounds)
            changed, point = after.picks != point.picks, after
            if not changed:
                break
        return point

    def refine(self, point: Allocation, bounds: Sequence[Bound], count: int, rounds: int, seed: int) -> Allocation:
        """The best by true KL of whole allocations near a point.

        Neighbours are the optima under losses jittered by a factor of about e^±0.2, which is how far corrected
        predictions are off: each is the right answer to some losses that we cannot tell from ours. The second round
        jitters around the best of the first by pulling its picks down 10%.
        """
        best = point
        generator = torch.Generator().manual_seed(seed)
        for _ in range(rounds):
            losses, picks = self.losses(), self.picks(best)
            near = {best.picks: best}
            for _ in range(3 * count):
                if len(near) > count:
                    break
                factor = iter(
                    torch.exp(0.2 * torch.randn(4096, generator=generator, dtype=torch.float32, device="cpu")).tolist()
                )
                jittered = {
                    group.name: {
                        option.name: losses[group.name][option.name]
                        * next(factor, 1.0)
                        * (0.9 if picks[group.name] == option else 1.0)
                        for option in group.options
                    }
                    for group in self.groups
                }
                found = allocate(self.candidates(jittered), bounds, ROUGH)
                near.setdefault(found.picks, found)
            points = list(near.values())
            measured = self.measure([self.picks(one) for one in points])
            winner = points[min(range(len(points)), key=lambda index: measured[index])]
            if winner.picks == best.picks:
                break
            best = winner
        return best


def pairs(variants: Iterable[Picks]) -> set[Pair]:
    """Every (group, option) that some variants round."""
    return {(group, option.name) for picks in variants for group, option in picks.items() if option.choice is not None}


def key(picks: Picks) -> str:
    """A short name of a variant, the same in every run."""
    text = json.dumps({name: option.name for name, option in sorted(picks.items()) if option.choice is not None})
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def read_ledger(folder: Folder) -> dict[str, float]:
    """What an earlier run measured; nothing where it left nothing that can be read."""
    found = folder.load(LEDGER)
    return {str(name): float(value) for name, value in found.items()} if type(found) is dict else {}
