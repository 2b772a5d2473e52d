"""Every architecture of the list: inspected, streamed, rounded to 8 bits, loaded, run and decoded."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import regauge as rg
from regauge.anatomy.storage import gather, scatter
from regauge.hosts.transformers.runner import Runner
from regauge.hosts.transformers.session import output_of
from regauge.hosts.transformers.skeleton import parameters
from regauge.hosts.transformers.source import Source
from tests.architectures import LIST, build, every, inputs, listed, opened


def test_the_list_is_long_enough_and_most_of_it_opens() -> None:
    rows = listed()
    assert len(rows) >= 80, LIST
    assert len(opened(slow=False) + opened(slow=True)) >= 70
    assert len({row["type"] for row in rows.values()}) >= 75


def run(model: Any, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return output_of(model(**given, **({"use_cache": False} if model.can_generate() else {})))


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def by_hand(model: Any, source: Source) -> Any:
    """The model with the matrices of its blocks rounded to 8 bits, a step a row, by plain arithmetic."""
    weights = gather(source.anatomy, {key: tensor.detach() for key, tensor in parameters(model).items()})
    for site in source.anatomy.sites:
        if site.block is not None and site.kind != "router":
            w = weights[f"{site.name}.weight"]
            step = (w.abs().amax(1, keepdim=True) / 127.5).bfloat16().float()
            weights[f"{site.name}.weight"] = (w / step).round().clamp(-128, 127) * step
    shapes = {key: tuple(tensor.shape) for key, tensor in parameters(model).items()}
    model.load_state_dict(scatter(source.anatomy, weights, shapes), strict=False)
    return model


@pytest.mark.parametrize("name", every())
def test_it_goes_the_whole_way(name: str, tmp_path: Path) -> None:
    """Streamed as transformers computes it; loaded as the rounding done by hand computes it, decoding token by token
    too; and near to what it was."""
    model = build(name)
    model.save_pretrained(tmp_path / "model")
    given = inputs(model)
    before = run(model, given)
    assert rg.inspect(tmp_path / "model").blocks > 0
    source = Source.open(tmp_path / "model")
    with torch.no_grad():
        streamed = next(iter(Runner(source).logits([given])))
    assert apart(streamed, before) < 1e-5
    rg.apply("rtn-w8", tmp_path / "model", out=tmp_path / "out")
    packed = rg.load(tmp_path / "out")
    after = run(packed, given)
    assert apart(after, before) < 0.12
    rounded = by_hand(model, source)
    assert apart(after, run(rounded, given)) < 2e-3
    if packed.can_generate() and not packed.config.is_encoder_decoder:
        assert apart(decoded(packed, given["input_ids"]), decoded(rounded, given["input_ids"])) < 2e-3
        step = getattr(packed, "regauge_step", None)
        assert (step is not None and step.steps > 0) == bool(listed()[name].get("native"))
    elif packed.can_generate():
        reads = {key: x for key, x in given.items() if key != "decoder_input_ids"}
        assert packed.generate(**reads, max_new_tokens=3, do_sample=False).shape[1] > 1


def decoded(model: Any, ids: Tensor) -> Tensor:
    """Logits of the last three tokens, read one at a time after the others."""
    found = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", rg.errors.FallbackWarning)
        out = model(input_ids=ids[:, :-3], use_cache=True)
        name = "past_key_values" if "past_key_values" in out else "cache_params"
        for at in range(ids.shape[1] - 3, ids.shape[1]):
            out = model(input_ids=ids[:, at : at + 1], use_cache=True, **{name: out[name]})
            found.append(out["logits"])
    return torch.cat(found, 1)


SHARING = ["gemma3n_text", "gemma4_text"]


def shares(name: str, dtype: torch.dtype = torch.float32, **sizes: int) -> Any:
    """Four layers, of which the last two read the keys and values of the first two."""
    return build(
        name,
        dtype=dtype,
        num_hidden_layers=4,
        **sizes,
        other={
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "intermediate_size": [52] * 4 if name == "gemma3n_text" else 52,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    )


@pytest.mark.parametrize("name", SHARING)
def test_layers_that_share_keys_and_values_are_run_one_by_one(name: str, tmp_path: Path) -> None:
    """Later layers read what the run before them has left, and never what another run has with other weights."""
    model = shares(name)
    model.save_pretrained(tmp_path / "model")
    given, before = inputs(model), run(model, inputs(model))
    rg.apply("rtn-w8", tmp_path / "model", out=tmp_path / "out")
    assert apart(run(rg.load(tmp_path / "out"), given), before) < 0.12
    source = Source.open(tmp_path / "model")
    assert source.anatomy.cached == 2 * 2 * (10 + 10)  # two layers keep two heads each
    runner, outer = Runner(source), source.block(None)
    with torch.no_grad():
        states = runner.begin([given, inputs(model, seed=2)], outer)
        assert not states.alone
        for index in range(4):
            weights = source.block(index)
            runner.block(index, {key: 2 * x for key, x in weights.items()}, states)
            after = runner.block(index, weights, states)
            runner.bind(index, {key: -x for key, x in weights.items()}, states)(states.hidden[0], 0)
            states = after
        first, second = runner.tail(outer, states)
    assert apart(first, before) < 1e-5
    assert apart(second, run(model, inputs(model, seed=2))) < 1e-5


def test_granites_multipliers_go_into_embeddings_epsilons_and_the_last_gain(tmp_path: Path) -> None:
    """With an epsilon that is felt; and where layers come to differ, transformers decodes, and says why."""
    build("granite", other={"rms_norm_eps": 0.5, "residual_multiplier": 0.3}).save_pretrained(tmp_path / "model")
    rg.apply("rtn-w8", tmp_path / "model", out=tmp_path / "out")
    packed = rg.load(tmp_path / "out")
    ids = inputs(packed)["input_ids"]
    wanted = run(packed, {"input_ids": ids})[:, -3:]
    assert apart(decoded(packed, ids), wanted) < 2e-3
    steps = packed.regauge_step.steps
    assert steps == 3
    packed.model.layers[1].residual_multiplier = 0.5
    past = packed(input_ids=ids[:, :-1], use_cache=True).past_key_values
    with pytest.warns(rg.errors.FallbackWarning, match="residual_multiplier is 0, or not the same number in all"):
        packed(input_ids=ids[:, -1:], past_key_values=past, use_cache=True)
    assert packed.regauge_step.steps == steps
