"""Random pico models of every family, in shapes that trip code up: prime, unequal sizes; random norms and biases.

`pico("qwen3")` is a transformers model in eval mode; `save(model, folder)` writes it as a checkpoint; `batches(model)`
are inputs for it. Seeded; the caller's random state is left alone. Names after a dash are variants of a family.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LM: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": 53, "max_position_embeddings": 64}
GQA = {"hidden_size": 29, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 37} | LM
MHA = {"num_attention_heads": 3, "intermediate_size": 37} | LM
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Sizes that groups of 16 divide, for what is trained."""
EVEN = GQA | {"hidden_size": 42, "head_dim": 10}  # these configs insist on hidden being a multiple of heads
GEMMA = EVEN | {"query_pre_attn_scalar": 7, "sliding_window": 5, "tie_word_embeddings": True}
SPECIAL = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
ENCODER = MHA | {"hidden_size": 33, "type_vocab_size": 3, "pad_token_id": 0}
VIT = {
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 37,
    "hidden_size": 33,
    "image_size": 15,
    "patch_size": 5,
    "num_channels": 2,
}
OPT = {k: v for k, v in MHA.items() if k != "intermediate_size"} | {
    "hidden_size": 33,
    "word_embed_proj_dim": 33,
    "ffn_dim": 37,
    "tie_word_embeddings": True,
}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4}

CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaForCausalLM", EVEN | {"tie_word_embeddings": False}),
    "llama-tied": ("llama", "LlamaForCausalLM", EVEN | {"tie_word_embeddings": True}),
    "llama-bias": ("llama", "LlamaForCausalLM", EVEN | {"attention_bias": True, "mlp_bias": True}),
    "llama-headless": ("llama", "LlamaModel", EVEN),
    "mistral": ("mistral", "MistralForCausalLM", GQA | {"head_dim": 10, "sliding_window": 5}),
    "qwen2": (
        "qwen2",
        "Qwen2ForCausalLM",
        GQA | {"hidden_size": 36, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", GQA | {"head_dim": 10}),
    "gemma2": ("gemma2", "Gemma2ForCausalLM", GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM", GEMMA | {"layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("phi3", "Phi3ForCausalLM", GQA | {"hidden_size": 60, "rope_parameters": PARTIAL, **SPECIAL}),
    "gpt2": ("gpt2", "GPT2LMHeadModel", MHA | {"hidden_size": 33, "n_inner": 37}),
    "gpt_neox": ("gpt_neox", "GPTNeoXForCausalLM", MHA | {"hidden_size": 30, "rope_parameters": PARTIAL}),
    "gpt_neox-serial": (
        "gpt_neox",
        "GPTNeoXForCausalLM",
        MHA | {"hidden_size": 30, "rope_parameters": PARTIAL, "use_parallel_residual": False},
    ),
    "opt": ("opt", "OPTForCausalLM", OPT),
    "opt-nobias": ("opt", "OPTForCausalLM", OPT | {"enable_bias": False}),
    "opt-plain": ("opt", "OPTForCausalLM", OPT | {"layer_norm_elementwise_affine": False}),
    "bert": ("bert", "BertModel", ENCODER),
    "bert-mlm": ("bert", "BertForMaskedLM", ENCODER),
    "vit": ("vit", "ViTForImageClassification", VIT | {"num_labels": 7}),
    "vit-headless": ("vit", "ViTModel", VIT),
    "mixtral": (
        "mixtral",
        "MixtralForCausalLM",
        GQA | {"head_dim": 10, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        GQA
        | {"head_dim": 10, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 17}
        | {"decoder_sparse_step": 2, "norm_topk_prob": True},
    ),
}
PICOS = tuple(CONFIGS)
FAMILIES = tuple(name for name in PICOS if "-" not in name)


SPECIAL_IF: dict[str, dict[str, Any]] = {model_type: {} for model_type, _, _ in CONFIGS.values()}
"""Settings that a family's default config needs to be as small as a pico."""
SPECIAL_IF |= dict.fromkeys(("phi3", "opt", "gemma2", "gemma3_text", "gpt2", "gpt_neox"), SPECIAL)


def pico(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model; `changes` go to its config."""
    import transformers

    model_type, architecture, settings = CONFIGS[name]
    config = transformers.AutoConfig.for_model(model_type, **(settings | SPECIAL_IF[model_type] | changes))
    config.architectures = [architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config._experts_implementation = "eager"  # the default, a grouped kernel, has no float64
        model = getattr(transformers, architecture)(config).to(dtype)
        randomise(model)
    model.config.dtype = dtype
    return model.eval()


def randomise(model: Any) -> None:
    """Random weights of a size that keeps signals alive; gains around one, biases not zero."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, dtype=torch.float64)
        if parameter.dim() == 1:
            stored_gain = name.endswith("weight") and "gemma" not in model.config.model_type
            value = 0.3 * noise + float(stored_gain)
        elif "embed" in name or "wte" in name or "wpe" in name:
            value = noise
        else:
            value = noise * parameter[0].numel() ** -0.5
        parameter.data.copy_(value)


def save(model: Any, folder: Path, fused: bool = False) -> Path:
    """Writes a checkpoint; `fused` keeps the modules' own keys (stacked experts), else those of the hub."""
    from safetensors.torch import save_file

    model.save_pretrained(folder)
    if fused:
        seen: set[int] = set()
        state = {}
        for key, tensor in model.state_dict().items():
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                state[key] = tensor.contiguous()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def batches(model: Any, seed: int = 1, sizes: tuple[tuple[int, int], ...] = ((2, 11), (3, 7))) -> list[Tensor]:
    """Token ids (B, T), or pixels for a vision model."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    if model.main_input_name == "pixel_values":
        shape = (config.num_channels, config.image_size, config.image_size)
        return [torch.randn(b, *shape, generator=generator, dtype=torch.float64) for b, _ in sizes]
    return [torch.randint(config.vocab_size, size, generator=generator) for size in sizes]
