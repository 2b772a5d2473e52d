"""`OUT.search`: whatever a search keeps carries a hash, belongs to one search, and nothing else is removed with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from regauge.artifact import files
from regauge.artifact.ownership import search_folder
from regauge.artifact.staging import Staging
from regauge.errors import OutputError, ResumeError
from regauge.search.kept import DONE, Folder, seal, sweep, whole


def test_a_work_folder_belongs_to_one_search(tmp_path: Path) -> None:
    folder = Folder.open(tmp_path / "w", {"seed": 0, "source": "a"}, force=False)
    folder.save("fisher.json", {"a": 1})
    assert Folder.open(tmp_path / "w", {"seed": 0, "source": "a"}, force=False).load("fisher.json") == {"a": 1}
    with pytest.raises(ResumeError, match=r"seed \(was 0, now 1\)"):
        Folder.open(tmp_path / "w", {"seed": 1, "source": "a"}, force=False)
    assert Folder.open(tmp_path / "w", {"seed": 1, "source": "a"}, force=True).load("fisher.json") is None


def test_a_search_begun_with_another_time_says_so_whole(tmp_path: Path) -> None:
    begun: dict[str, object] = {"seed": 0, "effort": {"calibration": 8192}, "texts": ["a"]}
    more: dict[str, object] = {"seed": 0, "effort": {"calibration": 32768}, "texts": ["b"]}
    Folder.open(tmp_path / "w", begun, force=False, limit=20.0)
    Folder.open(tmp_path / "w", begun, force=False, limit=25.0)  # the same effort goes on
    for limit, now in ((300.0, "with --time 300s"), (None, "without --time")):
        with pytest.raises(ResumeError, match=f"begun with --time 20s, and this one is {now}, .*"):
            Folder.open(tmp_path / "w", more, force=False, limit=limit)
    with pytest.raises(ResumeError, match=r"another search \(effort.calibration \(was 8192, now 32768\)"):
        Folder.open(tmp_path / "w", more, force=False, limit=20.0)
    Folder.open(tmp_path / "w", more, force=True, limit=300.0)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"sha256": "0", "kept": {"identity": {}}}', b"\xff"])
@pytest.mark.parametrize("name", ["identity.json", "fisher.json", "ledger.json"])
def test_whatever_is_kept_is_found_out_when_cut(name: str, content: bytes, tmp_path: Path) -> None:
    """An identity is a sentence, and --force starts over; anything else is as if it were not there."""
    identity: dict[str, object] = {"seed": 0}
    folder = Folder.open(tmp_path / "w", identity, force=False)
    folder.save("fisher.json", {"a": {"b": 1.5}})
    folder.save("ledger.json", {"c": 2.5})
    (folder.path / name).write_bytes(content)
    assert folder.load(name) is None
    if name != "identity.json":
        assert Folder.open(folder.path, identity, force=False).load(name) is None
        return
    with pytest.raises(ResumeError, match=r"was cut or changed, .* start over with --force"):
        Folder.open(folder.path, identity, force=False)
    assert Folder.open(folder.path, identity, force=True).load("fisher.json") is None
    assert Folder.open(folder.path, identity, force=False).load("identity.json") == {"identity": identity, "time": None}


def test_a_large_file_stands_with_its_hash(tmp_path: Path) -> None:
    path, tensors = tmp_path / "options-0.safetensors", {"a": torch.arange(9, dtype=torch.int64)}
    assert not whole(path)
    seal(path, lambda part: files.write(part, tensors))
    assert whole(path)
    good = path.read_bytes()
    for spoilt in (good[:-1], good[:40], b"", good[:-1] + b"\1", good + b"\0"):
        path.write_bytes(spoilt)
        assert not whole(path)
    path.write_bytes(good)
    path.with_suffix(".sha256").unlink()
    assert not whole(path)
    seal(path, lambda part: files.write(part, tensors))
    assert path.read_bytes() == good
    assert whole(path)


def test_nothing_in_a_search_folder_is_removed_but_what_a_search_wrote(tmp_path: Path) -> None:
    folder = Folder.open(tmp_path / "w", {"seed": 0}, force=False)
    folder.save("fisher.json", {})
    (folder.path / "build").mkdir()
    (folder.path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds thesis\.txt, which regauge did not write"):
        Folder.open(folder.path, {"seed": 1}, force=True)
    assert folder.load("fisher.json") == {}
    folder.leave()
    assert [entry.name for entry in folder.path.iterdir()] == ["thesis.txt"]


def made(out: Path) -> dict[str, object]:
    """A small artifact at `out`; gives the manifest of its making."""
    identity: dict[str, object] = {"seed": 0}
    with Staging(out, identity) as staging:
        staging.write("model-00001-of-00001.safetensors", {"a": torch.ones(3, dtype=torch.float32)})
        manifest = json.loads((staging.root / "manifest.json").read_text())
        staging.finish({"config.json": "{}"})
    return dict(manifest)


@pytest.mark.parametrize("theirs", [False, True])
def test_what_a_kill_after_the_last_rename_leaves_is_tidied_up(theirs: bool, tmp_path: Path) -> None:
    """The manifest of the making lies in OUT: it goes with the next command, and somebody's own manifest stays."""
    out = tmp_path / "out"
    manifest = made(out)
    (out / "manifest.json").write_text(json.dumps({"mine": 1} if theirs else manifest))
    (out / ".lock").write_text("")
    with pytest.raises(OutputError, match="exists"):
        Staging(out, {"seed": 0})
    assert (out / "manifest.json").exists() == theirs
    if not theirs:
        Staging(out, {"seed": 1}, force=True).close()
        return
    with pytest.raises(OutputError, match=r"holds .*manifest\.json"):
        Staging(out, {"seed": 1}, force=True)
    assert json.loads((out / "manifest.json").read_text()) == {"mine": 1}


def test_a_search_that_was_killed_when_its_artifact_was_there_is_swept_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    left = Folder.open(tmp_path / "out.search", {"seed": 0}, force=False)
    left.save("fisher.json", {})
    left.save(DONE, True)
    sweep(out)
    assert left.load("fisher.json") == {}  # OUT is not there: the search is to go on
    made(out)
    (left.path / "thesis.txt").write_text("mine")
    sweep(out)
    assert [entry.name for entry in left.path.iterdir() if entry.name != ".lock"] == ["thesis.txt"]
    (left.path / "thesis.txt").unlink()
    going_on = Folder.open(left.path, {"seed": 0}, force=False)
    sweep(out)  # nothing says that it is done
    assert going_on.load("identity.json") is not None


@pytest.mark.parametrize("name", [".tmp-identity.json", ".lock"])
def test_a_search_that_was_killed_before_it_said_what_it_is_begins_again(name: str, tmp_path: Path) -> None:
    (tmp_path / "out.search").mkdir()
    (tmp_path / "out.search" / name).write_text("{")
    with search_folder(tmp_path / "out") as room:
        assert Folder.open(room, {"seed": 0}, force=False).load("identity.json") is not None
