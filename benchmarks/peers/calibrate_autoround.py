"""AutoRound's default recipe: 200 steps a block in batches of 8 windows, 4 bits in groups of 128, on the CPU.

Groups are 64 where 128 does not divide the width of the model. Arguments and answer: `windows.py`.
"""

from __future__ import annotations

import time

BEGAN = time.monotonic()

import torch  # noqa: E402
from auto_round import AutoRound  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from windows import given, group, windows  # noqa: E402

BATCH = 8  # its default


def main() -> None:
    job = given(__doc__, BEGAN)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    ids = torch.tensor(windows(job), dtype=torch.int64, device="cpu")
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in torch.split(ids, BATCH)]
    job.ends("load")
    size = group(job.model)
    rounding = AutoRound(
        model,
        tokenizer,
        scheme="W4A16",
        group_size=size,
        dataset=batches,
        seqlen=job.length,
        nsamples=job.count,
        batch_size=BATCH,
        device_map="cpu",
    )
    rounding.quantize_and_save(str(job.out), format="auto_round")
    job.ends("blocks")
    job.tell("auto-round", "transformers", "torch", group=size)


if __name__ == "__main__":
    main()
