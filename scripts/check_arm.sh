#!/bin/sh
# Compiles the C++ kernels for 64-bit ARM and runs their self-test under an emulator of a user program.
#   scripts/check_arm.sh [CASES]
# Unoptimised: it is the results that count, and optimising takes minutes.
# Needs (Debian): g++-aarch64-linux-gnu qemu-user
set -eu
cd "$(dirname "$0")/.."

for tool in aarch64-linux-gnu-g++ qemu-aarch64; do
  command -v "$tool" >/dev/null || { echo "check_arm.sh needs $tool: apt install g++-aarch64-linux-gnu qemu-user" >&2; exit 2; }
done
. scripts/ccache.sh
[ -f build/arm/CMakeCache.txt ] || cmake -S . -B build/arm $launcher -DREGAUGE_SELFTEST=ON -DREGAUGE_OPTIMISE=-O0 \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ >/dev/null
cmake --build build/arm --parallel 2
said=$(qemu-aarch64 -L /usr/aarch64-linux-gnu build/arm/selftest "${1:-120}") || { echo "$said"; exit 1; }
echo "$said"
echo "$said" | grep -q '^neon: [1-9]' || { echo 'the NEON level did not run' >&2; exit 1; }
