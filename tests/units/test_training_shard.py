"""A family that processes hold together: the gradients of one process, half of the memory in each of two, and pieces on
disk that belong together."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regauge.artifact.staging import Staging
from regauge.elastic.family import Family
from regauge.elastic.subnet import Subnet
from regauge.engine.pieces import Joined, Pieces
from regauge.engine.training_recipe import Asked, refuse_shard
from regauge.errors import ModelError, SettingError
from regauge.hosts.transformers.sharded import Sharded
from regauge.hosts.transformers.switching import switchable
from regauge.hosts.transformers.table import anatomy_of
from regauge.hosts.transformers.trainee import Trainee
from regauge.learn.loop import State
from regauge.learn.ranks import ALONE, LostError, Ranks
from regauge.learn.training import Training
from tests.pico import pico
from tests.units import test_training_ranks
from tests.units.test_training_ranks import command, trained

CPU = torch.device("cpu")
MEMBERS = (Subnet(), Subnet(depth=1, ffn=0.5), Subnet(ffn=0.5))
SHARDED = Ranks(0, 2, sharded=True)


@contextmanager
def world(count: int) -> Iterator[None]:
    """A process group without other processes: of one, or of several that send nothing."""
    if count == 1:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    else:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def family(kind: str) -> Any:
    model = pico(kind).float()
    switchable(model, Family(depth=(1,), ffn=(0.5,)), anatomy_of(model.config, model))
    return model


def learnt(made: Any) -> dict[str, Tensor]:
    """Gradients of several members taught by the family as it was, with all numbers a little off."""
    ids_BT = torch.randint(0, 53, (2, 8), generator=torch.Generator().manual_seed(0))
    teacher = made.original()
    made.put({key: 1.01 * value for key, value in made.parameters.items()})
    with torch.enable_grad(), made.backward():
        for one in MEMBERS:
            found, wanted = made.read(one, ids_BT).logits_BTV, teacher.read(ids_BT).logits_BTV
            torch.autograd.backward((found - wanted).square().sum())
    return dict(made.gradients)


def test_members_are_views_of_what_is_gathered_and_their_gradients_add_up() -> None:
    wanted = learnt(Trainee(family("gpt2")))
    with world(1):
        made = Sharded(family("gpt2"), CPU)
        found = learnt(made)
        assert set(found) == set(wanted)
        for key, gradient in wanted.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))
        assert not any(one.grad is not None for one in made._model.parameters())
        assert all(one.is_meta for one in made._model.parameters())
        with pytest.raises(ModelError, match="leave --shard or gates out"):
            made.narrowed(torch.zeros(1, 1, dtype=torch.int64), (1.0,))
        with pytest.raises(ModelError, match="leave --shard or route out"):
            made.embedded(torch.zeros(1, 1, dtype=torch.int64))


def test_each_of_two_holds_half() -> None:
    whole = sum(one.numel() for one in Trainee(family("llama")).parameters.values())
    with world(2):
        made = Sharded(family("llama"), CPU)
        teacher = made.original()
        for some in (made.parameters, made.gradients, dict(teacher.root.named_parameters())):
            held = sum(getattr(one, "_local_tensor", one).untyped_storage().nbytes() / 4 for one in some.values())
            assert whole / 2 <= held < 0.55 * whole  # sizes are odd


def test_what_cannot_be_divided_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(shard=True)
    refuse_shard(Training(), False, Asked())
    with pytest.raises(SettingError, match=r"there is one: start several \(torchrun --nproc-per-node 2"):
        refuse_shard(Training(), False, asked)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "x"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    refuse_shard(Training(), False, asked)
    for training, images, what in (
        (Training(rank=4), False, "adapters"),
        (Training(route=0.5), False, "a router"),
        (Training(gates=0.5), False, "gates"),
        (Training(), True, "images"),
        (Training(experts=8), False, "experts"),
    ):
        with pytest.raises(SettingError, match=f"a training with {what} needs the whole family in each process"):
            refuse_shard(training, images, asked)


def test_all_read_as_often_as_the_first() -> None:
    assert [Ranks(own, 3).turns(4) for own in range(3)] == [[(0, 1), (3, 1)], [(1, 1)], [(2, 1)]]
    second, third = (Ranks(own, 3, sharded=True).turns(4) for own in (1, 2))
    assert (second, third) == ([(1, 1), (0, 0)], [(2, 1), (0, 0)])


def test_a_part_that_is_not_finite_is_told_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[Tensor]] = []
    monkeypatch.setattr(Ranks, "add", lambda self, tensors: sent.append(list(tensors)))
    loss = torch.ones(())
    SHARDED.total([torch.ones(2), torch.empty(0)], loss)
    assert (len(sent), len(sent[0]), float(loss)) == (1, 1, 1.0)  # gradients are added up already
    SHARDED.total([torch.tensor([1.0, torch.inf])], loss)
    assert loss.isnan()


def test_a_norm_is_of_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "add", lambda self, tensors: tensors[0].mul_(4))  # four processes with as much each
    parts = [torch.tensor([3.0]), torch.tensor([4.0]), torch.empty(0)]
    assert float(SHARDED.norm(parts)) == 10
    assert float(ALONE.norm(parts)) == 5


def test_another_process_that_is_gone_is_told_from_an_error_of_ours() -> None:
    for ranks, said, kind in (
        (SHARDED, "[gloo/transport/tcp/pair.cc:1] Connection closed by peer", LostError),
        (SHARDED, "mat1 and mat2 shapes cannot be multiplied", RuntimeError),
        (ALONE, "[gloo/transport/tcp/pair.cc:1] Connection closed by peer", RuntimeError),
    ):
        with pytest.raises(kind) as found, ranks.together():
            raise RuntimeError(said)
        assert type(found.value) is kind


def test_pieces_that_are_not_all_whole_are_not_gone_on_from(tmp_path: Path) -> None:
    state = State(3, {"a": torch.arange(3.0)}, {}, {"a": torch.ones(3)}, 1.0, 0.5, losses=(1.0,), looks=((0, 1.0),))
    with Staging(tmp_path / "out", {"plan": "x"}) as staging:
        pieces = Pieces(staging.root / "states", ALONE)
        pieces.folder.mkdir()
        assert pieces.kept(staging) == ""
        pieces.keep(state, staging)
        pieces.keep(replace(state, step=4), staging)
        assert pieces.kept(staging) == "training-4"
        assert [one.name for one in pieces.folder.iterdir()] == ["training-4.1-of-1"]
        assert State.of(pieces.read("training-4")).step == 4
        (pieces.folder / "training-4.1-of-1").write_bytes(b"spoilt")
        assert pieces.kept(staging) == ""


def test_pieces_are_joined_along_their_rows(tmp_path: Path) -> None:
    for own, rows in ((0, [[1.0], [2.0]]), (1, [[3.0]])):
        Pieces(tmp_path, replace(ALONE, own=own)).write("learnt", {"a": torch.tensor(rows)})
    found = Joined((tmp_path / "learnt.1-of-1", tmp_path / "learnt.2-of-1"))
    assert found["a"].tolist() == [[1.0], [2.0], [3.0]]
    assert (list(found), len(found), "a" in found, "b" in found) == (["a"], 1, True, False)
    with pytest.raises(KeyError):
        found["b"]


RECIPE = test_training_ranks.RECIPE.replace("rate: 0.01", "rate: 0.1, optimiser: momentum, clip: 0")
KILLED = """
import os, sys
from regauge.learn import loop
loop.EVERY = 0.0
at = int(os.environ.get("KILL_AT", "-1"))
before = loop._step
def step(problem, settings, seed, state, by):
    if state.step == at and os.environ["RANK"] == "1":
        os._exit(9)
    return before(problem, settings, seed, state, by)
loop._step = step
from regauge.cli import main
sys.argv[0] = "regauge"
main()
"""


@pytest.mark.slow
def test_two_processes_that_hold_a_family_together_give_the_losses_of_one_killed_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step is kept; one process ends before the fifth, and the same command goes on. What is learnt depends on
    how large gradients are, as it would not by Adam."""
    monkeypatch.setattr(test_training_ranks, "RECIPE", RECIPE)

    def run(out: str, processes: int, **said: str) -> subprocess.CompletedProcess[str]:
        words = command(tmp_path, out, 6, processes)
        if processes > 1:
            at = words.index("regauge")
            words = [*words[: at - 1], str(tmp_path / "killed.py"), *words[at + 1 :], "--shard"]
        return subprocess.run(words, capture_output=True, text=True, timeout=300, env=os.environ | said)

    (tmp_path / "killed.py").write_text(KILLED, encoding="utf-8")
    assert run("one", 1).returncode == 0
    whole = run("whole", 2)
    assert whole.returncode == 0, whole.stderr[-3000:]
    one, two = (trained(tmp_path / name) for name in ("one", "whole"))
    assert (two["processes"], two["sharded"], one["sharded"]) == (2, True, False)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert [error for _, error in two["looks"]] == pytest.approx([error for _, error in one["looks"]], rel=1e-4)
    lost = run("cut", 2, KILL_AT="4")
    assert lost.returncode
    assert "the same command goes on from there" in " ".join(lost.stderr.split())
    assert "this is a bug" not in lost.stderr
    partial = tmp_path / "cut.partial"
    assert sorted(one.name for one in (partial / "states").glob("training-*")) == [
        "training-4.1-of-2",
        "training-4.2-of-2",
    ]
    refused = subprocess.run(command(tmp_path, "cut", 6), capture_output=True, text=True, timeout=300)
    assert refused.returncode
    assert "sharded (was True, now False)" in refused.stderr
    assert run("cut", 2).returncode == 0
    assert json.dumps(trained(tmp_path / "cut")) == json.dumps(two)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()
