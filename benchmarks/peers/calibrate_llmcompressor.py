"""llm-compressor's GPTQ: its own defaults, 4 bits in groups of 128, one sample after the other, on the CPU.

Groups are 64 where 128 does not divide the width of the model. Arguments and answer: `windows.py`.
"""

from __future__ import annotations

import time

BEGAN = time.monotonic()

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402
from datasets import Dataset  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from windows import given, group, windows  # noqa: E402


def main() -> None:
    job = given(__doc__, BEGAN)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    ids = windows(job)
    samples = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * job.length] * job.count})
    job.ends("load")
    size = group(job.model)
    weights = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=size)
    schemes = {"all": QuantizationScheme(targets=["Linear"], weights=weights)}
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=samples,
        recipe=GPTQModifier(config_groups=schemes, ignore=["lm_head"]),
        max_seq_length=job.length,
        num_calibration_samples=job.count,
        shuffle_calibration_samples=False,
    )
    job.ends("blocks")
    model.save_pretrained(job.out, save_compressed=True)
    job.ends("write")
    job.tell("llmcompressor", "transformers", "torch", group=size)


if __name__ == "__main__":
    main()
