#!/usr/bin/env bash
# Everything that needs a GPU, in one command: builds, tests the kernels on the device, measures
# them, and ends with a short table. Needs no network, but torch, triton, transformers, pybind11,
# cmake, ninja and pytest installed. Results go to the folder given, benchmarks/results without one.
#
#     benchmarks/gpu_session.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-benchmarks/results}"
if ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_session: torch sees no CUDA device here; nothing was measured" >&2
  exit 1
fi
mkdir -p "$out"
gpu=$(python3 -c 'import torch; print(torch.cuda.get_device_name(0).lower().replace(" ", "-"))')
cmake --version | head -1
python3 -m pip install --quiet --no-build-isolation --no-deps -e .
status=0
timeout 160 python3 -m pytest -q tests/kernels >"$out/tests-$gpu.txt" 2>&1 || status=$?
timeout 30 python3 -m benchmarks.roofline_gpu || status=$?
timeout 60 python3 -m benchmarks.copy_gpu --json "$out/copy_gpu-$gpu.json" || status=$?
timeout 150 python3 -m benchmarks.decode_gpu --json "$out/decode_gpu-$gpu.json" || status=$?
timeout 100 python3 -m benchmarks.ffn_gpu --json "$out/ffn_gpu-$gpu.json" || status=$?
tail -3 "$out/tests-$gpu.txt"
exit "$status"
