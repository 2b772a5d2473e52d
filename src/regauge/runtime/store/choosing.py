"""When a store lets tokens go, and which: a policy's state between the calls of attention that it watches.

What must go where the sequences go (beams, copies, files) lies beside the store, by name: `starts` (B,), the first
token of each sequence that counts; `queries` (B, H, G, Q, D) of the newest tokens, and `noted` (B,), how many had been
seen then; `mass` (B, H, T), attention that each token of the text has had; `gone` (B, H, T), the tokens let go, and
`chosen` (B,), how many had been seen then.

Legend: B sequences, H KV heads, G query heads of one, Q new tokens, T tokens of the text, R rows that a store gives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regauge.cache.base import Layer, Rotary, Seen, probabilities
from regauge.cache.choosing import Choice, choose, disposed
from regauge.cache.scheme import Policy, behind
from regauge.cache.triggers import due
from regauge.runtime.store.packed import Packed
from regauge.runtime.store.waiting import Waiting

CHUNK = 64
"""Queries whose attention is added up at a time."""


@dataclass(frozen=True, eq=False)
class Asked:
    """One call of attention.

    Attributes:
        queries_BHGQD: of the new tokens, with their rotation.
        starts_B: the first token of each sequence that counts.
        scale, softcap: of attention's products; 0: no cap.
    """

    queries_BHGQD: Tensor
    starts_B: Tensor
    scale: float
    softcap: float = 0.0


class Chooser(Waiting):
    """One store's policy; `expected` and `pending` are of its prompt."""

    def __init__(self, policy: Policy, layer: Layer, rotary: Rotary | None) -> None:
        super().__init__()
        self.policy, self.layer, self.rotary = policy, layer, rotary

    @property
    def reads(self) -> int:
        """Queries that the choice reads."""
        return max(1, int(self.policy.score.queries), int(self.policy.budget.queries))

    def wants(self, store: Packed, new: int) -> bool:
        """Whether attention over the next tokens must be watched, and so computed one layer after another."""
        if self.pending:
            return True
        trigger = self.policy.trigger
        if trigger.kind == "prefill":
            return False
        ahead = 1 if not self._queried else self.reads
        seen = store.length + new + ahead - 1
        held = self._held(store, new + ahead - 1)
        return bool(self.policy.score.accumulates) or due(trigger, seen, self.chosen(store), held)

    @property
    def _queried(self) -> bool:
        return bool(max(self.policy.score.queries, self.policy.budget.queries) > 0)

    def chosen(self, store: Packed) -> int:
        """Tokens seen when tokens were last chosen; 0: never."""
        found = store.beside.get("chosen")
        return 0 if found is None else int(found.max())

    def _held(self, store: Packed, more: int = 0) -> int:
        """Rows of the fullest head."""
        shelf = store.shelf
        return store.rows + more + (0 if shelf is None else int(shelf.counts_BH.max()) * shelf.tokens)

    def saw(self, store: Packed, asked: Asked, one: bool) -> None:
        """After attention over new tokens, which the store holds: notes what scores read, and lets tokens go where it
        is time.

        Args:
            one: only one token of each sequence was new.
        """
        self.blind = False
        trigger = self.policy.trigger
        if not one and not store.record_past:
            self.pending = True  # a further prompt, maybe without a word of its length
        if not self.pending and trigger.kind == "prefill":
            return
        self._note(store, asked)
        if self.pending and not self.over(store, one):
            return
        chosen = 0 if self.pending else self.chosen(store)
        if due(trigger, store.length, chosen, self._held(store)):
            if not self.let_go(store, asked):
                return
            store.beside["chosen"] = torch.full((len(asked.starts_B),), store.length, dtype=torch.int64, device="cpu")
        self.pending, self.expected = False, None
        if trigger.kind == "prefill":
            for name in ("queries", "mass"):
                store.beside.pop(name, None)
        store.release()

    def _note(self, store: Packed, asked: Asked) -> None:
        beside, new = store.beside, asked.queries_BHGQD.shape[3]
        beside["starts"] = asked.starts_B.cpu()
        before = beside.get("queries")
        noted = beside.get("noted")
        follows = before is not None and noted is not None and int(noted.max()) == store.length - new
        both = asked.queries_BHGQD if not follows or before is None else torch.cat((before, asked.queries_BHGQD), 3)
        beside["queries"] = both[:, :, :, -self.reads :].clone()
        beside["noted"] = torch.full((len(asked.starts_B),), store.length, dtype=torch.int64, device="cpu")
        if self.policy.score.accumulates:
            beside["mass"] = self._mass(store, asked)

    def _mass(self, store: Packed, asked: Asked) -> Tensor:
        """(B, H, T): what all queries so far have read of each token."""
        seen = self.seen(store, asked)
        batch, heads = seen.positions_BHT.shape[:2]
        mass_BHT = torch.zeros(batch, heads, store.length, dtype=torch.float32, device=seen.keys_BHTD.device)
        before = store.beside.get("mass")
        if before is not None:
            mass_BHT[:, :, : before.shape[2]] = before[:, :, : store.length]
        new = asked.queries_BHGQD.shape[3]
        at_BHT = seen.positions_BHT.clamp_min(0)
        for start in range(0, new, CHUNK):
            part = asked.queries_BHGQD[:, :, :, start : start + CHUNK]
            last = store.length - new + start + part.shape[3]
            shown_BHT = torch.where(seen.positions_BHT < last, seen.positions_BHT, -1)
            p_BHT = probabilities(replace(seen, positions_BHT=shown_BHT, queries_BHGQD=part)).sum((2, 3))
            mass_BHT.scatter_add_(2, at_BHT, torch.where(seen.positions_BHT >= 0, p_BHT, 0))
        return mass_BHT

    def seen(self, store: Packed, asked: Asked) -> Seen:
        """What scores read of a store now."""
        keys, values = store.read()
        positions_BHT = self._positions(store, keys, asked.starts_B)
        older = behind(store.settled, store.scheme.window, self.layer.block)
        queries = store.beside.get("queries")
        found = Seen(
            keys, values, positions_BHT,
            asked.queries_BHGQD[:, :, :, :0] if queries is None else queries,
            min(store.rows, store.length - older), asked.scale, asked.softcap, rotary=self.rotary,
            text_B=store.length - asked.starts_B,
        )  # fmt: skip
        mass = store.beside.get("mass")
        if mass is None or mass.shape[2] != store.length:
            return found
        return replace(found, mass_BHT=mass.gather(2, positions_BHT.clamp_min(0)))

    def _positions(self, store: Packed, keys: Tensor, starts_B: Tensor) -> Tensor:
        """(B, H, R): the place in the text of every row that a store gives, -1 where there is none."""
        batch, heads, rows = keys.shape[:3]
        older = rows - store.rows
        text_T = torch.arange(store.length, dtype=torch.int64, device="cpu")
        window_BHT = text_T[store.origin :].expand(batch, heads, -1)
        older_BHT = torch.full((batch, heads, older), -1, dtype=torch.int64, device="cpu")
        if older:
            held, gone = store.held, store.beside.get("gone")
            is_row = torch.ones(batch, heads, older, dtype=torch.bool, device="cpu")
            is_row = is_row if held is None else held[:, :, :older].cpu()
            is_text = torch.ones(batch, heads, store.origin, dtype=torch.bool, device="cpu")
            if gone is not None:
                known = min(gone.shape[2], store.origin)
                is_text[:, :, :known] = ~gone[:, :, :known].cpu()
            older_BHT[is_row] = text_T[: store.origin].expand(batch, heads, -1)[is_text]
        found = torch.cat((older_BHT, window_BHT), 2)
        return found.masked_fill(found < starts_B.cpu()[:, None, None], -1).to(keys.device)

    def let_go(self, store: Packed, asked: Asked) -> bool:
        """Chooses among the tokens that no rollback can reach; False where one is being recorded before they are."""
        if store.record_past and store.settled <= store.scheme.window:
            return False
        seen = self.seen(store, asked)
        if seen.older <= 0:
            return True
        choice = choose(self.policy.score, self.policy.budget, seen, self.layer)
        if bool((choice.kept_BHO | (seen.positions_BHT[:, :, : seen.older] < 0)).all()):
            return True  # there is nothing to let go
        store.beside["gone"] = self._gone(store, seen, choice)
        store.replace(disposed(self.policy.disposal, seen, choice), choice.firsts_BH.cpu(), seen.window)
        return True

    def _gone(self, store: Packed, seen: Seen, choice: Choice) -> Tensor:
        """(B, H, T), bool: the tokens of the text before the window that are held no more."""
        positions_BHO = seen.positions_BHT[:, :, : seen.older].cpu()
        stays_BHO = choice.kept_BHO.cpu() & (positions_BHO >= 0)
        text = store.length - seen.window
        found = torch.ones(*positions_BHO.shape[:2], text + 1, dtype=torch.bool, device="cpu")
        found.scatter_(2, torch.where(stays_BHO, positions_BHO, text), False)  # the last is for rows that go
        return found[:, :, :text]
