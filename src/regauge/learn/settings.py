"""How a loop trains: what a recipe says under `learning:`. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

ERROR, DISTRIBUTION = LOSSES = ("error", "distribution")
SCHEDULES = ("constant", "linear", "cosine", "warmed", "stable")
WARM, DECAY = 0.05, 0.2
"""Shares of the steps in which a rate rises (`warmed`, `stable`), and falls (`stable`)."""
BLOCK, MODEL = SCOPES = ("block", "model")


@dataclass(frozen=True)
class Settings:
    """Steps, batches, and when to stop. Learning rates belong to the parts.

    Attributes:
        steps: of the optimiser, for each block.
        batch: tokens of one step (a window at least).
        optimiser: by name (`learn/optimisers.py`).
        schedule: of the learning rates: `constant`, or from 1 to 0 as `linear` or `cosine`; `warmed` is a cosine whose
            first twentieth rises instead, `stable` rises as long, stays, and falls in the last fifth (2405.18392).
        patience: passes over the text without a new best before a block is left; 0 for never.
        every: steps between two looks at the error; 0: one after each pass over the text. Patience counts looks then.
        loss: what a step lowers: the block's `error`, or beside it how its states and attention maps are distributed
            (`distribution`, ABQ-LLM, 2408.08554). The best is kept by the error either way.
        scope: what is trained together: the parts of one `block`, one block after another, or those of the whole
            `model`, towards the original's output.
    """

    steps: int = 320
    batch: int = 2048
    optimiser: str = "adamw"
    schedule: str = "constant"
    patience: int = 5
    every: int = 0
    loss: str = ERROR
    scope: str = BLOCK

    def __post_init__(self) -> None:
        for value, what in ((self.steps, "steps"), (self.batch, "tokens a batch")):
            if value < 1:
                raise ValueError(f"learning takes 1 or more {what}, not {value}")
        if self.patience < 0:
            raise ValueError(f"patience is 0 (never stop early) or more, not {self.patience}")
        if self.every < 0:
            raise ValueError(f"every is 0 (after each pass over the text) or a number of steps, not {self.every}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"the schedule is one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        if self.loss not in LOSSES:
            raise ValueError(f"the loss is one of {', '.join(LOSSES)}, not {self.loss!r}")
        if self.scope not in SCOPES:
            raise ValueError(f"the scope is one of {', '.join(SCOPES)}, not {self.scope!r}")
        if self.scope == MODEL and self.loss != ERROR:
            raise ValueError(f"a whole model is trained by its output, so the loss {self.loss!r} is a block's alone")
        if self.optimiser not in OPTIMISERS:
            raise ValueError(f"the optimiser is one of {', '.join(OPTIMISERS)}, not {self.optimiser!r}")

    def factor(self, progress: float) -> float:
        """What every learning rate is multiplied by after this share of the steps, 0 … 1."""
        import math

        return {
            "constant": 1.0,
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
            "warmed": min(1.0, (progress + 1 / self.steps) / WARM) * 0.5 * (1.0 + math.cos(math.pi * progress)),
            "stable": min(1.0, (progress + 1 / self.steps) / WARM, (1.0 - progress) / DECAY),
        }[self.schedule]


OPTIMISERS = ("adamw", "momentum", "sign")
KEYS: Mapping[str, type] = {field.name: type(field.default) for field in fields(Settings)}
"""What `learning:` may hold, and of which kind it is."""
