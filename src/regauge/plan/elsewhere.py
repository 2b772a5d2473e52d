"""Names by which other tools know a method, and what comes nearest to each here: an error that leads on.

Nothing is substituted in silence: what another tool makes of a name differs from ours in what the sentence says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """A family of names of another tool.

    Attributes:
        names: a pattern of the whole name, in lower case, `_` and `.` as `-`.
        what: what it is there.
        here: the preset that is nearest, with `\\g<…>` of the pattern; empty where there is none yet.
        apart: how that differs, or what to do meanwhile.
    """

    names: str
    what: str
    here: str
    apart: str


LIST = (
    Known(r"q(?P<bits>[2-8])-[01]", "llama.cpp's {bits} bits in groups of 32", r"rtn-w\g<bits>g32", "steps in bf16"),
    Known(
        r"q(?P<bits>[2-6])-k(-[sml])?",
        "llama.cpp's k-quant of {bits} bits",
        r"imatrix-w\g<bits>g32",
        "one group a step instead of blocks of blocks; `regauge fit --budget memory=...` spends unevenly as they do",
    ),
    Known(
        r"iq(?P<bits>[1-4])-(xxs|xs|s|m|nl)",
        "llama.cpp's code book of {bits} bits",
        "",
        "`regauge fit --budget memory=...` at the same bytes is what we have against it",
    ),
    Known(
        r"awq(-w?4)?(-?g?(128|64|32))?",
        "AWQ",
        "awq-w4g128",
        "strengths by the error of the block; `regauge explain awq-w4g128` says what differs",
    ),
    Known(r"autoround|auto-round|signround", "AutoRound", "autoround-w4g128", "fewer tokens a step: see its page"),
    Known(r"omniquant", "OmniQuant", "omniquant-lwc-w4g128", "learnt clipping, without learnt equivalence"),
    Known(r"gptq(-int(?P<bits>[2-8]))?", "GPTQ", "gptq-w4g128", "say the bits and the group"),
    Known(r"w(?P<bits>[48])a16(-asym)?", "a scheme of weights alone", r"gptq-w\g<bits>g128", "or rtn-, without text"),
    Known(r"w8a8|int8|llm-int8", "8 bits of weights and activations", "smoothquant", "or rtn-w8a8, without text"),
    Known(r"w4a8", "4 bits of weights, 8 of activations", "quarot-w4a8", "rotated, so that activations round well"),
    Known(r"w4a4|quarot|spinquant", "4 bits of weights, fewer of activations", "quarot-w4a8", "activations at 8 bits"),
    Known(r"fp8(-dynamic|-e4m3)?", "8-bit floats", "fp8", "the same: steps a channel and a token"),
    Known(r"nvfp4a16|nvfp4", "NVFP4", "nvfp4", "of weights"),
    Known(r"mxfp4a16|mxfp4-moe", "MXFP4", "mxfp4", "of weights"),
    Known(r"bnb-4bit|bitsandbytes|4bit|qlora", "bitsandbytes' 4 bits", "nf4", "the same code book in groups of 64"),
    Known(r"bnb-8bit|8bit", "bitsandbytes' 8 bits", "rtn-w8", "without its outlier columns in 16 bits"),
    Known(r"hqq|aqlm|quip#?|qtip|vptq|exl[23]|spqr|squeezellm|bitnet", "a method that we lack", "", "see the presets"),
    Known(r"imatrix", "llama.cpp's importance matrix", "imatrix-w4g32", "say the bits and the group"),
    Known(r"rtn|nearest", "rounding to nearest", "rtn-w4g128", "say the bits and the group"),
    Known(r"int4|q4", "4 bits", "gptq-w4g128", "or rtn-w4g128, which needs no text"),
)


def known_elsewhere(name: str) -> str:
    """A sentence that leads from another tool's name to the nearest preset; empty where we do not know the name."""
    told = re.sub(r"[_.]", "-", name.lower())
    for known in LIST:
        found = re.fullmatch(known.names, told)
        if found:
            bits = found.groupdict().get("bits") or "4"
            what = known.what.format(bits=bits)
            if not known.here:
                return f"{name!r} is {what}, which no preset makes; {known.apart}; 'regauge methods' lists them."
            here = known.here.replace(r"\g<bits>", bits)
            return f"{name!r} is {what}; here that is nearest to {here!r} ({known.apart})."
    return ""
