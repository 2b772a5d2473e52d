"""transformers' own generation over caches that let tokens go unevenly: the native step writes what the modules write,
and whatever is done to the cache on the way, each head keeps its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import regauge as rg
from artifacts import choice, make
from pico import pico, save
from regauge.cache.base import Seen
from regauge.cache.budgets import AcrossHeads
from regauge.cache.disposals import Drop
from regauge.cache.scheme import BlockCache, CachePlan, Policy, Scheme
from regauge.cache.scores import Random
from regauge.hosts.transformers import saved
from regauge.hosts.transformers.caching import fresh
from regauge.kernels.cpu.library import available
from stores import kivi

pytestmark = pytest.mark.skipif(not available(), reason="the C++ kernels were not built here")
KEPT = {"whole": Scheme(window=8), "kivi-4": kivi(4, window=8)}


class Tilted:
    """A score by which the second head has far more to keep than the others; what attends is of no account."""

    sinks = queries = 0
    accumulates = turns = False

    def __call__(self, seen: Seen) -> Tensor:
        found = Random()(seen)
        found[:, 1] += 2.0
        return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("evicted")
    made = pico("llama", head_dim=16, max_position_embeddings=1024)
    form = choice("int8", "channel", "f16")
    path = make(save(made, folder / "source"), folder / "out", lambda s: form if s.kind != "embed" else None).path
    return rg.load(path, activations="float32", cache="kivi-2")  # so that requests may ask for others


def plan_of(name: str) -> CachePlan:
    policy = Policy(Tilted(), AcrossHeads(0.5, floor=0.0), Drop())
    return CachePlan("test", (BlockCache(KEPT[name], policy),) * 2)


def prompts(batch: int, tokens: int = 300) -> dict[str, Tensor]:
    ids = torch.randint(3, 50, (batch, 9), generator=torch.Generator().manual_seed(4)).repeat(1, tokens // 9 + 1)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    for row in range(batch):
        mask[row, : 6 * row] = 0
    return {"input_ids": ids[:, :tokens], "attention_mask": mask}


def written(model: Any, cache: Any, inputs: dict[str, Tensor], new: int = 24, **how: Any) -> Tensor:
    torch.manual_seed(5)
    how = {"do_sample": False} | how
    found: Tensor = model.generate(
        **inputs, past_key_values=cache, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, **how
    )
    return found


HOW: dict[str, tuple[int, dict[str, Any]]] = {
    "greedy": (1, {}),
    "padding": (3, {}),
    "beams": (2, {"num_beams": 3, "num_return_sequences": 2}),
    "sampling": (1, {"do_sample": True, "num_return_sequences": 3}),
    "look-up": (1, {"prompt_lookup_num_tokens": 4}),
    "chunks": (1, {"prefill_chunk_size": 37}),
}


@pytest.mark.parametrize(
    "how", ["greedy", *(pytest.param(how, marks=pytest.mark.slow) for how in HOW if how != "greedy")]
)
@pytest.mark.parametrize("name", KEPT)
def test_the_step_writes_what_the_modules_write(
    name: str, how: str, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, more = HOW[how]
    found, caches, steps = [], [], []
    for native in (True, False):
        if not native:
            monkeypatch.setattr(type(model.regauge_step), "serve", lambda *args: None)
        caches.append(fresh(model, plan_of(name)))
        before = model.regauge_step.steps
        found.append(written(model, caches[-1], prompts(batch), **more))
        steps.append(model.regauge_step.steps - before)
    assert steps[0] > 8, "of the native step"
    assert steps[1] == 0
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert one.chosen
        assert not one.shelf.even
        assert one.shelf.counts_BH.sum() * 32 < 0.8 * one.origin * one.shelf.counts_BH.numel()
        assert one.length == other.length
    alike = (found[0] == found[1]).float().mean()
    assert alike > 0.9, "queries are rounded in the step, so one token in hundreds may differ, and what follows it"


@pytest.mark.parametrize("name", KEPT)
def test_a_chat_goes_on_is_copied_saved_and_forgotten(name: str, model: Any, tmp_path: Path) -> None:
    plan, first = plan_of(name), prompts(1)
    cache = fresh(model, plan)
    answer = written(model, cache, first)
    longer = {"input_ids": torch.cat((answer, answer[:, 3:10]), 1)}
    branch, loaded = copy.deepcopy(cache), saved.load(model, saved.save(model, cache, tmp_path / "a"), plan)
    with pytest.raises(RuntimeError, match="a policy has let go of tokens among the first"):
        cache.crop(-100)
    assert not cache.is_croppable
    texts = [written(model, one, longer, 20).tolist() for one in (cache, branch, loaded)]
    assert texts[0] == texts[1] == texts[2]
    cache.reset()
    assert written(model, cache, first).tolist() == answer.tolist()
