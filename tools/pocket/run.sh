#!/bin/sh
# Trains, exports and measures the built-in model. Usage: tools/pocket/run.sh [minutes]
# PYTHON names the interpreter; the rest of the environment is for speed only.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
export PYTHONPATH=.
# Threads that sleep instead of spinning survive a busy machine.
export OMP_WAIT_POLICY=passive
# Freed memory stays with the process, in large pages; compiled matrix kernels are kept.
export THP_MEM_ALLOC_ENABLE=1
export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=4000000000
export ONEDNN_PRIMITIVE_CACHE_CAPACITY=20000
"$python" -m tools.pocket.tokenizer
"$python" -m tools.pocket.train --minutes "${1:-55}"
"$python" -m tools.pocket.export
"$python" -m tools.pocket.evaluate
