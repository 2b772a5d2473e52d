"""A member of a family that drafts for the whole: fewer layers or narrower ones propose, the whole checks.

Blocks with which the member begins as the whole does compute the same keys and values, so their stores are the whole's:
what a draft writes there is taken back, and written again, bit for bit, when it is checked. The other blocks keep their
own, filled by one pass of the member over the prompt; a member that is only the first blocks needs none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch

from regauge.anatomy.members import Member
from regauge.errors import SettingError
from regauge.hosts.transformers.cache import GrowingLayer
from regauge.hosts.transformers.cachedtext import CachedText
from regauge.hosts.transformers.caching import fresh
from regauge.hosts.transformers.marking import MARK
from regauge.hosts.transformers.switching import members_of
from regauge.runtime.drafts.source import Draft


class MemberDrafts:
    """A member that writes on, token by token, as it finds most likely.

    Args:
        asked: the member.
        target: the whole, on its cache.
        ids: the prompt, which that holds.

    Raises:
        SettingError: the model is no family, or has no such member.
    """

    free: ClassVar[bool] = False

    def __init__(self, asked: str, model: Any, target: CachedText, ids: Sequence[int]) -> None:
        members = members_of(model)
        subnet = members.settled(asked)
        tree = members.tree(subnet, model)
        if tree is None:
            raise SettingError(f"drafts={asked!r} is the whole itself, which has nothing to gain from its own drafts")
        self._text, self._target = list(ids), target
        cache, shared = fresh(tree), shared_blocks(members.cut(subnet))
        layers = target.layers or []
        if len(layers) < shared or any(type(layer) is not GrowingLayer for layer in layers[:shared]):
            shared = 0
        setattr(cache, MARK, subnet)
        blocks = len(members.cut(subnet).blocks)
        if shared < blocks:
            ids_1T = torch.tensor([self._text], dtype=torch.int64, device=model.device)
            with torch.no_grad():
                tree(input_ids=ids_1T, attention_mask=target.mask, past_key_values=cache, use_cache=True)
        self._own = CachedText(tree, cache, target.mask)
        cache.layers[:shared] = layers[:shared]
        self._shared = layers[:shared]
        self._held = len(self._text)
        self._guessed: tuple[int, ...] = ()

    def extend(self, ids: Iterable[int]) -> None:
        """More of the text."""
        self._text += ids

    def propose(self, most: int) -> Draft:
        """So many tokens, one after another."""
        past = len(self._text) - 1  # the last token is in no cache yet
        for guess in self._guessed:
            if self._held == past or self._text[self._held] != guess:
                break
            self._held += 1
        self._keep(min(self._held, past))
        waiting = self._text[min(self._held, past) :]
        found: list[int] = []
        while len(found) < most:
            some = self._own.together(min(len(waiting), 8))
            logits_QV = self._own.step(waiting[:some])
            waiting = waiting[some:]
            if not waiting:
                found.append(int(logits_QV[-1].argmax()))
                waiting = found[-1:]
        for layer in self._shared:
            layer.keep(past)
        self._held, self._guessed = past + 1, tuple(found[:-1])
        return Draft(tuple(found))

    def _keep(self, length: int) -> None:
        for layer in self._own.cache.layers:
            layer.keep(length) if isinstance(layer, GrowingLayer) else layer.crop(length - layer.get_seq_length())


def shared_blocks(member: Member) -> int:
    """How many blocks, from the first on, keep what the whole's do."""
    count = 0
    for number, block in enumerate(member.blocks):
        own = [site for site in member.anatomy.in_block(number) if site.shape != member.whole.site(site.name).shape]
        if block != number or any(site.kind in ("k", "v") for site in own):
            break
        count += 1
        fewer = member.anatomy.plumbing.routed != member.whole.plumbing.routed
        if own or (fewer and any(site.expert is not None for site in member.anatomy.in_block(number))):
            break
    return count
