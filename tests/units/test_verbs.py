"""What a user looks for besides compressing: is the machine fit, what fits in it, talk to it, serve it, which one."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import regauge as rg
from pico import pico, save
from regauge.cli import chat as talk
from regauge.cli import main
from regauge.errors import RecipeError, SettingError
from regauge.hosts import host_of
from regauge.hosts.transformers.stream import pieces
from regauge.report import doctor as clinic
from regauge.report.fits import CONTEXTS, fitting

HOST = host_of(Path())
Capture = pytest.CaptureFixture[str]


def test_doctor_says_what_is_there_and_what_to_mend(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clinic, "load", lambda: 9.0)
    monkeypatch.setattr(clinic, "cpus", lambda: 1)
    monkeypatch.setattr(clinic, "level", lambda: "reference")
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "mend  kernels" in said
    assert "9.0 processes wanted a CPU" in said
    assert "GFLOP/s in float32" in said
    assert said.rstrip().splitlines()[-1].startswith("To mend: kernels")


def test_doctor_in_json_has_every_line(capsys: Capture) -> None:
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {"regauge", "libraries", "kernels", "processor", "speed", "GPU", "memory", "disk here"} <= {
        line["what"] for line in told
    }
    assert {line["verdict"] for line in told} <= {"ok", "note", "mend"}


def test_what_it_would_take_is_counted_from_formats(bundled: Path, tmp_path: Path) -> None:
    found = rg.inspect(bundled)
    sizes = {size.name: size for size in found.sizes}
    assert sizes["bf16, as it is"].bytes == found.bytes_bf16
    receipt = rg.apply("rtn-w8", bundled, tmp_path / "out")
    assert sizes["rtn-w8"].bytes == pytest.approx(receipt.bytes_after, rel=0.001)
    assert found.cache_bytes_a_token is not None
    whole = [size for size in found.sizes if not size.cache]
    assert len(whole) < len(found.sizes)
    for size in whole:
        assert size.with_cache == {n: size.bytes + n * found.cache_bytes_a_token for n in CONTEXTS}
    assert sizes["gptq-w4g128 --embed int8"].bytes < sizes["gptq-w4g128"].bytes
    least = min(size.with_cache[4096] for size in whole)
    assert [one.name for one in fitting(whole, least, 4096)] == ["gptq-w2g64 --embed int8"]


def test_inspect_lists_what_fits(bundled: Path, capsys: Capture) -> None:
    assert main(["inspect", str(bundled), "--memory", "16MB", "--context", "4k"]) == 0
    said = capsys.readouterr().out
    assert "gptq-w2g64" in said
    assert "rtn-w8" not in said
    assert "moves that keep the function" not in said
    assert main(["inspect", str(bundled), "--streams", "--memory", "1kB"]) == 0
    said = capsys.readouterr().out
    assert "moves that keep the function" in said
    assert "nothing fits in 1.00 kB" in said


@pytest.mark.parametrize("flags", [["--memory", "8"], ["--memory", "x"], ["--context", "k"], ["--context", "0"]])
def test_amounts_that_mean_nothing_are_a_sentence(flags: list[str], bundled: Path, capsys: Capture) -> None:
    assert main(["inspect", str(bundled), *flags]) == 2
    assert flags[1] in capsys.readouterr().err


def test_methods_are_narrowed(capsys: Capture) -> None:
    found = rg.methods(bits=4, loads_in="vllm", paper=True)
    names = {name for method in found for name in method.names}
    assert "gptq-w4g128" in names
    assert "gptq-w3g128" not in names
    assert "nf4" not in names  # compressed-tensors has no such code book
    assert "rtn-w4g128" not in names  # no paper
    assert main(["methods", "--bits", "7", "--loads-in", "vlm"]) == 2
    assert "did you mean 'vllm'" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="no preset has 13 bits"):
        rg.methods(bits=13)


def test_an_answer_is_what_stream_gives(bundled: Path, capsys: Capture) -> None:
    assert main(["chat", str(bundled), "--prompt", "def mean(values):", "--tokens", "8"]) == 0
    said = capsys.readouterr()
    wanted = "".join(rg.stream(rg.load(bundled), "def mean(values):", 8, text=True))
    assert said.out.rstrip("\n") == wanted.rstrip("\n")
    assert "tokens a second" in said.err
    assert "no chat template" in said.err


def test_lines_of_a_pipe_are_turns_and_two_models_are_named(
    bundled: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("def a():\n/new\nclass B:\n/exit\nnot said\n"))
    assert main(["chat", str(bundled), "--against", str(bundled), "--tokens", "4", "--temperature", "0.5"]) == 0
    said = capsys.readouterr()
    assert said.out.count(f"{bundled.name}:") == 4
    assert said.err.count("the first after") == 4


def test_a_conversation_goes_through_the_template() -> None:
    class Tokenizer:
        chat_template = "a template"
        seen: list[Any]

        def apply_chat_template(self, turns: list[dict[str, str]], **_: object) -> str:
            self.seen = [dict(turn) for turn in turns]
            return "abc"

        def __call__(self, text: str, **_: object) -> Any:
            return type("Ids", (), {"input_ids": [1, 2, 3]})()

        def decode(self, ids: list[int], **_: object) -> str:
            return "".join(chr(97 + token % 26) for token in ids)

    speaker = talk.Speaker("pico", HOST, pico("llama"), Tokenizer(), talk.Manner(tokens=3))
    first = "".join(speaker.answer("hello"))
    assert len(first) == 3
    "".join(speaker.answer("more"))
    roles = [(turn["role"], turn["content"]) for turn in speaker.tokenizer.seen]
    assert roles == [("user", "hello"), ("assistant", first), ("user", "more")]


def test_a_full_context_is_a_sentence() -> None:
    class Tokenizer:
        chat_template = None

        def __call__(self, text: str) -> Any:
            return type("Ids", (), {"input_ids": [1] * 64})()

    speaker = talk.Speaker("pico", HOST, pico("llama"), Tokenizer(), talk.Manner())
    with pytest.raises(SettingError, match="context of 64 tokens; /new starts afresh"):
        next(speaker.answer("x"))


def test_what_makes_no_text_is_refused(tmp_path: Path, capsys: Capture) -> None:
    folder = save(pico("bert"), tmp_path / "bert")
    assert main(["chat", str(folder), "--prompt", "x"]) == 2
    assert "makes no text" in capsys.readouterr().err


def test_pieces_wait_for_whole_characters(bundled: Path) -> None:
    tokenizer = rg.load(bundled) and __import__("transformers").AutoTokenizer.from_pretrained(bundled)
    text = "def grüße():\n    return '日本'\n"
    ids = tokenizer(text).input_ids
    found = list(pieces(iter(ids), tokenizer))
    assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in found)


def test_a_server_without_its_packages_says_what_to_install(
    bundled: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regauge.hosts.transformers import serve

    monkeypatch.setattr(serve, "PACKAGES", ("no_such_package",))
    assert main(["serve", str(bundled)]) == 2
    assert "no_such_package: pip install 'transformers[serving]'" in capsys.readouterr().err


def test_threads_are_what_is_asked_for(bundled: Path) -> None:
    before = torch.get_num_threads()
    try:
        assert main(["chat", str(bundled), "--prompt", "x", "--tokens", "1", "--threads", "1"]) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
