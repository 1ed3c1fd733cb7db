#!/usr/bin/env bash
# Builds and runs every C++ test: tests/cpp/run.sh [CTEST OPTIONS...].
set -euo pipefail
cd "$(dirname "$0")/../.."
cmake -G Ninja -S . -B build/cpp -DMOEINF_PYTHON=OFF -DMOEINF_TESTS=ON -DCMAKE_BUILD_TYPE=Release
cmake --build build/cpp
ctest --test-dir build/cpp --output-on-failure "$@"
