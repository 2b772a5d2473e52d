"""auto-round's default recipe at any width: 200 steps a block, asymmetric, float16 steps and packed zero points.

KIND: w2g64 and the like. Arguments and answer: `windows.py`.
"""

from __future__ import annotations

import time

BEGAN = time.monotonic()

import torch  # noqa: E402
from auto_round import AutoRound  # noqa: E402
from plain import grouped, kind, linears, write  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from windows import given, windows  # noqa: E402

BATCH = 8  # its default


def main() -> None:
    job = given(__doc__, BEGAN)
    bits, group = kind(job)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    ids = torch.tensor(windows(job), dtype=torch.int64, device="cpu")
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in torch.split(ids, BATCH)]
    rounding = AutoRound(
        model, tokenizer, bits=bits, group_size=group, sym=False, dataset=batches, seqlen=job.length,
        nsamples=job.count, batch_size=BATCH, device_map="cpu",
    )  # fmt: skip
    found, _ = rounding.quantize()
    decoded = {name: layer.weight.detach() for name, layer in linears(found).items()}
    job.ends("made")
    write(job, decoded, dict.fromkeys(decoded, grouped(bits, group, 16, bits)))


if __name__ == "__main__":
    main()
