"""What every peer that calibrates is told, which tokens it reads, and what it answers.

    python benchmarks/peers/calibrate_NAME.py MODEL OUT TEXT TOKENS LENGTH
    python benchmarks/peers/quality_NAME.py MODEL OUT TEXT TOKENS LENGTH KIND

TEXT is a file or a folder of them. The windows have LENGTH tokens each and lie evenly over the whole text, as many as
hold TOKENS; each opens with the tokens that the tokenizer sets before a text. The answer is one line of JSON: seconds
since the process began, tokens read, seconds of each phase, and versions.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from tokenizers import Tokenizer


@dataclass
class Job:
    """One call: what was asked, and seconds by phase."""

    model: Path
    out: Path
    text: Path
    tokens: int
    length: int
    began: float
    kind: str = ""
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Windows."""
        return -(-self.tokens // self.length)

    def ends(self, phase: str) -> None:
        """All time since the phase before counts for this one."""
        self.phases[phase] = time.monotonic() - self.began - sum(self.phases.values())

    def tell(self, *packages: str, **more: object) -> None:
        """The line of JSON."""
        versions = {name: version(name) for name in packages}
        told = {"seconds": time.monotonic() - self.began, "tokens": self.count * self.length, "phases": self.phases}
        print(json.dumps({**told, "versions": versions, **more}), flush=True)


def given(doc: str | None, began: float) -> Job:
    """The command line."""
    words = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    words.add_argument("model", type=Path)
    words.add_argument("out", type=Path)
    words.add_argument("text", type=Path)
    words.add_argument("tokens", type=int)
    words.add_argument("length", type=int)
    words.add_argument("kind", nargs="?", default="", help="w3g64, or a name of the peer's own")
    job = Job(**vars(words.parse_args()), began=began)
    job.out.mkdir(parents=True, exist_ok=True)
    return job


def windows(job: Job) -> list[list[int]]:
    """Token ids, LENGTH in each window."""
    files = sorted(path for path in job.text.glob("**/*") if path.is_file()) if job.text.is_dir() else [job.text]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    tokenizer = Tokenizer.from_file(str(job.model / "tokenizer.json"))
    front, ids = tokenizer.encode("").ids, tokenizer.encode(text, add_special_tokens=False).ids
    body = job.length - len(front)
    if len(ids) < job.count * body:
        raise SystemExit(f"{job.text} has {len(ids):,} tokens; {job.count} windows of {body} need {job.count * body:,}")
    step = (len(ids) - body) / max(job.count - 1, 1)
    return [[*front, *ids[int(at * step) :][:body]] for at in range(job.count)]


def group(model: Path, wanted: int = 128) -> int:
    """The widest group up to `wanted` that divides the inputs of every linear layer."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    while config["hidden_size"] % wanted or config["intermediate_size"] % wanted:
        wanted //= 2
    return wanted
