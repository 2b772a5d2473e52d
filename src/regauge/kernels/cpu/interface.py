"""The C interface of `native/regauge.h` as ctypes sees it."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from regauge.kernels.cpu import checks
from regauge.kernels.cpu.library import library

META = ("rows", "columns", "bits", "group", "step", "zero", "value", "offset", "mantissa", "bias")
"""The integers of an `rg_matrix`, in its order."""

PANEL = 16
"""Rows of a panel."""
CUT_BITS, MOST_RUNS = 12, 4
"""Of the numbers of groups that the stride of a matrix in runs holds, and how many it holds."""
BOOK = 129
"""Floats of a trellis's table: its values, and what makes whole numbers of them."""

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_ARGUMENTS = {
    "rg_bandwidth": (_INT, ctypes.c_size_t, ctypes.c_double),
    "rg_panel_bytes": (_POINTER,),
    "rg_pack": (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _INT),
    "rg_unpack": (_POINTER, _POINTER, _INT),
    "rg_decode": (_POINTER, _LONG, _LONG, _POINTER, _POINTER, _INT, _INT),
    "rg_linear": (_POINTER, _POINTER, _POINTER, _LONG, _INT, _INT, _INT),
    "rg_gemm": (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _LONG, _INT, _INT),
    "rg_coded": (_POINTER, _POINTER, _POINTER, _LONG, _INT, _INT),
    "rg_has_columns": (),
    "rg_has_cuts": (),
    "rg_has_gram": (),
    "rg_has_planes": (),
    "rg_gram": (_POINTER, _LONG, _LONG, _POINTER, _INT),
    "rg_range": (*(_POINTER,) * 3, _INT, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _INT),
    "rg_feedback": (_POINTER, _INT),
    "rg_trellis_round": (_POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _INT),
    "rg_trellis_feedback": (_POINTER, _POINTER, _INT),
    "rg_lists_near": (_POINTER, _POINTER, _POINTER, _LONG, _LONG, _POINTER, _INT),
    "rg_attend": (_POINTER, _INT),
    "rg_integers": (_POINTER, _POINTER, _POINTER, _LONG, _INT),
}
_RESULTS = {"rg_bandwidth": ctypes.c_double, "rg_panel_bytes": ctypes.c_size_t}


class Struct(ctypes.Structure):
    """`rg_matrix`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("panels", "row_scale", "table")),
        *((name, ctypes.c_int32) for name in META),
        ("stride", ctypes.c_int64),
    ]


def struct_of(
    panels: Tensor, row_scale_O: Tensor | None, table: Tensor | None, meta: tuple[int, ...], stride: int = 0
) -> Struct:
    """The C view of a packed matrix; its tensors must outlive it.

    Args:
        stride: bytes from panel to panel, in planes panels of the whole; 0: as its columns, and rows, say; below 0: in
            runs (`layout.stride_of`).

    Raises:
        ValueError: there is no such matrix, or its tensors are too small for it.
    """
    if len(meta) != len(META):
        raise ValueError(f"a matrix is {len(META)} integers ({', '.join(META)}), not {len(meta)}")
    checks.integers("the integers of a matrix", meta)
    checks.tensor("panels", panels, (torch.uint8,), (None,))
    rows, bits = meta[0], meta[2]
    checks.optional("row scales", row_scale_O, (torch.float32,), (None,))
    if row_scale_O is not None and row_scale_O.numel() < -(-rows // PANEL) * PANEL:
        raise ValueError(f"{row_scale_O.numel()} row scales are too few for {rows} rows in panels of {PANEL}")
    values = BOOK if meta[META.index("value")] == 4 else 1 << max(0, min(bits, 30))
    checks.optional("values of codes", table, (torch.float32,), (values,))
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in (panels, row_scale_O, table)]
    struct = Struct(*pointers, *meta, stride)
    size = int(kernels().rg_panel_bytes(ctypes.byref(struct)))
    whole = int(kernels().rg_panel_bytes(ctypes.byref(Struct(*pointers, *meta, 0))))
    if not size or not whole:
        told = ", ".join(f"{name} {number}" for name, number in zip(META, meta, strict=True))
        raise ValueError(f"the kernels have no matrix of {told}")
    said, count = dict(zip(META, meta, strict=True)), -(-rows // PANEL)
    if stride < 0:
        least = size * (-stride >> MOST_RUNS * CUT_BITS)
    else:
        least = size * (stride or count) if planes(said) else (count - 1) * size + whole
    if panels.numel() < least:
        raise ValueError(f"{panels.numel()} bytes of panels are too few for {rows} x {meta[1]} of {bits} bits")
    return struct


def planes(said: Mapping[str, int]) -> bool:
    """Whether the bits of a matrix with such integers lie apart."""
    return not said["value"] and said["bias"] > 0


def has(name: str) -> bool:
    """Whether the library is here and has a function; those that were added to an interface are asked for."""
    return library() is not None and getattr(kernels(), name, None) is not None


def kernels() -> ctypes.CDLL:
    """The library, with the types of what it takes and gives.

    Raises:
        RuntimeError: it is not here.
    """
    found = library()
    if found is None:
        raise RuntimeError("the C++ kernels are not here; ask regauge.kernels.cpu.library.available() first")
    if not vars(found).get("typed"):
        for name, types in _ARGUMENTS.items():
            if function := getattr(found, name, None):  # what only adds to the interface may be missing: `has`
                function.argtypes, function.restype = types, _RESULTS.get(name, ctypes.c_int)
        vars(found)["typed"] = True
    return found
