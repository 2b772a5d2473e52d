"""Ours: an artifact through `rg.load`, decoding by `generate` or by `rg.stream`, or prefilling.

Routes of one artifact share the loaded model.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from causal import a_token, timed
from serve import Loaded, Options, serve

import regauge as rg

LOADED: WeakValueDictionary[str, Any] = WeakValueDictionary()


def load(options: Options) -> Loaded:
    path = options["path"]
    model = LOADED.get(path)
    if model is None:
        model = LOADED[path] = rg.load(Path(path))
    facts: dict[str, Any] = {"bytes": options["bytes"], "bits": options["bits"], "kind": "int8"}
    if options["route"] != "stream":
        return Loaded(timed(model, options, facts), facts)
    prompt = torch.tensor([options["prompt"]])

    def stream() -> list[float]:
        times, ids = [], []
        for token in rg.stream(model, prompt, max_new_tokens=options["tokens"]):
            times.append(time.perf_counter())
            ids.append(int(token))
        facts["ids"] = ids
        return [a_token(times)]

    return Loaded(stream, facts)


if __name__ == "__main__":
    serve(load)
