"""llm-compressor: GPTQ in the order of activations, or AWQ; asymmetric, bf16 steps, packed zero points.

Its AWQ pins memory for an accelerator, which is left out here. KIND: gptq-w3g64, awq-w3g64. Arguments and answer:
`windows.py`.
"""

from __future__ import annotations

import time

BEGAN = time.monotonic()

from dataclasses import replace  # noqa: E402

import torch  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402
from compressed_tensors.quantization.lifecycle.forward import fake_quantize  # noqa: E402
from datasets import Dataset  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.awq import AWQModifier  # noqa: E402
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402
from llmcompressor.pipelines.cache import IntermediatesCache  # noqa: E402
from plain import grouped, kind, linears, write  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from windows import given, windows  # noqa: E402


def main() -> None:
    IntermediatesCache.pin_memory = lambda self, index: None
    job = given(__doc__, BEGAN)
    method, _, size = job.kind.partition("-")
    bits, group = kind(replace(job, kind=size))
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    ids = windows(job)
    samples = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * job.length] * job.count})
    weights = QuantizationArgs(num_bits=bits, symmetric=False, strategy="group", group_size=group)
    schemes = {"all": QuantizationScheme(targets=["Linear"], weights=weights)}
    outer = ["lm_head", "embed_out"]
    modifier = {"gptq": GPTQModifier, "awq": AWQModifier}[method](config_groups=schemes, ignore=outer)
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=samples,
        recipe=modifier,
        max_seq_length=job.length,
        num_calibration_samples=job.count,
        shuffle_calibration_samples=False,
    )
    decoded = {}
    with torch.no_grad():
        for name, layer in linears(model).items():
            assert getattr(layer, "weight_g_idx", None) is None, "its default leaves groups in the order of the weights"
            decoded[name] = fake_quantize(layer.weight, layer.weight_scale, layer.weight_zero_point, weights)
        bare = {name: tensor for name, tensor in model.named_parameters() if tensor.ndim == 1 and "scale" not in name}
    job.ends("made")  # AWQ scales norms too
    names = set(decoded) | {name for name in bare if "weight_" not in name}
    write(job, {name: decoded.get(name, bare.get(name)) for name in names}, {
        name: grouped(bits, group, 16, bits) for name in decoded
    })  # fmt: skip


if __name__ == "__main__":
    main()
