#!/bin/bash
cd /shared/moe || exit
mkdir -p runs/paper-base/launch/20260101-120000-000-login runs/paper-base/launch/20260101-120000-000-login/logs
env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=180 \
    STABLEMOE_LAUNCH=paper-base@node01:29400 OMP_NUM_THREADS=4 PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 \
    TTY_COMPATIBLE=0 NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0 /shared/moe/.venv/bin/python -m \
    torch.distributed.run --nnodes 1:2 --nproc-per-node 8 --max-restarts 5 --rdzv-backend c10d --rdzv-endpoint \
    node01:29400 --rdzv-id paper-base --log-dir runs/paper-base/launch/20260101-120000-000-login/logs \
    --redirects 3 --tee 3 -m stablemoe_ds train runs/paper-base/launch/20260101-120000-000-login/run.yaml
