"""Every Python snippet of the README and of docs/ runs, a document from top to bottom in one namespace; every
`regauge` command line that they show is one that the command line understands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from regauge.search.loop.desk import Effort

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
LITTLE = Effort(
    calibration=1024, search=256, evaluation=512, gradient=512, checks=4, neighbours=2, rounds=1, points=4, builds=2,
    turns=2, memory=False, seen=512, draws=4, shown=1, samples=False, uniforms=1,
)  # fmt: skip
FENCE = re.compile(r"^```(?P<language>[a-z]*)[^\n]*\n(?P<body>.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(document: Path, language: str) -> list[str]:
    text = document.read_text(encoding="utf-8")
    return [found["body"] for found in FENCE.finditer(text) if found["language"] == language]


def name(document: Path) -> str:
    return str(document.relative_to(ROOT))


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "python")], ids=name)
def test_python_snippets_run(
    document: Path, tmp_path: Path, bundled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bundled").symlink_to(bundled.parent)
    (tmp_path / "src").symlink_to(ROOT / "src")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Effort, "most", staticmethod(lambda: LITTLE))  # a search is shown, not how good it is
    namespace: dict[str, object] = {"__name__": "snippet"}
    for number, body in enumerate(blocks(document, "python"), start=1):
        exec(compile(body, f"{name(document)}[{number}]", "exec"), namespace)


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "console")], ids=name)
def test_command_lines_parse(document: Path) -> None:
    import typer

    from regauge.cli.app import app

    command = typer.main.get_command(app)
    for body in blocks(document, "console"):
        for line in re.sub(r"\\\n\s*", " ", body).splitlines():
            if line.startswith("$ regauge "):
                words = shlex.split(line.removeprefix("$ regauge "), comments=True)
                with command.make_context("regauge", words) as context:
                    name, chosen, rest = command.resolve_command(context, words)
                    chosen.make_context(name, rest).close()


def test_every_link_inside_the_documents_leads_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{name(document)} links to {target}"
