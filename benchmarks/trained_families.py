"""Families that are trained, beside their members trained alone, at equal passes over text.

    python benchmarks/trained_families.py                         # every row, the bundled code model
    python benchmarks/trained_families.py --rows sandwich --passes 600

A pass is one member, forward and backward, on one batch. A family has `--passes` of them, divided as its sampler says;
each member alone has an equal share, a quarter: the whole, three quarters, a half and a quarter of the products of its
blocks. All begin with the same trained model, its neurons sorted in the same way, and all but the rows that say
otherwise are taught by that model as it was (KL). Perplexity is measured on modules of the standard library that
neither the model nor any training saw; the gap of two rows is paired over the same windows, with its standard error.

    python benchmarks/trained_families.py --rows codes quantllm "quantllm, shared" "quantllm, uniform" --passes 400

Rows of other families have a table each, beside their own nulls. Of one file of 8, 4, 3 and 2 bits: adapters for each
width (`quantllm`), one for all of them (`shared`), every block's width drawn by itself (`uniform`), none (`codes`).
Of a router (`aptp`): what is lost behind the first quarter of each window as it chooses, beside as many windows for
each member by lot, and all for one member. Of gates (`adaptive-computation`): as each token's gate chooses its neurons,
beside one share for all tokens, and gates that were not trained. Of a model divided into experts (`smoe-dropout`): how
many a token goes to, beside as many of the first neurons of the dense model, and a router trained at the fewest. Of
exits (`modular-exits`): held against exits taught by the text alone. Of members of any shape that are taught states
(`lighthubert`): against the same taught logits. Both beside each member alone, which has a quarter of the passes.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common.trained import keep

import regauge as rg
from regauge.elastic.family import Family
from regauge.elastic.subnet import Subnet
from regauge.engine import apply
from regauge.engine.raising import space_of
from regauge.engine.recovery_text import Amounts
from regauge.engine.routing import PROMPT
from regauge.engine.training import train
from regauge.engine.training_recipe import Asked
from regauge.hosts.transformers.source import Source, read_tokenizer
from regauge.learn.samplers import Turn
from regauge.learn.training import training_of
from regauge.plan import Plan, load, parse, presets
from regauge.text.windows import cut

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "bundled" / "code-llama-5m"
MEMBERS = {"3/4": "depth=5,ffn=0.8", "1/2": "depth=4,ffn=0.6", "1/4": "depth=2,ffn=0.6"}
CHOICES = Family(depth=(5, 4, 2), ffn=(0.8, 0.6), members={name: Subnet.parse(text) for name, text in MEMBERS.items()})
ROWS = {
    "sandwich": {"sampler": "sandwich:2"},
    "once-for-all": {"sampler": "progressive:2"},
    "deps": {"sampler": "shrinking:2", "teacher": "largest"},
    "todm": {"sampler": "sandwich:2", "distiller": "alpha", "teacher": "largest"},
    "sandwich, labels alone": {"sampler": "sandwich:2", "distiller": "none", "labels": 1.0},
    "balanced": {"sampler": "balanced:2"},
    "uniform": {"sampler": "uniform:2"},
    "named": {"sampler": "named"},
    "named, labels too": {"sampler": "named", "labels": 0.5},
}
BITS = {f"{bits} bits": f"bits={bits}" for bits in (4, 3, 2)}
CODED = Family(bits=(4, 3, 2), members={name: Subnet.parse(text) for name, text in BITS.items()})
CODES = (
    "name: codes\nweights:\n  blocks.*: {grid: nested:8, grain: group:128 else group:64 else group:32, ranger: minmax, "
    "scale: f16-levels:5, rounder: {part: gptq-levels, levels: 4/3/2}}\n"
)
ADAPTED: dict[str, dict[str, object]] = {
    "quantllm": {"sampler": "balanced:1"},
    "quantllm, shared": {"sampler": "balanced:1", "adapters": "shared"},
    "quantllm, uniform": {"sampler": "uniform:1"},
}
BESIDE: dict[str, object] = {"layers": "each", "rank": 8}


ROUTED: dict[str, dict[str, object]] = {"aptp": {"sampler": "named", "route": 0.6}}
CHOSEN = "chosen"
WIDE = {"0.75": "ffn=0.75", "0.5": "ffn=0.5", "0.25": "ffn=0.25", "by token": "ffn=token"}
GATED: dict[str, dict[str, object]] = {
    "adaptive-computation": {"sampler": "sandwich:2", "layers": "each", "gates": 0.5}
}
EXPERTS = {f"{k} of 8": f"experts={k}" for k in (7, 6, 5, 4)}
NARROW = {name: f"ffn={int(name[0]) / 8}" for name in EXPERTS}
DIVIDED: dict[str, dict[str, object]] = {
    "smoe-dropout": {"sampler": "growing", "experts": 8},
    "smoe-dropout, labels": {"sampler": "growing", "experts": 8, "distiller": "none", "labels": 1.0},
    "router trained at 4": {"sampler": "smallest", "experts": 8, "router": "trained"},
    "smoe-dropout, any k": {"sampler": "uniform:1", "experts": 8},
}
DENSE = "first neurons"
TOO = ", labels too"
"""Behind a row that learns from the text beside a teacher: its null does so as well."""
LEAVING = load("modular-exits")
SHAPED = load("lighthubert")
DEEP = {"0.75": "depth=0.75", "0.5": "depth=0.5", "0.25": "depth=0.25"}
LIGHT = {
    "ffn=0.75,width=0.75": "ffn=0.75,width=0.75",
    "ffn=0.5,heads=0.5": "ffn=0.5,heads=0.5",
    "the smallest": "depth=0.75,ffn=0.5,heads=0.5,width=0.75",
}


@dataclass(frozen=True)
class Kind:
    """Families of a preset of their own, beside what is said otherwise, and each member alone.

    Attributes:
        untrained, alone: what those rows are called, the second in front of a member's heading.
        taught: of a member alone, beside the sampler.
        rows: those of the family: the preset, and what it is held against.
    """

    preset: Plan
    members: Mapping[str, str]
    untrained: str
    alone: str
    taught: Mapping[str, object]
    rows: Mapping[str, Mapping[str, object]]

    @property
    def null(self) -> str:
        """The same members on the same passes, without what the preset does."""
        return tuple(self.rows)[-1]

    @property
    def names(self) -> tuple[str, ...]:
        return (self.untrained, *(f"{self.alone} {one}" for one in self.members), *self.rows)

    @property
    def family(self) -> Family:
        assert self.preset.family is not None, "a preset that trains has one"
        return self.preset.family

    def asked(self, name: str) -> tuple[dict[str, object], Family, list[str]]:
        """How a row trains, of which family, and which members it is scored on; nothing of the untrained."""
        if name in self.rows:
            return {**self.preset.train, **self.rows[name]}, self.family, ["full", *self.members.values()]
        if name == self.untrained:
            return {}, self.family, ["full", *self.members.values()]
        member = Subnet.parse(self.members[name.removeprefix(f"{self.alone} ")])
        only = {dimension: (value,) for dimension, value in member.said()}
        family = Family(layers=self.family.layers, **only)  # type: ignore[arg-type]  # choices of its dimensions
        return {"sampler": "smallest", **self.taught}, family, [str(member)]


KINDS = (
    Kind(
        LEAVING,
        DEEP,
        "exits untrained",
        "exit alone",
        {"labels": 1.0},
        {"modular-exits": {}, "exits, text alone": {"distiller": "none"}},
    ),
    Kind(
        SHAPED,
        LIGHT,
        "shapes untrained",
        "shape alone",
        {"distiller": "features"},
        {"lighthubert": {}, "shapes, logits": {"distiller": "kl"}},
    ),
)
KIND_OF = {name: kind for kind in KINDS for name in kind.names}
TOLD = ("compute", "gated", "by lot")
"""Of the receipt: the mean share of neurons, and losses on what the training held out."""


@dataclass(frozen=True)
class Table:
    """Rows that are told together.

    Attributes:
        members: heading → subnet. untrained: the row that every other one is held against.
    """

    members: Mapping[str, str]
    untrained: str
    rows: tuple[str, ...]


TABLES = (
    Table(MEMBERS, "untrained", ("untrained", *(f"alone {name}{how}" for how in ("", TOO) for name in MEMBERS), *ROWS)),
    Table(BITS, "codes", ("codes", *ADAPTED)),
    Table(MEMBERS, "", tuple(ROUTED)),
    Table(WIDE, "", tuple(GATED)),
    Table(EXPERTS, DENSE, (DENSE, *DIVIDED)),
    *(Table(kind.members, kind.untrained, kind.names) for kind in KINDS),
)


@dataclass(frozen=True)
class Given:
    """What every row shares."""

    text: Path
    batch: int
    length: int
    rate: float
    seed: int
    device: str


def plan(name: str, how: dict[str, object], family: Family, given: Given, steps: int) -> Plan:
    """The recipe of a row."""
    named = f"name: {name.replace(', ', '-').replace(' ', '-')}\nfamily: {{depth: [1]}}\n"
    row = parse(CODES.replace("name: codes\n", named) if family is CODED else named)
    shared = {"batch": given.batch, "rate": given.rate, "steps": steps}
    return replace(row, family=family, train={**shared, **how}, calibration={"tokens": 16384, "length": given.length})


def steps_for(how: dict[str, object], family: Family, passes: int) -> int:
    """Steps of a sampler that come to so many passes."""
    draws, space = training_of(how).draws, space_of(family, Source.open(MODEL).anatomy, bits=family.bits)
    each = sum(len(draws(space, Turn(turn, 200))) for turn in range(200)) / 200
    return round(passes / each)


def losses(out: Path, members: Sequence[str], given: Given, tokens: int) -> dict[str, list[float]]:
    """Mean loss of each held-out window, nats a token, of each member of a family."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((given.text / "heldout").glob("**/*"))]
    windows = cut(texts, read_tokenizer(out), given.length, description="heldout").take(tokens)
    model, found = rg.load(out, dtype=torch.float32), dict[str, list[float]]()
    for name in members:
        found[name] = []
        for batch in windows.batches(given.length):
            with rg.use(model, name), torch.no_grad():
                logits = model(input_ids=batch.ids_BT, use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(logits[0, :-1], batch.ids_BT[0, 1:])
            found[name].append(float(loss))
    return found


def prompts(out: Path, given: Given, tokens: int) -> dict[str, list[float]]:
    """What each member loses behind the prompt of each held-out window, and the number of the one that is chosen."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((given.text / "heldout").glob("**/*"))]
    windows = cut(texts, read_tokenizer(out), given.length, description="heldout").take(tokens)
    model, prompt = rg.load(out, dtype=torch.float32), given.length // PROMPT
    router = model.regauge.learnt.router
    found: dict[str, list[float]] = {str(one): [] for one in router.subnets} | {CHOSEN: []}
    for batch in windows.batches(given.length):
        ids_BT = batch.ids_BT
        with torch.no_grad():
            scores_BK = router(model.get_input_embeddings()(ids_BT[:, :prompt]))
            found[CHOSEN].append(float(scores_BK[0].argmax()))
            for one in router.subnets:
                with rg.use(model, one):
                    logits = model(input_ids=ids_BT, use_cache=False).logits.float()
                loss = torch.nn.functional.cross_entropy(logits[0, prompt - 1 : -1], ids_BT[0, prompt:])
                found[str(one)].append(float(loss))
    return found


def row(name: str, passes: int, given: Given, out: Path, tokens: int) -> dict[str, list[float]]:
    """One row: what is trained, and its losses by member."""
    everyone = ["full", *MEMBERS.values()]
    if name in ("untrained", "codes"):
        family, found = (CHOICES, everyone) if name == "untrained" else (CODED, ["full", *BITS.values()])
        apply(replace(plan(name, {}, family, given, 1), train={}), MODEL, out, calibration=given.text / "train")
        return losses(out, found, given, tokens)
    if name in KIND_OF:
        how, family, found = KIND_OF[name].asked(name)
        if not how:
            apply(replace(plan(name, {}, family, given, 1), train={}), MODEL, out, calibration=given.text / "train")
            return losses(out, found, given, tokens)
        steps = passes // 4 if len(found) == 1 else steps_for(how, family, passes)
    elif name.startswith("alone"):
        member = Subnet.parse(MEMBERS[name.removeprefix("alone ").removesuffix(TOO)])
        family = Family(depth=(member.depth,), ffn=(member.ffn,))  # type: ignore[arg-type]  # both are said
        how = {"sampler": "smallest", "labels": 0.5 if name.endswith(TOO) else 0.0}
        steps, found = passes // 4, [str(member)]
    elif name in GATED:
        how, family, found = GATED[name], Family(ffn=(0.75, 0.5, 0.25)), ["full", *WIDE.values()]
        steps = steps_for(how, family, passes)
    elif name in DIVIDED:
        how, family, found = DIVIDED[name], Family(experts=(7, 6, 5, 4)), ["full", *EXPERTS.values()]
        steps = passes
    elif name == DENSE:
        how, family = {"sampler": "uniform:1"}, Family(ffn=(0.875, 0.75, 0.625, 0.5), multiple=16)
        steps, found = passes, ["full", *NARROW.values()]
    elif name in ROUTED:
        how, family, found = ROUTED[name], CHOICES, everyone
        steps = passes
    elif name in ADAPTED:
        how, family, found = ADAPTED[name] | BESIDE, CODED, ["full", *BITS.values()]
        steps = steps_for(how, family, passes)
    else:
        how, family, found = dict(ROWS[name]), CHOICES, everyone
        steps = steps_for(how, family, passes)
    asked = Asked(Amounts(length=given.length), given.seed, device=given.device)
    done = train(plan(name, how, family, given, steps), MODEL, out, given.text / "train", asked)
    if name in GATED:
        assert done.trained is not None, "it was trained"
        assert done.trained.gated is not None, "it has gates"
        some = done.trained.gated
        figures = {one: [value] for one, value in zip(TOLD, (some.compute, some.gated, some.by_lot), strict=True)}
        return losses(out, found, given, tokens) | figures
    if name == DENSE:  # under the names of as many experts, so that rows have one heading
        return dict(zip(["full", *EXPERTS.values()], losses(out, found, given, tokens).values(), strict=True))
    return prompts(out, given, tokens) if name in ROUTED else losses(out, found, given, tokens)


def told(values: Sequence[float], other: Sequence[float] | None = None) -> str:
    """Perplexity, and its change against another row on the same windows, in percent."""
    if other is None:
        return f"{math.exp(torch.tensor(values).mean().item()):.2f}"
    own, _, gap, error = _gap(values, other)
    return f"{own:.2f} ({gap:+.1f} ± {error:.1f} %)"


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """The rows as text; behind each the gap to its null: the whole to the untrained whole, members to those alone, or
    where no member is trained alone to the untrained ones."""
    return "\n\n".join(one for kind in TABLES if (one := _table(kind, found)))


def _table(kind: Table, found: dict[str, dict[str, list[float]]]) -> str:
    members, rows = kind.members, {name: found[name] for name in kind.rows if name in found}
    if not rows:
        return ""
    if not kind.untrained:
        return "\n\n".join((gates if name in GATED else routes)(name, row) for name, row in rows.items())
    lines = [f"| row | whole | {' | '.join(members)} |", "|---" * (len(members) + 2) + "|"]
    alone = {
        how: {one: rows[f"alone {name}{how}"][one] for name, one in members.items() if f"alone {name}{how}" in rows}
        for how in ("", TOO)
    }
    for how, some in alone.items():
        if some:
            cells = [told(some[one]) if one in some else "" for one in members.values()]
            lines.append(f"| each alone{how} | | {' | '.join(cells)} |")
    before = rows.get(kind.untrained, {})
    if own := KIND_OF.get(kind.untrained):
        alone[""] = {one: rows[name][one] for at, one in own.members.items() if (name := f"{own.alone} {at}") in rows}
        if alone[""]:
            cells = [told(alone[""][one]) if one in alone[""] else "" for one in own.members.values()]
            lines.append(f"| {own.alone} | | {' | '.join(cells)} |")
    for name, row in rows.items():
        if name.startswith("alone") or (own and name.startswith(own.alone)):
            continue
        beside = alone[TOO if name.endswith(TOO) else ""]
        if own:
            null = rows.get(own.null, {}) if name != own.null else {}
        elif kind.members in (BITS, EXPERTS):
            null = {**before, **beside}
        else:
            null = {"full": before["full"], **beside} if before else {}
        cells = [
            told(row[one], null.get(one) if name != kind.untrained else None) for one in ("full", *members.values())
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def routes(name: str, row: dict[str, list[float]]) -> str:
    """What a router does: perplexity as it chooses against the same shares by lot, and each member for all."""
    routed, by_lot, compute, share_K = _routed(row)
    members, costs = [one for one in row if one != CHOSEN], _all_costs()
    lines = ["| row | of the products | perplexity behind the prompt |", "|---|---|---|"]
    shares = ", ".join(f"{100 * float(share):.0f} % {one}" for one, share in zip(members, share_K, strict=True))
    lines.append(f"| {name}: {shares} | {compute:.2f} | {told(routed.tolist(), by_lot.tolist())} |")
    lines.append(f"| by lot | {compute:.2f} | {told(by_lot.tolist())} |")
    lines += [f"| {one} alone | {costs[one]:.2f} | {told(row[one])} |" for one in members]
    return "\n".join(lines)


def _routed(row: dict[str, list[float]]) -> tuple[torch.Tensor, torch.Tensor, float, torch.Tensor]:
    """Losses of windows as a router chooses, and by lot at its shares; the products that run, and the shares."""
    chosen_B, costs = torch.tensor(row[CHOSEN]).long(), _all_costs()
    members = [one for one in row if one != CHOSEN]
    lost_BK = torch.tensor([row[one] for one in members]).T
    share_K = torch.bincount(chosen_B, minlength=len(members)) / len(chosen_B)
    compute = sum(costs[one] * float(share) for one, share in zip(members, share_K, strict=True))
    return lost_BK.gather(1, chosen_B[:, None])[:, 0], lost_BK @ share_K, compute, share_K


def _all_costs() -> dict[str, float]:
    return {"full": 1.0, **{str(one): size for one, size in _costs().items()}}


def gates(name: str, row: dict[str, list[float]]) -> str:
    """What gates do: perplexity as tokens choose against half of the neurons for all, and each share for all."""
    lines = ["| row | of the neurons | perplexity |", "|---|---|---|"]
    lines.append(f"| {name} | {row['compute'][0]:.2f} | {told(row['ffn=token'], row['ffn=0.5'])} |")
    for one in ("full", *WIDE.values()):
        if one != "ffn=token":
            share = 1.0 if one == "full" else float(one.partition("=")[2])
            lines.append(f"| {one} for all | {share:.2f} | {told(row[one])} |")
    by_lot = math.exp(row["by lot"][0] - row["gated"][0]) - 1
    lines.append(f"| gates not trained (other text) | {row['compute'][0]:.2f} | {100 * by_lot:+.1f} % of the gates' |")
    return "\n".join(lines)


def write(rows: dict[str, dict[str, list[float]]], given: argparse.Namespace) -> None:
    """Keeps the figures of the rows that are presets, each with the command that prints it."""
    command = (
        f"python benchmarks/trained_families.py --passes {given.passes} --rate {given.rate:g} --scored {given.scored}"
    )
    command += f" --device {given.device}" * (given.device != "cpu")
    for name in rows.keys() & set(presets()):
        figures, null, beside = gained(name, rows)
        if figures:
            asked = " ".join(f'"{one}"' if " " in one else one for one in (*beside, name))
            how = {"command": f"{command} --rows {asked}", "model": MODEL.name, "unit": "perplexity", "null": null}
            keep(name, how, figures)


def gained(
    name: str, rows: dict[str, dict[str, list[float]]]
) -> tuple[dict[str, tuple[float, ...]], str, tuple[str, ...]]:
    """Of a row: where → its perplexity, its null's, and the gap; what the null is, and the rows that it takes."""
    own = rows[name]
    if name in ROUTED:
        routed, by_lot, compute, _ = _routed(own)
        return {f"{compute:.2f} of the products": _gap(routed.tolist(), by_lot.tolist())}, "the same shares by lot", ()
    if name in GATED:
        return {f"{own['compute'][0]:.2f} of the neurons": _gap(own["ffn=token"], own["ffn=0.5"])}, "half for all", ()
    if name in DIVIDED:
        found = {at: _gap(own[one], rows[DENSE][one]) for at, one in EXPERTS.items() if DENSE in rows}
        return found, DENSE, (DENSE,)
    if name in KIND_OF:
        kind = KIND_OF[name]
        other = rows.get(kind.null, {})
        found = {one: _gap(own[one], other[one]) for one in ("full", *kind.members.values()) if other}
        return found, kind.null.partition(", ")[2], (kind.null,)
    coded = name in ADAPTED
    nulls = {one: "codes" if coded else f"alone {at}" for at, one in (BITS if coded else MEMBERS).items()}
    found = {one: _gap(own[one], rows[null][one]) for one, null in nulls.items() if null in rows}
    return found, "without adapters" if coded else "alone", tuple(dict.fromkeys(nulls.values())) if found else ()


def _gap(values: Sequence[float], other: Sequence[float]) -> tuple[float, float, float, float]:
    """Perplexity of both, and the gap in percent with its standard error."""
    own, null = torch.tensor(values), torch.tensor(other)
    gap = own - null
    error = 100 * (gap.std() / len(gap) ** 0.5).item()
    return math.exp(own.mean().item()), math.exp(null.mean().item()), 100 * math.expm1(gap.mean().item()), error


def _costs() -> Mapping[Subnet, float]:
    return space_of(CHOICES, Source.open(MODEL).anatomy).named


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = [name for kind in TABLES for name in kind.rows]
    parser.add_argument("--rows", nargs="+", default=rows, choices=rows)
    parser.add_argument("--passes", type=int, default=600, help="of each family")
    parser.add_argument("--batch", type=int, default=1024, help="tokens of a pass")
    parser.add_argument("--length", type=int, default=256, help="of a window")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--scored", type=int, default=16384, help="tokens that perplexity is measured on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="keep presets' figures where `regauge methods` reads them")
    parser.add_argument("--device", default="cpu", help="where families are trained: cpu or cuda")
    parser.add_argument(
        "--text", type=Path, help="train/ and heldout/ as scripts/stdlib_text.py makes them; without it made now"
    )
    parser.add_argument(
        "--keep", type=Path, default=ROOT / "out" / "families.json", help="figures, kept and gone on with"
    )
    given = parser.parse_args(arguments)
    given.keep.parent.mkdir(parents=True, exist_ok=True)
    asked = {name: getattr(given, name) for name in ("passes", "batch", "length", "rate", "scored", "seed")}
    asked |= {} if given.device == "cpu" else {"device": given.device}
    with tempfile.TemporaryDirectory() as folder:
        text = given.text or Path(folder) / "text"
        if given.text is None:
            made = [sys.executable, str(ROOT / "scripts" / "stdlib_text.py"), str(text)]
            subprocess.run(made, check=True, stdout=sys.stderr)
        shared = Given(text, given.batch, given.length, given.rate, given.seed, given.device)
        for name in given.rows:
            kept = json.loads(given.keep.read_text()) if given.keep.exists() else {}
            kept = kept if kept.get("asked") == asked else {"asked": asked, "rows": {}}
            if name not in kept["rows"]:
                found = row(name, given.passes, shared, Path(folder) / name.replace("/", "-"), given.scored)
                kept = json.loads(given.keep.read_text()) if given.keep.exists() and kept["rows"] else kept
                kept["rows"][name] = found
                given.keep.write_text(json.dumps(kept))
            print(table(kept["rows"]), flush=True)
    if given.write:
        write(kept["rows"], given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
