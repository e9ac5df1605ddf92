"""The reference of cluster files, written from the schema.

``python -m stablemoe_ds.launch.cluster_reference > docs/cluster.md``
"""

from __future__ import annotations

from stablemoe_ds.config.reference import document
from stablemoe_ds.launch.cluster import ClusterConfig

HEAD = """# Cluster files

<!-- Generated: python -m stablemoe_ds.launch.cluster_reference > docs/cluster.md -->

A cluster is one YAML file; `launch/` holds one for each launcher and, in `launch/rendered/`, what it comes to.
[operations.md](operations.md) says how they are used. Paths are relative to `working_directory`. Besides those
of `environment` every rank gets the variables `OMP_NUM_THREADS`, `PYTHONUNBUFFERED`, `PYTHONFAULTHANDLER`,
`TTY_COMPATIBLE`, `STABLEMOE_LAUNCH`, `STABLEMOE_WORLD_SIZE` (unless `min_nodes` is set), those of `network`, and on
CPUs `DS_ACCELERATOR=cpu` and an empty `CUDA_VISIBLE_DEVICES`.
"""


def reference() -> str:
    """The whole reference as Markdown."""
    return document(HEAD, "cluster", ClusterConfig)


if __name__ == "__main__":
    print(reference(), end="")
