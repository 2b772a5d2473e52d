"""VAR while its subnets are trained by the one loop: as `hosts.teaching.Trainee`.

A member of the family runs on late scales, the whole on those before, as VARiant (arXiv 2511.16546) has it; so every
layer learns from early scales to the end. The tokenizer stays. A row of ids is a class and an image's tokens.

Legend: B images, T ids of each, L tokens of each, N images.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from regauge.anatomy.model import Anatomy
from regauge.elastic.family import Family
from regauge.elastic.subnet import Subnet
from regauge.errors import TextError
from regauge.hosts.regauge.stages import Stages, bridged
from regauge.hosts.regauge.training import freeze_key_bias, tokens_of
from regauge.hosts.teaching import Numbers, Ungated
from regauge.learn.distillers import Read

BATCH = 256
"""Images that become tokens together."""


@dataclass(frozen=True, eq=False)
class Teacher:
    """A model that teaches and is not trained."""

    model: Any
    parameters: Mapping[str, Tensor]

    def read(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Read:
        with torch.no_grad():
            given = _given(ids_BT, None)
            return _read(torch.func.functional_call(self.model, dict(self.parameters), (), given).logits)


@dataclass(frozen=True, eq=False)
class Lessons(Ungated, Numbers):
    """A family that draws by scales while it is trained.

    Attributes:
        parameters: key → the transformer's numbers. gradients: key → what backward passes have added up.
    """

    why: ClassVar[str] = "gates choose neurons for each token of a language model, and this one draws images"
    model: Any
    family: Family
    anatomy: Anatomy
    parameters: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, parameter in self.model.named_parameters():
            trained = not key.startswith("vae.")
            parameter.requires_grad_(trained)
            if trained:
                parameter.grad = torch.zeros_like(parameter)
                self.parameters[key], self.gradients[key] = parameter.detach(), parameter.grad
        freeze_key_bias(self.model)

    @property
    def bits(self) -> tuple[int, ...]:
        """Nothing of it is in codes."""
        return ()

    def read(self, subnet: Subnet, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Read:
        """What a member makes of some images; its backward pass adds to the family's gradients."""
        stages = None if subnet.full else bridged(len(self.model.config.areas), subnet)
        return _read(self.model(**_given(ids_BT, stages)).logits)

    def embedded(self, ids_BT: Tensor) -> Tensor:
        """What tells a router of images: their class."""
        with torch.no_grad():
            found: Tensor = self.model.class_emb(ids_BT[:, :1])
        return found

    def backward(self) -> AbstractContextManager[None]:
        """Nothing is to be done around backward passes."""
        return nullcontext()

    def original(self) -> Teacher:
        """The whole as it is now, apart: a teacher that stays."""
        return Teacher(self.model, {key: value.clone() for key, value in self.parameters.items()})

    def stored(self, learnt: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Nothing lies beside the tensors."""
        return {}


def ids_of_images(model: Any, x_NChw: Tensor, y_N: Tensor, seed: int | None) -> Tensor:
    """(N, T): class and tokens of images; a share of the classes is hidden, but none where there is no seed.

    Raises:
        TextError: a class is none of the model's.
    """
    config = model.config
    least, most = int(y_N.min()), int(y_N.max())
    if least < 0 or most >= config.num_classes:
        raise TextError(f"classes go from {least} to {most}, and this model draws {config.num_classes} from 0 on.")
    drawn = torch.Generator().manual_seed(seed or 0)
    chance_N = torch.rand(len(y_N), generator=drawn, dtype=torch.float64, device="cpu")
    shown_N = y_N if seed is None else torch.where(chance_N < config.cond_drop_rate, config.num_classes, y_N)
    return torch.cat([shown_N[:, None], tokens_of(model.vae, torch.split(x_NChw, BATCH)).long()], 1)


def _given(ids_BT: Tensor, stages: Stages) -> dict[str, Any]:
    return {"labels": ids_BT[:, 0], "tokens": ids_BT[:, 1:], "subnet": stages}


def _read(logits_BLV: Tensor) -> Read:
    """As of a text: behind the last token nothing is to come."""
    logits_BTV = functional.pad(logits_BLV, (0, 0, 0, 1))
    return Read(logits_BTV, logits_BTV)
