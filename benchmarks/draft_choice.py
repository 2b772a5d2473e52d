"""Drafts by members, measured: how often each member's guesses are right, what steps and guesses cost, what is chosen.

    python benchmarks/draft_choice.py                                      # the bundled model on held-out sources
    python benchmarks/draft_choice.py --model DIR=TEXTS --model DIR=TEXTS  # others
    python benchmarks/draft_choice.py --family OUT=TEXTS                   # a family of those depths, trained say

Each model becomes a family at 4 bits without training (`family+rtn-w4`, depths of three quarters, half and a quarter,
ranked by what blocks do), and writes held-out texts on, greedily. `right`: how often a member's likeliest token is the
one that came. Then every way of drafting is replayed along those texts by the loop that decodes: at what steps and
guesses took on the model itself here, and at what they take on random weights of `--shape` (a member is that share of
its blocks). Gains are times as many tokens a second, with intervals over texts and rounds; the choice is `fit`'s; where
one is made on the model's own costs, it is run through `generate` beside plain decoding.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common.shapes import SHAPES
from decode_cached import pieces, window

import regauge as rg
from regauge.elastic.family import Family
from regauge.engine.drafting import Drafting, likeliest, passages, run, weighed
from regauge.engine.measuring import text_of
from regauge.hosts import host_of
from regauge.kernels.cpu.step import Program
from regauge.kernels.cpu.store import Store
from regauge.measure.cost import in_turn, prompt_of
from regauge.measure.several import Seconds, Together, together
from regauge.plan import load
from regauge.text.windows import Windows

ROOT = Path(__file__).resolve().parent.parent
SHARES = (0.75, 0.5, 0.25)
SIZES, STEPS, PAST = range(1, 9), 3, 256


def costs(name: str, rounds: int, clock: Seconds) -> list[Together]:
    """Steps of 1 to 8 tokens of a shape on random weights, and a token of its first blocks; a guess by share."""
    shape = SHAPES[name]
    torch.manual_seed(0)
    parts, norm, head = pieces(shape, "int8")
    whole = Program(parts, norm, head, shape.hidden, 1, 0.0)
    held = [window(shape, PAST + 8) for _ in range(shape.layers)]
    angles = torch.outer(torch.arange(PAST + 8.0), 1e4 ** -torch.linspace(0, 1, shape.head // 2))
    tables = [(angles.cos().contiguous(), angles.sin().contiguous())]

    def rate(step: Program, blocks: int, tokens: int) -> Any:
        step.keep([Store(keys, values) for keys, values in held[:blocks]])
        inputs, positions = torch.randn(tokens, shape.hidden), list(range(PAST, PAST + tokens))

        def once() -> float:
            began = clock()
            for _ in range(STEPS):
                step(inputs, positions, [0], tables, [PAST] * blocks, False)
            return STEPS / (clock() - began)

        return once

    runs = {str(tokens): rate(whole, shape.layers, tokens) for tokens in SIZES}
    for share in SHARES:
        blocks = max(1, round(share * shape.layers))
        part = Program(parts[:blocks], norm, head, shape.hidden, 1, 0.0)
        runs[f"={share}"] = rate(part, blocks, 1)
    rates = in_turn(runs, rounds)
    return [
        Together(
            tuple(1 / rates[str(tokens)][turn] for tokens in SIZES),
            {str(share): 1 / rates[f"={share}"][turn] for share in SHARES},
        )
        for turn in range(rounds)
    ]


def right(model: Any, members: dict[str, Any], windows: Windows, most: int | None) -> dict[str, float]:
    """How often each member's likeliest token is the one that the whole wrote."""
    some = passages(model, windows, most)
    found = {}
    for name, member in members.items():
        hits = [
            one.ids[place] == likely[place - 1]
            for one, likely in zip(some, likeliest(member, some), strict=True)
            for place in range(one.begin, len(one.ids))
        ]
        found[name] = sum(hits) / max(1, len(hits))
    return found


def told(found: Drafting) -> dict[str, str]:
    return {way.drafts: f"{way.gain.value:.2f} [{way.gain.low:.2f}, {way.gain.high:.2f}]" for way in found.ways}


def weigh(where: Path, texts: Path, shaped: Sequence[Together], rounds: int, clock: Seconds, made: bool) -> None:
    """A table of one model, or of one that is a family already."""
    with tempfile.TemporaryDirectory() as scratch:
        out = where
        if not made:
            out = Path(scratch) / "out"
            rg.apply(
                replace(load("family+rtn-w4"), family=Family(depth=SHARES, layers="ranked")), where, out, tokens=8192
            )
        host = host_of(out)
        facts, model = host.facts(out), rg.load(out)
        windows = text_of(out, texts, facts, 0)
        shares = {f"depth={share}": str(share) for share in SHARES}
        members = {name: model.regauge.member(name) for name in shares}
        with host.unsaid():
            own = together(model, members, prompt_of(facts.vocabulary, facts.most), 8, rounds, clock)
            named = [Together(one.steps, {name: one.guesses[shares[name]] for name in shares}) for one in shaped]
            sets = windows.halves()
            here, there = (weighed(model, members, sets, times, facts.most) for times in (own, named))
            kept = run(model, here, sets[1], facts.most, clock=clock)
            often = right(model, members, sets[1], facts.most)
    one, other = told(here), told(there)
    print(f"\n{where.name}, {facts.most} tokens at once, on {texts.name}: steps of 1 to 8 tokens take", end=" ")
    print(" ".join(f"{step:.2f}" for step in here.steps))
    print(f"{'drafts':<12} {'right':>6} {'gain, own costs':>20} {'gain, shape':>20}")
    for name in one:
        share = f"{100 * often[name]:.0f} %" if name in often else ""
        print(f"{name:<12} {share:>6} {one[name]:>20} {other[name]:>20}")
    gain = "" if kept.measured is None else f", through generate {kept.measured.value:.2f} "
    gain += "" if kept.measured is None else f"[{kept.measured.low:.2f}, {kept.measured.high:.2f}]"
    print(f"chosen: {kept.drafts} on its own costs{gain}; {there.drafts} on the shape's", flush=True)


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    words.add_argument("--model", action="append", metavar="DIR=TEXTS", help="a model and texts that it never saw")
    words.add_argument("--family", action="append", metavar="OUT=TEXTS", help="a family that offers those depths")
    words.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    words.add_argument("--rounds", type=int, default=7)
    words.add_argument("--cpu", action="store_true", help="CPU seconds of this process, where others are busy")
    given = words.parse_args()
    clock = time.process_time if given.cpu else time.perf_counter
    shaped = costs(given.shape, given.rounds, clock)
    middle = sorted(shaped, key=lambda one: one.steps[0])[len(shaped) // 2]
    steps = " ".join(f"{step / middle.steps[0]:.2f}" for step in middle.steps)
    guesses = ", ".join(f"{share} of the blocks {took / middle.steps[0]:.2f}" for share, took in middle.guesses.items())
    print(
        f"{given.shape}, {torch.get_num_threads()} threads: {1e3 * middle.steps[0]:.1f} ms a token; steps of 1 to 8",
        end="",
    )
    print(f" tokens take {steps} of one; guesses by {guesses}", flush=True)
    models = given.model or ([] if given.family else [f"{ROOT / 'bundled' / 'code-llama-5m'}={ROOT / 'tests'}"])
    for pairs, made in ((models, False), (given.family or [], True)):
        for pair in pairs:
            where, _, texts = pair.partition("=")
            weigh(Path(where), Path(texts), shaped, given.rounds, clock, made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
