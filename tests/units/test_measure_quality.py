"""Quality figures against answers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from regauge.amounts import figure
from regauge.errors import TextError
from regauge.measure.bootstrap import Draws, quantile, ratio
from regauge.measure.quality import compare, paired, summarise, token_scores
from regauge.text.windows import Windows, covered_bytes, cut, stretches


class Letters:
    """One token a character; decoding drops one leading space, as SentencePiece does."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i) for i in ids).removeprefix(" ")


def windows(*rows: list[int], document: tuple[int, ...] | None = None, size: int = 3) -> Windows:
    owner = document or tuple(range(len(rows)))
    return Windows(tuple(torch.tensor(row) for row in rows), owner, tuple(size for _ in rows))


def logits(rows: list[list[list[float]]]) -> torch.Tensor:
    """Probabilities (B, T, V) → logits."""
    return torch.tensor(rows).log()


def test_kl_perplexity_and_agreement_by_hand() -> None:
    text = windows([0, 1, 0])  # two tokens are scored: 1, then 0
    p = logits([[[0.5, 0.5], [0.75, 0.25], [0.5, 0.5]]])
    q = logits([[[0.25, 0.75], [0.75, 0.25], [0.9, 0.1]]])  # the last position predicts nothing and must not count
    scores = compare(text, [p], [q])
    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)  # 0.143841
    assert scores.kl_N == pytest.approx([0.1438410362, 0.0], abs=1e-6)
    assert kl == pytest.approx(0.1438410362)
    assert scores.nll_N == pytest.approx([-math.log(0.75), -math.log(0.75)], abs=1e-6)
    assert scores.nll_original_N == pytest.approx([-math.log(0.5), -math.log(0.75)], abs=1e-6)
    quality = summarise(scores)
    assert quality.kl.value == pytest.approx(0.0719205181, abs=1e-6)
    assert quality.perplexity.value == pytest.approx(4 / 3, rel=1e-6)
    assert quality.bits_per_byte.value == pytest.approx(2 * 0.4150374993 / 3, rel=1e-6)  # log2(4/3), 3 bytes
    assert quality.kl99.value == pytest.approx(0.1438410362, abs=1e-6)
    # argmax of [.5, .5] is the first; of [.25, .75] the second: one of two agrees
    assert quality.agreement.value == pytest.approx(0.5)
    assert (quality.tokens, quality.documents, quality.bytes) == (2, 1, 3)


def test_kl_is_from_the_original() -> None:
    """KL is not symmetric: swapping the models must change it."""
    text = windows([0, 0])
    p, q = logits([[[0.9, 0.1], [0.5, 0.5]]]), logits([[[0.5, 0.5], [0.5, 0.5]]])
    assert compare(text, [p], [q]).kl_N[0] == pytest.approx(0.3680642, abs=1e-6)
    assert compare(text, [q], [p]).kl_N[0] == pytest.approx(0.5108256, abs=1e-6)


def test_the_same_model_loses_nothing() -> None:
    text = windows([0, 1, 2, 1], [2, 2, 0, 1], [1, 0])
    torch.manual_seed(0)
    out = [torch.randn((*batch.ids_BT.shape, 3)) for batch in text.batches(8)]
    quality = summarise(compare(text, out, out, tokens=8))
    assert quality.kl.value == 0
    assert quality.kl99.value == 0
    assert quality.agreement.value == 1
    assert quality.tokens == 7


def test_padding_is_not_scored() -> None:
    text = windows([0, 1, 1, 0], [0, 1])
    batches = list(text.batches(100))
    assert [batch.lengths for batch in batches] == [(4, 2)]
    p = torch.zeros(2, 4, 2)
    q = torch.zeros(2, 4, 2)
    q[1, 1:, 0] = 50.0  # nonsense where there is only padding or no next token
    assert compare(text, [p], [q]).kl_N.tolist() == [0.0] * 4


def test_batches_hold_at_most_so_many_tokens_and_every_window() -> None:
    text = windows(*[[1] * n for n in (5, 7, 3, 11, 2)])
    batches = list(text.batches(14))
    assert [batch.lengths for batch in batches] == [(5, 7), (3,), (11,), (2,)]
    assert all(batch.ids_BT.numel() <= 14 for batch in batches)


def test_documents_weigh_by_their_tokens() -> None:
    top, bottom = np.array([3.0, 1.0]), np.array([1.0, 3.0])
    found = ratio(top, bottom, Draws.make(2, seed=1))
    assert found.value == 1.0
    assert found.low == pytest.approx(1 / 3)
    assert found.high == pytest.approx(3.0)


def test_interval_covers_the_truth_about_95_times_in_100() -> None:
    generator = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        value = generator.normal(1.0, 1.0, size=40)
        found = ratio(value, np.ones(40), Draws.make(40, seed=trial, resamples=400))
        hits += found.low <= 1.0 <= found.high
    assert 178 <= hits <= 200


def test_weighted_quantile_by_hand() -> None:
    value, owner = np.array([4.0, 1.0, 3.0, 2.0]), np.array([0, 0, 1, 1])
    assert quantile(value, owner, 0.5, Draws.make(2)).value == 2.0
    assert quantile(value, owner, 0.99, Draws.make(2)).value == 4.0


def test_paired_is_sharper_than_two_intervals() -> None:
    """Two models whose intervals overlap widely, one better on every document by a little."""
    torch.manual_seed(0)
    text = windows(*[[0, 1, 0, 1]] * 30)
    base = [torch.randn(1, 4, 2) * (1 + row % 5) for row in range(30)]
    worse = [x + torch.tensor([0.5, 0.0]) for x in base]
    worst = [x + torch.tensor([0.55, 0.0]) for x in base]
    first, second = compare(text, base, worse, tokens=4), compare(text, base, worst, tokens=4)
    assert summarise(first).kl.high > summarise(second).kl.low
    assert paired(first, second).verdict == "first"
    assert paired(second, first).verdict == "second"
    same = paired(first, first)
    assert same.verdict == "neither"
    assert not same.decided


def test_bytes_are_those_of_the_predicted_tokens() -> None:
    assert covered_bytes([ord(c) for c in "aé b"], Letters()) == 4  # é is two bytes; the first token is given
    assert covered_bytes([ord(c) for c in " ab"], Letters()) == 2


def test_cut_keeps_documents_apart_and_drops_short_tails() -> None:
    text = cut(["abcdefg", "hi", "jklm"], Letters(), length=4, shortest=3)
    assert ["".join(chr(i) for i in ids.tolist()) for ids in text.ids] == ["abcd", "efg", "jklm"]
    assert text.document == (0, 0, 1)
    assert text.documents == 2
    assert text.bytes == (3, 2, 3)
    assert text.predicted == 8
    with pytest.raises(TextError, match="no window of 9 tokens"):
        cut(["abcdefg"], Letters(), length=100, shortest=9)


def test_take_is_a_sample_of_whole_windows() -> None:
    text = windows(*[[i] * 5 for i in range(20)])
    part = text.take(20, seed=1)
    assert part.predicted == 20
    assert len(part.ids) == 5
    assert part.document == (0, 1, 2, 3, 4)
    assert text.take(20, seed=1).hash() == part.hash() != text.take(20, seed=2).hash()
    assert text.take(1000) is text


def test_stretches_lose_nothing() -> None:
    text = "one two.\n\nthree four five.\nsix\n\n" * 40
    pieces = stretches(text, 200)
    assert "".join(pieces) == text
    assert all(50 < len(piece) <= 200 for piece in pieces[:-1])


def test_a_figure_out_of_all_proportion_is_told_by_its_size() -> None:
    """A perplexity of e^300 is no 130 digits."""
    assert [figure(value, 3) for value in (5.25, 999_999_999.0, 1.94e130, float("inf"))] == [
        "5.250",
        "999999999.000",
        "1.9e+130",
        "inf",
    ]
    assert figure(2e9, 3, "+") == "+2e+09"


def test_of_equally_likely_tokens_the_first_counts() -> None:
    """As argmax has it: bf16 logits tie often."""
    log_p_NV = torch.log_softmax(torch.tensor([[1.0, 2.0, 2.0], [2.0, 2.0, 1.0]]), -1)
    other_NV = torch.tensor([[1.0, 1.0, 5.0], [7.0, 1.0, 7.0]])
    assert token_scores(log_p_NV, other_NV, torch.tensor([0, 0]))[2].tolist() == [0.0, 1.0]
