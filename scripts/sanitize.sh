#!/bin/sh
# Builds the C++ kernels with the address and undefined-behaviour sanitisers and runs their tests on that library.
#   scripts/sanitize.sh PYTHON [PYTEST_ARGUMENT ...]
# Leaks are not looked for: the interpreter keeps its own memory to the end.
set -eu
cd "$(dirname "$0")/.."
python=$1
shift

[ -f build/sanitize/CMakeCache.txt ] || cmake -S . -B build/sanitize -DREGAUGE_SANITIZE=ON >/dev/null
cmake --build build/sanitize --parallel 2
library=$(echo "$PWD"/build/sanitize/libregauge_cpu.*)
runtime=$("${CXX:-c++}" -print-file-name=libasan.so)

# The interpreter is not instrumented, so the sanitiser's own library must be there before it. What a test shows is held
# back by capturing, so that a report, which ends the process, is printed straight to the terminal.
LD_PRELOAD=$runtime REGAUGE_LIBRARY=$library OMP_NUM_THREADS=1 \
  ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
  "$python" -m pytest -n 0 --capture=sys "$@" $([ $# -gt 0 ] || ls tests/units/test_kernels_cpu*.py)
