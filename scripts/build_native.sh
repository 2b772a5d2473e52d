#!/bin/sh
# Builds the C++ kernels of this clone and installs them into the environment of a Python.
#   scripts/build_native.sh PYTHON BUILD_FOLDER [CMAKE_OPTION ...]
set -eu
cd "$(dirname "$0")/.."
python=$1 folder=$2
shift 2

if ! command -v cmake >/dev/null; then
  PIP_CONSTRAINT=constraints.txt "$python" -m pip install --quiet --disable-pip-version-check cmake ninja
  PATH="$(dirname "$("$python" -c 'import sys; print(sys.executable)')"):$PATH"
fi
. scripts/ccache.sh
generator=$(command -v ninja >/dev/null && echo Ninja || echo 'Unix Makefiles')
[ -f "$folder/CMakeCache.txt" ] || cmake -S . -B "$folder" -G "$generator" $launcher "$@" >/dev/null
cmake --build "$folder" --parallel "$(nproc 2>/dev/null || sysctl -n hw.ncpu)"
cmake --install "$folder" --prefix "$("$python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')" >/dev/null
