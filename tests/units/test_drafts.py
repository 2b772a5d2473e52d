"""Drafts: the text is the one without them, token for token, and so is what the cache holds, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import regauge as rg
from regauge.elastic.family import Family
from regauge.hosts.transformers.cachedtext import CachedText
from regauge.hosts.transformers.caching import fresh
from regauge.hosts.transformers.drafting import draftable
from regauge.hosts.transformers.selfdrafts import shared_blocks
from regauge.hosts.transformers.switching import switchable
from regauge.kernels.cpu.library import available
from regauge.runtime.drafts.lookup import Lookup
from regauge.runtime.drafts.loop import drafted
from regauge.runtime.drafts.pace import Costs, Pace
from regauge.runtime.drafts.source import Draft
from regauge.runtime.drafts.worth import best
from units.test_step import loaded

native = pytest.mark.skipif(not available(), reason="the C++ kernels were not built here")
IDS = torch.tensor([[5, 9, 11, 7, 5, 9, 11, 7, 5, 9, 11]])
MASK = {"attention_mask": torch.ones_like(IDS)}


class Fixed(Costs):
    """Costs that stay as they are."""

    def took(self, tokens: int, seconds: float) -> None:
        return


def eager_to_draft(model: Any) -> None:
    """Drafts are as long as they may be: steps of any length seem to take as long as one."""
    model.regauge_drafts = Fixed(seconds=[1.0] * 8)


class Guesses:
    """Guesses given beforehand, one draft a call."""

    free = False

    def __init__(self, drafts: Sequence[Sequence[int]]) -> None:
        self.drafts, self.text = list(drafts), []

    def extend(self, ids: Any) -> None:
        self.text += list(ids)

    def propose(self, most: int) -> Draft:
        return Draft(tuple(self.drafts.pop(0)[:most]) if self.drafts else ())


class Counting:
    """A model whose text counts up from 0, and that remembers what it was given."""

    def __init__(self) -> None:
        self.held: list[int] = []
        self.steps: list[tuple[int, ...]] = []

    def step(self, ids: Sequence[int]) -> Tensor:
        self.steps.append(tuple(ids))
        self.held += ids
        return torch.nn.functional.one_hot(torch.tensor(ids) + 1, 64).float()

    def back(self, tokens: int) -> None:
        del self.held[len(self.held) - tokens :]

    def together(self, most: int) -> int:
        return most


def quick() -> Pace:
    return Pace(Costs(seconds=[1.0, *[1.0] * 7]), sure=(1.0,))


def largest(logits_V: Tensor) -> int:
    return int(logits_V.argmax())


def run(target: Counting, source: Any, most: int, pace: Pace | None = None) -> list[int]:
    logits = torch.nn.functional.one_hot(torch.tensor(0), 64).float()
    return list(drafted(target, source, pace or quick(), logits, largest, most))


def test_the_last_of_the_longest_matches_is_looked_up() -> None:
    assert Lookup([1, 2, 3, 9, 1, 2, 3]).propose(2) == Draft((9, 1), 3)
    assert Lookup([1, 2, 7, 0, 1, 2, 8, 0, 1, 2]).propose(3) == Draft((8, 0, 1), 3)  # the latest of two
    assert Lookup([6, 1, 2, 7, 3, 1, 2, 8, 6, 1, 2]).propose(1) == Draft((7,), 3)  # the longer of two
    assert Lookup([4, 5, 4]).propose(1) == Draft((5,), 1)
    assert Lookup([1, 2, 3]).propose(4) == Draft((), 0)
    assert Lookup().propose(4) == Draft((), 0)


def test_a_continuation_goes_on_with_itself() -> None:
    assert Lookup([3, 8, 3, 8]).propose(5) == Draft((3, 8, 3, 8, 3), 2)
    grown = Lookup([1, 2, 3, 4, 5, 6, 7, 8, 9])
    grown.extend([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert grown.propose(1) == Draft((0,), 8)


def test_right_guesses_stay_and_wrong_ones_are_taken_back() -> None:
    target = Counting()
    assert run(target, Guesses([[1, 2, 9, 4], [4, 5], [9]]), 8) == list(range(8))
    assert target.steps == [(0, 1, 2, 9, 4), (3, 4, 5), (6,)]  # no guess for the last token
    assert target.held == list(range(7))


def test_what_nobody_asks_for_any_more_is_taken_back() -> None:
    target = Counting()
    found = drafted(target, Guesses([[1, 2, 3, 4]]), quick(), torch.eye(64)[0], largest, 20)
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    found.close()
    assert target.held == [0, 1]  # as without drafts: the last token was chosen and not read


def test_nothing_is_drafted_before_a_step_was_timed_nor_where_it_does_not_pay() -> None:
    pace = Pace(Costs())
    assert pace.length(8, 7, True) == 0
    pace.costs.took(1, 1.0)
    assert pace.length(8, 7, True) == 7
    dear = Pace(Costs(seconds=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]))
    assert dear.length(8, 7, True) == 0
    for _ in range(200):
        dear.tried(Draft((3,), 1))
        dear.came(4)
    cheap = Pace(Costs(seconds=[1.0, 1.2, 1.3, 1.35, 2.7, 2.8, 2.9, 3.0]))
    assert cheap.length(8, 7, True) == 3  # behind the fourth token steps are dear
    assert cheap.length(8, 2, True) == 2
    for _ in range(200):
        cheap.tried(Draft((3,), 8))
        cheap.came(4)
    assert cheap.length(8, 7, True) == 0
    for _ in range(200):  # guesses that are free are looked at where they are not tried
        cheap.tried(Draft((3, 3), 8))
        cheap.came(3)
        cheap.came(3)
    assert cheap.length(8, 7, True) == 3


def test_how_many_guesses_are_worth_it() -> None:
    """A second guess in a step that costs half a token more: 1 + 0.8 + 0.64 for 1.5 and two guesses of a tenth."""
    times = {1: 1.0, 2: 1.2, 3: 1.5, 4: 3.0}
    length, gain = best(0.8, 0.8, times.__getitem__, 0.1, most=3)
    assert (length, gain) == (2, pytest.approx(2.44 / 1.7))
    assert best(0.8, 0.8, times.__getitem__, 0.6, most=3) == (0, 1.0)
    assert best(0.1, 0.1, times.__getitem__, 0.0, most=3) == (0, 1.0)


def test_guesses_that_cost_something_are_tried_again_now_and_then() -> None:
    pace = Pace(Costs(seconds=[1.0, *[9.0] * 7], guess=1.0))
    lengths = [pace.length(0, 7, False) for _ in range(252)]
    assert [step + 1 for step, length in enumerate(lengths) if length] == [4, 12, 28, 60, 124, 188, 252]
    assert set(lengths) == {0, 2}


def test_a_pause_of_the_machine_is_no_cost() -> None:
    costs = Costs()
    costs.took(1, 1.0)
    costs.took(1, 100.0)
    assert costs.of(1) == pytest.approx(1.4)
    costs.took(4, 2.0)
    assert costs.of(2) == pytest.approx(1.6)  # between what was measured
    assert costs.of(6) == pytest.approx(2.0 + 2 * 0.04 * 1.4)


@native
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral"])
def test_drafts_make_the_tokens_of_greedy_decoding(name: str, tmp_path: Path) -> None:
    model = loaded(tmp_path, name)
    kwargs = {"max_new_tokens": 45, "min_new_tokens": 45, "do_sample": False, **MASK}
    greedy = model.generate(IDS, **kwargs)
    eager_to_draft(model)
    assert model.generate(IDS, drafts="lookup", **kwargs).equal(greedy)
    assert model.regauge_drafts.drafted > 20
    assert model.generate(IDS, drafts="none", **kwargs).equal(greedy)
    alone = list(rg.stream(model, IDS[0].tolist(), 45, stop=[]))
    model.generation_config.drafts = "lookup"
    assert list(rg.stream(model, IDS[0].tolist(), 45, stop=[])) == alone


@native
@pytest.mark.parametrize("form", ["int4", "int2", "asym", "nf4", "int8"])
def test_several_tokens_are_bit_for_bit_those_of_one_by_one(form: str, tmp_path: Path) -> None:
    """Rounded inputs too, every number of tokens, and across the chunks of attention."""
    model = loaded(
        tmp_path, "llama", form, activations="int8" if form == "int4" else None, max_position_embeddings=1024
    )
    ids = torch.randint(3, 50, (1, 290), generator=torch.Generator().manual_seed(1))
    found = []
    for sizes in ([1], [2, 3, 4, 5, 6, 7, 8]):
        cache, logits, at = fresh(model), [], 240
        with torch.no_grad():
            model(input_ids=ids[:, :at], past_key_values=cache)
        text = CachedText(model, cache)
        while at < 290:
            some = text.together(min(sizes[at % len(sizes)], 290 - at))
            logits.append(text.step(ids[0, at : at + some].tolist()))
            at += some
        found.append((torch.cat(logits), [layer.keys.clone() for layer in cache.layers]))
    assert found[0][0].equal(found[1][0])
    assert all(one.equal(other) for one, other in zip(found[0][1], found[1][1], strict=True))


@native
@pytest.mark.parametrize("cache", [None, "kivi-4"])
def test_the_cache_is_as_without_drafts(cache: str | None, tmp_path: Path) -> None:
    model = loaded(tmp_path, "llama", activations=None, max_position_embeddings=1024)
    ids = torch.cat([IDS] * 20, 1)
    kwargs: dict[str, Any] = {
        "max_new_tokens": 80,
        "min_new_tokens": 80,
        "do_sample": False,
        "return_dict_in_generate": True,
    }
    kwargs |= {"attention_mask": torch.ones_like(ids)} | ({} if cache is None else {"regauge_cache": cache})
    plain = model.generate(ids, **kwargs)
    eager_to_draft(model)
    ours = model.generate(ids, drafts="lookup", **kwargs)
    assert model.regauge_drafts.drafted > model.regauge_drafts.accepted > 0
    assert ours.sequences.equal(plain.sequences)
    for one, other in zip(ours.past_key_values.layers, plain.past_key_values.layers, strict=True):
        assert one.length == other.length
        assert one.keys.equal(other.keys)
        assert one.values.equal(other.values)


@native
def test_sampled_text_is_that_of_the_same_seed(tmp_path: Path) -> None:
    model = loaded(tmp_path, "llama", activations=None)
    kwargs = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": True, "temperature": 0.5, "top_k": 5, **MASK}
    eager_to_draft(model)
    for seed in range(4):
        torch.manual_seed(seed)
        plain = model.generate(IDS, **kwargs)
        torch.manual_seed(seed)
        assert model.generate(IDS, drafts="lookup", **kwargs).equal(plain)
    assert model.regauge_drafts.accepted > 0


@native
@pytest.mark.long
def test_sampled_tokens_have_the_distribution_of_plain_sampling(tmp_path: Path) -> None:
    """The third token of 600 texts each, whose seeds differ: total variation within what chance allows."""
    model = loaded(tmp_path, "llama", activations=None)
    eager_to_draft(model)
    kwargs = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": True, "temperature": 0.6, "top_k": 4, **MASK}
    at = IDS.shape[1] + 2
    torch.manual_seed(7)
    ours = torch.stack([model.generate(IDS, drafts="lookup", **kwargs)[0, at] for _ in range(600)])
    torch.manual_seed(8)
    plain = torch.cat([model.generate(IDS, num_return_sequences=60, **kwargs)[:, at] for _ in range(10)])
    counts = [torch.bincount(third, minlength=64) / 600 for third in (plain, ours)]
    assert float((counts[0] - counts[1]).abs().sum()) / 2 < 0.12


@native
def test_criteria_processors_scores_and_streamers_go_token_by_token(tmp_path: Path) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append(-1)

    model = loaded(tmp_path, "llama")
    eager_to_draft(model)

    def stop(ids: Tensor, scores: Any, **more: Any) -> Tensor:
        return torch.tensor([ids.shape[1] >= IDS.shape[1] + 9])

    kwargs: dict[str, Any] = {
        "max_new_tokens": 30,
        "do_sample": False,
        "repetition_penalty": 1.02,
        "eos_token_id": None,
        **MASK,
    }
    kwargs |= {"return_dict_in_generate": True, "output_scores": True, "stopping_criteria": [stop]}
    plain, streamer = model.generate(IDS, **kwargs), Streamer()
    ours = model.generate(IDS, drafts="lookup", streamer=streamer, **kwargs)
    assert ours.sequences.equal(plain.sequences)
    assert ours.sequences.shape[1] == IDS.shape[1] + 9
    assert all(one.equal(other) for one, other in zip(ours.scores, plain.scores, strict=True))
    assert streamer.seen[-10:] == [*ours.sequences[0, -9:].tolist(), -1]
    assert ours.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()


@native
def test_padding_and_a_request_in_the_config(tmp_path: Path) -> None:
    model = loaded(tmp_path, "llama")
    ids, mask = torch.cat((torch.zeros(1, 3, dtype=torch.long), IDS), 1), torch.ones(1, 14, dtype=torch.long)
    mask[:, :3] = 0
    kwargs = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "attention_mask": mask}
    plain = model.generate(ids, **kwargs)
    eager_to_draft(model)
    asked = copy.deepcopy(model.generation_config)
    asked.drafts = "lookup"
    assert model.generate(ids, generation_config=asked, **kwargs).equal(plain)
    assert model.regauge_drafts.drafted > 0


@native
@pytest.mark.parametrize(
    ("asked", "shared"), [("depth=2", 2), ("depth=0/2", 1), ("ffn=0.5", 1), ("depth=3,ffn=0.5", 1)]
)
def test_a_member_drafts_for_the_whole(asked: str, shared: int, tmp_path: Path) -> None:
    """Its first blocks write to the whole's stores, which are afterwards, bit for bit, as without drafts."""
    model = loaded(tmp_path, "llama", activations=None, num_hidden_layers=4)
    family = Family(depth=(3, 2), ffn=(0.5,), layers="exits")
    switchable(model, family, model.regauge_anatomy)
    draftable(model)
    members = model.regauge
    assert shared_blocks(members.cut(members.settled(asked))) == shared
    kwargs: dict[str, Any] = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, **MASK}
    kwargs |= {"return_dict_in_generate": True}
    plain = model.generate(IDS, **kwargs)
    eager_to_draft(model)
    ours = model.generate(IDS, drafts=asked, **kwargs)
    assert model.regauge_drafts.drafted > 10
    assert ours.sequences.equal(plain.sequences)
    for one, other in zip(ours.past_key_values.layers, plain.past_key_values.layers, strict=True):
        assert one.length == other.length
        assert one.keys.equal(other.keys)
        assert one.values.equal(other.values)
    with pytest.raises(rg.errors.SettingError, match="the whole itself"):
        model.generate(IDS, drafts="full", **kwargs)


@native
@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"num_beams": 2}, "not with beam search"),
        ({"num_return_sequences": 2, "do_sample": True}, "one sequence, not for 2"),
        ({"use_cache": False}, "needs a cache"),
        ({"prompt_lookup_num_tokens": 3}, "both say how to decode"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "neither attentions"),
        ({"drafts": "oracle"}, "'oracle' drafts nothing: give 'lookup'"),
    ],
)
def test_what_drafts_cannot_serve_is_refused(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = loaded(tmp_path, "llama")
    with pytest.raises(rg.errors.SettingError, match=said):
        model.generate(IDS, **{"drafts": "lookup", "max_new_tokens": 4, "do_sample": False, **MASK, **more})


@native
@pytest.mark.parametrize(
    "more", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}, {"use_cache": False}]
)
def test_drafts_that_an_artifact_prefers_give_way(more: dict[str, Any], tmp_path: Path) -> None:
    """What `fit` wrote into the generation settings never makes a call fail, nor its text another."""
    model = loaded(tmp_path, "llama")
    kwargs = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, **MASK, **more}
    torch.manual_seed(3)
    plain = model.generate(IDS, **kwargs)
    model.generation_config.drafts = "lookup"
    eager_to_draft(model)
    torch.manual_seed(3)
    assert model.generate(IDS, **kwargs).equal(plain)
    assert model.regauge_drafts.steps == 0
    model.generate(IDS, max_new_tokens=12, do_sample=False, **MASK)
    assert model.regauge_drafts.drafted > 0


@native
def test_preferred_drafts_that_nobody_has_are_refused(tmp_path: Path) -> None:
    """A member where there is no family, in the call as in the settings; and in a family one that it does not offer."""
    model = loaded(tmp_path, "llama", activations=None, num_hidden_layers=4)
    model.generation_config.drafts = "depth=2"
    with pytest.raises(rg.errors.SettingError, match="drafts nothing: give 'lookup' or 'none', or a member"):
        model.generate(IDS, max_new_tokens=4, **MASK)
    with pytest.raises(rg.errors.SettingError, match="drafts nothing"):
        draftable(model)
    switchable(model, Family(depth=(3, 2), layers="exits"), model.regauge_anatomy)
    model.generation_config.drafts = "depth=1"
    with pytest.raises(rg.errors.SettingError, match="depth"):
        draftable(model)
    model.generation_config.drafts = "depth=2"
    draftable(model)
    plain = model.generate(IDS, drafts="none", max_new_tokens=9, do_sample=False, **MASK)
    eager_to_draft(model)
    assert model.generate(IDS, max_new_tokens=9, do_sample=False, **MASK).equal(plain)
    assert model.regauge_drafts.drafted > 0
    with rg.use(model, "depth=3"):  # the drafts are of the whole
        small = model.generate(IDS, max_new_tokens=9, do_sample=False, **MASK)
        assert list(rg.stream(model, IDS[0], 9, stop=[])) == small[0, IDS.shape[1] :].tolist()
    assert model.generate(IDS, subnet="depth=3", max_new_tokens=9, do_sample=False, **MASK).equal(small)
