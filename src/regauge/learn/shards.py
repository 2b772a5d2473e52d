"""Parameters divided over processes, by torch's `fully_shard` (FSDP2): each process holds a part of the rows of every
tensor, of its gradient and of what an optimiser keeps of it, and a unit is whole while it runs.

`fully_shard` gathers the parameters of the module that it was given before its `forward`, and sums up their gradients
after its backward pass. Members of a family are other modules over the same numbers, which it would not see. So it is
given `Unit`s, modules that hold nothing but numbers; whatever computes with them runs inside of a unit's `forward`,
over views of what was gathered, and autograd adds up the gradients of views in the gathered tensors as anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Lent = Callable[[Mapping[str, Tensor]], Any]
"""A `with` in which modules have these tensors, by key."""


class Unit(nn.Module):
    """Numbers that are gathered together, and the units whose computations lie inside of this one's.

    Args:
        tensors: by key; none is of no dimension.
    """

    def __init__(self, tensors: Mapping[str, Tensor], inside: Sequence[Unit] = ()) -> None:
        super().__init__()
        self.keys = tuple(tensors)
        for number, one in enumerate(tensors.values()):
            self.register_parameter(f"of{number}", nn.Parameter(one.detach().contiguous(), one.requires_grad))
        self.inside = nn.ModuleList(inside)

    @property
    def held(self) -> dict[str, nn.Parameter]:
        """As it is now: parts, or whole tensors while it runs."""
        return {key: self.get_parameter(f"of{number}") for number, key in enumerate(self.keys)}

    def forward(self, run: Callable[..., Any], lent: Lent, *args: Any, **kwargs: Any) -> Any:
        """Runs something over the whole tensors; gives no view, which could lose the hook on its gradient."""
        with lent(self.held):
            return _apart(run(*args, **kwargs))


def divided(units: Iterable[Mapping[str, Tensor]], rest: Mapping[str, Tensor]) -> Unit:
    """Numbers divided over all processes: those of some units, inside of one that holds the rest."""
    from torch.distributed.device_mesh import init_device_mesh  # some seconds of imports, for this alone

    first = next(iter(rest.values()))
    mesh = init_device_mesh(first.device.type, (torch.distributed.get_world_size(),))
    return _divided(Unit(rest, [_divided(Unit(one), mesh) for one in units]), mesh)


def _divided(unit: Unit, mesh: Any) -> Unit:
    from torch.distributed.fsdp import fully_shard

    made: Any = fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    made.set_gradient_divide_factor(1.0)  # gradients are of shares of a batch, so they are added up
    made.set_force_sum_reduction_for_comms(True)
    return unit


def run(unit: Unit, what: Callable[..., Any], lent: Lent, *args: Any, **kwargs: Any) -> Any:
    """Runs something over a unit's tensors, which are whole meanwhile. All processes do it at the same time."""
    if torch.is_grad_enabled():
        return unit(what, lent, *args, **kwargs)
    with whole(unit) as held, lent(held):  # what is only read leaves no order for a backward pass
        return what(*args, **kwargs)


@contextmanager
def whole(unit: Unit) -> Iterator[Mapping[str, Tensor]]:
    """A unit's tensors gathered, without a gradient."""
    made: Any = unit
    made.unshard()
    try:
        yield unit.held
    finally:
        made.reshard()


def parts(root: Unit) -> dict[str, Tensor]:
    """Key → the rows of a tensor that lie here; what is changed in place is changed."""
    return {key: _local(one) for unit in _all(root) for key, one in unit.held.items()}


def gradients(root: Unit) -> dict[str, Tensor]:
    """Key → the same rows of its gradient, in which backward passes add up; 0 now."""
    found = {}
    for unit in _all(root):
        for key, one in unit.held.items():
            one.grad = torch.zeros_like(one)
            found[key] = _local(one.grad)
    return found


def _apart(found: Any) -> Any:
    """What a module gives, copied where it is a view."""
    if isinstance(found, tuple):
        return tuple(map(_apart, found))
    return found.clone() if isinstance(found, Tensor) and found._is_view() else found


def _all(root: Unit) -> list[Unit]:
    return [root, *(one for one in root.inside if isinstance(one, Unit))]


def _local(value: Any) -> Tensor:
    found: Tensor = value.detach().to_local()
    return found
