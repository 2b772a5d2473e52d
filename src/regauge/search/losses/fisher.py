"""What each option of each group would cost in KL, from one streamed backward pass.

Second order: moving a site's output from y to y + ΔW x at every token changes the model's next-token distributions by
KL ≈ ½ E[(Σ_o g_o (ΔW x)_o)²], g = ∂ log p(next) / ∂y, the next tokens drawn from the model itself, which makes the
expectation the Fisher information. The sum over outputs is taken before the square, per token. We tried three forms
against true KL of 224 single-site changes (8M llama, 2 to 6 bits): this one ranks 0.94-0.96 and predicts 0.85 of it
throughout; squaring element by element ranks 0.93-0.96; summing over the whole sequence first is unbiased and too
noisy (0.85). The idea is that of Fisher pruning (1801.05787) and of ModelOpt's gradient search, which square per
element; we calibrate the result by true KL (see `correction`).

The pass walks backward over the states at every block's border, replaying one block at a time: what its sites read,
XᵀX of it, and the gradients come from the same run. Of every site some rows are rounded to each option there (see
`sites`); errors of rows have next to nothing to do with each other, so what they lose together is what all lose, times
R / O. Experts have no output of their own to tap, so those rows are put in place, the block is run, and the change of
its output is weighted by the gradient there; so are their cross terms.

Outside the blocks the figures are ruder, and true KL of some options sets their scale: an embedding's is by the
gradient behind it; a head's is ½ E[(ΔW x)²] (1 − Σ p²), the variance that errors of independent rows have under p.

Of a classifier of images one class is drawn for an image: what its places do is summed before it is squared.
Cost: a forward and a backward pass over a few thousand tokens, and error feedback on the rows that are tried. Memory:
one block's inputs and gradients. Lower = better. Legend: n tokens, O outputs, I inputs, R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regauge.anatomy.model import Weights
from regauge.hosts.states import States
from regauge.kernels.cpu.machine import trim
from regauge.search.losses.between import completed, narrowed
from regauge.search.losses.borders import Borders
from regauge.search.losses.sites import Tried, tried, watching
from regauge.search.losses.stores import Reads
from regauge.search.options import SiteGroup
from regauge.search.subject import Subject, some

Losses = dict[str, dict[str, float]]
"""Group → option → KL, nats a token. Full precision is 0."""

CHUNK = 1 << 22  # logits at a time


def fisher(
    borders: Borders,
    groups: Sequence[SiteGroup],
    keep: int,
    seed: int = 0,
    progress: Callable[[str, float], None] = lambda _, __: None,
    at_once: int | None = None,
) -> Losses:
    """Predicted KL of every option of every group.

    Args:
        keep: batches that go backward; the others show what sites read.
        at_once: how many matrices are rounded at the same time; None: as many as there are threads.
    """
    subject = borders.subject
    last = borders.before(subject.blocks)
    stores = [group for group in groups if group.store is not None]
    whole, groups = groups, [narrowed(group) for group in groups if group.store is None]
    outside = [group for group in groups if group.block is None]
    gradients, found, alone = _tail(subject, outside, last, keep, seed)
    for block in reversed(range(subject.blocks)):
        progress("sensitivity", 1 - (block + 1) / subject.blocks)
        trim()
        visit = Visit(subject, block, borders.before(block), gradients, subject.read(block), at_once, alone)
        reads = Reads([group for group in stores if group.block == block])
        losses, gradients = visit.back([group for group in groups if group.block == block], reads)
        found |= losses
    tables = [] if subject.pictured else outside  # classes of images, which no search rounds
    for name, losses_of in _embedding(subject, tables, some(borders.before(0), 0, keep), gradients).items():
        own = found.get(name, {})
        found[name] = {option: loss + own.get(option, 0.0) for option, loss in losses_of.items()}
    return {
        group.name: completed(group.options, found[group.name]) if group.store is None else found[group.name]
        for group in whole
        if group.name in found
    }


def _tail(
    subject: Subject, groups: Sequence[SiteGroup], states: States, keep: int, seed: int
) -> tuple[list[Tensor], Losses, int]:
    """∂ Σ log p(next) / ∂ last hidden, next tokens drawn from the model; what options of the head cost; and how many
    inputs there are, where one class was drawn for each, else 0."""
    generator = torch.Generator().manual_seed(seed)
    outer, gradients, alike, inputs = subject.read(None), list[Tensor](), list[Tensor](), 0
    wanted = [(group, option) for group in groups for option in group.options if option.choice is not None]
    seen, x = watching(wanted), list[Tensor]()
    watch = dict(seen.watch) | ({"head": x.append} if any(s.name == "head" for s in subject.anatomy.sites) else {})
    if "head" in seen.watch:
        watch["head"] = _both(x.append, seen.watch["head"])
    for batch in range(keep):
        hidden = states.hidden[batch].detach().requires_grad_()
        one = some(states, batch, batch + 1).with_hidden([hidden])
        with torch.enable_grad():
            (logits_BTV,) = subject.quick.tail(outer, one, watch=watch)
        inputs += len(logits_BTV) if logits_BTV.dim() == 2 else 0
        pull_BTV, alike_N = _drawn(logits_BTV.detach(), generator)
        gradients += torch.autograd.grad(logits_BTV, hidden, pull_BTV)
        alike.append(alike_N)
        del logits_BTV, pull_BTV
    share = 1 - float(torch.cat(alike).mean())
    stats = seen.finish(subject.anatomy.sites)[0]
    found: Losses = {}
    for group in groups:
        of_head = [
            site for site in group.sites if site.name == "head" or (site.name == "embed" and subject.anatomy.tied)
        ]
        if of_head and x:
            rows = tried([replace(group, sites=tuple(of_head))], outer, stats)
            lost = {name: 0.5 * share * value for name, value in rows[of_head[0].name].spread(torch.cat(x)).items()}
            found[group.name] = lost
    return gradients, found, inputs


def _drawn(logits_BTV: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """∂ Σ log p(next) / ∂ logits, next tokens drawn from p, and Σ p² of each token (n,); some rows at a time."""
    logits_nV, pull_BTV, alike = logits_BTV.flatten(0, -2), torch.empty_like(logits_BTV), list[Tensor]()
    pull_nV, step = pull_BTV.view(logits_nV.shape), max(1, CHUNK // logits_BTV.shape[-1])
    for start in range(0, len(logits_nV), step):
        p_NV = torch.softmax(logits_nV[start : start + step].float(), -1)
        next_N1 = torch.multinomial(p_NV, 1, generator=generator)
        alike.append(p_NV.square().sum(-1))
        pull_nV[start : start + step] = p_NV.neg_().scatter_add_(
            -1, next_N1, torch.ones_like(next_N1, dtype=p_NV.dtype)
        )
    return pull_BTV, torch.cat(alike)


def _both(first: Callable[[Tensor], None], second: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    def see(x_nI: Tensor) -> None:
        first(x_nI)
        second(x_nI)

    return see


@torch.no_grad()
def _embedding(subject: Subject, groups: Sequence[SiteGroup], states: States, gradients: Sequence[Tensor]) -> Losses:
    """What the options of tables cost that are looked up: what they move behind them, by the gradient there."""
    outer, found = subject.read(None), Losses()
    ids = [next(iter(batch.values())) for batch in states.inputs]
    used_R = torch.unique(torch.cat([one.flatten() for one in ids]))
    for group in groups:
        tables = [site for site in group.sites if site.tap is None]
        if not tables:
            continue
        plain = subject.runner.begin(ids, outer)
        rows: dict[str, Tried] = tried(
            [replace(group, sites=tuple(tables))], outer, {}, {site.name: used_R for site in tables}
        )
        lost = {}
        for option in group.options:
            if option.choice is None:
                continue
            named = {s.name: f"{s.name}.weight" for s in tables}
            looked = {
                name: rows[name].lookup(outer[key], option.name) for name, key in named.items() if name == "embed"
            }
            own = {key: rows[name].weights(outer[key], option.name) for name, key in named.items() if name != "embed"}
            moved = subject.runner.begin(ids, {**outer, **own}, rows=looked)
            pulls = _change(moved, plain, gradients)
            lost[option.name] = 0.5 * float(pulls.double().square().mean())
        found[group.name] = lost
    return found


@dataclass(frozen=True, eq=False)
class Visit:
    """One block on the way back.

    Attributes:
        states: before the block; gradients: at its output, of the first batches.
        weights: what it computes with.
        inputs: how many there are, where all places of one have one class between them; 0: each has its own.
    """

    subject: Subject
    block: int
    states: States
    gradients: Sequence[Tensor]
    weights: Weights
    at_once: int | None = None
    inputs: int = 0

    def back(self, groups: Sequence[SiteGroup], reads: Reads) -> tuple[Losses, list[Tensor]]:
        """The losses of the block's groups, and of its store, and the gradient at its input."""
        sites = [site for group in groups for site in group.sites if site.expert is None]
        wanted = [(group, option) for group in groups for option in group.options if option.choice is not None]
        seen, keep = watching(wanted), len(self.gradients)
        x: dict[str | None, list[Tensor]] = {site.tap: [] for site in sites}
        g: dict[str, list[Tensor]] = {site.name: [] for site in sites}
        show = {s.tap: s.name for s in reversed(sites)}
        watch: dict[str, Callable[[Tensor], None]] = {name: x[tap].append for tap, name in show.items()}
        watch |= {n: _both(watch[n], see) if n in watch else see for n, see in seen.watch.items()}
        found, before = Losses(), list[Tensor]()
        for batch, gradient in enumerate(self.gradients):
            inner, at_reads = self._replay(batch, gradient, watch, g, reads)
            before.append(inner)
            found |= reads.losses(at_reads) if at_reads else {}
        trim()
        with torch.no_grad():
            if seen.watch and keep < len(self.states):
                self.subject.quick.show(self.block, self.weights, some(self.states, keep), seen.watch)
            stats = seen.finish(self.subject.anatomy.sites)[0]
            rows = tried(groups, self.weights, stats, at_once=self.at_once)
            del stats  # with their factors: of wide sites more than all else here
            trim()
            for group in groups:
                if group.sites[0].expert is None:
                    found[group.name] = self._scores(group, rows, x, g)
                else:
                    found[group.name] = self._experts(group, rows)
        return found, before

    def _replay(
        self,
        batch: int,
        gradient: Tensor,
        watch: Mapping[str, Callable[[Tensor], None]],
        g: Mapping[str, list[Tensor]],
        reads: Reads,
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs one batch again; shows what sites read, keeps the gradient at their outputs, gives that at the input,
        and what attention's output has where `reads` watches it in this batch."""
        nudges: dict[str, Tensor] = {}

        def nudge(name: str) -> Callable[[Tensor], Tensor]:
            def add(y: Tensor) -> Tensor:
                nudges[name] = torch.zeros_like(y, requires_grad=True)
                return y + nudges[name]

            return add

        outputs = {name: nudge(name) for name in g}
        hidden = self.states.hidden[batch].detach().requires_grad_()
        fresh = not reads.seen
        with torch.enable_grad(), reads.watching(self.subject.quick):
            run = self.subject.quick.bind(self.block, self.weights, self.states, watch=watch, outputs=outputs)
            out = run(hidden, batch)
            read = [nudge for _, nudge in reads.seen] if fresh else []
            at = [hidden, *(nudges[name] for name in g), *read]
            inner, *outward = torch.autograd.grad(out, at, gradient)
        for name, value in zip(g, outward, strict=False):
            g[name].append(value.flatten(0, -2))
        found: Tensor = inner
        return found, outward[len(g) :]

    def _scores(
        self,
        group: SiteGroup,
        rows: Mapping[str, Tried],
        x: Mapping[str | None, list[Tensor]],
        g: Mapping[str, list[Tensor]],
    ) -> dict[str, float]:
        """½ mean over tokens of (Σ over sites and outputs of g · ΔW x)²."""
        totals: dict[str, Tensor] = {}
        for site in group.sites:
            if site.name not in rows:  # only full precision is on offer
                continue
            for name, pull_n in rows[site.name].pulls(torch.cat(x[site.tap]), torch.cat(g[site.name])).items():
                totals[name] = totals[name] + pull_n if name in totals else pull_n
        if self.inputs:
            totals = {name: pull_n.view(self.inputs, -1).sum(1) for name, pull_n in totals.items()}
        return _losses(totals)

    def _experts(self, group: SiteGroup, rows: Mapping[str, Tried]) -> dict[str, float]:
        """The same for sites without an output of their own: the block is run with each option."""
        runner, states = self.subject.runner, some(self.states, 0, len(self.gradients))
        states = states.with_hidden([hidden.float() for hidden in states.hidden])
        states = replace(states, store=None)
        plain, totals = runner.block(self.block, self.weights, states), dict[str, Tensor]()
        for option in group.options:
            if option.choice is None:
                continue
            names = {site.name: f"{site.name}.weight" for site in group.sites}
            changed = {key: rows[name].weights(self.weights[key], option.name) for name, key in names.items()}
            moved = runner.block(self.block, {**self.weights, **changed}, states)
            totals[option.name] = _change(moved, plain, self.gradients) * rows[group.sites[0].name].weight ** 0.5
        return _losses(totals)


def _change(moved: States, plain: States, gradients: Sequence[Tensor]) -> Tensor:
    """What a change of states does to the log-probabilities, a token each."""
    pulls = [
        ((after - before) * gradient).float().sum(-1).flatten()
        for after, before, gradient in zip(moved.hidden, plain.hidden, gradients, strict=True)
    ]
    return torch.cat(pulls)


def _losses(totals: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: 0.5 * float(pull_n.double().square().mean()) for name, pull_n in totals.items()}
