"""The same prompts continued by two models, greedily: what the figures mean in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


@torch.inference_mode()
def continuations(model: nn.Module, tokenizer: Any, prompts: Sequence[str], tokens: int = 48) -> list[str]:
    """Greedy continuation of each prompt, through the model's own `generate`; the prompt is not repeated.

    `tokenizer` is the host's: `encode`, `decode`. Cost: one prefill and `tokens` steps a prompt.
    """
    generate: Any = model.generate
    found = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt)], dtype=torch.int64, device="cpu")
        out = generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        )
        found.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return found
