"""`transformers serve` on an artifact: real requests to a server on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import regauge as rg
from artifacts import choice, make
from regauge.kernels.cpu.library import available

pytestmark = pytest.mark.skipif(not available(), reason="the C++ kernels were not built here")
PROMPT = "def mean(values):\n"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.fixture(params=["regauge", "compressed-tensors"])
def artifact(request: pytest.FixtureRequest, bundled: Path, tmp_path: Path) -> Path:
    form = choice("int4", "group:32", "f16")
    return make(bundled, tmp_path / "out", lambda s: form if s.kind != "embed" else None, prefer=request.param).path


@pytest.fixture
def port(artifact: Path) -> Iterator[int]:
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason="transformers serve wants it: pip install 'regauge[test]'")
    number, code = free_port(), "from regauge.hosts.transformers.serve import main; main()"
    flags = ["--port", str(number), "--host", "127.0.0.1", "--device", "cpu"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    log = (artifact.parent / "log").open("w")
    server = subprocess.Popen([sys.executable, "-c", code, str(artifact), *flags], env=env, stdout=log, stderr=log)
    try:
        for _ in range(600):
            time.sleep(0.1)
            assert server.poll() is None, (artifact.parent / "log").read_text()[-3000:]
            try:
                ask(number, "/health")
                break
            except OSError:
                continue
        yield number
    finally:
        server.terminate()
        server.wait(20)
        log.close()


@pytest.mark.telling
@pytest.mark.slow
def test_a_served_artifact_writes_what_generate_writes(artifact: Path, port: int) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(artifact)
    wanted = tokenizer.decode(list(rg.stream(rg.load(artifact), PROMPT, max_new_tokens=12)))
    body = {"model": str(artifact), "prompt": PROMPT, "max_tokens": 12, "temperature": 0.0}
    found = ask(port, "/v1/completions", body)
    assert found["choices"][0]["text"] == wanted
    assert found["usage"]["completion_tokens"] == 12


def test_the_server_is_transformers_own_again_afterwards(artifact: Path) -> None:
    from transformers.cli.serving.model_manager import ModelManager

    from regauge.errors import SettingError
    from regauge.hosts.transformers.serve import packed_models

    stock = ModelManager._load_model
    with packed_models():
        model = ModelManager(device="cpu")._load_model(f"{artifact}@main")
        with pytest.raises(SettingError, match="leave --quantization bnb-4bit out"):
            ModelManager(device="cpu", quantization="bnb-4bit")._load_model(f"{artifact}@main")
    assert ModelManager._load_model is stock
    assert list(rg.stream(model, PROMPT, max_new_tokens=3))
    assert model.regauge_step.steps == 2


def test_a_model_without_a_chat_template_says_which_endpoint_answers(
    bundled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from regauge.cli.running import serve
    from regauge.hosts import host_of

    host = host_of(bundled)
    monkeypatch.setattr(type(host), "serve", lambda *given: None)
    serve(str(bundled))
    told = capsys.readouterr()
    assert "no chat template, so only /v1/completions answers" in " ".join((told.out + told.err).split())
