"""Where loaded models differ from plain ones in transformers' own tests by design, and why; and what is left out.

The words of the failure are named too, so that the same test failing otherwise is a difference that nobody explained.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LEFT_OUT = {
    "test_tp_": "tensor parallelism starts processes of its own, which make plain models",
    "compil": "minutes each, for torch's compiler",
    "training_overfit": "trains packed weights, which are not trained",
    "bc_torch_dtype": "reads no model, ten seconds each",
    "fp16": "attention in float16, half a minute a family; float32 and bfloat16 are compared",
}
"""Parts of test names, and why they are not run."""


@dataclass(frozen=True)
class Expected:
    """A difference by design: tests of such a name that fail with such words, and the reason."""

    pattern: str
    words: str
    reason: str
    families: tuple[str, ...] = ()  # none: in all

    def explains(self, family: str, name: str, why: str) -> bool:
        named = re.fullmatch(self.pattern, name) is not None and (not self.families or family in self.families)
        return named and re.search(self.words, why) is not None


EXPECTED = (
    Expected(
        "test_(load_save_without_tied_weights|save_load_keys_to_ignore_on_save|reverse_loading_mapping)",
        "No such file or directory: .*model.safetensors",
        "opens model.safetensors of the saved folder and looks for stock keys; an artifact's files hold codes",
    ),
    Expected(
        "test_model_weights_reload_no_missing_tied_weights",
        "Items in the first set but not the second",
        "overwrites model.safetensors to see every weight missed; it is no file of an artifact, so nothing is missed",
    ),
    Expected(
        "test_can_load_ignoring_mismatched_shapes",
        "KeyError: .*weight",
        "reads the saved folder with another number of labels, which is stock code's to do, and compares state keys",
    ),
    Expected(
        "test_(can_load_ignoring_mismatched_shapes|load_with_mismatched_shapes|causal_lm_can_accept_training_kwargs)",
        "OSError: Error no file named model.safetensors",
        "stock from_pretrained reads artifacts of linear layers, not of GPT-2's transposed ones nor of stacked experts",
        ("gpt2", "mixtral", "qwen3_moe"),
    ),
    Expected(
        "test_(from_pretrained_no_checkpoint|can_init_all_missing_weights)",
        "odict_keys|Lists differ",
        "compares the keys of a loaded model's state with the stock class's; a packed matrix has codes, not a weight",
    ),
    Expected(
        "test_init_weights_can_init_buffers",
        "Lists differ",
        "compares the buffers of a loaded model with the stock class's; codes and their steps are buffers",
    ),
    Expected(
        "test_cannot_load_with_meta_device_context_manager",
        "RuntimeError not raised",
        "wants an error under torch.device('meta'); load() takes its device as an argument and asks no context",
    ),
    Expected(
        "test_problem_types",
        "problem_type=.*requires `num_labels > 1`",
        "sets one label and a loss of several, a config that transformers itself does not read back",
    ),
    Expected(
        "test_model_rope_scaling_from_config.*",
        "validate_rope",
        "sets a rotary scaling that Phi-3 has none of, a config that transformers itself does not save",
        ("phi3",),
    ),
    Expected(
        "test_eager_matches_batched_and_grouped_inference.*",
        "Expected 'mock' to have been called",
        "counts the calls of transformers' ways to multiply stacked experts; packed experts have their own",
        ("mixtral", "qwen3_moe"),
    ),
    Expected(
        "test_left_padding_compatibility",
        r"Greatest absolute difference: [12]\.\d*e-05",
        "allows 1e-5; what packed weights are multiplied by is rounded to 16 bits (passes with activations='float32')",
    ),
    Expected(
        ".*",
        "bert with is_decoder=True cannot be used",
        "BERT as a decoder is refused in a sentence: the family's table describes the encoder",
        ("bert",),
    ),
)
