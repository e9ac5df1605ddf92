#!/bin/bash
cd /shared/moe || exit
mkdir -p runs/paper-base/launch/20260101-120000-000-login runs/paper-base/launch/20260101-120000-000-login/logs
cat > runs/paper-base/launch/20260101-120000-000-login/hostfile <<'END_OF_FILE'
node01 slots=8
node02 slots=8
END_OF_FILE
mpirun -n 16 --hostfile runs/paper-base/launch/20260101-120000-000-login/hostfile --map-by ppr:8:node \
    --bind-to none --output merge,file=runs/paper-base/launch/20260101-120000-000-login/logs/rank -x \
    STABLEMOE_LAUNCH=20260101-120000-000-login -x OMP_NUM_THREADS=4 -x PYTHONUNBUFFERED=1 -x \
    PYTHONFAULTHANDLER=1 -x TTY_COMPATIBLE=0 -x STABLEMOE_WORLD_SIZE=16 -x NCCL_SOCKET_IFNAME=eth0 -x \
    GLOO_SOCKET_IFNAME=eth0 -x MASTER_ADDR=node01 -x MASTER_PORT=29500 -x WANDB_API_KEY \
    /shared/moe/.venv/bin/python -m stablemoe_ds train \
    runs/paper-base/launch/20260101-120000-000-login/run.yaml
