"""Families that are trained: what is refused and written, and that a killed or divided training is the same one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import regauge as rg
from regauge.artifact.families import family_at
from regauge.artifact.files import read
from regauge.cli import main
from regauge.elastic.family import Family
from regauge.elastic.subnet import Subnet
from regauge.engine.raising import Batch, Raising, space_of
from regauge.engine.recovery_text import Amounts
from regauge.engine.training import train
from regauge.engine.training_cost import planned
from regauge.engine.training_recipe import Asked
from regauge.errors import BudgetError, RecipeError, RegaugeError, TextError
from regauge.hosts import host_of
from regauge.hosts.transformers.switching import switchable
from regauge.hosts.transformers.table import anatomy_of
from regauge.hosts.transformers.trainee import Trainee
from regauge.learn import loop
from regauge.learn.distillers import Features, Read
from regauge.learn.loop import At
from regauge.learn.training import Training, training_of
from regauge.plan import Plan, diff, digest, dump, parse
from regauge.plan.combining import combined
from tests.pico import pico, save
from tests.words import save_tokenizer, text

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
}
TEXT = [text(2000, seed) for seed in range(3)]
RECIPE = "name: f\nfamily: {depth: [2], ffn: [0.5]}\ntrain: {sampler: sandwich:1, batch: 128, rate: 0.01, steps: 6}\n"
FEW = Asked(Amounts(tokens=1024, length=32))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(save(pico("llama", **SIZES), tmp_path_factory.mktemp("training") / "model"))


def plan(text: str = RECIPE) -> Plan:
    return parse(text + "calibration: {tokens: 512, length: 32}\n")


def trainee(**sizes: Any) -> Trainee:
    model = pico("llama", **(SIZES | sizes)).float()
    switchable(model, Family(depth=(2,), ffn=(0.5,)), anatomy_of(model.config, model))
    return Trainee(model)


def raising(made: Trainee, **recipe: Any) -> Raising:
    ids = torch.randint(0, 53, (5, 4, 16), generator=torch.Generator().manual_seed(0))
    text = [Batch(one) for one in ids]
    return Raising(made, made.original(), Training(**recipe), 4, text[:4], text[4:], (Subnet(depth=2, ffn=0.5),))


def contents(out: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    files.pop("regauge/run-log.json")
    return files


def test_a_family_is_better_on_text_that_it_never_saw(model: Path, tmp_path: Path) -> None:
    told = train(plan(), model, tmp_path / "out", TEXT, FEW).trained
    assert told is not None
    small = told.members["depth=2,ffn=0.5"]
    assert small.after < small.before
    assert len(told.losses) == told.steps == 6
    assert [at for at, _ in told.looks] == [0, 1, 2, 3, 4, 5, 6]
    family = rg.load(tmp_path / "out", dtype=torch.float32)
    with rg.use(family, "depth=2,ffn=0.5"), torch.no_grad():
        assert family(torch.zeros(1, 3, dtype=torch.int64)).logits.isfinite().all()
    stored = {key: one for path in (tmp_path / "out").glob("*.safetensors") for key, one in read(path).items()}
    assert torch.equal(stored["model.norm.weight"].float(), family.model.norm.weight)


def test_a_rate_is_written_as_people_write_it() -> None:
    """YAML takes 3e-4 for text, since it has no point; this page's own recipes have it so."""
    for said, rate in (("3e-4", 3e-4), ("1e-04", 1e-4), ("0.01", 0.01)):
        plan = parse(f"name: f\nfamily: {{depth: [2]}}\ntrain: {{rate: {said}, steps: 6}}\n")
        assert training_of(plan.train).rate == rate
        assert parse(dump(plan)) == plan
    with pytest.raises(RecipeError, match="rate is a number, not '3e-4x'"):
        parse("name: f\nfamily: {depth: [2]}\ntrain: {rate: 3e-4x, steps: 6}\n")


def test_gradients_of_members_add_up_in_the_memory_of_the_family() -> None:
    made = trainee()
    problem = raising(made, sampler="sandwich:1", distiller="none", labels=1.0, clip=0.0)
    start = problem.init()
    both = {key: one.clone() for key, one in problem.gradients(start, At(0, 0))[1].items()}
    ids = problem.text[0].ids_BT
    drawn = problem.recipe.draws(problem.space, problem_turn())
    assert [str(one.subnet) for one in drawn][::2] == ["full", "depth=2,ffn=0.5"]
    summed = dict.fromkeys(both, torch.zeros(()))
    for one in drawn:
        made.put(start)
        logits = made.read(one.subnet, ids).logits_BTV
        assert logits is not None
        with made.backward():
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        summed = {key: summed[key] + made.gradients[key] / len(drawn) for key in both}
    for key, gradient in both.items():
        torch.testing.assert_close(gradient, summed[key], rtol=1e-4, atol=1e-7)
    name = "model.layers.3.mlp.down_proj.weight"
    made.put(start)
    with made.backward():
        made.read(Subnet(depth=2, ffn=0.5), ids).hidden_BTD.square().sum().backward()
    assert made.gradients[name][:, :32].abs().sum() > 0
    assert not made.gradients[name][:, 32:].any()  # neurons that the member leaves out
    assert not made.gradients["model.layers.1.mlp.down_proj.weight"].any()  # a block that it leaves out


def problem_turn() -> Any:
    from regauge.learn.space import Turn

    return Turn(0, 4, 0, 0)


def test_the_whole_is_its_own_teacher_and_stays() -> None:
    made = trainee()
    problem = raising(made, sampler="exits", distiller="kl")
    start = problem.init()
    made.put({key: one * 1.5 for key, one in start.items()})
    ids = problem.text[0].ids_BT
    with torch.no_grad():
        whole = made.read(Subnet(), ids).logits_BTV
        taught = problem.teacher.read(ids).logits_BTV
    assert not torch.allclose(whole, taught)
    made.put(start)
    with torch.no_grad():
        torch.testing.assert_close(made.read(Subnet(), ids).logits_BTV, taught)


@pytest.mark.parametrize("teacher", ["original", "largest", "larger"])
@pytest.mark.parametrize("distiller", ["none", "kl", "alpha", "features", "relations"])
def test_every_distiller_teaches(distiller: str, teacher: str) -> None:
    problem = raising(trainee(), sampler="sandwich:1", distiller=distiller, teacher=teacher, labels=0.1)
    loss, gradients = problem.gradients(problem.init(), At(0, 0))
    assert loss.isfinite()
    assert sum(float(one.abs().sum()) for one in gradients.values()) > 0


def test_embeddings_that_are_frozen_stay_and_all_else_learns() -> None:
    model = pico("llama", **SIZES).float()
    switchable(model, Family(depth=(2,), ffn=(0.5,)), anatomy_of(model.config, model))
    keys = {key for key, _ in model.named_parameters()}
    problem = raising(Trainee(model, Training(frozen="embed").held), sampler="sandwich:1", distiller="features")
    assert keys - set(problem.init()) == {"model.embed_tokens.weight"}
    _, gradients = problem.gradients(problem.init(), At(0, 0))
    assert gradients["model.layers.0.mlp.down_proj.weight"].any()


def test_a_member_is_held_to_what_the_same_blocks_read() -> None:
    """Blocks 0 and 3 of 4: what block 3 reads behind block 0 is compared with what it reads behind block 2."""
    model = pico("llama", **SIZES).float()
    switchable(model, Family(depth=(2,), layers="last"), anatomy_of(model.config, model))
    made = Trainee(model)
    problem = replace(raising(made, sampler="smallest", distiller="fronts", clip=0.0), watched=(Subnet(depth=2),))
    ids = problem.text[0].ids_BT
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        member = made.read(Subnet(depth=2), ids)
    assert sorted(member.fronts) == [0, 3]
    torch.testing.assert_close(member.fronts[3], states[1])
    heard = problem.teaching.read(0, ids, None)
    assert sorted(heard.fronts) == [0, 3]
    torch.testing.assert_close(heard.fronts[3], states[3])
    loss, gradients = problem.gradients(problem.init(), At(0, 0))
    torch.testing.assert_close(loss, Features()(Read(states[1]), Read(states[3])))
    name = "model.layers.{}.mlp.down_proj.weight".format
    assert gradients[name(0)].any()
    assert not gradients[name(3)].any()


def test_what_a_teacher_says_is_kept_where_text_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four batches, twelve steps: four readings instead of twelve, and the same numbers bit for bit."""

    def learnt(most: int, distiller: str) -> tuple[int, dict[str, torch.Tensor]]:
        monkeypatch.setattr("regauge.engine.teaching.KEPT", most)
        made = trainee()
        problem = replace(raising(made, sampler="smallest", distiller=distiller, rate=0.01), steps=12)
        read, said = problem.teacher.read, list[int]()
        monkeypatch.setattr(problem.teacher, "read", lambda *given: said.append(1) or read(*given))
        state = loop.train(problem, problem.recipe.settings(12, every=12), by=problem.gradients)
        return len(said), dict(state.parameters)

    (few, kept), (many, again) = learnt(1 << 20, "embedding+features"), learnt(0, "embedding+features")
    assert (few, many) == (4, 12)
    assert all(torch.equal(kept[key], again[key]) for key in kept)
    assert learnt(1 << 20, "kl")[0] == 12  # logits are too many to be kept


def test_killed_at_any_step_it_ends_with_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "EVERY", 0.0)
    train(plan(), model, tmp_path / "whole", TEXT, FEW)

    class Killed(BaseException):
        """As sudden as a signal."""

    def kill_at(step: int) -> Any:
        def watch(event: Any) -> None:
            if event.phase == "training" and event.done == step:
                raise Killed

        return watch

    for step in (1, 4, 5):
        with pytest.raises(Killed):
            train(plan(), model, tmp_path / "cut", TEXT, FEW, kill_at(step))
    train(plan(), model, tmp_path / "cut", TEXT, FEW)
    assert contents(tmp_path / "cut").keys() == contents(tmp_path / "whole").keys()
    different = [
        name for name, data in contents(tmp_path / "whole").items() if contents(tmp_path / "cut")[name] != data
    ]
    assert not [name for name in different if not name.startswith("regauge/receipt")]
    one, other = (json.loads((tmp_path / name / "regauge/receipt.json").read_text()) for name in ("whole", "cut"))
    assert one["trained"] == other["trained"]


def test_where_one_member_is_trained_alone_the_whole_decides_nothing() -> None:
    problem = raising(trainee(), sampler="smallest")
    found = problem.errors(problem.init())
    assert found["full"] != found["depth=2,ffn=0.5"]
    assert problem.error(problem.init()) == found["depth=2,ffn=0.5"]
    assert raising(trainee(), sampler="sandwich").error(problem.init()) == sum(found.values()) / 2


@pytest.mark.parametrize(
    ("recipe", "text", "error", "why"),
    [
        ("family", TEXT, RecipeError, "trains no family: it needs 'family' and 'train'"),
        (plan(RECIPE + "weights: {blocks.*: {grid: int4, grain: channel}}\n"), TEXT, RecipeError, "train first"),
        (plan(RECIPE.replace("depth: [2]", "depth: [9]")), TEXT, RecipeError, "the model has 4 blocks"),
        (plan(), ["too short"], TextError, "too few to hold some out"),
    ],
)
def test_what_cannot_be_trained(
    model: Path, tmp_path: Path, recipe: Any, text: Any, error: type[RegaugeError], why: str
) -> None:
    with pytest.raises(error, match=why):
        train(recipe, model, tmp_path / "out", text, FEW)
    assert not (tmp_path / "out").exists()


def test_apply_says_that_a_recipe_trains(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="trains what it makes: use `regauge learn train f MODEL -o OUT`"):
        rg.apply(plan(), model, tmp_path / "out", calibration=TEXT)


def test_time_is_kept_or_refused_before_it_is_spent(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="does not suffice: a step"):
        train(plan(), model, tmp_path / "out", TEXT, Asked(Amounts(tokens=1024, length=32, time=1e-3)))
    plans = [planned(plan(), model, TEXT, Asked(Amounts(length=32, time=time))) for time in (60.0, 600.0)]
    assert plans[0].steps < plans[1].steps
    assert planned(plan(), model, TEXT, FEW).steps == 6


@pytest.mark.parametrize(
    ("train", "why"),
    [
        ("{sampler: sandwhich}", "did you mean 'sandwich'"),
        ("{sampler: 'sandwich:0'}", "1 to 64 members a step"),
        ("{distiller: kll}", "did you mean 'kl'"),
        ("{distiller: embedding+feature}", "did you mean 'features'"),
        ("{distiller: embedding+}", "distiller is one of"),
        ("{frozen: embedd}", "did you mean 'embed'"),
        ("{frozen: embed, rank: 4}", "so frozen says nothing more"),
        ("{teacher: smaller}", "teacher is one of original, largest, larger"),
        ("{rate: 0}", "a learning rate lies above 0"),
        ("{steps: 0}", "1 or more steps"),
        ("{steps: many}", "steps is a whole number"),
        ("{stepps: 3}", "stepps"),
        ("{}", "train says nothing"),
    ],
)
def test_what_a_recipe_may_get_wrong(train: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        parse(f"name: f\nfamily: {{depth: [2]}}\ntrain: {train}\n")


def test_a_recipe_that_trains_prints_and_reads_back() -> None:
    made = plan()
    assert parse(dump(made)) == made
    other = plan(RECIPE.replace("rate: 0.01", "rate: 0.02"))
    assert digest(made) != digest(other)
    assert any(line.startswith("train: ") for line in diff(made, other))
    with pytest.raises(RecipeError, match="two of them train a family otherwise"):
        combined([made, other])
    with pytest.raises(RecipeError, match="say 'family' too"):
        parse("name: f\nweights: {blocks.*: {grid: int4, grain: channel}}\ntrain: {steps: 3}\n")


def test_the_command_trains_and_tells(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, corpus = tmp_path / "f.yaml", tmp_path / "text.txt"
    recipe.write_text(dump(plan()), encoding="utf-8")
    corpus.write_text("\n\n".join(TEXT), encoding="utf-8")
    words = ["learn", str(recipe), str(model), "--text", str(corpus), "--length", "32", "--tokens", "512", "-q"]
    out = tmp_path / "out"
    assert main([*words, "-o", str(out), "--dry-run"]) == 0
    assert "nothing is written" in capsys.readouterr().out
    assert not out.exists()
    assert main([*words, "-o", str(out), "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "nats a token" in said
    assert "depth=2,ffn=0.5" in said
    page = (out / "regauge/report.html").read_text(encoding="utf-8")
    assert 'id="losses"' in page
    assert page.count("<polyline") == 2
    assert "Members that were trained" in page


def test_blocks_may_be_left_to_ranking(model: Path, tmp_path: Path) -> None:
    ranked = plan(RECIPE.replace("family: {", "family: {layers: ranked, "))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(TEXT), encoding="utf-8")
    asked = Asked(Amounts(length=32, tokens=512, steps=1))
    assert planned(ranked, model, text, asked).passes == planned(plan(), model, text, asked).passes
    train(ranked, model, tmp_path / "out", text, asked)
    assert sorted(family_at(tmp_path / "out")[1].ranked) == [0, 1, 2, 3]


def test_shares_of_a_space_are_what_a_model_comes_to() -> None:
    made = trainee()
    space = space_of(made.family, made.anatomy)
    assert [(choice.value, choice.share) for choice in space.choices["depth"]] == [(None, 1.0), (2, 0.5)]
    assert [choice.share for choice in space.choices["ffn"]] == [1.0, 0.5]
    assert space.size(Subnet(depth=2, ffn=0.5)) == 0.25


def test_an_encoder_learns_to_embed_as_it_did(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4}
    model = save_tokenizer(save(pico("bert", **sizes), tmp_path / "model"))
    lines = "\n".join(line for one in TEXT for line in one.split(". "))
    made = train(
        parse("name: leaf\nfamily: {depth: [2]}\ntrain: {sampler: sandwich:1, distiller: embedding, rate: 0.01}\n"),
        model,
        tmp_path / "out",
        [lines, *TEXT],
        Asked(Amounts(tokens=1024, length=16, steps=6)),
    )
    assert made.trained is not None
    assert made.trained.unit == "squared distance of embeddings"
    assert made.trained.members["depth=2"].after < made.trained.members["depth=2"].before
    assert host_of(tmp_path / "out").trainee(tmp_path / "out").family.depth == (2,)
    tokens = parse("name: f\nfamily: {depth: [2]}\ntrain: {steps: 2}\n")
    with pytest.raises(RecipeError, match="trains on next tokens"):
        train(tokens, model, tmp_path / "kl", [lines, *TEXT], FEW)
    with pytest.raises(RecipeError, match="trains on next tokens"):
        planned(tokens, model, [lines, *TEXT], FEW)
