"""`Program` by hand and against torch: taps, stores, low-rank terms, blocks of unequal sizes, refusals.

Legend: B sequences, T new tokens, H channels, K KV heads, C rows of a store, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from panels import case
from regauge.kernels.cpu import matrix
from regauge.kernels.cpu.library import available
from regauge.kernels.cpu.pieces import Block, Norm, Site, Tap, across
from regauge.kernels.cpu.step import Program
from regauge.kernels.cpu.store import Store

pytestmark = pytest.mark.skipif(not available(), reason="the C++ kernels were not built here")
NONE = Norm("none", 0, 0.0)


def head(site: Site, x_NI: Tensor, tap: Tap | None = None) -> Tensor:
    """A program of nothing but a head: the site's product."""
    width = x_NI.shape[1]
    program = Program((), Norm("none", width, 0.0), site, width, 0, 0.0, tap)
    return program(x_NI, [0] * len(x_NI), [0] * len(x_NI), (), ())


def test_a_static_step_by_hand() -> None:
    """value = 0.5 · code, codes of 3 bits −4 … 3: ties to even, ends saturate."""
    x_NI = torch.tensor([[0.25, 0.75, 1.3, 9.0, -9.0, -0.3]])
    eye = Site(torch.eye(6), activations="float32")
    tap = Tap(rounding="static", bits=3, step=0.5)
    assert head(eye, x_NI, tap).tolist() == [[0.0, 1.0, 1.5, 1.5, -2.0, -0.5]]
    shifted = Tap(rounding="static", bits=3, step=0.5, asymmetric=True, zero=1.0)  # −0.5 … 3
    assert head(eye, x_NI, shifted).tolist() == [[0.5, 0.5, 1.5, 3.0, -0.5, -0.5]]
    assert head(Site(torch.eye(6), activations="float32", unrounded=True), x_NI, tap).equal(x_NI)


def test_a_dynamic_step_by_hand() -> None:
    """4 bits: step = reach / 7.5, of the token or of three channels; asymmetric: the range of the values and 0."""
    x_NI = torch.tensor([[7.5, 3.2, -1.6, 0.75, 0.31, -0.1]])
    eye = Site(torch.eye(6), activations="float32")
    whole = head(eye, x_NI, Tap(rounding="dynamic", bits=4))[0]
    torch.testing.assert_close(whole, torch.tensor([7.0, 3.0, -2.0, 1.0, 0.0, 0.0]))
    parts = head(eye, x_NI, Tap(rounding="dynamic", bits=4, group=3))[0]
    torch.testing.assert_close(parts, torch.tensor([7.0, 3.0, -2.0, 0.7, 0.3, -0.1]))
    ends = head(
        eye, torch.tensor([[14.0, 1.2, -1.0]]) @ torch.eye(3, 6), Tap(rounding="dynamic", bits=4, asymmetric=True)
    )
    torch.testing.assert_close(ends[0], torch.tensor([14.0, 1.0, -1.0, 0.0, 0.0, 0.0]))


def sylvester(size: int) -> Tensor:
    found = torch.ones(1, 1)
    while len(found) < size:
        found = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), found)
    return found / math.sqrt(size)


@pytest.mark.parametrize("size", [1, 4, 32, 64])
def test_a_hadamard_is_sylvesters(size: int) -> None:
    x_NI = torch.randn(5, 192, generator=torch.Generator().manual_seed(size))
    found = head(Site(torch.eye(192), activations="float32"), x_NI, Tap("hadamard", size))
    torch.testing.assert_close(found, (x_NI.view(5, -1, size) @ sylvester(size)).view(5, 192))


def test_a_diagonal_comes_before_a_kronecker_product() -> None:
    generator = torch.Generator().manual_seed(0)
    x_NI, diagonal_I = torch.randn(3, 35, generator=generator), torch.rand(35, generator=generator)
    left, right = torch.randn(5, 5, generator=generator), torch.randn(7, 7, generator=generator)
    tap = Tap("kronecker", 5, diagonal_I, left, right)
    found = head(Site(torch.eye(35), activations="float32"), x_NI, tap)
    torch.testing.assert_close(found, (x_NI * diagonal_I) @ torch.kron(left, right))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_low_rank_term_is_exact_to_rounding_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    left_OR, right_RI = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((53, 19), (19, 131)))
    one = case("int4", 53, 131)
    x_NI = torch.randn(7, 131, generator=generator)
    terms = None, (across(left_OR), right_RI)
    plain, summed = (head(Site(one.packed, None, "float32", term), x_NI) for term in terms)
    wanted = x_NI.double() @ right_RI.double().T @ left_OR.double().T
    assert float(((summed - plain).double() - wanted).abs().max()) < 2e-6 * float(
        wanted.abs().max() + plain.abs().max()
    )


def test_a_prefix_is_the_first_rows_and_inputs_where_they_lie() -> None:
    for name in ("int3", "int4-asym", "int5", "int6", "int7-asym", "int8", "nf4"):
        one = case(name, 45, 150)
        part = one.packed.prefix(20, 77)
        assert part.panels is one.packed.panels
        assert matrix.unpack(part).equal(one.codes_OI[:20, :77])
        assert matrix.decode(part, 0, 20, torch.float32).equal(one.weights()[:20, :77])
        x_TI = torch.randn(3, 77, generator=torch.Generator().manual_seed(2))
        padded = torch.nn.functional.pad(x_TI, (0, 73))
        whole = matrix.linear(padded, one.packed, "float32")[:, :20]
        assert matrix.linear(x_TI, part, "float32").equal(whole)
        torch.testing.assert_close(head(Site(part, activations="float32"), x_TI), whole)
        assert matrix.decode(part.prefix(3, 5), 0, 3, torch.float32).equal(one.weights()[:3, :5])
    wide = torch.randn(9, 40)
    x_TI = torch.randn(2, 31)
    torch.testing.assert_close(head(Site(wide[:6, :31]), x_TI), x_TI @ wide[:6, :31].T)
    with pytest.raises(ValueError, match="the first 46 x 3 of a matrix of 45 x 150"):
        one.packed.prefix(46, 3)


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_the_first_planes_are_the_highest_bits(bits: int) -> None:
    """Of one group: codes that differ in their low bits alone share the first plane, of the top four bits."""
    codes_OI = torch.randint(0, 1 << bits, (16, 32), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    low = (1 << (bits - 4)) - 1
    panels = [
        matrix.pack(codes, bits, matrix.Value(), 32, None).panels
        for codes in (codes_OI, codes_OI & ~low, codes_OI ^ low)
    ]
    plane = 64 * {5: 4, 6: 2, 7: 4}[bits]
    first = [part.view(-1, 64 * {5: 5, 6: 3, 7: 7}[bits])[:, :plane] for part in panels]
    assert first[0].equal(first[1])
    assert first[0].equal(first[2])
    assert not panels[0].equal(panels[2])


def attended(q: Tensor, keys: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
    score = (q @ keys.T).masked_fill(~allowed, -math.inf)
    return score.softmax(-1) @ values


def blocks_of(sizes: list[tuple[int, int, int, int]], hidden: int, generator: torch.Generator) -> list[Block]:
    """One block for each (heads, KV heads, head size, neurons)."""

    def site(rows: int, columns: int) -> Site:
        return Site(torch.randn(rows, columns, generator=generator) / math.sqrt(columns))

    found = []
    for heads, kv, size, neurons in sizes:
        shapes = {
            "q": (heads * size, hidden),
            "k": (kv * size, hidden),
            "v": (kv * size, hidden),
            "o": (hidden, heads * size),
        }
        shapes |= {"up": (neurons, hidden), "down": (hidden, neurons)}
        norms = {name: Norm("rms", hidden, 1e-5) for name in ("attn_norm", "mlp_norm")}
        integers = {"heads": heads, "kv_heads": kv, "head_dim": size, "activation": 3}
        found.append(Block(norms, {name: site(*shape) for name, shape in shapes.items()}, (), integers, size**-0.5))
    return found


def reference(blocks: list[Block], x_TH: Tensor, pasts: list[tuple[Tensor, Tensor]], firsts: list[int]) -> Tensor:
    """One sequence in float64; `pasts`: (K, C, D) keys and values of each block."""
    x_TH = x_TH.double()
    for block, (keys, values), first in zip(blocks, pasts, firsts, strict=True):
        weight = {name: site.matrix.double() for name, site in block.sites.items() if isinstance(site.matrix, Tensor)}
        kv, size = block.cached
        group = block.integers["heads"] // kv

        def normed(x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-5)

        def heads(x: Tensor, size: int = size) -> Tensor:
            return x.view(x.shape[0], -1, size).transpose(0, 1)

        y = normed(x_TH)
        q, k, v = (heads(y @ weight[name].T) for name in ("q", "k", "v"))
        k, v = torch.cat((keys.double(), k), 1), torch.cat((values.double(), v), 1)
        row = torch.arange(k.shape[1])
        allowed = (row <= torch.arange(len(x_TH))[:, None] + keys.shape[1]) & (row >= first)
        mixed = torch.stack(
            [attended(q[h] * block.scale, k[h // group], v[h // group], allowed) for h in range(len(q))]
        )
        x_TH = x_TH + mixed.transpose(0, 1).flatten(1) @ weight["o"].T
        x_TH = x_TH + (normed(x_TH) @ weight["up"].T).clamp(min=0) @ weight["down"].T
    return x_TH


@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_blocks_of_unequal_sizes_and_lengths_against_torch(tokens: int) -> None:
    """Each block its heads, head size and neurons, its own number of cached tokens and dtypes of keys and values."""
    generator = torch.Generator().manual_seed(tokens)
    hidden, sizes, lengths = 24, [(4, 2, 6, 31), (3, 1, 16, 5), (5, 5, 3, 40)], [7, 3, 11]
    blocks = blocks_of(sizes, hidden, generator)
    dtypes = [(torch.float32, torch.bfloat16), (torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)]
    stores, pasts = [], []
    for block, length, kinds in zip(blocks, lengths, dtypes, strict=True):
        kv, size = block.cached
        memory = [torch.randn(1, kv, length + tokens + 2, size, generator=generator).to(kind) for kind in kinds]
        pasts.append((memory[0][0, :, :length].clone(), memory[1][0, :, :length].clone()))
        stores.append(Store(*memory))
    program = Program(blocks, Norm("none", hidden, 0.0), Site(torch.eye(hidden)), hidden, 0, 0.0)
    assert program.cached == [(2, 6), (1, 16), (5, 3)]
    program.keep(stores)
    x_NH = torch.randn(tokens, hidden, generator=generator)
    found = program(x_NH, [0] * tokens, [0], (), lengths)
    wanted = reference(blocks, x_NH, pasts, [0, 0, 0])
    assert float((found - wanted).abs().max()) < 3e-2  # the new keys and values are stored in 16 bits
    last = program(x_NH, [0] * tokens, [0], (), lengths, last=True)
    torch.testing.assert_close(last, found[-1:])


def test_heads_of_unequal_lengths_against_torch() -> None:
    """As eviction by head leaves them: each head its own rows, and its own first row that counts."""
    generator = torch.Generator().manual_seed(5)
    blocks = blocks_of([(2, 2, 5, 9)], 12, generator)
    keys, values = (torch.randn(1, 2, 10, 5, generator=generator) for _ in range(2))
    lengths_BK, firsts_BK = torch.tensor([[6, 3]], dtype=torch.int32), torch.tensor([[1, 0]], dtype=torch.int32)
    program = Program(blocks, Norm("none", 12, 0.0), Site(torch.eye(12)), 12, 0, 0.0)
    program.keep([Store(keys, values, 0, lengths_BK, firsts_BK)])
    x_NH = torch.randn(1, 12, generator=generator)
    before = keys.clone(), values.clone()
    found = program(x_NH, [0], [0], (), [50])
    # Head by head: the rows of the shorter are made as many by rows that the mask hides.
    weights = blocks[0].sites
    y = x_NH.double() * torch.rsqrt(x_NH.double().pow(2).mean(-1, True) + 1e-5)
    parts = []
    for head_number, (length, first) in enumerate([(6, 1), (3, 0)]):
        at = slice(5 * head_number, 5 * head_number + 5)
        q, k, v = (y @ weights[name].matrix.double()[at].T for name in ("q", "k", "v"))  # type: ignore[union-attr, operator]
        own = [
            torch.cat((memory[0, head_number, first:length].double(), new))
            for memory, new in zip(before, (k, v), strict=True)
        ]
        parts.append(((q * 5**-0.5) @ own[0].T).softmax(-1) @ own[1])
        torch.testing.assert_close(keys[0, head_number, length], k[0].float())
    x = x_NH.double() + torch.cat(parts, 1) @ weights["o"].matrix.double().T  # type: ignore[union-attr, operator]
    hidden = x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-5) @ weights["up"].matrix.double().T  # type: ignore[union-attr, operator]
    x = x + hidden.clamp(min=0) @ weights["down"].matrix.double().T  # type: ignore[union-attr, operator]
    assert float((found - x).abs().max()) < 1e-5


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Store], str]] = {
    "no room": (lambda k, v: Store(k[:, :, :4].contiguous(), v[:, :, :4].contiguous()), "no room for the new tokens"),
    "gone": (lambda k, v: Store(k, v, origin=2), "let go of tokens"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_store_that_cannot_be_read_is_refused_in_a_sentence(what: str) -> None:
    make, words = REFUSED[what]
    program = Program(
        blocks_of([(2, 1, 4, 3)], 8, torch.Generator()), Norm("none", 8, 0.0), Site(torch.eye(8)), 8, 0, 0.0
    )
    keys = torch.zeros(1, 1, 6, 4)
    program.keep([make(keys, keys.clone())])
    with pytest.raises(ValueError, match=words):
        program(torch.zeros(1, 8), [0], [0], (), [4])


def test_what_does_not_fit_is_refused() -> None:
    program = Program((), Norm("none", 8, 0.0), Site(torch.eye(8)), 8, 0, 0.0, Tap("hadamard", 3))
    with pytest.raises(ValueError, match="do not fit together"):
        program(torch.zeros(1, 8), [0], [0], (), ())
    with pytest.raises(ValueError, match=r"left factors are .* of shape \(1, 3, 16\), not .*\(1, 2, 16\)"):
        Site(torch.eye(8), low_rank=(across(torch.zeros(8, 2)), torch.zeros(3, 8)))
    with pytest.raises(ValueError, match=r"a low-rank term that reads \(2, 7\) beside 8 x 8"):
        Site(torch.eye(8), low_rank=(across(torch.zeros(8, 2)), torch.zeros(2, 7)))
    with pytest.raises(ValueError, match="no whole groups of 5, each with a step"):
        Tap(rounding="static", group=5, steps_G=torch.ones(2)).check(12)
    with pytest.raises(ValueError, match="side by side"):
        Site(torch.zeros(8, 8)[::2, ::2]).struct()
