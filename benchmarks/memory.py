"""Memory of a search by its phases, beside what was counted before it: anonymous bytes of the process, every 2 ms.

python scripts/write_random_model.py MODEL --size 135m
python benchmarks/memory.py MODEL OUT --text FOLDER                 # a whole search
python benchmarks/memory.py MODEL OUT --text FOLDER --short         # little text a step: every phase, sooner
"""

from __future__ import annotations

import argparse
import threading
import time
from dataclasses import replace
from typing import Any

from regauge.hosts import host_of
from regauge.kernels.cpu.machine import anonymous_bytes
from regauge.search import budgets
from regauge.search.fit import fit
from regauge.search.loop.desk import Effort, Limits
from regauge.search.loop.room import room
from regauge.search.options import site_groups

SHORT = {"calibration": 4096, "search": 1024, "evaluation": 1024, "gradient": 1024, "seen": 2048, "checks": 4}
SHORT |= {"neighbours": 2, "rounds": 1, "points": 3, "builds": 2, "turns": 2, "draws": 3}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    words.add_argument("model")
    words.add_argument("out")
    words.add_argument("--text", required=True)
    words.add_argument("--budget", default="memory=0.3x")
    words.add_argument("--short", action="store_true", help="little text a step")
    given = words.parse_args()
    sized: Any = Effort.sized
    if given.short:
        Effort.sized = lambda self, parameters: replace(sized(self, parameters), **SHORT)  # type: ignore[method-assign]  # for this process
    source = host_of(given.model).open(given.model)
    effort = Effort().sized(source.parameters())
    for step in room(source, site_groups(source.anatomy), effort, budgets.parse([given.budget])).steps:
        print(f"counted {step.peak(Limits()) / 1e6:8.0f} MB  {step.name}", flush=True)
    phase, highest, ended = ["start"], dict[str, int](), threading.Event()

    def watch() -> None:
        while not ended.is_set():
            highest[phase[0]] = max(highest.get(phase[0], 0), anonymous_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        fit(
            given.model,
            given.out,
            budgets=[given.budget],
            calibration=given.text,
            progress=lambda event: phase.__setitem__(0, event.phase),
        )
    finally:
        ended.set()
        watcher.join()
        for name, found in highest.items():
            print(f"taken   {found / 1e6:8.0f} MB  {name}")


if __name__ == "__main__":
    main()
