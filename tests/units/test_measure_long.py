"""Long generation: where two continuations part, whether loss grows along them, and what a choice could see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from regauge.cli import tell
from regauge.engine import measure
from regauge.errors import ModelError, SettingError
from regauge.hosts.transformers.host import HOST
from regauge.measure import compare
from regauge.measure.long import QUESTION, Long, along, in_sight, prompts, refused, write
from regauge.measure.subject import EMBEDDINGS, NEXT, Facts, Outputs, Reader
from regauge.text.windows import Windows
from tests import tiny

RULE = {"window": 16, "score": "recency", "budget": "uniform:0.5", "disposal": "drop", "trigger": "prefill"}


def up(ids_BT: Tensor) -> Tensor:
    """Logits of seven tokens of which the next number is the likeliest: 3 against 0."""
    return 3.0 * torch.nn.functional.one_hot((ids_BT + 1) % 7, 7).float()


def counts(input_ids: Tensor, **_: Any) -> SimpleNamespace:
    return SimpleNamespace(logits=up(input_ids), past_key_values=None)


def reader(changed: Callable[[Tensor, int | None], Tensor] = lambda logits_BTV, _: logits_BTV) -> Reader:
    def outputs(batches: Sequence[Mapping[str, Tensor]], prompt: int | None = None) -> Outputs:
        return lambda: (changed(up(batch["input_ids"]), prompt) for batch in batches)

    return outputs


def otherwise(logits_BTV: Tensor, place: int) -> Tensor:
    """Another choice from a place on."""
    return torch.cat((logits_BTV[:, :place], logits_BTV[:, place:].roll(1, -1)), 1)


def texts(*lengths: int) -> Windows:
    rows = tuple(torch.arange(length) % 7 for length in lengths)
    return Windows(rows, tuple(range(len(rows))), (1,) * len(rows), "by hand")


def test_where_continuations_part_by_hand() -> None:
    written = write(counts, torch.tensor([[0, 1, 2, 3], [5, 5, 5, 5]]), 8)
    assert [row.tolist() for row in written.texts] == [
        [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]],
        [[5, 5, 5, 5, 6, 0, 1, 2, 3, 4, 5, 6]],
    ]
    same = along(reader(), reader(), written)
    assert (same.until, same.kl) == ((8, 8), (0.0, 0.0, 0.0, 0.0))
    # the token behind place 8 is the sixth that was written: five are alike, and half of the third quarter
    found = along(reader(), reader(lambda logits, _: otherwise(logits, 8)), written)
    assert (found.prompt, found.tokens, found.until, found.mean) == (4, 8, (5, 5), 5.0)
    assert found.kl == pytest.approx((0, 0, 1.09748, 2.19496), abs=1e-4)
    assert found.told == (
        "2 prompts of 4 tokens, continued greedily for 8: 5 to 5 tokens alike, 5 in the mean; KL a token 0.0000 in the "
        "first quarter, 2.1950 in the last"
    )


def test_agreement_after_the_first_difference_does_not_count() -> None:
    written = write(counts, torch.tensor([[0, 1, 2, 3]]), 8)

    def once(logits_BTV: Tensor, _: int | None) -> Tensor:
        found = logits_BTV.clone()
        found[:, 6] = found[:, 6].roll(1, -1)
        return found

    assert along(reader(), reader(once), written).until == (3,)


def test_what_a_choice_could_see() -> None:
    """Of 128 tokens the last 16 are scored; a choice before the last 32 of the prompt of 112 is one at 80."""
    asked: list[int | None] = []

    def blind(logits_BTV: Tensor, prompt: int | None) -> Tensor:
        asked.append(prompt)
        return otherwise(logits_BTV, 112) if prompt is not None and prompt < 112 else logits_BTV

    found = in_sight(reader(), reader(blind), texts(128, 128, 40))
    assert found == pytest.approx((0.0, 2.19496 * 15 / 16), abs=1e-4)  # place 111 is right, 112 to 126 are not
    assert asked == [112, 112, 112 - QUESTION, 112 - QUESTION]
    assert in_sight(reader(), reader(), texts(64)) is None


def test_prompts_leave_room_for_what_is_written() -> None:
    assert prompts(texts(600, 600), 32, 4096).shape == (2, 256)
    assert prompts(texts(600, 100), 32, 512).shape == (1, 128)
    assert prompts(texts(*[40] * 9), 32, None).shape == (4, 40)
    with pytest.raises(SettingError, match=r"--long 400 asks .*: 512 tokens at once, 128 .*; write --long 384"):
        prompts(texts(600), 400, 512)
    with pytest.raises(SettingError, match="4 or more; not 3"):
        prompts(texts(600), 3, 512)
    with pytest.raises(SettingError, match="name another, or --cache"):
        refused(["a"], [Facts(NEXT, 7, 512)], texts(600), 32)
    with pytest.raises(ModelError, match="a gives embeddings; leave it out"):
        refused(["a", "b"], [Facts(EMBEDDINGS, 7, 512)] * 2, texts(600), 32)
    with pytest.raises(SettingError, match="128 tokens at once"):  # the second reads less than the first
        refused(["a", "b"], [Facts(NEXT, 7, 512), Facts(NEXT, 7, 128)], texts(600), 128)


def test_tokens_are_let_go_from_where_a_prompt_ends(tmp_path: Path) -> None:
    source = tiny.folder(tmp_path / "source", "llama", max_position_embeddings=512)
    ids = {"input_ids": torch.arange(192)[None] % tiny.VOCABULARY}
    whole, early, late = (
        next(HOST.outputs(source, [ids], rule, prompt)()) for rule, prompt in ((None, None), (RULE, 96), (RULE, 144))
    )
    for found, prompt in ((early, 96), (late, 144)):
        gone_T = (found - whole).abs().amax((0, 2))
        assert float(gone_T[:prompt].max()) < 1e-5
        assert float(gone_T[prompt:].min()) > 1e-4
    assert HOST.facts(source, RULE).lets_go
    assert not HOST.facts(source, "kivi-2").lets_go
    assert not HOST.facts(source).lets_go


def test_measure_tells_it_of_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "memory", lambda *_: None)
    monkeypatch.setattr(compare, "bandwidth", lambda **_: 1e9)
    monkeypatch.setattr(compare, "_speeds", lambda *_: ({"decode": {}, "prefill": {}}, {}, {}))
    source = tiny.folder(tmp_path / "source", "llama", max_position_embeddings=512)
    found = measure([source], eval=[tiny.TEXT * 3] * 2, cache=RULE, long=16)
    assert found.rows[0].long is None
    told = found.rows[1].long
    assert isinstance(told, Long)
    assert told.tokens == 16
    assert max(told.kl) > 0
    assert told.seen is not None
    assert told.seen > 0
    tell.measurement(found)
    assert "continued greedily for 16:" in capsys.readouterr().out
    assert measure([source], eval=[tiny.TEXT * 3] * 2, cache=RULE).rows[1].long is None
