"""Statistics of batch norms of a member: taken on images, and put where the whole's would stand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from regauge.anatomy.members import Member
from regauge.anatomy.model import Weights
from regauge.artifact.statistics import WORDS, own
from regauge.hosts.regauge.modeling_resnet import BatchNorm, recalibrate


def by_batch(model: nn.Module) -> None:
    """Lets the batch norms of a model, in place, compute with the statistics of each batch."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.training = True


def taken_anew(tree: Any, member: Member, batches: Iterable[Tensor]) -> Weights:
    """Statistics of a member's batch norms by some images, put into it: canonical tensor of the whole → its own.

    Raises:
        SettingError: it has none, or there are no images.
    """
    found = recalibrate(tree, batches)
    made: Weights = {}
    for norm in member.anatomy.norms:
        if norm.module in found:
            made |= {member.origin(f"{norm.name}.{w}"): one for w, one in zip(WORDS, found[norm.module], strict=True)}
    return made


def put_statistics(tree: Any, member: Member, found: Weights) -> None:
    """Gives a member's batch norms statistics of their own, in place."""
    for name, tensor in own(found, member).items():
        norm, _, word = name.rpartition(".")
        module: Any = tree.get_submodule(member.anatomy.norm(norm).module)
        held: Tensor = getattr(module, word)
        setattr(module, word, nn.Parameter(tensor.to(held.dtype).to(held.device), requires_grad=False))
