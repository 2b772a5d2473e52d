"""The pure pass over the tensors of one block: moves, codes, and the figures of each site. Nothing here reads or writes
a file or runs a model. Legend: O output channels, I input channels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regauge import parts
from regauge.anatomy.fusing import fused
from regauge.anatomy.inner import inner_taps
from regauge.anatomy.model import Anatomy, Site, Weights
from regauge.anatomy.moves import Move
from regauge.artifact.codec.base import DECODES
from regauge.artifact.receipt import SiteReceipt, StoreReceipt, TapReceipt
from regauge.engine.statistics import output_error
from regauge.errors import RecipeError
from regauge.formats.base import Codes, Format
from regauge.formats.readings import Reading
from regauge.formats.terms import checked, summed
from regauge.learn.base import Finished
from regauge.parts import Point, Spec
from regauge.plan.keeping import of_block
from regauge.plan.resolution import Resolution
from regauge.plan.stores import block_of
from regauge.rounding.base import Stats
from regauge.rounding.pieces import piecewise
from regauge.rounding.together import named
from regauge.runtime.capabilities import runs

Choices = Mapping[str, Point | None]


@dataclass(frozen=True, eq=False)
class Moved:
    """The tensors of a block before and after its moves.

    Attributes:
        source: as read.
        exact: after the moves, in float64.
        stored: after the moves, in the dtype in which they are stored.
        moves: every move, those of the whole model first.
    """

    source: Weights
    exact: Weights
    stored: Weights
    moves: Sequence[Move]


def as_stored(anatomy: Anatomy, weights: Weights, like: Weights, default: torch.dtype) -> Weights:
    """Tensors rounded to the dtype in which they will be stored: that of `like`, where it has them.

    A gain to which the module adds an offset is rounded without it.
    """
    offsets = {f"{norm.name}.gain": norm.offset for norm in anatomy.norms if norm.offset}
    out: Weights = {}
    for name, tensor in weights.items():
        if name in offsets:
            stored = (tensor.double() - offsets[name]).to(default)
            out[name] = stored.float() + offsets[name]
        else:
            out[name] = tensor.to(like[name].dtype if name in like else default)
    return out


def round_sites(
    sites: Iterable[Site],
    weights: Weights,
    choices: Choices,
    stats: Mapping[str, Stats],
    learnt: Finished | None = None,
    at_once: int | None = None,
) -> dict[str, Codes]:
    """Codes of every site that has a choice, with what its compensator adds.

    Args:
        learnt: formats with a step that was learnt, in place of the choice's own, and codes, in place of a rounder's.
        at_once: how many are rounded at the same time; see `side_by_side`.
    """
    sites = list(sites)
    found = learnt or Finished()
    known, codes = {**_fused(sites, weights, choices), **found.formats}, found.codes
    chosen = {site.name: choice for site in sites if (choice := choices.get(site.name)) is not None}

    def job(name: str) -> Callable[[], Codes]:
        made = codes.get(name)
        return lambda: round_site(weights[f"{name}.weight"], chosen[name], stats.get(name, {}), known.get(name), made)

    rounded = named({name: job(name) for name in _largest_first(chosen, weights)}, at_once)
    return {name: rounded[name] for name in chosen}


def _largest_first(names: Iterable[str], weights: Weights) -> list[str]:
    """Sites in the order in which they are begun side by side: nothing long is begun last."""
    return sorted(names, key=lambda name: -weights[f"{name}.weight"].numel())


def _fused(sites: Sequence[Site], weights: Weights, choices: Choices) -> dict[str, Format]:
    """Site → its format, of those that runtimes fuse and whose steps have a level that is then one for all."""
    found: dict[str, Format] = {}
    for some in fused(sites).values():
        alike: dict[tuple[Spec, ...], dict[str, Format]] = {}
        for site in some:
            choice = choices.get(site.name)
            if choice is not None:
                stored = tuple(choice.spec(axis) for axis in DECODES)
                alike.setdefault(stored, {})[site.name] = parts.format_of(choice)
        for formats in alike.values():
            if len(formats) > 1 and all(fmt.scale.fused for fmt in formats.values()):
                matrices = [weights[f"{name}.weight"].float() for name in formats]
                found |= {name: fmt.together(matrices) for name, fmt in formats.items()}
    return found


def round_site(
    w_OI: Tensor, choice: Point, stats: Stats, fmt: Format | None = None, codes: Codes | None = None
) -> Codes:
    """One matrix through its rounder and compensator; in `fmt` where that is given, with `codes` where they are known.

    Raises:
        RecipeError: the compensator gives what an artifact could not hold, or what nothing would apply.
    """
    fmt = fmt or parts.format_of(choice)
    rounder, compensator = parts.rounder_of(choice), parts.compensator_of(choice)
    if compensator is None and codes is not None:
        return codes
    if compensator is None:
        return piecewise(lambda w_RI, *of: rounder(_narrow(w_RI), *of), w_OI, fmt, stats)
    w_OI = _narrow(w_OI)
    rows, columns = w_OI.shape
    codes, best = codes or rounder(w_OI, fmt, stats), None
    try:
        for left in reversed(range(1 + compensator.again)):
            terms = checked(compensator(w_OI.float(), fmt.decode(codes), stats), (rows, columns))
            made = replace(codes, terms=(*codes.terms, *terms))
            best = min(best, made, key=lambda one: output_error(w_OI, summed(one, fmt), stats)) if best else made
            if left:
                codes = rounder(w_OI.float() - sum(term.dense().float() for term in terms), fmt, stats)
        assert best is not None, "it is asked once at least"
        return best
    except ValueError as error:
        name = choice.name("compensator")
        raise RecipeError(f"the compensator {name!r} does not serve a matrix of {rows} x {columns}: {error}") from error


def _narrow(w_OI: Tensor) -> Tensor:
    return w_OI.float() if w_OI.dtype is torch.float64 else w_OI


def effective(
    stored: Weights, codes: Mapping[str, Codes], choices: Choices, dtype: torch.dtype = torch.float32
) -> Weights:
    """What the compressed block computes with: matrices rebuilt, then rounded to `dtype`, and the rest as stored."""

    def job(name: str, found: Codes) -> Callable[[], Tensor]:
        choice = choices[name]
        assert choice is not None, f"{name} has codes and no choice"
        return lambda: summed(found, parts.format_of(choice)).to(dtype)

    return {**stored, **named({f"{name}.weight": job(name, found) for name, found in codes.items()})}


def full_precision(stored: Weights, codes: Mapping[str, Codes]) -> Weights:
    """The tensors that are not replaced by codes."""
    gone = {f"{name}.weight" for name in codes}
    return {name: tensor for name, tensor in stored.items() if name not in gone}


def changes(
    sites: Iterable[Site], readings: Mapping[str, Reading], passed: bool = False
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Site → what becomes of its input before it is multiplied, for all sites that read a tap with a reading.

    Args:
        passed: gradients pass through the rounding.
    """
    made = {tap: reading.passed if passed else reading.simulate for tap, reading in readings.items()}
    return {site.name: made[site.tap] for site in sites if site.tap in made}


def site_receipts(
    sites: Iterable[Site],
    moved: Moved,
    codes: Mapping[str, Codes],
    stats: Mapping[str, Stats],
    resolution: Resolution,
    rare: Mapping[str, str],
) -> list[SiteReceipt]:
    """The figures of each site. Bytes count the weight with its steps, zero points, low-rank factors and bias.

    Args:
        rare: site → what was done about an expert that saw few tokens.
    """
    source, exact, stored = moved.source, moved.exact, moved.stored
    sites = [site for site in sites if f"{site.name}.weight" in exact]
    found, errors = [], _errors(sites, exact, codes, stats, resolution.choices)
    for site in sites:
        name, weight, bias = site.name, f"{site.name}.weight", f"{site.name}.bias"
        seen = stats.get(name, {})
        count = site.shape[0] * site.shape[1]
        after = _bytes(stored[bias]) if bias in stored else 0
        error = None
        told = [said[name] for said in (resolution.fallbacks, rare) if name in said]
        choice = resolution.choices.get(name)
        if name in codes and choice is not None:
            fmt = parts.format_of(choice)
            after += fmt.bytes(site.shape) + sum(term.bytes for term in codes[name].terms)
            told += codes[name].notes
            error = errors[name]
        else:
            after += _bytes(stored[weight])
        found.append(
            SiteReceipt(
                name=name,
                kind=site.kind,
                shape=site.shape,
                choice=None if choice is None else spelled(choice),
                bits=8 * after / count,
                bytes_before=sum(source[n].numel() * 2 for n in (weight, bias) if n in source),
                bytes_after=after,
                error=error,
                tokens=int(seen["count"]) if "count" in seen else None,
                fallback="; ".join(told) or None,
                kept=resolution.kept.get(name),
                runs={} if choice is None else _runs(site, choice, resolution),
            )
        )
    return found


def _runs(site: Site, choice: Point, resolution: Resolution) -> dict[str, str]:
    return runs(choice, resolution.inputs.get(site.tap or ""), site.shape, bool(site.window))


def _errors(
    sites: Iterable[Site], exact: Weights, codes: Mapping[str, Codes], stats: Mapping[str, Stats], choices: Choices
) -> dict[str, float]:
    """Site → relative error of its output."""

    def job(name: str, choice: Point) -> Callable[[], float]:
        fmt, w_OI, seen = parts.format_of(choice), exact[f"{name}.weight"], stats.get(name, {})
        return lambda: output_error(w_OI, summed(codes[name], fmt), seen)

    chosen = {s.name: choice for s in sites if s.name in codes and (choice := choices.get(s.name)) is not None}
    return named({name: job(name, chosen[name]) for name in _largest_first(chosen, exact)})


def tap_receipts(anatomy: Anatomy, inputs: Mapping[str, Point]) -> list[TapReceipt]:
    """What became of each activation that is rounded, in the order in which a model reads them; last those that no
    matrix reads."""
    readers: dict[str, list[str]] = {}
    for site in anatomy.sites:
        if site.tap in inputs:
            readers.setdefault(site.tap or "", []).append(site.name)
    readers |= {tap: [] for tap in inner_taps(anatomy) if tap in inputs}
    return [
        TapReceipt(
            name=tap,
            reading=spelled(inputs[tap]),
            sites=tuple(names),
            bits=parts.build("grid", inputs[tap].spec("grid")).bits,
        )
        for tap, names in readers.items()
    ]


def store_receipts(anatomy: Anatomy, points: Mapping[str, Point]) -> tuple[StoreReceipt, ...]:
    """What becomes of each block's cache, in the order of the blocks; of those that keep everything, nothing."""
    found = []
    for name, point in sorted(points.items(), key=lambda item: block_of(item[0])):
        sizes = anatomy.attention(block_of(name))
        if sizes is not None:
            grown = of_block(point, sizes)
            found.append(
                StoreReceipt(name=name, keeping=spelled(point), bytes_before=grown.before, bytes_after=grown.after)
            )
    return tuple(found)


def spelled(choice: Point) -> dict[str, object]:
    """A point as flat data, each coordinate in its one-line spelling where it has one."""
    from regauge.plan import coordinates

    return dict(coordinates(choice))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def nearest_codes(choices: Choices) -> dict[str, Point | None]:
    """The same points with the rounder that needs nothing: what a tentative block is tried under."""
    plain = Spec("nearest")
    return {
        name: None if point is None else point.but(rounder=plain, compensator=None) for name, point in choices.items()
    }
