"""llama.cpp's own tools: a GGUF file in bf16, `llama-imatrix` over the windows, `llama-quantize` to Q4_K_M with it.

Perplexity, which llama-imatrix computes beside, is off. The tokenizer must be byte-level BPE. Arguments and answer:
`windows.py`.
"""

from __future__ import annotations

import time

BEGAN = time.monotonic()

import json  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import gguf  # noqa: E402
from gguf_files import write_bf16  # noqa: E402
from setup import LLAMA, tool  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from windows import Job, given, windows  # noqa: E402


def vocabulary(writer: gguf.GGUFWriter, folder: Path) -> None:
    """The tokenizer's words, padded to the rows of the model's table."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    told = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if told["model"]["type"] != "BPE" or "ByteLevel" not in json.dumps(told["pre_tokenizer"]):
        raise SystemExit(f"{folder / 'tokenizer.json'} is not byte-level BPE, which alone is written here")
    named: dict[int, str] = {number: word for word, number in told["model"]["vocab"].items()}
    special = {entry["id"]: entry["content"] for entry in told["added_tokens"]}
    special |= {config[key]: named.get(config[key], f"<{key}>") for key in ("bos_token_id", "eos_token_id")}
    named |= special
    rows = range(config["vocab_size"])
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([named.get(row, f"[PAD{row}]") for row in rows])
    writer.add_token_types(
        [kinds.CONTROL if row in special else kinds.NORMAL if row in named else kinds.UNUSED for row in rows]
    )
    merges: list[Any] = told["model"]["merges"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    writer.add_token_merges(pairs or ["\u0100 \u0101"])  # llama.cpp wants one: two bytes that no text has
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(bool(Tokenizer.from_file(str(folder / "tokenizer.json")).encode("").ids))


def ran(*command: object) -> None:
    """One tool; what it says is shown where it fails."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with {done.returncode}\n{done.stdout[-500:]}{done.stderr[-1500:]}")


def read(job: Job) -> Path:
    """The windows as text, less what opens each, and a few more at the end: the tool cuts anew what it tokenises."""
    tokenizer = Tokenizer.from_file(str(job.model / "tokenizer.json"))
    front, found = len(tokenizer.encode("").ids), windows(job)
    again = found * (1 + 2 // job.count)
    text = job.out / "windows.txt"
    said = "".join(tokenizer.decode(ids[front:]) for ids in [*found, *again[: 1 + job.count // 16]])
    text.write_text(said, encoding="utf-8")
    return text


def main() -> None:
    job = given(__doc__, BEGAN)
    full, importance, out = job.out / "bf16.gguf", job.out / "imatrix.gguf", job.out / "Q4_K_M.gguf"
    text = read(job)
    write_bf16(job.model, full, vocabulary)
    job.ends("convert")
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or len(os.sched_getaffinity(0))
    batch = max(1, 2048 // job.length) * job.length
    lengths = ("-c", job.length, "-b", batch, "-ub", min(batch, 2048), "--chunks", job.count)
    ran(tool("imatrix"), "-m", full, "-f", text, "-o", importance, *lengths, "-t", threads, "--no-ppl")
    job.ends("imatrix")
    ran(tool("quantize"), "--imatrix", importance, full, out, "Q4_K_M", threads)
    job.ends("quantise")
    full.unlink()
    job.tell("gguf", source=LLAMA)


if __name__ == "__main__":
    main()
