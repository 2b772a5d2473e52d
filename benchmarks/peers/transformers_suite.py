"""transformers' own generation and model tests on models that Regauge compressed and loaded, beside plain ones.

    python benchmarks/peers/setup.py suite                                    # once
    python benchmarks/peers/transformers_suite.py --tests ../transformers     # a checkout; twelve families
    python benchmarks/peers/transformers_suite.py --repository X.git --commit C --families llama opt

Every test runs twice on the testers' tiny random models: on transformers' own, and with each of them compressed
(`rtn-w8`) and loaded (`suite_plugin.py` says how). Compared is test by test. What a plain model fails too (tests of
another version than the installed transformers, mostly) is counted apart; what differs by design stands in EXPECTED
with its reason; any other difference is named and makes the exit status 1. Each answer of the native step is also
compared with that of transformers' modules on the same packed weights. `--spoil` rolls the step's logits by one, which
must be seen. The tests are copied into a scratch folder, and nothing of them is kept.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from setup import python
from suite_expected import EXPECTED, LEFT_OUT

HERE = Path(__file__).resolve().parent
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gpt_neox", "gpt2", "opt", "mixtral", "bert", "vit"]
MORE = ["qwen3_moe"]
PARTS = (":(glob)tests/*.py", "tests/generation", "tests/utils", "tests/models/__init__.py", "utils/test_module")
DROPPED = {'"cache_implementation": "dynamic_full",': ""}
"""What newer versions of transformers refuse in the tests' own calls, and what stands there instead."""


@dataclass
class Row:
    """One family: how many tests there are of each kind."""

    skipped: int = 0
    failing: int = 0
    same: int = 0
    designed: dict[str, str] = field(default_factory=dict)  # test -> reason
    unexplained: dict[str, str] = field(default_factory=dict)  # test -> what was seen

    @property
    def compared(self) -> int:
        return self.same + len(self.designed) + len(self.unexplained)


def unpack(scratch: Path, given: argparse.Namespace) -> None:
    """Copies the tests into the scratch folder, and takes from them what cannot run here."""
    wanted = [*PARTS, *(f"tests/models/{family}" for family in given.families)]
    where = ["--git-dir", str(given.repository)] if given.repository else ["-C", str(given.tests)]
    made = subprocess.run(["git", *where, "archive", given.commit, "--", *wanted], capture_output=True, check=False)
    if made.returncode:
        raise SystemExit(f"no tests from {given.repository or given.tests}: {made.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(made.stdout)) as archive:
        archive.extractall(scratch, filter="data")
    mixin = "class PipelineTesterMixin:  # pipelines want models of the hub\n    pass\n"
    (scratch / "tests" / "test_pipeline_mixin.py").write_text(mixin, encoding="utf-8")
    for path in (scratch / "tests" / "generation").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        for old, new in DROPPED.items():
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")
    (scratch / "artifacts").mkdir()


def run(scratch: Path, kind: str, given: argparse.Namespace) -> dict[tuple[str, str], tuple[str, str]]:
    """One run of all tests: (family, test) -> (passed, failed or skipped; the first line of why)."""
    import regauge

    left = "".join(f" and not {name}" for name in LEFT_OUT)
    out = scratch / f"{kind}.xml"
    command = [str(python("suite")), "-m", "pytest", "-q", "-p", "suite_plugin", "-p", "no:cacheprovider"]
    command += ["-p", "no:warnings", "--tb=short", "-n", str(given.jobs), "--junitxml", str(out)]
    command += ["-k", f"ModelTest{left}"]
    command += [f"tests/models/{family}/test_modeling_{family}.py" for family in given.families]
    paths = [str(HERE), str(Path(regauge.__file__).parents[1]), *sys.path[1:]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "SUITE_FOLDER": str(scratch)}
    if kind == "ours":
        environment |= {"SUITE_FAMILIES": " ".join(given.families), "SUITE_PRESET": given.preset}
        environment |= {"SUITE_ACTIVATIONS": given.activations} if given.activations else {}
        environment |= {"SUITE_SPOILT": "1"} if given.spoil else {}
    with (scratch / f"{kind}.log").open("w", encoding="utf-8") as log:
        subprocess.run(command, cwd=scratch, env=environment, stdout=log, stderr=log, check=False)
    if not out.exists():
        raise SystemExit(f"pytest did not end: {(scratch / f'{kind}.log').read_text(encoding='utf-8')[-2000:]}")
    return read(out)


def read(path: Path) -> dict[tuple[str, str], tuple[str, str]]:
    """What a JUnit file tells of every test."""
    found = {}
    for case in ET.parse(path).iter("testcase"):
        family = (case.get("classname") or "tests.models.?").split(".")[2]
        bad = [*case.findall("failure"), *case.findall("error")]
        why = " ".join((bad[0].get("message") or "").split())[:200] if bad else ""
        outcome = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
        found[family, case.get("name") or ""] = outcome, why
    return found


def compared(
    plain: dict[tuple[str, str], tuple[str, str]], ours: dict[tuple[str, str], tuple[str, str]]
) -> dict[str, Row]:
    """Test by test, a row a family."""
    rows: dict[str, Row] = {}
    for family, name in sorted(plain.keys() | ours.keys()):
        row = rows.setdefault(family, Row())
        before, _ = plain.get((family, name), ("did not run", ""))
        after, why = ours.get((family, name), ("did not run", ""))
        reasons = [entry.reason for entry in EXPECTED if entry.explains(family, name, why)]
        if before == "failed":
            row.failing += 1
        elif before == after:
            row.skipped += before == "skipped"
            row.same += before == "passed"
        elif reasons:
            row.designed[name] = reasons[0]
        else:
            row.unexplained[name] = f"{before} plain, {after} ours: {why}"
    return rows


def told(scratch: Path) -> tuple[dict[str, Counter[str]], float]:
    """What the plugin counted, a family, and how far the native step was from transformers' modules at most."""
    found: dict[str, Counter[str]] = {}
    furthest = 0.0
    for path in scratch.glob("told-ours-*.json"):
        one = json.loads(path.read_text(encoding="utf-8"))
        furthest = max(furthest, one["furthest"])
        for name, count in one["counts"].items():
            family, _, what = name.partition(": ")
            found.setdefault(family, Counter())[what] += count
    return found, furthest


def table(rows: dict[str, Row], counts: dict[str, Counter[str]]) -> str:
    """Markdown: a line a family, and the sum."""
    lines = [
        "| family | compared | pass | differ by design | unexplained | fail plain too "
        "| models loaded | `generate`, native of all |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cells = {family: _cells(row, counts.get(family, Counter())) for family, row in rows.items()}
    total = [sum(column) for column in zip(*cells.values(), strict=True)]
    for family, numbers in [*cells.items(), ("together", total)]:
        *most, native, every = numbers
        lines.append(f"| {family} | {' | '.join(map(str, most))} | {native} of {every} |")
    return "\n".join(lines)


def _cells(row: Row, count: Counter[str]) -> list[int]:
    numbers = [row.compared, row.same, len(row.designed), len(row.unexplained), row.failing]
    return [*numbers, count["models loaded"], count["generate, native"], count["generate"]]


def report(rows: dict[str, Row], counts: dict[str, Counter[str]], whole: bool) -> int:
    """Prints everything; the exit status."""
    print(table(rows, counts), end="\n\n")
    print("Differ by design:")
    for entry in EXPECTED:
        names = sorted(
            {name for row in rows.values() for name, reason in row.designed.items() if reason == entry.reason}
        )
        many = sum(reason == entry.reason for row in rows.values() for reason in row.designed.values())
        if many:
            shown = names if len(names) < 5 else [*names[:2], f"{len(names) - 2} others"]
            print(f"- {entry.reason} ({many}: {', '.join(shown)})")
        elif whole:
            print(f"- STALE, nothing differs so: {entry.reason} ({entry.pattern})")
    print("Left out:", *(f"- {name}: {reason}." for name, reason in LEFT_OUT.items()), sep="\n")
    print("Where transformers' modules decoded:")
    reasons: Counter[str] = Counter()
    for count in counts.values():
        reasons.update({what: many for what, many in count.items() if what.startswith("not native")})
    print(*(f"- {what.partition(': ')[2]} ({many} calls)" for what, many in reasons.most_common()), sep="\n")
    unexplained = [(family, *one) for family, row in rows.items() for one in row.unexplained.items()]
    for family, name, why in unexplained:
        print(f"UNEXPLAINED {family} {name}: {why}")
    together: Counter[str] = sum(counts.values(), Counter())
    hollow = [what for what in ("models loaded", "generate, native") if not together[what]]
    for what in hollow:
        print(f"NOTHING TESTED: no {what}")
    return 1 if unexplained or hollow else 0


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = words.add_mutually_exclusive_group(required=True)
    source.add_argument("--tests", type=Path, help="a checkout of transformers")
    source.add_argument("--repository", type=Path, help="a git directory of transformers")
    words.add_argument("--commit", default="HEAD", help="which of its commits")
    words.add_argument("--families", nargs="+", default=FAMILIES, choices=[*FAMILIES, *MORE])
    words.add_argument("--preset", default="rtn-w8", help="how models are compressed")
    words.add_argument("--activations", help="as of load(): int8, int16 or float32")
    words.add_argument("--jobs", type=int, default=2)
    words.add_argument("--scratch", type=Path, help="an empty folder that stays; none: one that goes")
    words.add_argument("--spoil", action="store_true", help="spoil the native step, and see it found")
    given = words.parse_args()
    if not python("suite").exists():
        raise SystemExit("not installed: python benchmarks/peers/setup.py suite")
    with tempfile.TemporaryDirectory() as folder:
        scratch = (given.scratch or Path(folder)).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        if any(scratch.iterdir()):
            raise SystemExit(f"{scratch} is not empty")
        unpack(scratch, given)
        results = []
        for kind in ("plain", "ours"):
            start = time.perf_counter()
            results.append(run(scratch, kind, given))
            print(f"{kind}: {len(results[-1])} tests in {time.perf_counter() - start:.0f} s", flush=True)
        versions = (f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch"))
        print(f"{given.preset}; {', '.join(versions)}", end="\n\n")
        counts, furthest = told(scratch)
        steps = sum(count["calls of the native step"] for count in counts.values())
        print(f"{steps} answers of the native step, each beside transformers' modules: {furthest:.0e} apart at most\n")
        return report(compared(*results), counts, given.families == FAMILIES)


if __name__ == "__main__":
    sys.exit(main())
