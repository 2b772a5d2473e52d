"""Runs a loaded model once and records every product of matrices that torch is asked for, with what its factors are.

Operators are seen below modules (a dispatch mode), so nothing that multiplies matrices is missed, whatever its module.
Whether a factor is of integers is not taken from the recipe: its values are looked at, and must be whole multiples of
the step that its reading keeps. Prompts are run by modules, which the native step of one token agrees with.

Legend: T tokens, I input channels, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from regauge.anatomy.inner import KEYS, PROBABILITIES, QUERIES, VALUES
from regauge.anatomy.model import Anatomy, Site
from regauge.formats.readings import TURNING, Reading
from regauge.hosts.transformers.inside import READS
from regauge.measure.products import FLOAT, NATIVE, SIMULATED, Product
from regauge.runtime.matrices.held import PackedMatrix
from regauge.runtime.matrices.modules import PackedExperts, PackedLinear

FACTORS: Mapping[str, tuple[int, int]] = {
    "aten::mm": (0, 1),
    "aten::bmm": (0, 1),
    "aten::mv": (0, 1),
    "aten::dot": (0, 1),
    "aten::linear": (0, 1),
    "aten::matmul": (0, 1),
    "aten::addmm": (1, 2),
    "aten::addbmm": (1, 2),
    "aten::baddbmm": (1, 2),
    "aten::convolution": (0, 1),
    "aten::_int_mm": (0, 1),
    "aten::_weight_int8pack_mm": (0, 1),
    "aten::_weight_int4pack_mm_for_cpu": (0, 1),
    "regauge::packed_linear": (0, 1),
    "regauge::packed_integers": (0, 1),
    "regauge::packed_codes": (0, 3),
}
"""Operators that multiply matrices → the places of their two factors."""
BYTES = ("aten::_int_mm", "regauge::packed_integers", "regauge::packed_codes")
"""Those that multiply bytes and sum in 32 bits."""
FUSED = "aten::_scaled_dot_product"
CLOSE = 1e-3  # of a step: what is on a grid lies no farther from it after one rounding to float32
SUMS = 2.0**31
PAIRS = ((QUERIES, KEYS), (PROBABILITIES, VALUES))
WORDS = ("scores", "sums")


@dataclass(eq=False)
class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """While it is entered, products are recorded; `stack` holds the modules that are running, the innermost last.

    Attributes:
        names: id of a packed or linear module → the name of its site.
        paths: id of a module → its path.
        attending: id of a module that attends → its block.
        turning: while an input goes through its transform, whose products are none of the site's.
    """

    names: Mapping[int, str]
    paths: Mapping[int, str]
    attending: Mapping[int, int]
    stack: list[nn.Module] = field(default_factory=list)
    found: dict[str, Product] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    turning: bool = False

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in FACTORS:
            first, second = FACTORS[name]
            self._product(name, args[first], args[second])
        elif name.startswith(FUSED):
            for word in WORDS:
                what = _float(args[0])
                self._keep(Product(name=self._attention(word), inputs=what, weights=what, runs=FLOAT, why=FUSED_WHY))
        return func(*args, **(kwargs or {}))

    def _product(self, op: str, x: Tensor, w: Tensor) -> None:
        inner = next((m for m in reversed(self.stack) if isinstance(m, PackedMatrix)), None)
        if inner is not None:
            self._keep(self._of_matrix(inner, op, x))
            return
        if x.dim() > 1 and x.shape[-1] == 1 and op != "aten::convolution":
            return  # an outer product sums nothing: the angles of rotary embeddings
        linear = next((m for m in reversed(self.stack) if id(m) in self.names), None)
        if linear is not None:
            why, weights = "its weights are in full precision", _float(w)
        elif self.stack and id(self.stack[-1]) in self.attending:
            self._keep(self._of_attention(self.stack[-1], x, w))
            return
        else:
            why, weights = "no reading rounds its factors", _float(w)
        name = self.names[id(linear)] if linear is not None else self._elsewhere()
        self._keep(Product(name=name, inputs=_float(x), weights=weights, runs=FLOAT, why=why))

    def _of_matrix(self, matrix: PackedMatrix, op: str, x: Tensor) -> Product:
        name, reading, fmt = self.names.get(id(matrix), self._elsewhere()), matrix.reading, matrix.format
        if self.turning and reading is not None:
            return Product(
                name=f"{name}.transform",
                inputs=_float(x),
                weights=reading.transform.name,
                runs=FLOAT,
                why=TURNED_WHY,
                static=True,
            )
        at = next(number for number, module in enumerate(self.stack) if module is matrix)
        told = partial(
            Product, name=name, weights=fmt.grid.name, inputs=_float(x) if reading is None else _named(reading)
        )
        if len(self.stack) > at + 1 or (len(matrix.terms) and op not in BYTES and "regauge::" not in op):
            return told(runs=FLOAT, why="a term beside its codes is in full precision")
        if reading is None:
            return told(runs=FLOAT, why="its inputs are not rounded")
        static = reading.step is not None
        why = _unlike(reading) or _uneven(fmt.grid.kind, fmt.grain.span(matrix.shape) >= matrix.shape[1], fmt.grid.name)
        if not why and matrix.shape[1] * 2.0 ** (reading.format.grid.bits + fmt.grid.bits) > SUMS * 2:
            why = "32 bits do not hold its sums"
        if not why and op not in BYTES:
            why = off(x, reading)
        runs = FLOAT if why else NATIVE if op in BYTES else SIMULATED
        return told(runs=runs, why=why, static=static)

    def _of_attention(self, module: nn.Module, x: Tensor, y: Tensor) -> Product:
        turn = self.counts[id(module)] = self.counts.get(id(module), -1) + 1
        words, name = PAIRS[turn % 2], self._attention(WORDS[turn % 2])
        readings: Mapping[str, Reading] = getattr(module, READS).readings if hasattr(module, READS) else {}
        kinds = [_named(readings[word]) if word in readings else _float(x) for word in words]
        why = ""
        for word, factor in zip(words, (x, y), strict=True):
            reading = readings.get(word)
            told = "are not rounded" if reading is None else _unlike(reading) or off(factor, reading)
            why = why or (f"{word} {told}" if told else "")
        static = all(word in readings and readings[word].step is not None for word in words)
        runs = FLOAT if why else SIMULATED
        return Product(name=name, inputs=kinds[0], weights=kinds[1], runs=runs, why=why, static=static)

    def _keep(self, one: Product) -> None:
        """What failed once stays failed: a product that ran several times is as good as its worst."""
        known = self.found.get(one.name)
        if known is None:
            self.found[one.name] = one
            return
        worse = known if known.why else one
        self.found[one.name] = worse.model_copy(update={"times": known.times + 1, "static": known.static & one.static})

    def _attention(self, word: str) -> str:
        inner = next((self.attending[id(m)] for m in reversed(self.stack) if id(m) in self.attending), None)
        return f"{self._elsewhere()} {word}" if inner is None else f"blocks.{inner}.attn.{word}"

    def _elsewhere(self) -> str:
        return self.paths.get(id(self.stack[-1]), "") if self.stack else "the model"


FUSED_WHY = "attention is torch's own, on floats"
TURNED_WHY = "its inputs are turned by floats before they are rounded"


def off(x: Tensor, reading: Reading) -> str:
    """Why values are not whole multiples of a reading's step, as a clause; "" where they are."""
    fmt = reading.format
    if reading.step is None:  # its steps are gone: of so many codes a row has no more than so many values
        few = x.reshape(-1, x.shape[-1])[:64]
        most = max(len(row.unique()) for row in few)
        return "" if most <= 1 << fmt.grid.bits else "are not on the grid of their reading"
    scale = float(reading.step.scale_G1.view(-1)[0])
    z = x.double() / scale
    whole = z.round()
    miss = float((z - whole).abs().max()) if z.numel() else 0.0
    reach = float(whole.abs().max()) if z.numel() else 0.0
    if miss > CLOSE or reach > 1 << fmt.grid.bits:
        return "are not on the grid of their reading"
    return ""


def _unlike(reading: Reading) -> str:
    """Why what a reading leaves are not integers of one step."""
    return _uneven(reading.format.grid.kind, reading.one_step, reading.format.grid.name)


def _uneven(kind: str, one_step: bool, name: str) -> str:
    if kind != "integer":
        return f"are read as {name}, which is no grid of integers"
    return "" if one_step else "have several steps along a row, whose sums are floats"


def _named(reading: Reading) -> str:
    how = "static" if reading.step is not None else "dynamic"
    turned = f"{reading.transform.name}, " if reading.transform.changes else ""
    return f"{turned}{reading.format.grid.name}, {how}"


def _float(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


@contextmanager
def _turning(recorder: Recorder) -> Iterator[None]:
    """While it lasts, the recorder knows when an input goes through its transform, of this context."""

    def told(turning: bool) -> None:
        recorder.turning = turning

    before = TURNING.set(told)
    try:
        yield
    finally:
        TURNING.reset(before)


@contextmanager
def _running(model: nn.Module, stack: list[nn.Module]) -> Iterator[None]:
    """While it lasts, `stack` holds the modules that are running in this thread: others may run the same."""
    here = get_ident()

    def push(module: nn.Module, *_: Any) -> None:
        if get_ident() == here:
            stack.append(module)

    def pop(*_: Any) -> None:
        if get_ident() == here:
            stack.pop()

    handles = [
        handle
        for module in model.modules()
        for handle in (
            module.register_forward_pre_hook(push, prepend=True),
            module.register_forward_hook(pop, always_call=True),
        )
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def named(model: nn.Module, anatomy: Anatomy) -> dict[int, str]:
    """id of each packed or plain module of a site → the site's name."""
    by_module: dict[str, list[Site]] = {}
    for site in anatomy.sites:
        by_module.setdefault(site.module, []).append(site)
    found: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        sites = [site for site in by_module.get(path, []) if site.kind != "embed"]
        if isinstance(module, PackedExperts):
            at = {(site.expert or 0, site.kind): site.name for site in sites}
            for number, expert in enumerate(module.experts):
                found |= {id(one): at[number, kind] for kind, one in expert.named_children() if (number, kind) in at}
        elif isinstance(module, PackedLinear):
            names = [site.name for site in sites] if len(sites) == len(module.parts) else [path] * len(module.parts)
            found |= {id(part): name for part, name in zip(module.parts, names, strict=True)}
        elif sites:
            found[id(module)] = " + ".join(site.name for site in sites)
    return found


def traced(model: Any, anatomy: Anatomy, ids_BT: Tensor) -> tuple[tuple[Product, ...], tuple[str, ...]]:
    """Products of one forward pass over some tokens, and the sites that it did not reach."""
    names = named(model, anatomy)
    paths = {id(module): path for path, module in model.named_modules()}
    parents = {site.block: site.module.rpartition(".")[0] for site in anatomy.sites if site.kind == "q"}
    attending = {id(model.get_submodule(path)): block for block, path in parents.items() if block is not None}
    recorder = Recorder(names, paths, attending)
    with torch.no_grad(), _running(model, recorder.stack), _turning(recorder), recorder:
        model(ids_BT, use_cache=False) if anatomy.causal else model(ids_BT)
    seen = {part for name in recorder.found for part in name.split(" + ")}
    wanted = [site.name for site in anatomy.sites if site.tap is not None]
    return tuple(recorder.found.values()), tuple(name for name in wanted if name not in seen)
