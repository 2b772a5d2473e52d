"""The member that a router chooses for a request: `model.generate(ids, subnet="route")`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from regauge.artifact.router import Router
from regauge.elastic.subnet import Subnet
from regauge.errors import SettingError

ROUTE = "route"
"""What a request says in place of a subnet."""
PROMPT = ("inputs", "input_ids", "inputs_embeds")


def routed(model: Any, router: Router | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Subnet:
    """The member for the prompts of a call of `generate`. Several of one call go together, where the mean of their
    scores is the largest.

    Raises:
        SettingError: the family has no router, or the call no prompt.
    """
    if router is None:
        raise SettingError(
            "this family has no router that could choose a member for a prompt: train one with "
            "'regauge learn aptp MODEL -o OUT', or name a member"
        )
    prompt = next((one for name in PROMPT if (one := kwargs.get(name)) is not None), args[0] if args else None)
    if not isinstance(prompt, Tensor) or not prompt.numel():
        raise SettingError("subnet='route' chooses a member by the prompt, and this call has none: give input_ids")
    with torch.no_grad():
        embedded = prompt if prompt.is_floating_point() else model.get_input_embeddings()(prompt)
        scores_BK = router(embedded, kwargs.get("attention_mask"))
    return router.subnets[int(scores_BK.mean(0).argmax())]
