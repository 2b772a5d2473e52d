"""regauge's own wire: any grid, grain, scale and compensator, under names that stock code does not look for.

A quantised site `s` is `s.codes` (dense rows of bits), a tensor for each field of its steps (`s.scale`,
`s.global_scale`, …; zero points packed into one row), and `s.extra.*` for what a compensator adds. Full-precision
tensors keep the module's keys. What each site is stands in config.json (`header`), with a format version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from regauge.anatomy.model import Weights
from regauge.artifact.codec.base import REGAUGE, Layout, decoder, full_parameters
from regauge.artifact.header import header
from regauge.errors import ArtifactError
from regauge.formats.base import Codes
from regauge.kernels.reference import pack, unpack


@dataclass(frozen=True)
class Packed:
    """Tensors in regauge's packed format."""

    layout: Layout

    @property
    def name(self) -> str:
        return REGAUGE

    def shard(self, index: int, total: int) -> str:
        return f"regauge-{index + 1:05d}-of-{total:05d}.safetensors"

    def pack(self, weights: Weights, codes: Mapping[str, Codes]) -> dict[str, Tensor]:
        out = full_parameters(self.layout, weights)
        quantised = self.layout.quantised
        for name, found in codes.items():
            grid = decoder(quantised[name]).grid
            out[f"{name}.codes"] = pack(found.codes_OI, grid.bits)
            for part, tensor in found.step.fields.items():
                zero = part == "zero"
                out[f"{name}.{part}"] = pack(tensor.reshape(1, -1), grid.bits) if zero else tensor.contiguous()
            for part, tensor in found.extra.items():
                out[f"{name}.extra.{part}"] = tensor.contiguous()
        return out

    def unpack(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Codes]]:
        rest = dict(tensors)
        codes: dict[str, Codes] = {}
        shapes = {site.name: site.shape for site in self.layout.anatomy.sites}
        for name, choice in self.layout.quantised.items():
            if f"{name}.codes" not in rest:
                continue
            fmt = decoder(choice)
            own = {key.removeprefix(f"{name}."): rest.pop(key) for key in list(rest) if _belongs(key, name)}
            extra = {key.removeprefix("extra."): own.pop(key) for key in list(own) if key.startswith("extra.")}
            (rows, columns), bits = shapes[name], fmt.grid.bits
            groups, _ = fmt.grain.groups((rows, columns))
            try:
                codes_OI = unpack(own.pop("codes"), bits, columns)
                if "zero" in own:
                    own["zero"] = unpack(own["zero"], bits, groups).reshape(-1, 1)
                if codes_OI.shape[0] != rows or fmt.scale.load(own).numel() != groups:
                    raise ValueError(f"{codes_OI.shape[0]} rows and {own['scale'].numel()} steps were found")
                codes[name] = Codes(codes_OI, fmt.load(own), extra)
            except (KeyError, ValueError, RuntimeError) as error:
                raise ArtifactError(
                    f"the tensors of {name} do not fit {rows} x {columns}, {fmt.grid.name}, {fmt.grain.name}: {error}."
                ) from error
        return rest, codes

    def config(self) -> dict[str, object]:
        return header(self.layout)


FIELDS = ("codes", "scale", "zero", "global_scale", "row_scale")


def _belongs(key: str, site: str) -> bool:
    """Whether a tensor is a field or an extra of a site (`blocks.0.attn.q` has fields, and so may `…q.norm`)."""
    if not key.startswith(f"{site}."):
        return False
    part = key.removeprefix(f"{site}.")
    return part in FIELDS or part.startswith("extra.")
