"""The C structures of a decode step as ctypes sees them, field by field in the order of `native/regauge.h`."""

from __future__ import annotations

import ctypes

from regauge.kernels.cpu.interface import Struct

NORM_FIELDS = ("attn_norm", "q_norm", "k_norm", "attn_post", "mlp_norm", "mlp_post")
TAP_FIELDS = ("attn_in", "attn_mixed", "mlp_in", "mlp_hidden")
SITE_FIELDS = ("q", "k", "v", "o", "gate", "up", "down", "router")
INT_FIELDS: tuple[str, ...] = ("expert_count", "experts_used", "normalise", "heads", "kv_heads", "head_dim")
INT_FIELDS += ("rotary", "interleaved", "rope", "parallel", "activation", "window")

_POINTER, _INT, _FLOAT, _LONG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float, ctypes.c_int64
_INTS = ctypes.POINTER(_INT)


class CNorm(ctypes.Structure):
    """`rg_norm`."""

    _fields_ = [("gain", _POINTER), ("bias", _POINTER), ("kind", _INT), ("size", _INT), ("eps", _FLOAT)]


class CTap(ctypes.Structure):
    """`rg_tap`."""

    _fields_ = [
        *((name, _POINTER) for name in ("diagonal", "left", "right", "steps", "zeros")),
        *((name, _INT) for name in ("transform", "size", "format", "bits", "group", "asymmetric", "value", "mantissa")),
        *((name, _FLOAT) for name in ("step", "zero", "top", "tiny")),
    ]


class CLowRank(ctypes.Structure):
    """`rg_low_rank`."""

    _fields_ = [("left", Struct), ("right", Struct)]


class CSite(ctypes.Structure):
    """`rg_site`."""

    _fields_ = [
        ("matrix", Struct),
        ("bias", _POINTER),
        ("low_rank", ctypes.POINTER(CLowRank)),
        ("activations", _INT),
        ("unrounded", _INT),
    ]


class CBlock(ctypes.Structure):
    """`rg_block`."""

    _fields_ = [
        *((name, CNorm) for name in NORM_FIELDS),
        *((name, CTap) for name in TAP_FIELDS),
        *((name, CSite) for name in SITE_FIELDS),
        ("experts", ctypes.POINTER(CSite)),
        *((name, _INT) for name in INT_FIELDS),
        ("scale", _FLOAT),
        ("softcap", _FLOAT),
    ]


class CProgram(ctypes.Structure):
    """`rg_program`."""

    _fields_ = [
        ("blocks", ctypes.POINTER(CBlock)),
        ("norm", CNorm),
        ("head_in", CTap),
        ("head", CSite),
        ("block_count", _INT),
        ("hidden", _INT),
        ("rope_count", _INT),
        ("head_softcap", _FLOAT),
    ]


class CBlocks(ctypes.Structure):
    """`rg_blocks`."""

    _fields_ = [
        *((name, _POINTER) for name in ("blocks", "offsets", "rows")),
        *((name, _INT) for name in ("bits", "axis", "group", "low", "offset", "dtype", "value")),
    ]


class CPart(ctypes.Structure):
    """`rg_part`."""

    _fields_ = [
        ("keys", CBlocks),
        ("values", CBlocks),
        *((name, _POINTER) for name in ("lengths", "firsts", "row_offsets")),
        ("tokens", _INT),
    ]


class CStore(ctypes.Structure):
    """`rg_store`."""

    _fields_ = [
        *((name, _POINTER) for name in ("keys", "values", "lengths", "firsts")),
        ("parts", ctypes.POINTER(CPart)),
        *((name, _INT) for name in ("part_count", "keys_dtype", "values_dtype", "room", "origin", "turned")),
    ]


class CAttention(ctypes.Structure):
    """`rg_attention`."""

    _fields_ = [
        *((name, _POINTER) for name in ("q", "out")),
        ("store", ctypes.POINTER(CStore)),
        ("starts", _INTS),
        *(
            (name, _INT)
            for name in ("batch", "tokens", "heads", "kv_heads", "head_dim", "dtype", "rows", "window", "all")
        ),
        ("scale", _FLOAT),
        ("softcap", _FLOAT),
    ]


class CCall(ctypes.Structure):
    """`rg_call`."""

    _fields_ = [
        ("x", _POINTER),
        ("logits", _POINTER),
        ("positions", _INTS),
        ("starts", _INTS),
        ("cosines", ctypes.POINTER(_POINTER)),
        ("sines", ctypes.POINTER(_POINTER)),
        ("stores", ctypes.POINTER(CStore)),
        ("lengths", _INTS),
        ("batch", _INT),
        ("tokens", _INT),
        ("last", _INT),
    ]
