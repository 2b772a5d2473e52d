#!/bin/sh
# Builds the C++ kernels with the address and undefined-behaviour sanitisers, then runs the self-test and the tests from
# Python on that library.
#   scripts/sanitize.sh PYTHON [PYTEST_ARGUMENT ...]
# Leaks are not looked for: the interpreter keeps its own memory to the end.
set -eu
cd "$(dirname "$0")/.."
python=$1
shift

[ -f build/sanitize/CMakeCache.txt ] || cmake -S . -B build/sanitize -DREGAUGE_SANITIZE=ON -DREGAUGE_SELFTEST=ON >/dev/null
cmake --build build/sanitize --parallel 2
library=$(echo "$PWD"/build/sanitize/libregauge_cpu.*)
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1

build/sanitize/selftest
# The interpreter is not instrumented, so the sanitiser's own library must be there before it. Nothing is captured at the
# file descriptors, so that a report, which ends the process, reaches the terminal.
[ $# -gt 0 ] || set -- tests/units/test_kernels_cpu*.py
LD_PRELOAD=$("${CXX:-c++}" -print-file-name=libasan.so) REGAUGE_LIBRARY=$library OMP_NUM_THREADS=1 \
  "$python" -m pytest -n 0 --capture=sys "$@"
