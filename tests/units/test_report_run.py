"""The page of a search: predicted and measured apart, budgets and baselines told as they came out."""

from __future__ import annotations

from pathlib import Path

import pytest

from regauge.errors import ArtifactError
from regauge.measure.bootstrap import Interval
from regauge.measure.cost import Costs, Memory, Speed
from regauge.measure.quality import Paired, Quality
from regauge.report import figures, words, write
from regauge.report.page import render
from regauge.report.run import of_run
from regauge.search import record
from regauge.search.record import Build, Point, Run, Sample, Verdict
from regauge.text.split import Text
from tests.units.test_report import a_receipt


def an_interval(value: float) -> Interval:
    return Interval(value=value, low=value * 0.9, high=value * 1.1)


def a_quality(kl: float) -> Quality:
    return Quality(
        tokens=4096,
        documents=12,
        bytes=12000,
        perplexity=an_interval(5.0),
        bits_per_byte=an_interval(1.25),
        kl=an_interval(kl),
        kl99=an_interval(kl * 8),
        agreement=an_interval(0.9),
    )


def a_point(name: str, size: int, kl: float, kind: str = "searched", measured: float | None = None) -> Point:
    return Point(
        name=name,
        kind=kind,
        picks={"blocks.0.attn.q": "int4-g128"},
        bits=4.1,
        bytes_predicted=size,
        kl_predicted=kl,
        bytes_measured=None if measured is None else size + 7,
        measured=None if measured is None or kind == "uniform" else a_quality(measured),
        in_memory=None if measured is None else a_quality(measured),
    )


def a_speed(median: float) -> Speed:
    return Speed(median=median, low=median - 2, high=median + 2, rounds=5)


def a_run() -> Run:
    fast, same, slow = a_speed(60), a_speed(59), a_speed(10)
    return Run(
        regauge="0.1.0",
        command="regauge fit model --budget memory=0.30x",
        seed=0,
        source="models/code",
        source_hash="b" * 64,
        family="llama",
        parameters=5_000_000,
        bytes_bf16=10_000_000,
        budgets=(),
        floor={},
        texts=(Text(role="evaluation", description="held out", tokens=4096, documents=7, sha256="c" * 64),),
        points=(a_point("0", 2_000_000, 0.2), a_point("1", 3_000_000, 0.05, measured=0.06)),
        chosen=1,
        chosen_why="the best within memory=0.30x",
        uniforms=(a_point("gptq-w4g128", 3_100_000, 0.0, "uniform", measured=0.09),),
        against_uniform={
            "gptq-w4g128": Paired(difference=Interval(value=-0.03, low=-0.04, high=-0.02), verdict="first")
        },
        quality=a_quality(0.06),
        original=a_quality(0.0),
        costs={
            "original": Costs(decode=slow, prefill=fast),
            "runtime": Costs(decode=same, prefill=fast),
            "compressed": Costs(decode=fast, prefill=slow, bytes=3_000_007),
        },
        verdicts=(
            Verdict(text="memory=0.30x", limit=3e6, measured=2.99e6, unit="bytes", met=True, how="tensors as stored"),
            Verdict(text="decode=1.5x", limit=1.5, measured=1.02, unit="x", met=False, how="5 rounds, interleaved"),
        ),
        builds=(Build(point="1", bytes=3_000_007, kl=0.06, why="first build"),),
        samples=(Sample(prompt="def f(", original="a, b):", compressed="x):"),),
    )


def test_predicted_in_memory_and_built_stay_apart() -> None:
    points = of_run(a_run(), a_receipt()).points
    assert [(p.label, p.kind, p.bytes, p.predicted, p.measured, p.chosen) for p in points] == [
        ("0", "searched", 2_000_000, 0.2, None, False),
        ("1", "searched", 3_000_000, 0.05, 0.06, False),
        ("gptq-w4g128", "uniform", 3_100_000, None, 0.09, False),
        ("1", "built", 3_000_007, None, 0.06, True),
    ]


def test_a_speed_up_is_told_in_its_parts() -> None:
    """Compression gave nothing that shows at decoding, the runtime six times; the prefill became slower."""
    table = figures.parts(a_run().costs)
    assert table.rows == (
        ("decode", "no faster", "5.90x", "6.00x"),
        ("prefill", "0.17x, slower", "no faster", "0.17x, slower"),
    )
    assert figures.parts({"original": Costs(decode=a_speed(10)), "compressed": Costs(decode=a_speed(60))}).rows == ()


def test_the_artifact_stands_with_the_source_and_variants_by_themselves() -> None:
    run = a_run()
    assert [row[:3] for row in figures.measured(run).rows] == [
        ("original, by transformers", "10.0 MB", "1.000×"),
        ("original, by this runtime", "–", "–"),
        ("fit", "3.00 MB", "0.300×"),
    ]
    assert [row[-2:] for row in figures.measured(run).rows] == [("10", "60"), ("59", "60"), ("60", "10")]
    assert [row[0] for row in figures.evenly(run).rows] == ["the chosen point", "gptq-w4g128"]
    assert figures.evenly(run).rows[1][3:] == ("-0.0300 [-0.0400, -0.0200]", "better")


def test_a_record_of_version_0_1_keeps_what_was_measured_on_what() -> None:
    old = a_point("0", 2, 0.2).model_dump(exclude={"in_memory"})
    for what, artifact, memory in (("artifact", True, False), ("memory", False, True)):
        found = Point.model_validate({**old, "measured": a_quality(0.1), "measured_on": what})
        assert (found.measured is not None, found.in_memory is not None) == (artifact, memory)
    assert Point.model_validate({**old, "measured_on": None}).measured is None


def test_the_page_says_what_was_met_missed_and_no_faster() -> None:
    page = render(of_run(a_run(), a_receipt()))
    for said in ("met", "missed", "no faster", "slower", "interleaved", "first build", "better", "def f(", "held out"):
        assert said in page


def test_a_run_is_reported_from_its_directory(tmp_path: Path) -> None:
    kept = tmp_path / "regauge"
    kept.mkdir()
    (kept / "receipt.json").write_text(a_receipt().model_dump_json())
    assert "What was spent where" in write(tmp_path).read_text(encoding="utf-8")
    record.write(a_run(), tmp_path)
    assert "Against spending evenly" in write(tmp_path).read_text(encoding="utf-8")


def test_a_directory_without_a_receipt_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no receipt \(regauge/receipt.json\)"):
        write(tmp_path)
    (tmp_path / "regauge").mkdir()
    for text, told in (
        ("{", "is not JSON"),
        ("{}", "not a receipt that this version of regauge reads: regauge: Field"),
    ):
        (tmp_path / "regauge" / "receipt.json").write_text(text)
        with pytest.raises(ArtifactError, match=told):
            write(tmp_path)


def test_the_last_words_tell_size_quality_and_speed_in_their_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Terminal, page and README show the same cells; predicted, in memory and of the artifact stand apart."""
    from regauge.cli import tell

    tell.run(a_run(), tmp_path / "out")
    told = capsys.readouterr().out
    page = render(of_run(a_run(), a_receipt()))
    for table in figures.tables(a_run()):
        for row in table.rows:
            for cell in row:
                assert cell in told
                assert cell in page
    assert "KL predicted   KL in memory   KL of the artifact" in told
    assert "met: memory=0.30x: 2.99 MB" in told
    assert "NOT met: decode=1.5x: 1.02 x" in told
    assert "  Machine: " in told


def said(run: Run, **changes: object) -> dict[str, str]:
    found = words.of_run(run, a_receipt().model_copy(update=changes), "out")
    told: dict[str, str] = {}
    for one in found:
        name = one.about or list(told)[-1]
        told[name] = f"{told.get(name, '')} {one.said}".strip()
    return told


def test_the_last_words_are_what_a_person_asks_for() -> None:
    cache = 1000.0
    memory = Memory(anonymous=3_000_000, file=1_000_000, process=200_000_000)
    run = a_run()
    made = run.costs["compressed"].model_copy(update={"memory": memory, "cache_bytes": cache})
    run = run.model_copy(update={"costs": {**run.costs, "compressed": made}, "machine": {"cpus": 2}, "load": 1.0})
    told = said(run, wire="compressed-tensors")
    assert told["size"] == "10.0 MB as bf16 → 3.00 MB, 3.3 times smaller (0.300x)"
    assert told["quality"].startswith("of 100 next tokens 90 stay the same; perplexity 5.000 → 5.000; KL 0.06 nats")
    assert told["decode"] == "60 tokens a second: no faster than the same runtime uncompressed, 6.00x transformers"
    assert told["memory"] == (
        "4.00 MB at load; with its cache 5.02 MB at 1k, 12.2 MB at 8k, 36.8 MB at 32k tokens of context"
    )
    assert told["against"].startswith("1.5 times less KL than gptq-w4g128 everywhere, which takes 3.10 MB")
    assert "vllm serve out" in told["loads in"]
    assert "regauge chat out --against models/code" in told["next"]
    assert "regauge pick out 0 -o out-0   # smaller: 2.00 MB, KL about 0.2" in told["next"]


def test_what_only_we_load_says_why_and_how() -> None:
    told = said(a_run(), wire="regauge", refusals=("it has no nf4 weights",))
    assert "trust_remote_code=True" in told["loads in"]
    assert "not vLLM: it has no nf4 weights" in told["loads in"]


def test_speeds_of_a_busy_machine_are_no_headline() -> None:
    told = said(a_run().model_copy(update={"machine": {"cpus": 2}, "load": 7.4}))
    assert "decode" not in told
    assert told["speed"].startswith("taken while 7 processes wanted 2 CPUs")


def test_speeds_of_a_busy_machine_are_marked_on_the_page() -> None:
    busy = a_run().model_copy(update={"machine": {"cpus": 2}, "load": 7.4})
    page, quiet = render(of_run(busy, a_receipt())), render(of_run(a_run(), a_receipt()))
    for title in ("Measured, speeds on a busy machine", "Where the speed comes from, taken on a busy machine"):
        assert f"<h2>{title}</h2>" in page
    assert "<h2>Measured speeds, taken on a busy machine</h2>" in page
    assert "busy machine" not in quiet


def test_each_point_has_the_line_that_builds_it() -> None:
    page = render(of_run(a_run(), a_receipt(), "some out"))
    for index in (0, 1):
        line = f"regauge pick &#39;some out&#39; {index} -o &#39;some out-{index}&#39;"
        assert f'<code class="copy">{line}</code>' in page


def test_memory_is_told_by_the_length_of_the_context() -> None:
    memory = Memory(anonymous=3_000_000, file=1_000_000, process=200_000_000)
    run = a_run()
    made = run.costs["compressed"].model_copy(update={"memory": memory, "cache_bytes": 1000.0})
    view = of_run(run.model_copy(update={"costs": {"compressed": made}}), a_receipt())
    table = next(one for one in view.first if one.title == "Memory by context length")
    assert table.header == ("model", "at load", "at 1k", "at 8k", "at 32k", "a token of cache")
    assert table.rows == (("compressed", "4.00 MB", "5.02 MB", "12.2 MB", "36.8 MB", "1.00 kB"),)


def test_a_receipt_ends_with_what_was_left_whole_and_what_to_do() -> None:
    site = a_receipt().sites[0].model_copy(update={"name": "embed", "choice": None, "bytes_after": 900_000})
    receipt = a_receipt().model_copy(update={"sites": (site,), "bytes_after": 1_000_000})
    told = {one.about: one.said for one in words.of_receipt(receipt, "out")}
    assert told["left whole"] == "embed, 90 % of it; --embed int8 halves it"
    assert told["next"].startswith("regauge chat out --against")
