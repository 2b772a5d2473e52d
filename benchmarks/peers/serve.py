"""The loop that every peer runs: requests on stdin, answers on stdout, a line of JSON each. Standard library only.

Between requests a peer blocks in a read, so that whatever else is being measured has the machine for itself. What
libraries print goes to stderr. Requests:

    {"do": "load", "id": ..., "options": {...}}    -> {"facts": {...}}
    {"do": "run", "id": ...}                       -> {"seconds": [...], "facts": {...}}
    {"do": "drop", "id": ...}                      -> {}

An answer `{"error": sentence}` means that the request could not be served; the peer lives on.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Options = dict[str, Any]  # JSON


@dataclass
class Loaded:
    """Something to time.

    Attributes:
        run: does it once and gives seconds a unit (a token, a pass, a prompt), one or more.
        facts: what is told of it: `bytes` of weights read a unit, `bits` a weight, versions, notes.
    """

    run: Callable[[], list[float]]
    facts: dict[str, Any] = field(default_factory=dict)  # JSON


def serve(load: Callable[[Options], Loaded]) -> None:
    """Answers requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    held: dict[str, Loaded] = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = _answer(load, held, request)
        except Exception as error:  # a peer that fails is a row that says why, not the end of the run
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(load: Callable[[Options], Loaded], held: dict[str, Loaded], request: Options) -> dict[str, Any]:
    name = request["id"]
    if request["do"] == "load":
        held[name] = load(request["options"])
        return {"facts": held[name].facts}
    if request["do"] == "drop":
        held.pop(name, None)
        gc.collect()
        return {}
    seconds = held[name].run()
    return {"seconds": seconds, "facts": held[name].facts}
