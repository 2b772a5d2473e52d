"""transformers, eager, in bf16 as the checkpoint is stored, or with torch's or torchao's packed weights in its linear
layers (`variant`: `bf16`, `torch int8`, `torch int4`, `torchao int8`, `torchao int4`)."""

from __future__ import annotations

from typing import Any

import torch
from causal import timed
from packed_torch import replace_linears
from serve import Loaded, Options, serve
from transformers import AutoModelForCausalLM


def load(options: Options) -> Loaded:
    model: Any = AutoModelForCausalLM.from_pretrained(options["path"], dtype=torch.bfloat16, local_files_only=True)
    model.eval().requires_grad_(False)
    facts: dict[str, Any] = {"kind": "bf16"}
    head = model.get_output_embeddings().weight
    if options["variant"] == "bf16":
        linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        facts["bytes"] = sum(module.weight.nbytes for module in linears)
        facts["bits"] = 16.0
    else:
        count = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
        tied = head is model.get_input_embeddings().weight
        facts["bytes"] = replace_linears(model, options["variant"], options.get("group", 32))
        facts["bits"] = 8 * facts["bytes"] / count
        if tied:
            facts["notes"] = ["the tied table is held a second time, packed, for the head"]
    return Loaded(timed(model, options, facts), facts)


if __name__ == "__main__":
    serve(load)
