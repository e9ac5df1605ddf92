#!/bin/bash
# Trains on SLURM: starts the ranks, passes the request to save on to them, and asks to be started again.
#SBATCH --job-name=paper-base
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=8
#SBATCH --partition=gpu
#SBATCH --time=24:00:00
#SBATCH --constraint='h100&nvlink'
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/paper-base/launch/20260101-120000-000-login/job.out
#SBATCH --chdir=/shared/moe
set -eo pipefail
export APPTAINER_CACHEDIR=/scratch/$USER
set -u

export STABLEMOE_LAUNCH=20260101-120000-000-login
export OMP_NUM_THREADS=8
export PYTHONUNBUFFERED=1
export PYTHONFAULTHANDLER=1
export TTY_COMPATIBLE=0
export STABLEMOE_WORLD_SIZE=16
run_dir=runs/paper-base
folder=runs/paper-base/launch/20260101-120000-000-login
logs=runs/paper-base/launch/20260101-120000-000-login/logs
attempt=${SLURM_RESTART_COUNT:-0}

# Ranks find their number in SLURM_PROCID; whatever the submitting shell had must not get in the way.
unset RANK WORLD_SIZE LOCAL_RANK
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # below the range from which systems hand ports out
export MASTER_ADDR MASTER_PORT
# Ranks would try for minutes without a word.
getent hosts "$MASTER_ADDR" > /dev/null || {
    echo "stablemoe: the first node, $MASTER_ADDR, has no address on $(hostname): check /etc/hosts or DNS" >&2
    exit 1
}

# USR1 comes before the time limit and before a pre-emption. srun hands USR1 on, but would kill its tasks upon TERM.
ranks=
trap 'echo "stablemoe: asked to save and stop"; [ -z "$ranks" ] || kill -USR1 "$ranks" || true' USR1

echo "stablemoe: job $SLURM_JOB_ID, attempt $attempt, on ${hosts//$'\n'/ }"
# When one rank fails, the others have a minute to end by themselves: what they exit with says whether to try again.
srun --kill-on-bad-exit=0 --wait=60 --export=ALL \
    --output="$logs/rank-%t.attempt-$attempt.log" \
    apptainer exec --nv --bind /shared/moe:/shared/moe --bind /data/corpora:/data/corpora --pwd /shared/moe \
    /shared/images/stablemoe_ds.sif python -m stablemoe_ds train "$folder/run.yaml" &
ranks=$!

while kill -0 "$ranks" 2> /dev/null; do # a signal ends wait, not the ranks
    wait "$ranks" || true
done
code=0
wait "$ranks" || code=$?
echo "stablemoe: ranks ended with $code"

if apptainer exec --nv --bind /shared/moe:/shared/moe --bind /data/corpora:/data/corpora --pwd /shared/moe \
    /shared/images/stablemoe_ds.sif python -m stablemoe_ds.launch.restart \
    "$run_dir" --exit-code "$code" --limit 3; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
