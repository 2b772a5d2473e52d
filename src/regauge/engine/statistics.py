"""What is measured on a site's input while a block runs: exactly the statistics that the parts declare they need.

Sites that read the same activation (q, k and v; gate and up) share one collector, and each sees the activation once.
The matrix XᵀX is symmetric: only what lies on and above its diagonal is summed, block by block. Activations in float32
are summed over batches in float64 from products of at most `ROWS` rows, so that a long text loses nothing to a large
running sum; those in bfloat16, where the CPU has a unit for them, in float32 throughout: their products are exact and
both sums short. Either is within 1e-6 of the sum in float64. A sample of the rows themselves is kept too, from which
the receipt's error is computed where no XᵀX was collected.

Experts. A rare expert sees few tokens or none. With n tokens seen and a threshold of m = I (as many tokens as input
channels), an expert with n < m takes its statistics blended with those of all experts of its block that read the same
kind of input: (n·own + (m − n)·all) / m; maxima and minima take the larger range. Every such site is reported. Where
no expert saw a token the statistics are those of white noise, under which every rounder is nearest.

Cost: XᵀX T·I² operations and 8·I² bytes a collector (4·I² of bfloat16); the others next to nothing.
Legend: T tokens, I input channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regauge.anatomy.model import Site
from regauge.kernels.cpu.gram import gram, has_gram, mirrored
from regauge.rounding.base import STATISTICS, Stats

ROWS = 4096  # rows multiplied at a time: float32 sums of this length err by about 1e-6
MEANS = frozenset({"hessian", "second_moment", "absmean"})
"""Statistics that are means over tokens; the others are extremes."""
SAMPLE = 1024  # rows kept for the receipt's error
STRIP = 512  # channels of a strip of XᵀX
WIDE = 1024  # channels from which the receipt's error is taken in bfloat16, where that is the quicker


@dataclass(eq=False)
class Collector:
    """Sums over one activation. `sums` holds totals, not means; see `Stats` for what comes out.

    Attributes:
        needs: statistics to collect; `count` always is, `sample` on request.
        channels: I.
    """

    needs: frozenset[str]
    channels: int
    count: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, x_TI: Tensor) -> None:
        """Adds rows. Rows of no tokens are welcome."""
        x_TI = x_TI.detach()
        if not (x_TI.dtype is torch.bfloat16 and has_gram()):
            x_TI = x_TI.float()
        if not len(x_TI):
            return
        if "sample" in self.needs:
            self._sample(x_TI)
        self.count += len(x_TI)
        for start in range(0, len(x_TI), ROWS):
            self._add(x_TI[start : start + ROWS])

    def _add(self, x_TI: Tensor) -> None:
        sums = self.sums
        if "hessian" in self.needs:
            self._products(x_TI)
        if not self.needs - {"hessian", "count", "sample"}:
            return
        x_TI = x_TI.float()
        if "second_moment" in self.needs:
            total_I = x_TI.double().square().sum(0)
            sums["second_moment"] = sums["second_moment"] + total_I if "second_moment" in sums else total_I
        if "absmean" in self.needs:
            total_I = x_TI.double().abs().sum(0)
            sums["absmean"] = sums["absmean"] + total_I if "absmean" in sums else total_I
        if "absmax" in self.needs:
            most_I = x_TI.abs().amax(0)
            sums["absmax"] = torch.maximum(sums["absmax"], most_I) if "absmax" in sums else most_I
        if "minimum" in self.needs:
            least_I = x_TI.amin(0)
            sums["minimum"] = torch.minimum(sums["minimum"], least_I) if "minimum" in sums else least_I
        if "maximum" in self.needs:
            most_I = x_TI.amax(0)
            sums["maximum"] = torch.maximum(sums["maximum"], most_I) if "maximum" in sums else most_I

    def _products(self, x_TI: Tensor) -> None:
        """Adds XᵀX to what is on and above the diagonal; the blocks on it are whole but for bfloat16."""
        narrow = x_TI.dtype is torch.bfloat16
        if "hessian" not in self.sums:
            kind = torch.float32 if narrow else torch.float64
            self.sums["hessian"] = torch.zeros(self.channels, self.channels, dtype=kind, device="cpu")
        sum_II = self.sums["hessian"]
        if narrow:
            gram(x_TI, sum_II)
            return
        for start in range(0, self.channels, STRIP):
            sum_II[start : start + STRIP, start:] += x_TI[:, start : start + STRIP].T @ x_TI[:, start:]

    def _sample(self, x_TI: Tensor) -> None:
        """Keeps evenly spaced rows, halving their number whenever there are twice too many."""
        step = int(self.sums["step"]) if "step" in self.sums else 1
        first = -self.count % step
        found_TI = x_TI[first::step].to(torch.float32, copy=True)
        if "sample" in self.sums:
            found_TI = torch.cat([self.sums["sample"], found_TI])
        while len(found_TI) > 2 * SAMPLE:
            found_TI, step = found_TI[::2].clone(), step * 2
        self.sums |= {"sample": found_TI, "step": torch.tensor(step, dtype=torch.int64, device="cpu")}

    def finish(self) -> dict[str, Tensor]:
        """Means over tokens, by name. The collector is spent: its memory goes with the result."""
        found = dict(self.sums)
        found.pop("step", None)
        if "hessian" in found:
            mirrored(found["hessian"])
        for name in MEANS & found.keys():
            found[name] = found[name].div_(max(self.count, 1))
            if name != "hessian":
                found[name] = found[name].float()
        self.sums = {}
        for name in self.needs & frozenset(STATISTICS):
            if name not in found and name != "count":
                found[name] = _unseen(name, self.channels)
        found["count"] = torch.tensor(self.count, dtype=torch.int64, device="cpu")
        return found


def _unseen(name: str, channels: int) -> Tensor:
    """White noise of variance one: XᵀX/T = 1, under which rounding is nearest."""
    if name == "hessian":
        return torch.eye(channels, dtype=torch.float64, device="cpu")
    return (
        -torch.ones(channels, dtype=torch.float32, device="cpu")
        if name == "minimum"
        else torch.ones(channels, dtype=torch.float32, device="cpu")
    )


@dataclass(frozen=True, eq=False)
class Collection:
    """The collectors of one block.

    Attributes:
        by_tap: tap → collector.
        taps: site → tap.
        watch: what the runner is given: one site of each tap → its collector.
    """

    by_tap: Mapping[str, Collector]
    taps: Mapping[str, str]
    watch: Mapping[str, Callable[[Tensor], None]]

    def finish(self, sites: Iterable[Site]) -> tuple[dict[str, Stats], dict[str, str]]:
        """Statistics of each site, and the sites whose expert was rare with what was done."""
        found = {tap: collector.finish() for tap, collector in self.by_tap.items()}
        sites = [site for site in sites if site.name in self.taps]
        blended, rare = _blend(found, {self.taps[site.name]: site for site in sites if site.expert is not None})
        stats: dict[str, Stats] = {site.name: blended[self.taps[site.name]] for site in sites}
        return stats, {site.name: rare[self.taps[site.name]] for site in sites if self.taps[site.name] in rare}


def collection(sites: Iterable[Site], needs: Mapping[str, frozenset[str]], sample: bool = False) -> Collection:
    """Collectors for the sites that need something, one for each activation.

    Args:
        needs: site → statistics.
        sample: also keep rows, for sites whose needs do not include `hessian`.
    """
    wanted: dict[str, frozenset[str]] = {}
    taps: dict[str, str] = {}
    watch: dict[str, str] = {}
    channels: dict[str, int] = {}
    for site in sites:
        if site.name not in needs or site.tap is None:
            continue
        taps[site.name] = site.tap
        watch.setdefault(site.tap, site.name)
        channels[site.tap] = site.shape[1]
        wanted[site.tap] = wanted.get(site.tap, frozenset()) | needs[site.name]
    if sample:
        wanted = {tap: need if "hessian" in need else need | {"sample"} for tap, need in wanted.items()}
    by_tap = {tap: Collector(need, channels[tap]) for tap, need in wanted.items()}
    return Collection(by_tap, taps, {site: by_tap[tap] for tap, site in watch.items()})


def _blend(
    found: Mapping[str, dict[str, Tensor]], experts: Mapping[str, Site]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """Statistics in which rare experts lean on all experts of their kind, and what was done to whom."""
    out = dict(found)
    said: dict[str, str] = {}
    kinds: dict[tuple[int | None, int, str], list[str]] = {}
    for tap, site in experts.items():
        kinds.setdefault((site.block, site.shape[1], tap.rpartition(".")[2]), []).append(tap)
    for taps in kinds.values():
        counts = {tap: int(found[tap]["count"]) for tap in taps}
        channels = experts[taps[0]].shape[1]
        rare = [tap for tap in taps if counts[tap] < channels]
        if not rare:
            continue
        seen = sum(counts.values())
        pooled = _pool([found[tap] for tap in taps if counts[tap]], seen) if seen else {}
        for tap in rare:
            n = counts[tap]
            told = f"the expert saw {n} tokens, fewer than its {channels} input channels: "
            if not seen:
                said[tap] = f"{told}rounded as if its inputs were white noise (no expert saw a token)"
                continue
            out[tap] = _mix(found[tap], pooled, n / channels)
            said[tap] = f"{told}its statistics are blended with those of all experts ({seen} tokens)"
    return out, said


def _pool(parts: list[dict[str, Tensor]], seen: int) -> dict[str, Tensor]:
    """Statistics over the tokens of all experts together."""
    pooled: dict[str, Tensor] = {}
    for name in parts[0].keys() - {"count", "sample"}:
        values = [part[name] for part in parts]
        if name in MEANS:
            total = torch.zeros_like(values[0], dtype=torch.float64)
            for part, value in zip(parts, values, strict=True):
                total += value.double() * (int(part["count"]) / seen)
            pooled[name] = total.to(values[0].dtype)
        else:
            pooled[name] = torch.stack(values).amin(0) if name == "minimum" else torch.stack(values).amax(0)
    if "sample" in parts[0]:
        pooled["sample"] = torch.cat([part["sample"] for part in parts])
    return pooled


def _mix(own: Mapping[str, Tensor], pooled: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """share · own + (1 − share) · pooled for means, the wider range otherwise; the count stays the expert's own."""
    mixed = {"count": own["count"]}
    unseen = int(own["count"]) == 0
    for name, other in pooled.items():
        if name == "sample" or unseen:
            mixed[name] = other
        elif name in MEANS:
            mixed[name] = (share * own[name].double() + (1 - share) * other.double()).to(other.dtype)
        else:
            mixed[name] = torch.minimum(own[name], other) if name == "minimum" else torch.maximum(own[name], other)
    return mixed


def output_error(w_OI: Tensor, w_hat_OI: Tensor, stats: Stats | None) -> float:
    """‖(W − Ŵ)X‖ / ‖WX‖ in Frobenius norms; ‖W − Ŵ‖ / ‖W‖ where there is no text. Lower = better.

    With XᵀX known it is √(tr(E H Eᵀ) / tr(W H Wᵀ)), of wide sites with factors rounded to bfloat16 where the CPU
    multiplies those faster (the figure is then off by 1e-4 of itself); otherwise it is taken on the rows kept.
    """
    energy: Callable[[Tensor], Tensor] = _energy
    if stats and "hessian" in stats:
        narrow = len(stats["hessian"]) >= WIDE and has_gram()
        kind = torch.bfloat16 if narrow else torch.float32
        h_II = stats["hessian"].to(kind)
        energy = lambda m_RI: (m_RI.to(kind) @ h_II).float().mul_(m_RI).sum(dtype=torch.float64)  # noqa: E731  # as below
    elif stats and "sample" in stats and len(stats["sample"]):
        rows_TI = stats["sample"]
        energy = lambda m_RI: _energy(rows_TI @ m_RI.T)  # noqa: E731  # one of three
    top, base = 0.0, 0.0
    for start in range(0, len(w_OI), STRIP):
        w_RI = w_OI[start : start + STRIP].float()
        top += float(energy(w_RI - w_hat_OI[start : start + STRIP].float()))
        base += float(energy(w_RI))
    return math.sqrt(max(top, 0.0) / base) if base > 0 else 0.0


def _energy(m: Tensor) -> Tensor:
    """Sum of squares: rows in float32, which is one pass without a copy, and their sum in float64."""
    norms_O: Tensor = torch.linalg.vector_norm(m, dim=1)
    return norms_O.double().square().sum()
