"""How far dry runs are off: what they predict of a preset, beside the KL that its artifact then has.

    python benchmarks/foresight.py MODEL --calibration TEXT --eval TEXT [--presets rtn-w4g128,gptq-w4g32]

Prints predicted, measured and their ratio for each preset, and the spread of the ratios (minutes on one core). The
constants of `engine/foresight.py` are the medians of such runs; docs/LOG.md has the figures.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import regauge as rg
from regauge.text.corpora import corpus
from regauge.text.split import pieces

PRESETS = (
    "rtn-w2g32,rtn-w3g128,rtn-w4g32,rtn-w4,rtn-w8,nf4,nvfp4,fp8-weight-only,gptq-w2g32,gptq-w3g64,gptq-w4g128,gptq-w8,"
    "imatrix-w4g32,quarot-gptq-w4g32"
)
TOKENS, LENGTH = 8192, 256


def row(preset: str, model: str, calibration: str, held_out: list[str]) -> tuple[float, float]:
    """Predicted and measured KL, nats a token."""
    told = rg.dry_run(preset, model, calibration=calibration, tokens=TOKENS, length=LENGTH)
    if told.kl is None:
        raise SystemExit(f"{preset}: {told.quality}")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        rg.apply(preset, model, out, calibration=calibration, tokens=TOKENS, length=LENGTH, quiet=True)
        found = rg.api.measure(model, out, eval=held_out, quiet=True).rows[1].quality
    assert found is not None, "it predicts next tokens"
    return (told.kl[0] * told.kl[1]) ** 0.5, found.kl.value


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("model")
    asked.add_argument("--calibration", required=True)
    asked.add_argument("--eval", required=True)
    asked.add_argument("--presets", default=PRESETS)
    given = asked.parse_args()
    held_out = pieces(corpus(given.eval))[:200]
    ratios = []
    for preset in given.presets.split(","):
        predicted, measured = row(preset, given.model, given.calibration, held_out)
        ratios.append(predicted / measured)
        print(f"{preset:<22}predicted {predicted:8.2g}  measured {measured:8.2g}  ratio {ratios[-1]:.2f}", flush=True)
    print(f"ratios {min(ratios):.2f} to {max(ratios):.2f}, median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
