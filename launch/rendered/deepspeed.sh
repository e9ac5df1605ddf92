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
NCCL_DEBUG=WARN
END_OF_FILE
env STABLEMOE_LAUNCH=20260101-120000-000-login OMP_NUM_THREADS=4 PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 \
    TTY_COMPATIBLE=0 STABLEMOE_WORLD_SIZE=16 NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0 NCCL_DEBUG=WARN \
    DS_ENV_FILE=runs/paper-base/launch/20260101-120000-000-login/deepspeed_env \
    'PDSH_SSH_ARGS_APPEND=-o ServerAliveInterval=5 -o ServerAliveCountMax=3 -o SendEnv=WANDB_API_KEY' \
    /shared/moe/.venv/bin/python -m deepspeed.launcher.runner --quiet --no_local_rank --master_port 29500 \
    --hostfile runs/paper-base/launch/20260101-120000-000-login/hostfile --master_addr node01 --force_multi \
    --launcher pdsh --enable_each_rank_log runs/paper-base/launch/20260101-120000-000-login/logs --module \
    stablemoe_ds train runs/paper-base/launch/20260101-120000-000-login/run.yaml
