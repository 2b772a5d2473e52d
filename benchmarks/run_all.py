"""Runs every benchmark of this folder, one after another, and says which failed.

    make bench
    python benchmarks/run_all.py linear decode      # only these

Each is a command of its own and prints its own table; what needs models or a device that are not on this machine says
so, and exits with 2.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ABSENT = 2
"""Exit status of a benchmark that cannot run on this machine."""


def main(names: list[str]) -> int:
    found = {path.stem: path for path in sorted(HERE.glob("*.py")) if path.stem != "run_all"}
    unknown = [name for name in names if name not in found]
    if unknown:
        print(f"no benchmark named {', '.join(unknown)}; there are {', '.join(found)}", file=sys.stderr)
        return 2
    failed = []
    for name in names or found:
        print(f"\n== {name} ==", flush=True)
        start = time.monotonic()
        code = subprocess.run([sys.executable, str(found[name])], check=False).returncode
        print(f"-- {name}: exit {code}, {time.monotonic() - start:.0f} s", flush=True)
        failed += [name] if code not in (0, ABSENT) else []
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
