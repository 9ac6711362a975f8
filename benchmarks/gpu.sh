#!/usr/bin/env bash
# What needs a GPU machine, in stages of under ten minutes each:   PYTHON=python3.12 benchmarks/gpu.sh [STAGE...]
#
#   build      the compiled ops with CUDA, in place; needs the CUDA toolkit (CUDA_HOME, /usr/local/cuda or the nvcc on PATH), no network
#   test       CUDA == CPU bit for bit, Triton against the reference, graph capture, the golden cases; no backend may be missing
#   forward    every op beside eager PyTorch and torch.compile                          -> NAME.json
#   backward   the same for backward and both together                                  -> NAME-backward.json
#   network    the ops between a transformer's GEMMs beside eager and torch.compile     -> NAME-network.json
#   train      seconds and memory of whole training steps on full-size backbones        -> NAME-train-step.json
#   apply      the same with LoRA, without and with flowbp_kernels.apply                -> NAME-apply.json
#   offload    FLUX.1-dev with LoRA, without and with memory.offload=blocks             -> NAME-offload.json
#   switches   SD3.5-medium with LoRA without and with each switch for a GPU, in turns; never run -> NAME-switches.json
#   quantised  velocity and LoRA gradient over a base in nf4, int8, float8; never run -> NAME-quantised.json
#   sanitize   compute-sanitizer, memcheck and racecheck, over the tests
#
# Without arguments all of them, in this order. A stage that fails or runs out of time is named at the end, and the others still run; the
# benchmarks write their file after every case. `train`, `apply`, `offload` and `switches` need the [train] extra, `quantised` [quantise]
# too, the others torch, NumPy, pytest and Triton alone. Results go to $OUT, else to benchmarks/results. FLOWBP_COMMIT names the commit
# where a copy of the checkout has left .git behind.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
PYTHON=${PYTHON:-python3}
RESULTS=${OUT:-benchmarks/results}
LIMIT=${LIMIT:-540} # seconds a command
export PYTHONUNBUFFERED=1

run() { timeout --kill-after=10 "$LIMIT" "$@"; }

tests() { # tests FILE... : one after the other, all within one limit; each says at once what failed
  local good=0 file deadline=$((SECONDS + LIMIT))
  "$PYTHON" -c '
import sys
from flowbp_kernels import backend
sys.exit("; ".join(f"{name}: {backend.unavailable(name)}" for name in ("cuda", "triton") if backend.unavailable(name)) or None)' || return 1
  for file in "$@"; do
    LIMIT=$((deadline > SECONDS ? deadline - SECONDS : 1)) run "$PYTHON" -m pytest -q -rs -m gpu --maxfail 20 --durations 3 "$file" || good=1
  done
  return $good
}

bench() { # bench FILE OPTIONS...
  run "$PYTHON" benchmarks/run.py --device cuda --batch 8 --steps 25 --json "$RESULTS/$NAME$1.json" "${@:2}"
}

sanitize() { # sanitize TOOL
  local sanitizer
  sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
  [[ -x $sanitizer ]] || { echo "compute-sanitizer not found; it comes with the CUDA toolkit"; return 1; }
  LIMIT=$((LIMIT / 2)) PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "$sanitizer" --tool "$1" --error-exitcode 1 \
    "$PYTHON" -m pytest -q -x -p no:cacheprovider tests/kernels/test_gpu.py -k "bits and not 90" # not the video
}

stage() {
  case $1 in
    build) FLOWBP_CUDA=1 run "$PYTHON" setup.py build_ext --inplace && "$PYTHON" -m flowbp_kernels ;;
    test) tests tests/kernels/test_gpu.py tests/test_golden.py tests/kernels/test_triton.py tests/kernels/test_offload.py ;;
    forward) bench "" --mode forward --latent sd3.5-1024 flux-1024 video-720p ;;
    backward) bench -backward --mode backward full --latent sd3.5-1024 ;;
    network) bench -network --mode forward full --dtype bfloat16 --latent sd3.5-block flux-block ;;
    train)
      run "$PYTHON" benchmarks/train_step.py --backbone sd3.5-medium flux.1-dev --active 1 4 --repeats 2 \
        --json "$RESULTS/$NAME-train-step.json"
      ;;
    apply)
      run "$PYTHON" benchmarks/train_step.py --backbone sd3.5-medium --batch 8 --active 4 --mode sweep --checkpointing on \
        --rank 32 --repeats 2 --apply off on --json "$RESULTS/$NAME-apply.json"
      ;;
    offload)
      run "$PYTHON" benchmarks/train_step.py --backbone flux.1-dev --active 4 --mode sweep --checkpointing on \
        --repeats 2 --offload off on --json "$RESULTS/$NAME-offload.json"
      ;;
    switches)
      run "$PYTHON" benchmarks/train_step.py --backbone sd3.5-medium --active 4 --mode sweep --checkpointing on \
        --repeats 3 --rounds 2 --json "$RESULTS/$NAME-switches.json" \
        --switch none attention-auto attention-cudnn cuda-graph channels-last reward-float32 reward-tf32
      ;;
    quantised) run "$PYTHON" benchmarks/quantised.py --device cuda --json "$RESULTS/$NAME-quantised.json" ;;
    sanitize)
      local good=0
      sanitize memcheck || good=1
      sanitize racecheck || good=1
      return $good
      ;;
    *) echo "no stage $1; there are build, test, forward, backward, network, train, apply, offload, switches, quantised, sanitize"; return 1 ;;
  esac
}

"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "torch sees no CUDA device"' || exit 1
NAME=$("$PYTHON" -c 'import torch; print("".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name()).lower())')
mkdir -p "$RESULTS"

failed=()
(($#)) || set -- build test forward backward network train apply offload switches quantised sanitize
for name in "$@"; do
  echo "== $name ($(date +%T))"
  stage "$name" || failed+=("$name")
done
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
