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
install 60 || CMAKE_ARGS="${CMAKE_ARGS:-} -DMOEINF_CUDA=OFF" install 40

status=0
step() { # step SECONDS LOG COMMAND...: a step that fails, or runs out of time, stops no other
  local limit=$1 log=$2
  shift 2
  timeout "$limit" "$@" >"$logs/$log.txt" 2>&1 || { status=$?; echo "$log: exit status $status" >&2; }
}

# Compiling is most of the tests' time and takes one core each: side by side, before anything is timed.
# What the first benchmark will launch is compiled beside them.
pids=()
beside() { # beside STEP...: what it set ends with it, but for its exit status
  { step "$@"; exit "$status"; } &
  pids+=($!)
}
tests() { # tests NAME ARGUMENTS...
  local name=$1
  shift
  beside 150 "tests-$name" "$python" -m pytest -q -p no:cacheprovider "$@"
}
beside 150 compile "$python" -m benchmarks.ffn_gpu --compile
forms=tests/kernels/numerics/test_kernels_forms.py
tests vector "$forms" -k "vector and not odd_sizes"
tests shared "$forms" -k "shared and not odd_sizes"
tests grouped "$forms" -k "grouped and not odd_sizes"
tests forms "$forms" -k "not vector and not shared and not grouped or odd_sizes"
tests residency tests/kernels/numerics/test_kernels_residency.py
tests numerics tests/kernels/numerics --ignore="$forms" \
  --ignore=tests/kernels/numerics/test_kernels_residency.py
tests kernels tests/kernels --ignore=tests/kernels/numerics
tests cache tests/test_cuda_real.py
for pid in "${pids[@]}"; do wait "$pid" || status=1; done

step 150 ffn_gpu "$python" -m benchmarks.ffn_gpu --json "$out/ffn_gpu-$gpu.json"
step 45 copy_gpu "$python" -m benchmarks.copy_gpu --json "$out/copy_gpu-$gpu.json"
step 95 decode_gpu "$python" -m benchmarks.decode_gpu --json "$out/decode_gpu-$gpu.json"
"$python" -m benchmarks.gpu_summary "$out" "$gpu" | tee "$out/summary-$gpu.txt"
exit "$status"
