"""What a subnet comes to in one model: whether it is legal, which is the nearest that is, and its sizes.

`settled` makes a subnet legal or says which is the nearest that is, `cut_of` turns a legal one into sizes: which blocks
run, and how many units of each stream they keep. Units are always the first ones, since streams are sorted when a
family is made.
"""

from __future__ import annotations

from dataclasses import replace

from regauge.anatomy.members import Member, member_of
from regauge.anatomy.model import Anatomy
from regauge.elastic.dimensions import BY_NAME
from regauge.elastic.family import RANKED, Family
from regauge.elastic.offers import Cut
from regauge.elastic.subnet import Subnet
from regauge.errors import MoveError, SettingError, nearest


def reasons(family: Family, anatomy: Anatomy) -> list[str]:
    """Why a model cannot have this family, a sentence each; empty where it can."""
    found = [why for name in family.offered for why in BY_NAME[name].refuses(family.choices(name), family, anatomy)]
    if family.layers == RANKED and sorted(family.ranked) != list(range(anatomy.blocks)):
        found.append(f"layers: ranked needs every block from 0 to {anatomy.blocks - 1} once, most important first")
    if found:
        return found
    for name, member in family.members.items():
        try:
            settled(member, family, anatomy)
        except SettingError as error:
            found.append(f"the member {name!r}: {error}")
    return found


def settled(asked: str | Subnet, family: Family, anatomy: Anatomy) -> Subnet:
    """The subnet as this family says it: what is whole is left out, and equal members are equal values.

    Raises:
        SettingError: it is not legal; the sentence names the nearest that is.
    """
    text = str(asked).strip()
    if isinstance(asked, str) and text in family.members:
        subnet = family.members[text]
    elif isinstance(asked, str) and "=" not in text and text not in ("", "full"):
        like, meant = family.offered[0], nearest(text, (*family.members, "full"))
        raise SettingError(
            f"this family has no member called {text[:60]!r}{meant}; one without a name is written like "
            f"'{like}={family.choices(like)[0]}'"
        )
    else:
        subnet = Subnet.parse(asked)
    found, near, wrong = Subnet(), Subnet(), []
    for name, value in subnet.said():
        legal, why = BY_NAME[name].settle(value, family, anatomy, found)
        near = replace(near, **{name: legal})
        if why:
            wrong.append(why)
        else:
            found = replace(found, **{name: legal})
    if wrong:
        raise SettingError(f"the subnet {subnet} is not legal here: {'; '.join(wrong)}; the nearest that is: {near}")
    return found


def cut_of(subnet: Subnet, family: Family, anatomy: Anatomy) -> Cut:
    """The sizes of a legal subnet."""
    blocks = BY_NAME["depth"].blocks(subnet.depth, family, anatomy)
    cut = Cut(blocks, {}, subnet.experts, subnet.bits, subnet.cache)
    for name in ("ffn", "heads", "width"):
        value = getattr(subnet, name)
        if value is not None:
            cut.kept.update(BY_NAME[name].kept(value, blocks, family, anatomy))
    if subnet.kernel is None:
        return cut
    return replace(cut, kernels=BY_NAME["kernel"].kernels(subnet.kernel, blocks, anatomy))


def member_in(subnet: Subnet, family: Family, anatomy: Anatomy) -> Member:
    """The anatomy of a legal subnet of a family.

    Raises:
        SettingError: the model has no such member.
    """
    cut = cut_of(subnet, family, anatomy)
    bits = (cut.bits,) * len(cut.blocks) if isinstance(cut.bits, int) else cut.bits
    try:
        return replace(member_of(anatomy, cut.blocks, cut.kept, cut.experts, cut.kernels), bits=bits)
    except (MoveError, ValueError) as error:
        raise SettingError(f"this model has no member {subnet}: {error}") from error


def narrows(family: Family) -> bool:
    """Whether there are members of fewer channels of the residual."""
    return bool(family.width) or any(member.width is not None for member in family.members.values())


def widths_of(family: Family, anatomy: Anatomy) -> dict[str, tuple[int, ...]]:
    """Site → the numbers of its first inputs that members of fewer neurons, heads or residual channels read."""
    asked = [
        *(Subnet(ffn=one) for one in family.ffn),
        *(Subnet(heads=one) for one in family.heads),
        *(Subnet(width=one) for one in family.width),
    ]
    found: dict[str, set[int]] = {}
    for subnet in (*asked, *family.members.values()):
        legal = replace(settled(subnet, family, anatomy), experts=None, kernel=None)
        member = member_in(legal, family, anatomy)
        for site in member.anatomy.sites:
            whole = anatomy.site(member.origin(site.name))
            if site.shape[1] != whole.shape[1]:
                found.setdefault(whole.name, set()).add(site.shape[1])
    return {name: tuple(sorted(widths)) for name, widths in found.items()}
