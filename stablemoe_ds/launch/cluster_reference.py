"""The reference of cluster files, written from the schema.

``python -m stablemoe_ds.launch.cluster_reference > docs/cluster.md``
"""

from __future__ import annotations

from stablemoe_ds.config.reference import document
from stablemoe_ds.launch.cluster import ClusterConfig

HEAD = """# Cluster files

<!-- Generated: python -m stablemoe_ds.launch.cluster_reference > docs/cluster.md -->

A cluster is one YAML file. `launch/` has an example for each launcher, and `launch/rendered/` the scripts that result
from them. [operations.md](operations.md) explains how to use them. Paths are relative to `working_directory`.

Every rank gets the variables in `environment` and these: `OMP_NUM_THREADS`, `PYTHONUNBUFFERED`, `PYTHONFAULTHANDLER`,
`TTY_COMPATIBLE`, `STABLEMOE_LAUNCH`, `STABLEMOE_WORLD_SIZE` (unless `min_nodes` is set), those that follow from
`network`, and on CPUs `DS_ACCELERATOR=cpu` and an empty `CUDA_VISIBLE_DEVICES`.
"""


def reference() -> str:
    """The whole reference as Markdown."""
    return document(HEAD, "cluster", ClusterConfig)


if __name__ == "__main__":
    print(reference(), end="")
