"""Which member of a loaded family runs: by the context, by the request, never by a flag in the model.

    with rg.use(model, "depth=6,ffn=0.5"):
        model.generate(**inputs)
    model.generate(**inputs, subnet="depth=6")
    model.regauge.active

A member is built once and kept, so that a switch is a look-up in a variable of the context: threads and tasks do not
see each other's. A cache remembers by which member it was filled, and another member refuses it, because every layer
behind the first would have written other keys and values: `refill` reads a text again.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from contextvars import ContextVar, Token
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regauge.anatomy.members import Member
from regauge.anatomy.model import Anatomy, Weights
from regauge.artifact.cutting import read_cut
from regauge.artifact.families import read_family
from regauge.artifact.gains import of_member, read_gains
from regauge.artifact.gates import widths
from regauge.artifact.learnt import Learnt, read_learnt
from regauge.elastic.family import Family
from regauge.elastic.legal import member_in, settled
from regauge.elastic.subnet import TOKEN, Subnet
from regauge.errors import SettingError
from regauge.hosts.transformers.caching import fresh
from regauge.hosts.transformers.gaining import fitted
from regauge.hosts.transformers.gated import gate
from regauge.hosts.transformers.marking import WHOLE, Alone, Marked, running
from regauge.hosts.transformers.members import cached, view
from regauge.hosts.transformers.norming import put_statistics, taken_anew
from regauge.hosts.transformers.owned import before, disown, method, own
from regauge.hosts.transformers.routed import ROUTE, routed

REQUEST = "subnet"
"""The attribute of a generation config that names the member which one request is answered by."""
MOST = 32
"""Members that a model keeps: some megabytes of modules; the one that was not used for longest goes first."""
TEXTS = 1024
"""Spellings of subnets that are remembered."""
_RUNNING: ContextVar[tuple[tuple[Members, Subnet, Any], ...]] = ContextVar("regauge_running", default=())


class Members:
    """The members of one loaded model.

    Attributes:
        family: what may be chosen; anatomy: of the whole.
        gains: subnet → site of the whole → what the member multiplies its outputs by.
        learnt: what was trained beside the tensors.
    """

    def __init__(self, model: Any, family: Family, anatomy: Anatomy) -> None:
        self.family, self.anatomy = family, anatomy
        self.gains: dict[str, dict[str, Tensor]] = {}
        self.learnt = Learnt()
        self.of: weakref.ref[Any] | None = weakref.ref(model)
        self.forget()

    def forget(self) -> None:
        """Lets every member go, and what is known of spellings: for whoever put other tensors into the model."""
        self._made: OrderedDict[Subnet, Any] = OrderedDict()
        self._known: dict[str, Subnet] = {}
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("family", "anatomy", "gains", "learnt")
        return {name: getattr(self, name) for name in kept} | {"of": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.forget()

    @property
    def active(self) -> Subnet:
        """The member that runs here and now."""
        return self.running()[0]

    def running(self) -> tuple[Subnet, Any]:
        """The member that runs here and now, and its modules; None: the whole."""
        for members, subnet, tree in _RUNNING.get():
            if members is self:
                return subnet, tree
        return WHOLE, None

    def members(self) -> tuple[Subnet, ...]:
        """Those that were built and are kept, the one used last at the end."""
        with self._lock:
            return tuple(self._made)

    def member(self, asked: str | Subnet) -> Any:
        """A member as a model of its own, over the memory of this one: what runs inside `use`; or the SettingError that
        it is not legal, or the model holds something in a way that has no first part."""
        model = None if self.of is None else self.of()
        if model is None:
            raise SettingError("the model of these members is gone, or was copied and not run yet: call it once")
        return self.tree(self.settled(asked), model) or model

    def fit(self, asked: str | Subnet, model: Any, ids_BT: Tensor) -> dict[str, Tensor]:
        """Gains of a member by a text, which it has from now on: site of the whole → a number for each output; or the
        SettingError that it is not legal, or a matrix is held in a way that has no multiplier a row."""
        legal = self.settled(asked)
        self.forget_gains(legal)
        tree = self.tree(legal, model)
        found = {} if tree is None else fitted(model, tree, self.cut(legal), ids_BT)
        with self._lock:
            self._made.pop(legal, None)
            self.gains[str(legal)] = found
            self.tree(legal, model)
        return found

    def recalibrate(self, asked: str | Subnet, model: Any, batches: Iterable[Tensor]) -> Weights:
        """Statistics of a member's batch norms by some images, which it has from now on, by the whole's names; or a
        SettingError."""
        legal = self.settled(asked)
        found = taken_anew(self.tree(legal, model) or model, self.cut(legal), batches)
        self.learnt.statistics.update({} if legal.full else {str(legal): found})
        return found

    def forget_gains(self, subnet: Subnet) -> None:
        """Takes gains from a legal member, which is built anew when it runs next."""
        with self._lock:
            self.gains.pop(str(subnet), None)
            self._made.pop(subnet, None)

    def settled(self, asked: str | Subnet) -> Subnet:
        """A subnet as this family says it.

        Raises:
            SettingError: it is not legal; the sentence names the nearest that is.
        """
        found = self._known.get(str(asked))
        if found is None:
            found = settled(asked, self.family, self.anatomy)
            with self._lock:
                if len(self._known) >= TEXTS:
                    self._known.clear()
                self._known[str(asked)] = found
        return found

    def cut(self, subnet: Subnet) -> Member:
        """The anatomy of a legal subnet."""
        return member_in(subnet, self.family, self.anatomy)

    def tree(self, subnet: Subnet, model: Any) -> Any:
        """The modules of a legal subnet; None: the whole's own. Built where they are not there yet.

        Raises:
            SettingError: the model holds something in a way that has no first part.
        """
        if subnet.full:
            return None
        with self._lock:
            found = self._made.get(subnet)
            if found is not None:
                self._made.move_to_end(subnet)
                return found
            member = self.cut(subnet)
            plan = cached(member, subnet.cache, getattr(model, "regauge_cache", None))
            gains = of_member(self.gains.get(str(subnet), {}), member)
            found = view(model, member, plan, gains, self.learnt.adapters)
            put_statistics(found, member, self.learnt.statistics.get(str(subnet), {}))
            for name in ("generate", "_apply"):
                disown(found, name)
            switched: Any = before(found, "forward")
            if subnet.ffn == TOKEN:
                narrower = [self.tree(replace(subnet, ffn=share), model) for share in widths(self.family)[1:]]
                gate(found, member, narrower, self.learnt.gates)
            own(found, "forward", Marked(subnet, None if subnet.ffn == TOKEN else switched.whole.before))
            self._made[subnet] = found
            while len(self._made) > MOST:
                self._made.popitem(last=False)
            return found


@dataclass(frozen=True)
class Switched:
    """`forward` of a family: that of the member which runs.

    Attributes:
        whole: the `forward` of the whole.
    """

    whole: Marked

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        _, tree = model.regauge.running()
        return self.whole(model, *args, **kwargs) if tree is None else tree.forward(*args, **kwargs)


def offer(model: Any, folder: Path, anatomy: Anatomy) -> None:
    """Lets a loaded model run as any member that its directory offers; does nothing where it offers none. A member
    that was taken out says which it is. What the directory says of members may be damaged: an ArtifactError."""
    taken = read_cut(folder, anatomy)
    if taken is not None:
        model.regauge = Alone(taken.subnet)
    family = read_family(folder, anatomy)
    if family is not None and getattr(model, "regauge_window", None) is None:
        switchable(model, family, anatomy)
        model.regauge.gains, model.regauge.learnt = read_gains(folder, anatomy), read_learnt(folder, family, anatomy)


def switchable(model: Any, family: Family, anatomy: Anatomy) -> None:
    """Lets a loaded model run as any member of its family."""
    model.regauge = Members(model, family, anatomy)
    own(model, "forward", Switched(Marked(WHOLE, before(model, "forward"))))
    own(model, "_apply", _apply)
    if model.can_generate():
        setattr(model.generation_config, REQUEST, None)
        own(model, "generate", _generate)


def members_of(model: Any) -> Members:
    """What a model has of members.

    Raises:
        SettingError: it is no family.
    """
    found = vars(model).get("regauge") if isinstance(model, torch.nn.Module) else None
    if not isinstance(found, Members):
        raise SettingError(
            f"this {type(model).__name__} is no family, so it has no members to choose from: make one with a recipe "
            "that says 'family', such as 'regauge apply family MODEL -o OUT', and load that"
        )
    found.of = weakref.ref(model)
    return found


class use:  # a `with`, named as what is written
    """Runs a family as one of its members inside a `with`, in this thread or task alone.

        with rg.use(model, "depth=6,ffn=0.5") as active:
            model.generate(**inputs)

    Args:
        model: a family, of `rg.load`.
        subnet: a `Subnet`, its text, the name of a member, or `full`.

    Raises:
        SettingError: the model is no family, or the subnet not legal in it; the sentence names the nearest that is.
    """

    __slots__ = ("_entry", "_tokens")

    def __init__(self, model: Any, subnet: str | Subnet) -> None:
        members = members_of(model)
        legal = members.settled(subnet)
        self._entry = (members, legal, members.tree(legal, model))
        self._tokens: list[Token[Any]] = []

    def __enter__(self) -> Subnet:
        self._tokens.append(_RUNNING.set((self._entry, *_RUNNING.get())))
        return self._entry[1]

    def __exit__(self, *error: object) -> None:
        _RUNNING.reset(self._tokens.pop())


def refill(model: Any, ids: Tensor, subnet: str | Subnet = WHOLE, mask: Tensor | None = None) -> Any:
    """A new cache of a text for one member, by one pass over the text: for a conversation that goes on with another.

    Args:
        ids: (B, T), all that is to be remembered.
        mask: (B, T), 0 where there is padding.
    """
    with use(model, subnet), torch.no_grad():
        cache = fresh(running(model))
        model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    return cache


def _generate(model: Any, *args: Any, subnet: str | Subnet | None = None, **kwargs: Any) -> Any:
    """`generate` of the member that a request names, that the router chooses for it, or else of the one that runs."""
    config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or model.generation_config
    asked = getattr(config, REQUEST, None) if subnet is None else subnet
    if asked is None:
        tree = running(model)
        return method(tree, "generate")(*args, **kwargs)
    if asked == ROUTE:
        asked = routed(model, model.regauge.learnt.router, args, kwargs)
    with use(model, asked):
        return method(running(model), "generate")(*args, **kwargs)


def _apply(model: Any, *args: Any, **kwargs: Any) -> Any:
    """A move or a cast of the model's tensors, after which members would look at what was."""
    model.regauge.forget()
    return method(model, "_apply")(*args, **kwargs)
