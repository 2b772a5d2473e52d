"""Runtimes that load what we write, and why one would not read a matrix.

transformers, vLLM and SGLang read compressed-tensors; what that says stands in `schemes`. The servers are narrower than
the format: their kernels for integer weights have 4 and 8 bits (`WNA16_SUPPORTED_TYPES_MAP` in both), they stack
q, k, v and gate, up into one matrix each, and they keep a head as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from regauge import parts
from regauge.anatomy.model import Anatomy, Site
from regauge.artifact.codec.base import COMPRESSED_TENSORS
from regauge.artifact.codec.schemes import Scheme, scheme_of, unsayable
from regauge.errors import SettingError, nearest
from regauge.parts import Point


@dataclass(frozen=True)
class Target:
    """A runtime.

    Attributes:
        wire: what it must be written in; None: any.
        bits: of the integer weights that it multiplies; empty: all.
        fuses: whether it stacks q, k, v and gate, up, which then need one format.
        head: whether it reads a quantised head.
    """

    name: str
    wire: str | None = None
    bits: frozenset[int] = frozenset()
    fuses: bool = False
    head: bool = True

    def kernel(self, choice: Point) -> str:
        """Why it cannot multiply by weights of a format, whatever their shape; "" where it can."""
        grid = parts.format_of(choice).grid
        if self.bits and grid.kind == "integer" and grid.bits not in self.bits:
            return f"{self.name} multiplies by integers of {' and '.join(map(str, sorted(self.bits)))} bits"
        return ""

    def scheme(self, site: Site, choice: Point, anatomy: Anatomy) -> Scheme | str | None:
        """How a matrix is said to it, or why it cannot be; None where it reads all that we write."""
        if self.wire is None:
            return None
        if not self.head and site.kind == "head":
            return f"{self.name} keeps a head as it is"
        return self.kernel(choice) or unsayable(site, choice, anatomy) or scheme_of(choice, site.shape)


SERVED = frozenset({4, 8})
TARGETS = {
    target.name: target
    for target in (
        Target("transformers", COMPRESSED_TENSORS),
        Target("vllm", COMPRESSED_TENSORS, SERVED, fuses=True, head=False),
        Target("sglang", COMPRESSED_TENSORS, SERVED, fuses=True, head=False),
        Target("regauge"),
    )
}


def target_of(name: str) -> Target:
    """A runtime by name.

    Raises:
        SettingError: nothing is known of it; names the nearest.
    """
    if name not in TARGETS:
        raise SettingError(f"nothing is known of the runtime {name!r}{nearest(name, TARGETS)}")
    return TARGETS[name]
