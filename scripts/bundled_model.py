"""The bundled model's recipe, tokenizer and folder; shared by training and evaluation."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """Shape and schedule. Rates are per step; ``decay`` is the share of steps that decays.

    The defaults are for an idle machine and have not been run from start to end;
    the settings of each start of the committed run are in ``training.json``.
    """

    vocab: int = 4096
    hidden: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    intermediate: int = 640
    positions: int = 1024
    context: int = 512
    context_decay: int = 1024
    tokens_per_step: int = 4096
    steps: int = 4000
    warmup: int = 100
    decay: float = 0.35
    lr_muon: float = 4e-3
    lr_adamw: float = 3e-3
    weight_decay: float = 0.3
    weight_decay_embedding: float = 0.01
    dropout: float = 0.1
    clip: float = 1.0
    autocast: bool = True
    seed: int = 20260

    @property
    def decay_from(self) -> int:
        """First step of the decay."""
        return round(self.steps * (1 - self.decay))

    def replace(self, **changes: float) -> Recipe:
        """The same recipe with other values; an unknown field is an error."""
        return dataclasses.replace(self, **changes)

    def as_dict(self) -> dict:
        """Plain values, for ``training.json``."""
        return dataclasses.asdict(self)


def build_tokenizer(texts: list[str], path: Path, recipe: Recipe) -> Tokenizer:
    """Byte-level BPE of ``recipe.vocab`` tokens; read from ``path`` if it is there."""
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return tokenizer


def encode_files(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """One stream: END, file, END, file, ..., END; uint16 [tokens]."""
    end = tokenizer.token_to_id(END)
    stream = [end]
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        stream += [*encoding.ids, end]
    return np.array(stream, dtype=np.uint16)


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    """Random weights in float32: std 0.02, residual outputs smaller by sqrt(2 * layers).

    While training, what each attention and MLP adds to the residual is dropped
    out (arXiv:1207.0580); transformers' llama has no such place, so hooks do it.
    """
    config = LlamaConfig(
        vocab_size=recipe.vocab,
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.hidden // recipe.heads,
        intermediate_size=recipe.intermediate,
        max_position_embeddings=recipe.positions,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter /= (2 * recipe.layers) ** 0.5
    for name, module in model.named_modules():
        if recipe.dropout and name.endswith(("o_proj", "down_proj")):
            module.register_forward_hook(
                lambda module, _, out: torch.nn.functional.dropout(out, recipe.dropout, module.training)
            )
    return model


def save_folder(folder: Path, model, tokenizer: Tokenizer, recipe: Recipe, files: list, facts: dict) -> None:
    """Write the folder that AutoModel and AutoTokenizer load; weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy = copy.to(torch.bfloat16)
    copy.config.dtype = torch.bfloat16
    copy.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0)
    copy.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        model_max_length=recipe.positions,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    # Transformers 4 does not know the name that 5 writes; 5 reads both.
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    (folder / "model.safetensors").chmod(0o644)
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    rows = [[file.module, file.split, file.n_bytes, file.sha256] for file in files]
    lines = ",\n".join(json.dumps(row) for row in rows)
    (folder / "files.json").write_text(
        f'{{"columns": ["module", "split", "bytes", "sha256"], "files": [\n{lines}\n]}}\n'
    )
