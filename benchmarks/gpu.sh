#!/usr/bin/env bash
# All tests and benchmarks that need a GPU, in three calls, on a machine that need have no network.
#
#   benchmarks/gpu.sh correct WHEELS OUTPUT [DATA]   at most four minutes: the tests, and each benchmark at its smallest,
#                                                    side by side
#   benchmarks/gpu.sh fast WHEELS OUTPUT             at most nine: layer, generation, step and resident experts, one
#                                                    after the other
#   benchmarks/gpu.sh train WHEELS OUTPUT [DATA]     at most five: routers and tables on the text in DATA
#   benchmarks/gpu.sh --cpu correct ...              the same with --quick on the CPU, ten times as patient, to try it out
#
#   WHEELS   a folder that benchmarks/wheels.sh has filled; an empty one if everything is installed
#   DATA     a folder that benchmarks.carry has filled; without it the routers read Python's standard library
#   PYTHON   the interpreter to use (default: python3)
#
# What no GPU has answered yet comes first in each call, and every part writes down what it knows as it goes: a call that
# is cut off leaves something. In OUTPUT, whatever fails:
# summary.txt (begin there), logs.txt, results.json, results.md, profile.txt, PNGs.
# The exit status is 0 if all parts succeeded, 1 if one failed or was cut off, 2 if there is no GPU, the call is wrong or
# the package cannot be imported.
#
# The machine is expected to have Python 3.12 with torch 2.11 for CUDA 13, and with it numpy, matplotlib, tensorboard,
# sentencepiece, tokenizers, safetensors, scipy, jinja2, mpi4py, pyyaml, rich, tqdm, pytest, pytest-timeout, and einops,
# msgpack, ninja, psutil and py-cpuinfo for DeepSpeed.
set -uo pipefail

USAGE="usage: benchmarks/gpu.sh [--cpu] correct|fast|train WHEELS OUTPUT [DATA], and WHEELS has to be a folder"
NEEDED=(torch deepspeed megatron.core pydantic ruamel.yaml sentencepiece tokenizers scipy safetensors matplotlib)
NEEDED+=(tensorboard pytest pytest_timeout)
IMPORTS='
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except BaseException as error:
        print(f"{name} cannot be imported ({error})")
'
PYTHON="${PYTHON:-python3}"

main() {
  cpu=
  [[ "${1-}" != --cpu ]] || { cpu=1 && shift; }
  (($# == 3 || $# == 4)) && [[ "$1" =~ ^(correct|fast|train)$ ]] && [[ -d "$2" ]] || stop "$USAGE"
  mkdir -p "$3" || stop "cannot write to $3"
  local call="$1" wheels output data=()
  wheels="$(realpath "$2")" output="$(realpath "$3")"
  [[ -z "${4-}" ]] || data=(--data "$(realpath "$4")")
  cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
  work="$(mktemp -d)"
  trap 'collect "$output"; rm -rf "$work"' EXIT
  mkdir "$work/logs" "$work/results"
  prepare "$wheels"
  quick=() patience=1
  [[ -z "$cpu" ]] || { quick=(--quick --rounds 1) && patience=10; }
  case "$call" in
    correct) correct ;;
    fast) fast ;;
    train) train ;;
  esac
  cat "$work/parts.txt"
  ! grep -qv 'ok$' "$work/parts.txt"
  exit
}

# What can fail, as much at once as there are cores for: nothing here is a measurement.
correct() {
  TOTAL=$((220 * patience))
  local settings=("${quick[@]}") kind
  quick=(--quick --rounds 1)
  beside tests layouts-alone 200 tests/gpu/test_layouts.py -k "1-modern or 1-paper or fetched"
  beside tests layouts-ranks 200 tests/gpu/test_layouts.py -k "2-modern or 2-paper or split"
  for kind in bf16-zero3 bf16-offload-all fp16-zero3; do
    beside tests "run-$kind" 200 tests/gpu/test_run.py -k "$kind"
  done
  beside tests model 200 tests/gpu/test_model.py tests/gpu/test_documents.py tests/gpu/test_layer.py \
    tests/gpu/test_gradients.py
  beside measure moe_layer 150
  beside measure step 150 --profile "$work/results/profile.txt"
  beside measure generation 100
  beside measure resident_experts 100
  beside tests sync 150 tests/gpu/test_sync.py
  for kind in bf16-zero1 bf16-offload-optimizer fp32-zero1 bf16-zero2 fp16-zero1; do
    beside tests "run-$kind" 150 tests/gpu/test_run.py -k "$kind"
  done
  beside tests kernels 150 tests/ops
  beside tests routing 150 tests/routing/test_router.py tests/routing/test_switch.py tests/routing/test_topk.py \
    tests/moe/test_one_graph.py
  beside measure routers 120 "${data[@]}" --seconds $((60 * patience)) --together 4
  wait
  quick=("${settings[@]}")
  part pictures 20 -m benchmarks.pictures "$work/results"
}

# Figures, of a machine that does nothing else meanwhile. The layers of other libraries were measured already.
fast() {
  TOTAL=$((530 * patience))
  local layers=("stage 2" "stage 2, compiled" "dense, CUDA graphs" "stage 2, CUDA graphs")
  measure moe_layer 120 --rounds 9 --layers "${layers[@]}" "stage 2, compiled, CUDA graphs"
  measure generation 60 --rounds 3
  measure step 280 --rounds 5 --profile "$work/results/profile.txt"
  measure resident_experts 50 --rounds 3
  part pictures 20 -m benchmarks.pictures "$work/results"
}

# Recipes, as many as there is time for.
train() {
  TOTAL=$((290 * patience))
  local recipes=(dense hash cooccurrence "stablemoe, balance 0.03" "switch, balance 0.1")
  measure routers 285 "${data[@]}" --seconds $((200 * patience)) --together 4 --seeds 1 2 --tokens 12e6 --recipes "${recipes[@]}"
}

# beside COMMAND...: in the background, when there is a core for it.
beside() {
  while (($(jobs -rp | wc -l) >= $(nproc --all))); do wait -n; done
  "$@" &
}

# measure NAME SECONDS OPTIONS...: a benchmark, which writes what it knows as it goes.
measure() {
  local name="$1" limit="$2"
  shift 2
  part "$name" "$limit" -m "benchmarks.$name" --output "$work/results/$name.json" "$@" "${quick[@]}"
}

# tests NAME SECONDS FILES...: they end by themselves before they are killed, so that they say what they know.
# shellcheck disable=SC2329 # beside calls it
tests() {
  local name="$1" limit="$2"
  shift 2
  part "$name" "$limit" -m pytest "$@" -v --tb=short -rfE -p no:cacheprovider --durations 5 \
    --timeout $((90 * patience)) --session-timeout $((limit * patience - 10))
}

# Wheels on the path, libraries that can be imported, a GPU.
prepare() {
  local found=("$1"/*.whl)
  if [[ -e "${found[0]}" ]]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" "${found[@]}" >&2 ||
      stop "the wheels in $1 cannot be installed into $("$PYTHON" --version)"
  fi
  export PYTHONPATH="$PWD:$work/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 MPLCONFIGDIR="$work" MPLBACKEND=Agg
  export TORCHINDUCTOR_CACHE_DIR="$work/inductor" TRITON_CACHE_DIR="$work/triton" TMPDIR="$work"
  if [[ -n "$cpu" ]]; then
    export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
  else
    export DS_ACCELERATOR=cuda
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
      stop "torch sees no GPU here; with --cpu as the first argument everything runs on the CPU"
  fi
  local said
  said="$("$PYTHON" -W ignore -c "$IMPORTS" "${NEEDED[@]}" stablemoe_ds.training.trainer 2>&1 | grep 'cannot be imported')"
  [[ -z "$said" ]] || stop "is a wheel missing? $(head -n 3 <<<"$said" | paste -sd ';')"
}

# part NAME SECONDS ARGUMENTS...: run Python with these, as long as it may and there is time; one line for the summary.
part() {
  local name="$1" limit=$(($2 * patience)) began=$SECONDS status=0 what
  shift 2
  ((limit <= TOTAL - SECONDS)) || limit=$((TOTAL - SECONDS))
  if ((limit < 10)); then
    what="left out: no time"
  else
    echo "$name: at most $limit s" >&2
    timeout --kill-after=5 "$limit" "$PYTHON" -W ignore "$@" >"$work/logs/$name.txt" 2>&1 || status=$?
    case $status in
      0) what=ok ;;
      124 | 137) what="CUT OFF after $limit s" ;;
      *) what="FAILED with status $status" ;;
    esac
  fi
  printf '%-22s %4d s  %s\n' "$name" $((SECONDS - began)) "$what" >>"$work/parts.txt"
}

# Few files, whatever there is.
# shellcheck disable=SC2329 # the trap calls it
collect() {
  local file
  [[ -e "$work/parts.txt" ]] || return
  cp "$work"/results/*.png "$work"/results/profile.txt "$1/" 2>/dev/null
  (cd "$work/logs" && tail -n +1 -- *.txt) >"$1/logs.txt"
  for file in "$work"/results/*.md; do
    [[ ! -e "$file" ]] || { cat "$file" && echo; }
  done >"$1/results.md"
  "$PYTHON" - "$work/results" >"$1/results.json" <<'END'
import json, pathlib, sys
files = sorted(pathlib.Path(sys.argv[1]).glob("*.json"))
print(json.dumps({file.stem: json.loads(file.read_text()) for file in files}, indent=1))
END
  {
    "$PYTHON" -c 'import platform, torch; print("Python", platform.python_version(), "torch", torch.__version__)'
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null || echo "no GPU"
    echo
    cat "$work/parts.txt"
    echo
    grep -hE '^(FAILED|ERROR)|(passed|failed|skipped|error).* in [0-9.]+s' "$work"/logs/*.txt
  } >"$1/summary.txt"
}

stop() {
  echo "gpu.sh: $1" >&2
  exit 2
}

main "$@"
