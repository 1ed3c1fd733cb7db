#!/usr/bin/env bash
# Builds and runs every C++ test, and a million calls of the C interface, under AddressSanitizer with UBSan, then under ThreadSanitizer.
set -euo pipefail
cd "$(dirname "$0")/../.."
for sanitizer in address,undefined thread; do
  folder="build/sanitize-${sanitizer%%,*}"
  cmake -G Ninja -S . -B "$folder" -DMOEINF_PYTHON=OFF -DMOEINF_TESTS=ON \
    -DMOEINF_SANITIZE="$sanitizer" -DCMAKE_BUILD_TYPE=RelWithDebInfo
  cmake --build "$folder"
  MOEINF_STRESS_CALLS=1000000 UBSAN_OPTIONS=halt_on_error=1 ctest --test-dir "$folder" --output-on-failure
done
