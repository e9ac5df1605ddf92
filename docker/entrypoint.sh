#!/usr/bin/env bash
# Become what the container was asked to run: a program of the image, or else a `stablemoe` command.
#
# `train` looks at the environment first, and goes by the first of these that is there:
#
#   SLURM_PROCID, OMPI_COMM_WORLD_RANK, PMI_RANK or LOCAL_RANK: srun, mpirun or torchrun has started this container
#       as one rank of many. It trains as that rank.
#   NNODES, NODE_RANK, NPROC_PER_NODE: containers of the run, which of them this is, ranks in each; `auto` means one
#       rank a GPU. MASTER_ADDR and MASTER_PORT say where container 0 listens.
#       Each may come as PET_..., which Kubeflow sets and torchrun reads, and then counts before the plain name.
#       PET_RDZV_ENDPOINT and the other PET_RDZV_... ask for torchrun's elastic rendezvous.
#   WORLD_SIZE and RANK, in place of NNODES and NODE_RANK: PyTorchJob counts its pods so.
#   None of them: one process.
set -euo pipefail

main() {
  case "${1-}" in
    train) train "${@:2}" ;;
    "" | -*) exec stablemoe "$@" ;;
    *) if is_program "$1"; then exec "$@"; else exec stablemoe "$@"; fi ;;
  esac
}

is_program() {
  [[ -n "$(type -P -- "$1" || true)" ]] # -P: `eval`, say, is a word of this shell, too
}

train() {
  if [[ -n "${SLURM_PROCID-}${OMPI_COMM_WORLD_RANK-}${PMI_RANK-}${LOCAL_RANK-}" ]]; then
    exec stablemoe train "$@"
  fi
  local nodes="${PET_NNODES:-${NNODES:-${WORLD_SIZE:-1}}}"
  local node="${PET_NODE_RANK:-${NODE_RANK:-${RANK:-0}}}"
  local ranks="${PET_NPROC_PER_NODE:-${NPROC_PER_NODE:-1}}"
  local address="${PET_MASTER_ADDR:-${MASTER_ADDR:-}}"
  local port="${PET_MASTER_PORT:-${MASTER_PORT:-29500}}"
  if [[ "$ranks" == auto ]]; then # without a GPU, torchrun would start a rank on every core
    ranks="$(count_gpus)"
  fi
  if [[ -z "${PET_RDZV_ENDPOINT-}" ]]; then
    if [[ "$nodes" == 1 && "$ranks" == 1 ]]; then
      exec stablemoe train "$@"
    elif [[ "$nodes" != 1 && -z "$address" ]]; then
      echo "entrypoint: error: $nodes containers, but no MASTER_ADDR: expected the name of container 0" >&2
      exit 2
    elif [[ "$ranks" == 1 ]]; then # no launcher in between: the exit status of the rank is that of the container
      export RANK="$node" WORLD_SIZE="$nodes" LOCAL_RANK=0 MASTER_ADDR="$address" MASTER_PORT="$port"
      exec stablemoe train "$@"
    fi
  fi
  export PET_NNODES="$nodes" PET_NODE_RANK="$node" PET_NPROC_PER_NODE="$ranks"
  export PET_MASTER_ADDR="${address:-127.0.0.1}" PET_MASTER_PORT="$port"
  # How long ranks may take to save when the container is told to stop; torchrun's own 30 seconds are few.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
  exec torchrun --module stablemoe_ds train "$@"
}

count_gpus() {
  local gpus
  gpus="$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true)"
  echo "$((gpus > 0 ? gpus : 1))"
}

main "$@"
