"""The C++ kernels where memory or CPUs are short, without torch: an answer, never numbers that mean nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from regauge.kernels.cpu.library import library

CXX = shutil.which(os.environ.get("CXX", "c++"))
CALLS = r"""
import ctypes, os, sys
from pathlib import Path

class Matrix(ctypes.Structure):
    names = "rows columns bits group step zero value offset mantissa bias"
    _fields_ = [(n, ctypes.c_void_p) for n in ("panels", "row_scale", "table")]
    _fields_ += [(n, ctypes.c_int32) for n in names.split()] + [("stride", ctypes.c_int64)]

rows, columns, many = 2048, 1024, ctypes.c_int64
lib = ctypes.CDLL(sys.argv[1])
lib.rg_panel_bytes.restype = ctypes.c_size_t
panels = ctypes.create_string_buffer(rows // 16 * 16 * columns)
m = Matrix(ctypes.addressof(panels), 0, 0, rows, columns, 8, 128, 0, 0, 0, 128, 0, 0, 0)
assert lib.rg_panel_bytes(ctypes.byref(m)) == 16 * columns
x, y = (ctypes.c_float * columns)(*[1.0] * columns), (ctypes.c_float * (rows * columns))()
z = (ctypes.c_int8 * columns)()

def answers(threads):
    call = ctypes.byref(m), threads
    return [
        lib.rg_linear(call[0], x, y, many(1), 0, 1, threads),
        lib.rg_gemm(call[0], x, None, None, y, many(1), 0, threads),
        lib.rg_integers(call[0], z, y, many(1), threads),
        lib.rg_decode(call[0], many(0), many(rows), None, y, 0, threads),
    ]
"""
MEMORY = CALLS + "hold = ctypes.CDLL(sys.argv[2]); hold.fail_on(1); found = [answers(1), answers(3)]; hold.fail_on(0)\n"
MEMORY += "print(found, answers(3))"
THREADS = CALLS + "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
THREADS += "count = lambda: len(os.listdir('/proc/self/task'))\nbefore = count(); print(answers(8), count() - before)"
ROUNDING = r"""
import ctypes, sys
P, I, F, L = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float, ctypes.c_int64
lib = ctypes.CDLL(sys.argv[1])
Grid = type("Grid", (ctypes.Structure,), {"_fields_": list(zip("vmkbztclhs", [P, P] + [I] * 5 + [F] * 3))})
Ranger = type("Ranger", (ctypes.Structure,), {"_fields_": list(zip("stkcerw", [P, ctypes.c_double] + [I] * 4 + [F]))})
Sweep = type("Sweep", (ctypes.Structure,), {"_fields_": list(zip("wfgrszcRCG", [P] * 7 + [L] * 3)) + [("grid", Grid)]})
grid, ranger = Grid(None, None, 0, 4, 0, 0, 0, -8.0, 7.0, 1.0), Ranger(None, 1.0, 0, 0, 3, 0, 1.0)
x, f, steps, codes = (F * 640)(*[1.0] * 640), (F * 4096)(), (F * 10)(), ctypes.create_string_buffer(640)
at = ctypes.addressof
sweep = Sweep(at(x), at(f), None, at(ranger), at(steps), None, at(codes), 10, 64, 1, grid)
def answers(threads):
    found = lib.rg_range(P(at(grid)), P(at(ranger)), P(at(x)), 0, None, L(10), L(64), P(at(steps)), None, threads)
    return [found, lib.rg_feedback(P(at(sweep)), threads)]
hold = ctypes.CDLL(sys.argv[2]); hold.fail_on(1); found = [answers(1), answers(3)]; hold.fail_on(0)
print(found, answers(3))
"""
FAILING = r"""#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <string.h>
extern "C" void *__libc_malloc(size_t);
extern "C" void *__libc_memalign(size_t, size_t);
static volatile int on;
static __thread int in;
extern "C" void fail_on(int x) { on = x; }
static int fails(size_t n, void *caller) {
  if (!on || in || n < 256) return 0;
  Dl_info i;
  in = 1;
  const int hit = dladdr(caller, &i) && i.dli_fname && strstr(i.dli_fname, "libregauge");
  in = 0;
  return hit;
}
extern "C" void *malloc(size_t n) { return fails(n, __builtin_return_address(0)) ? 0 : __libc_malloc(n); }
extern "C" void *aligned_alloc(size_t a, size_t n) {
  return fails(n, __builtin_return_address(0)) ? 0 : __libc_memalign(a, n);
}
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    kernels = library()
    if kernels is None:
        pytest.skip("the C++ kernels were not built here")
    command = [sys.executable, "-c", code, kernels._name, *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux" or CXX is None, reason="malloc is replaced with glibc's own, by a compiler")
@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="a sanitiser has malloc already")
def test_no_memory_is_an_answer_of_every_product(tmp_path: Path) -> None:
    (tmp_path / "f.cpp").write_text(FAILING, encoding="utf-8")
    made = str(tmp_path / "f.so")
    subprocess.run([str(CXX), "-shared", "-fPIC", "-o", made, str(tmp_path / "f.cpp"), "-ldl"], check=True)
    assert run(MEMORY, made, LD_PRELOAD=made) == "[[1, 1, 1, 1], [1, 1, 1, 1]] [0, 0, 0, 0]"
    assert run(ROUNDING, made, LD_PRELOAD=made) == "[[1, 1], [1, 1]] [0, 0]"


@pytest.mark.skipif(sys.platform != "linux", reason="affinity and threads are asked for as Linux has them")
def test_threads_are_no_more_than_the_cpus_that_the_process_may_use() -> None:
    assert run(THREADS) == "[0, 0, 0, 0] 0"
