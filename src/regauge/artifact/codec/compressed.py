"""The compressed-tensors wire: what stock transformers (and vLLM) load.

Layouts: `compressors/*` of compressed-tensors 0.20. `pack-quantized` is our dense rows padded to 32 bits; zero points
are packed down the columns; `int-quantized` and `float-quantized` keep a byte a weight under the stock name; FP4 has
two codes a byte, low nibble first.

Legend: O output channels, I input channels, N groups along a row, G = O·N.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from regauge.anatomy.model import Site, Weights
from regauge.artifact.codec.base import COMPRESSED_TENSORS, Layout, decoder, full_parameters, join, split
from regauge.artifact.codec.schemes import Scheme, expands, schemes
from regauge.errors import ArtifactError
from regauge.formats.base import Codes
from regauge.kernels.reference import pack, unpack

VERSION = "0.20.0"
"""Version of compressed-tensors whose layout this is."""


def _words(packed_OB: Tensor) -> Tensor:
    """Packed rows, padded to whole 32-bit words, as int32."""
    padded_OB = torch.nn.functional.pad(packed_OB, (0, -packed_OB.shape[1] % 4))
    # a single row keeps any stride and still counts as contiguous, so it is flattened before it is read as words
    return padded_OB.reshape(-1).view(torch.int32).reshape(packed_OB.shape[0], -1)


def _from_words(words: Tensor, bits: int, columns: int) -> Tensor:
    # a column of one word keeps any stride and still counts as contiguous: see `_words`
    whole = words.reshape(-1).view(torch.uint8).reshape(words.shape[0], -1)
    packed = whole[:, : (columns * bits + 7) // 8]
    return unpack(packed.contiguous(), bits, columns)


@dataclass(frozen=True)
class CompressedTensors:
    """Tensors as stock compressed-tensors expects them."""

    layout: Layout

    @property
    def name(self) -> str:
        return COMPRESSED_TENSORS

    def shard(self, index: int, total: int) -> str:
        return f"model-{index + 1:05d}-of-{total:05d}.safetensors"

    @cached_property
    def _schemes(self) -> dict[str, Scheme]:
        return schemes(self.layout)

    def pack(self, weights: Weights, codes: Mapping[str, Codes]) -> dict[str, Tensor]:
        out = full_parameters(self.layout, weights)
        for path, sites in self.layout.modules().items():
            if sites[0].name in codes:
                found = _WRITERS[self._schemes[path].format](sites, codes, self.layout)
                out |= {f"{path}.{name}": tensor for name, tensor in found.items()}
        return out

    def unpack(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Codes]]:
        rest = dict(tensors)
        codes: dict[str, Codes] = {}
        for path, sites in self.layout.modules().items():
            if f"{path}.weight_scale" not in rest:
                continue
            names = [name for name in rest if name.startswith(f"{path}.weight")]
            own = {name.removeprefix(f"{path}."): rest.pop(name) for name in names}
            try:
                codes |= self._read(sites, own, self._schemes[path].format)
            except (KeyError, ValueError, RuntimeError) as error:
                raise ArtifactError(f"the tensors of {path} do not fit its format: {error}.") from error
        return rest, codes

    def _read(self, sites: list[Site], own: Mapping[str, Tensor], form: str) -> dict[str, Codes]:
        choice = self.layout.quantised[sites[0].name]
        fmt = decoder(choice)
        columns = sites[0].shape[1]
        rows = sum(site.shape[0] for site in sites)
        codes = _READERS[form](own, fmt.grid.bits, columns)
        if tuple(codes.shape) != (rows, columns):
            raise ValueError(f"{tuple(codes.shape)} codes were found and {(rows, columns)} expected")
        parts = split(sites, codes)
        scales = split(sites, own["weight_scale"].reshape(rows, -1))
        zeros: dict[str, Tensor] = {}
        if "weight_zero_point" in own:
            stored = own["weight_zero_point"]
            if stored.dtype == torch.int8:  # signed and not packed, as older versions wrote them
                zeros = split(sites, (stored.to(torch.int16) + (1 << (fmt.grid.bits - 1))).to(torch.uint8))
            else:
                zeros = split(sites, _from_words(stored.t(), fmt.grid.bits, rows).t().contiguous())
        found = {}
        for site in sites:
            fields = {"scale": scales[site.name].reshape(-1, 1)}
            if site.name in zeros:
                fields["zero"] = zeros[site.name].reshape(-1, 1)
            if "weight_global_scale" in own:
                fields["global_scale"] = own["weight_global_scale"]
            found[site.name] = Codes(parts[site.name], fmt.load(fields))
        return found

    def config(self) -> dict[str, object]:
        groups: dict[Scheme, list[str]] = {}
        for path, scheme in self._schemes.items():
            groups.setdefault(scheme, []).append(path)
        if not groups:
            return {}
        forms = sorted({scheme.format for scheme in groups})
        quantised = self._schemes.keys()
        whole = dict.fromkeys(site.module for site in self.layout.anatomy.sites if site.module not in quantised)
        config: dict[str, object] = {
            "quant_method": COMPRESSED_TENSORS,
            "format": forms[0] if len(forms) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": {f"group_{i}": scheme.json(paths) for i, (scheme, paths) in enumerate(groups.items())},
            "ignore": list(whole),
            "kv_cache_scheme": None,
            "version": VERSION,
        }
        if expands(self.layout):
            config["dequantize"] = True
        return config


def _scales(sites: list[Site], codes: Mapping[str, Codes]) -> Tensor:
    rows = {site.name: codes[site.name].step.fields["scale"].reshape(site.shape[0], -1) for site in sites}
    return join(sites, rows).contiguous()


def _codes(sites: list[Site], codes: Mapping[str, Codes]) -> Tensor:
    return join(sites, {site.name: codes[site.name].codes_OI for site in sites})


def _bits(sites: list[Site], layout: Layout) -> int:
    return decoder(layout.quantised[sites[0].name]).grid.bits


def _write_packed(sites: list[Site], codes: Mapping[str, Codes], layout: Layout) -> dict[str, Tensor]:
    bits, codes_OI = _bits(sites, layout), _codes(sites, codes)
    found = {
        "weight_packed": _words(pack(codes_OI, bits)),
        "weight_scale": _scales(sites, codes),
        "weight_shape": torch.tensor(codes_OI.shape, dtype=torch.int64, device="cpu"),
    }
    if codes[sites[0].name].step.zero_G1 is not None:
        rows = {site.name: codes[site.name].step.fields["zero"].reshape(site.shape[0], -1) for site in sites}
        zero_ON = join(sites, rows)
        found["weight_zero_point"] = _words(pack(zero_ON.t().contiguous(), bits)).t().contiguous()
        # Its loader multiplies in the dtype of these steps, so they must not be narrower than the model.
        scale = found["weight_scale"]
        found["weight_scale"] = scale.to(torch.promote_types(scale.dtype, layout.dtype))
    return found


def _write_bytes(sites: list[Site], codes: Mapping[str, Codes], layout: Layout) -> dict[str, Tensor]:
    weight_OI = _codes(sites, codes).to(torch.int16).sub_(128).to(torch.int8)
    return {"weight": weight_OI, "weight_scale": _scales(sites, codes)}


def _write_fp8(sites: list[Site], codes: Mapping[str, Codes], layout: Layout) -> dict[str, Tensor]:
    weight_OI = _codes(sites, codes).contiguous().view(torch.float8_e4m3fn)
    return {"weight": weight_OI, "weight_scale": _scales(sites, codes)}


def _write_fp4(sites: list[Site], codes: Mapping[str, Codes], layout: Layout) -> dict[str, Tensor]:
    found = {"weight_packed": pack(_codes(sites, codes), 4), "weight_scale": _scales(sites, codes)}
    fields = codes[sites[0].name].step.fields
    return found | {f"weight_{name}": fields[name] for name in ("global_scale",) if name in fields}


_WRITERS: dict[str, Callable[[list[Site], Mapping[str, Codes], Layout], dict[str, Tensor]]] = {
    "pack-quantized": _write_packed,
    "int-quantized": _write_bytes,
    "float-quantized": _write_fp8,
    "nvfp4-pack-quantized": _write_fp4,
    "mxfp4-pack-quantized": _write_fp4,
}

_READERS: dict[str, Callable[[Mapping[str, Tensor], int, int], Tensor]] = {
    "pack-quantized": lambda own, bits, columns: _from_words(own["weight_packed"], bits, columns),
    "int-quantized": lambda own, bits, columns: own["weight"].to(torch.int16).add_(128).to(torch.uint8),
    "float-quantized": lambda own, bits, columns: own["weight"].view(torch.uint8),
    "nvfp4-pack-quantized": lambda own, bits, columns: unpack(own["weight_packed"], bits, columns),
    "mxfp4-pack-quantized": lambda own, bits, columns: unpack(own["weight_packed"], bits, columns),
}
