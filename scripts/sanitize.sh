#!/bin/sh
# Builds the C++ kernels with the sanitisers for addresses and undefined behaviour, then runs the self-test and the tests
# from Python on that library; and with the sanitiser for threads, and runs the self-test.
#   scripts/sanitize.sh PYTHON [PYTEST_ARGUMENT ...]
# The memory that threads work in is as long as they asked for there (RG_EXACT in CMakeLists.txt), and full of bytes that
# make NaNs. Leaks are not looked for: the interpreter keeps its own memory to the end.
set -eu
cd "$(dirname "$0")/.."
python=$1
shift

build() {  # FOLDER CMAKE_OPTION ...
  folder=$1
  shift
  cmake -S . -B "$folder" -DREGAUGE_SELFTEST=ON "$@" >/dev/null
  cmake --build "$folder" --parallel 2
}

# Threads: one dispatch level is enough, for all share the pool. Of our own pool, for torch's OpenMP is not instrumented.
build build/sanitize-thread -DREGAUGE_SANITIZE=thread -DREGAUGE_LEVEL=portable
TSAN_OPTIONS=halt_on_error=1 build/sanitize-thread/selftest 40

build build/sanitize -DREGAUGE_SANITIZE=address
library=$(echo "$PWD"/build/sanitize/libregauge_cpu.*)
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:max_malloc_fill_size=1073741824:malloc_fill_byte=255
export UBSAN_OPTIONS=print_stacktrace=1
build/sanitize/selftest
# The interpreter is not instrumented, so the sanitiser's own library must be there before it. Nothing is captured at the
# file descriptors, so that a report, which ends the process, reaches the terminal.
[ $# -gt 0 ] || set -- tests/units/test_kernels_*.py tests/units/test_gram.py tests/units/test_step_program.py tests/units/test_sweep.py
LD_PRELOAD=$("${CXX:-c++}" -print-file-name=libasan.so) REGAUGE_LIBRARY=$library OMP_NUM_THREADS=1 \
  "$python" -m pytest -n 0 --capture=sys "$@"
