"""Taps: seeing and changing what sites read and write, alone and where storage is fused.

Oracles: forward hooks on transformers' modules, and linear algebra (scaling a site's input is scaling the columns of
its weight, scaling its output the rows).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regauge.errors import ModelError
from regauge.hosts.transformers.runner import Runner
from tests.pico import FAMILIES, PICOS, batches
from tests.streaming import distance, opened, run, stock


@pytest.mark.parametrize("name", PICOS)
def test_watch_shows_what_the_modules_are_called_with(name: str) -> None:
    model, source = opened(name)
    seen: dict[str, Tensor] = {}
    calls: dict[str, Tensor] = {}
    sites = [site for site in source.anatomy.sites if site.tap is not None and site.expert is None]
    hooks = [
        model.get_submodule(site.module).register_forward_pre_hook(
            lambda _, args, at=site.module: calls.update({at: args[0]})
        )
        for site in sites
    ]
    with torch.no_grad():
        stock(model, batches(model)[0])
    for hook in hooks:
        hook.remove()
    run(name, watch={site.name: lambda x, at=site.name: seen.update({at: x}) for site in sites})
    assert seen.keys() == {site.name for site in sites}
    for site in sites:
        assert seen[site.name].shape[1] == site.shape[1], site.name
        wanted = calls[site.module]
        if site.kind == "patch":
            kernel = model.get_submodule(site.module).weight.detach()
            assert seen[site.name].shape[0] == 2 * 9
            patches = seen[site.name] @ kernel.reshape(kernel.shape[0], -1).T
            wanted = torch.nn.functional.conv2d(wanted, kernel, stride=5).flatten(2).transpose(1, 2)
            assert distance(patches, wanted.reshape(patches.shape)) < 1e-12
        else:
            assert distance(seen[site.name], wanted.reshape(-1, site.shape[1])) < 1e-12, site.name


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_every_expert_is_shown_the_tokens_that_the_router_sends_it(name: str) -> None:
    _, source = opened(name)
    seen: dict[str, Tensor] = {}
    names = ["blocks.1.moe.router", *(f"blocks.1.moe.{e}.{kind}" for e in range(5) for kind in ("gate", "up", "down"))]
    run(name, watch={at: lambda x, at=at: seen.update({at: x}) for at in names})
    x = seen["blocks.1.moe.router"]
    weights = source.block(1)
    chosen = (x @ weights["blocks.1.moe.router.weight"].T).topk(2, dim=-1).indices
    for expert in range(5):
        mine = x[(chosen == expert).any(dim=-1)]
        if not len(mine):
            assert f"blocks.1.moe.{expert}.up" not in seen
            continue
        assert torch.equal(seen[f"blocks.1.moe.{expert}.up"], mine)
        assert torch.equal(seen[f"blocks.1.moe.{expert}.gate"], mine)
        gate, up = (mine @ weights[f"blocks.1.moe.{expert}.{kind}.weight"].T for kind in ("gate", "up"))
        assert distance(seen[f"blocks.1.moe.{expert}.down"], torch.nn.functional.silu(gate) * up) < 1e-12
    counts = [len(seen.get(f"blocks.1.moe.{expert}.up", ())) for expert in range(5)]
    assert sum(counts) == 2 * len(x)


@pytest.mark.parametrize("name", ["bert", "opt", "llama", "mixtral"])
def test_watch_leaves_padding_out(name: str) -> None:
    model, source = opened(name)
    ids = batches(model)[0]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    runner = Runner(source, dtype=torch.float64)
    states = runner.begin([{"input_ids": ids, "attention_mask": mask}], source.block(None))
    counts: dict[str, int] = {}

    def count(at: str, x: Tensor) -> None:
        counts[at] = counts.get(at, 0) + len(x)

    sites = list(source.anatomy.in_block(1))
    runner.block(1, source.block(1), states, watch={s.name: lambda x, at=s.name: count(at, x) for s in sites})
    assert counts.pop("blocks.1.attn.q") == int(mask.sum()) == 18
    experts = [n for at, n in counts.items() if at.endswith(".up") and ".moe." in at]
    assert sum(experts) in (0, 2 * 18)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_changed_input_is_a_changed_column_and_a_changed_output_a_changed_row(name: str) -> None:
    """Every site of the last block and of the outside, one at a time; fused ones must not touch their neighbours."""
    _, source = opened(name)
    last = source.anatomy.blocks - 1
    sites = [site for site in source.anatomy.sites if site.tap is not None and site.block in (last, None)]
    generator = torch.Generator().manual_seed(0)
    plain = run(name)
    for site in sites:
        weight = source.read([f"{site.name}.weight"])[f"{site.name}.weight"]
        s = 0.5 + torch.rand(site.shape[1], generator=generator, dtype=torch.float64)
        found = run(name, inputs={site.name: lambda x, s=s: x * s})
        assert distance(found, run(name, {f"{site.name}.weight": weight * s})) < 1e-12, site.name
        if site.expert is None:
            assert distance(found, plain) > 1e-6, site.name
        if site.expert is None and site.kind not in ("router", "patch"):
            r = 0.5 + torch.rand(site.shape[0], generator=generator, dtype=torch.float64)
            change = {f"{site.name}.weight": weight * r[:, None]}
            if site.bias is not None:
                change[f"{site.name}.bias"] = source.read([f"{site.name}.bias"])[f"{site.name}.bias"] * r
            found = run(name, outputs={site.name: lambda y, r=r: y * r})
            assert distance(found, run(name, change)) < 1e-12, site.name


def test_sites_of_one_module_may_be_changed_by_different_functions() -> None:
    for name in ("phi3", "gpt2", "gpt_neox"):
        _, source = opened(name)
        change, inputs = {}, {}
        for factor, kind in ((2.0, "q"), (3.0, "v")):
            key = f"blocks.0.attn.{kind}"
            change[f"{key}.weight"] = source.read([f"{key}.weight"])[f"{key}.weight"] * factor
            inputs[key] = lambda x, factor=factor: x * factor
        assert distance(run(name, inputs=inputs), run(name, change)) < 1e-12


def test_taps_are_gone_after_the_run_and_after_an_error() -> None:
    model, source = opened("mixtral")
    runner = Runner(source, dtype=torch.float64)
    states = runner.begin(batches(model), source.block(None))

    def stop(_: Tensor) -> None:
        raise KeyboardInterrupt

    for at in ("blocks.0.attn.q", "blocks.0.moe.0.up"):
        with pytest.raises(KeyboardInterrupt):
            runner.block(0, source.block(0), states, watch={at: stop})
        runner.block(0, source.block(0), states)


def test_a_tap_on_an_unknown_site_is_an_error() -> None:
    model, source = opened("llama")
    runner = Runner(source, dtype=torch.float64)
    states = runner.begin(batches(model), source.block(None))
    with pytest.raises(ModelError, match=r"no site 'blocks\.0\.attn\.x' here \(did you mean 'blocks\.0\.attn\.\w'"):
        runner.block(0, source.block(0), states, watch={"blocks.0.attn.x": print})
