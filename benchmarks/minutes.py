"""What the memory of this machine gives from moment to moment: one thread and all, from the last cache and from memory.

    python benchmarks/minutes.py
    python benchmarks/minutes.py --seconds 10

On a shared host the bandwidth changes by the minute. Where two threads get no more from memory than one does, the cache
tells why: if they get no more from there either, they share a core; if they get twice as much, it is the memory.
Moments are slow where all threads read less than 1.3 times what one does. Needs the C++ kernels.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch

from regauge.kernels.cpu import library

CACHE, MEMORY = 12 << 20, 256 << 20  # bytes read: less than a last-level cache holds, and far more
SLOW = 1.3


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--seconds", type=float, default=60.0)
    given = words.parse_args()
    if library.library() is None or torch.get_num_threads() < 2:
        print("this needs the C++ kernels (make native) and two threads", file=sys.stderr)
        return 2
    from regauge.kernels.cpu.machine import bandwidth

    threads = torch.get_num_threads()
    turn = [(1, 0.02, CACHE), (threads, 0.02, CACHE), (1, 0.05, MEMORY), (threads, 0.05, MEMORY)]
    samples: list[list[float]] = []
    until = time.monotonic() + given.seconds
    while time.monotonic() < until:
        samples.append([bandwidth(*how) / 1e9 for how in turn])
    print(f"GB/s read by 1 and by {threads} threads, medians of {len(samples)} moments")
    for name, slow in (("slow", True), ("fast", False)):
        some = [sample for sample in samples if (sample[3] < SLOW * sample[2]) == slow]
        if some:
            cache_1, cache_n, one, all_ = (statistics.median(column) for column in zip(*some, strict=True))
            shared = sum(sample[1] < SLOW * sample[0] for sample in some)
            print(
                f"{name}: {len(some)} moments; memory {one:.0f} and {all_:.0f}, cache {cache_1:.0f} and {cache_n:.0f}; "
                f"in {shared} of them the threads shared a core"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
