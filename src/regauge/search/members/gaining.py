"""Gains of the members that were chosen: fitted to the whole's states, kept where they lose less as measured."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from regauge.artifact.disk import put
from regauge.artifact.gains import FILE, gains_bytes
from regauge.elastic.subnet import Subnet
from regauge.errors import ModelError, SettingError
from regauge.search.members.build import Built
from regauge.search.members.trials import Trials, member

TOKENS = 4096
"""Of the calibration text, at the most."""
LESS = 0.99
"""What a member may lose of what it lost without gains, to keep them."""


def gained(best: Built, subnets: Sequence[Subnet], windows_NT: Tensor, trials: Trials) -> list[str]:
    """Gives members of a loaded family gains, and writes them beside it; what is to be told of each."""
    ids_BT = windows_NT[: max(1, TOKENS // windows_NT.shape[1])]
    members, kept, told = best.model.regauge, dict[str, dict[str, Tensor]](), list[str]()
    for subnet in dict.fromkeys(subnets):
        if subnet.full:
            continue
        before = trials.kl(member(best.model, subnet))
        try:
            gains = members.fit(subnet, best.model, ids_BT)
        except (ModelError, SettingError) as error:
            members.forget_gains(subnet)
            told.append(f"{subnet} has no gains: {error}")
            continue
        after = trials.kl(member(best.model, subnet))
        if gains and after < LESS * before:
            kept[str(subnet)] = gains
            told.append(
                f"{subnet} has gains for what its blocks add: KL {before:.4f} to {after:.4f} on the search text"
            )
        else:
            members.forget_gains(subnet)
            told.append(f"{subnet} keeps no gains: KL {before:.4f} without, {after:.4f} with them")
    if kept:
        put(best.folder / FILE, gains_bytes(kept))
    return told
