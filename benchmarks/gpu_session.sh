#!/usr/bin/env bash
# Everything that needs a GPU, in one command: builds, tests on the device, measures, and ends with a
# table of the project's marks. Under 9 minutes, each step with a limit of its own; what a limit cuts
# off leaves what it had measured. Needs no network. Results go to the folder given, benchmarks/results
# without one, and what every step printed into one archive beside them.
#
#     benchmarks/gpu_session.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-benchmarks/results}"
python="${PYTHON:-python3}"

# What has to be installed already, all of it named at once; neither typer nor rich is needed.
"$python" - <<'PYTHON'
import importlib.metadata as metadata
import re
import sys

needed = {
    "setuptools": (77,), "pybind11": (3,), "cmake": (3, 24), "ninja": (), "torch": (2, 6),
    "triton": (3, 2), "safetensors": (), "numpy": (), "transformers": (5,), "pytest": (),
    "pytest-timeout": (), "pytest-xdist": (),
}
missing = []
for name, least in needed.items():
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        import shutil
        if name in ("cmake", "ninja") and shutil.which(name):
            continue
        missing.append(f"{name}: not installed")
        continue
    print(f"{name} {found}")
    if tuple(map(int, re.findall(r"\d+", found)[:len(least)])) < least:
        missing.append(f"{name}: expected {'.'.join(map(str, least))} or newer, found {found}")
if missing:
    sys.exit("gpu_session: " + "; ".join(missing))
import torch
if not torch.cuda.is_available():
    sys.exit("gpu_session: torch sees no CUDA device here; nothing was measured")
PYTHON

logs="$out/logs"
mkdir -p "$logs"
pack() { tar -czf "$logs-$gpu.tar.gz" -C "$out" logs && rm -r "$logs"; }
# Its cmake and ninja lie beside a Python that was named by its path.
PATH="$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH"
gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name(0).lower().replace(" ", "-"))')
trap pack EXIT
install() { # install SECONDS
  timeout "$1" "$python" -m pip install --quiet --disable-pip-version-check --no-build-isolation \
    --no-deps -e .
}
# An nvcc that cannot compile here costs the gather kernel alone: DMA does the same work.
install 100 || CMAKE_ARGS="${CMAKE_ARGS:-} -DMOEINF_CUDA=OFF" install 80

status=0
step() { # step SECONDS LOG COMMAND...: a step that fails, or runs out of time, stops no other
  local limit=$1 log=$2
  shift 2
  # Ctrl-C at the limit: pytest still says what failed, and a benchmark has written what it had.
  timeout --signal=INT --kill-after=5 "$limit" "$@" >"$logs/$log.txt" 2>&1 || { status=$?; echo "$log: exit status $status" >&2; }
}

# Compiling is most of the tests' time and takes one core each: side by side, before anything is timed.
# What the first benchmark will launch is compiled beside them.
(step 150 compile "$python" -m benchmarks.ffn_gpu --compile; exit "$status") &
step 170 tests-kernels "$python" -m pytest -q -p no:cacheprovider -n auto --tb=short \
  tests/kernels tests/test_cuda_real.py
wait $! || status=1

step 110 ffn_gpu "$python" -m benchmarks.ffn_gpu --json "$out/ffn_gpu-$gpu.json"
step 40 formats_gpu "$python" -m benchmarks.formats_gpu --json "$out/formats_gpu-$gpu.json"
step 30 copy_gpu "$python" -m benchmarks.copy_gpu --json "$out/copy_gpu-$gpu.json"
step 70 decode_gpu "$python" -m benchmarks.decode_gpu --json "$out/decode_gpu-$gpu.json"
"$python" -m benchmarks.gpu_summary "$out" "$gpu" | tee "$out/summary-$gpu.txt"
exit "$status"
