#!/bin/bash
cd /shared/moe || exit
mkdir -p runs/paper-base/launch/20260101-120000-000-login runs/paper-base/launch/20260101-120000-000-login/logs
cat > runs/paper-base/launch/20260101-120000-000-login/hostfile <<'END_OF_FILE'
node01 slots=8
node02 slots=8
END_OF_FILE
cat > runs/paper-base/launch/20260101-120000-000-login/deepspeed_env <<'END_OF_FILE'
STABLEMOE_LAUNCH=20260101-120000-000-login
OMP_NUM_THREADS=4
PYTHONUNBUFFERED=1
PYTHONFAULTHANDLER=1
TTY_COMPATIBLE=0
STABLEMOE_WORLD_SIZE=16
NCCL_SOCKET_IFNAME=eth0
GLOO_SOCKET_IFNAME=eth0
MASTER_ADDR=node01
MASTER_PORT=29500
END_OF_FILE
env STABLEMOE_LAUNCH=20260101-120000-000-login OMP_NUM_THREADS=4 PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 \
    TTY_COMPATIBLE=0 STABLEMOE_WORLD_SIZE=16 NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0 \
    DS_ENV_FILE=runs/paper-base/launch/20260101-120000-000-login/deepspeed_env /shared/moe/.venv/bin/python -m \
    deepspeed.launcher.runner --quiet --no_local_rank --master_port 29500 --hostfile \
    runs/paper-base/launch/20260101-120000-000-login/hostfile --master_addr node01 --force_multi --launcher \
    openmpi \
    '--launcher_args=--mca btl_tcp_if_include eth0 --output merge,file=runs/paper-base/launch/20260101-120000-000-login/logs/rank' \
    --module stablemoe_ds train runs/paper-base/launch/20260101-120000-000-login/run.yaml
