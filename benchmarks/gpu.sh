#!/usr/bin/env bash
# All that needs a GPU machine: build, tests, compute-sanitizer, benchmarks.   PYTHON=python3.12 benchmarks/gpu.sh [bench options]
# Runs every part even where one fails, names those that did, and leaves results in benchmarks/results/.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
RESULTS=benchmarks/results
failed=()

part() {  # part NAME COMMAND...
  echo "== $1"
  "${@:2}" || failed+=("$1")
}

sanitize() {  # sanitize TOOL: every op, forward and backward, on tiny shapes
  local tool
  tool=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
  [[ -x $tool ]] || { echo "compute-sanitizer not found; it comes with the CUDA toolkit"; return 1; }
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool "$1" --error-exitcode 1 \
    "$PYTHON" benchmarks/run.py --device cuda --latent tiny --batch 3 --steps 5 --provider cuda triton --seconds 0
}

"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "torch sees no CUDA device"' || exit 1
name=$("$PYTHON" -c 'import torch; print("".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name()).lower())')
mkdir -p "$RESULTS"

part build env FLOWBP_CUDA=1 "$PYTHON" -m pip install --no-build-isolation --no-deps -e .
part backends "$PYTHON" -m flowbp_kernels
part tests "$PYTHON" -m pytest -q -m gpu
part memcheck sanitize memcheck
part racecheck sanitize racecheck
part benchmarks "$PYTHON" benchmarks/run.py --device cuda --json "$RESULTS/$name.json" "$@"
part step_share "$PYTHON" benchmarks/step_share.py --device cuda --json "$RESULTS/$name-step-share.json"

if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
