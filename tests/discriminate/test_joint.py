"""What is learnt through the whole model: ranges of weights, static steps of inputs and scales of streams, together.

The planted case: in each block one neuron is loud, and writes a channel of the residual that nobody reads. One step
for all neurons, from the range that calibration saw, leaves the others hardly a code. The error of a block's output is
that channel's and asks for the wide range; the error of the logits does not know it. Weights that read quiet channels
are loud besides, so that clipping them is worth it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import regauge as rg
from regauge.artifact.files import read
from regauge.artifact.receipt import Receipt
from regauge.engine import apply
from regauge.hosts.transformers.source import read_tokenizer
from regauge.plan import parse
from tests.pico import SMALL, pico, save
from tests.words import save_tokenizer, text

READ: dict[str, Any] = {"calibration": [text(3000)], "tokens": 512, "length": 32}
LEARNT, STATIC = "'learnt-static:0.1'", "static"
CLIP, WHOLE = "'learnt-clip:0.1'", "minmax"
STEPS = 32
LOUD, UNREAD = 5, 9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    planted: Any = pico("llama", **SMALL)
    with torch.no_grad():
        for layer in planted.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[::8] *= 0.05
                norm.weight[UNREAD] = 0
            for site in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
                site.weight[:, ::8] *= 5
            layer.mlp.up_proj.weight[LOUD] *= 30
            layer.mlp.down_proj.weight[:, LOUD] = 0
            layer.mlp.down_proj.weight[UNREAD, LOUD] = 0.5
        planted.model.norm.weight[UNREAD] = 0
    return save_tokenizer(save(planted, tmp_path_factory.mktemp("joint") / "model"))


def recipe(weights: str, inputs: str, scope: str = "model", more: str = "", inner: bool = False) -> Any:
    learns = "learnt" in weights + inputs + more
    how = f"learning: {{scope: {scope}, steps: {STEPS}, batch: 64, patience: 0, schedule: cosine}}\n" if learns else ""
    read = f"{{grid: int4-asym, grain: tensor, ranger: {inputs}, scale: f32}}"
    inside = f"  blocks.*.attn.{{queries,keys,values,probabilities}}: {read}\n" if inner else ""
    point = f"{{grid: int3-asym, grain: channel, ranger: {weights}, scale: f32}}"
    return parse(f"name: joint\n{how}{more}weights:\n  blocks.*: {point}\ninputs:\n  blocks.*: {read}\n{inside}")


def made(model: Path, out: Path, *args: Any, **options: Any) -> Receipt:
    return apply(recipe(*args, **options), model, out, **READ)


def kl(model: Path, out: Path) -> float:
    """KL on words that no training saw."""
    ids = torch.tensor(read_tokenizer(model)(text(800, seed=5))["input_ids"][:768]).view(24, 32)
    original, found = (rg.load(path, dtype="float32")(ids).logits.log_softmax(-1) for path in (model, out))
    return float((original.exp() * (original - found)).sum(-1).mean())


CASES: dict[str, tuple[str, ...]] = {
    "null": (WHOLE, STATIC),
    "blocks": (CLIP, LEARNT, "block"),
    "weights": (CLIP, STATIC),
    "inputs": (WHOLE, LEARNT),
    "joint": (CLIP, LEARNT),
}


@pytest.fixture(scope="module")
def loss(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], float]:
    folder = tmp_path_factory.mktemp("made")

    @cache
    def of(name: str) -> float:
        made(model, folder / name, *CASES[name])
        return kl(model, folder / name)

    return of


def test_learnt_together_they_beat_what_calibration_saw(loss: Callable[[str], float]) -> None:
    assert loss("joint") < 0.9 * loss("null")


@pytest.mark.slow
def test_together_is_better_than_either_alone(loss: Callable[[str], float]) -> None:
    assert loss("joint") < 0.95 * loss("weights")
    assert loss("joint") < 0.95 * loss("inputs")


@pytest.mark.slow
def test_through_the_model_is_better_than_block_by_block(loss: Callable[[str], float]) -> None:
    assert loss("joint") < 0.9 * loss("blocks")


def test_without_a_rate_nothing_moves(model: Path, tmp_path: Path) -> None:
    """At rates of 0 what comes out is the null of static ranges, byte for byte in every tensor."""
    still = recipe(WHOLE, "'learnt-static:0'", more="rewrites: ['learnt-scales:0']\n", inner=True)
    apply(still, model, tmp_path / "still", **READ)
    apply(recipe(WHOLE, STATIC, inner=True), model, tmp_path / "null", **READ)
    assert tensors(tmp_path / "still") == tensors(tmp_path / "null")


def tensors(out: Path) -> dict[str, list[Any]]:
    return {name: one.tolist() for path in sorted(out.glob("*.safetensors")) for name, one in read(path).items()}
