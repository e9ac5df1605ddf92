"""The Python API. Libraries are configured here, before any module of this folder imports DeepSpeed."""

from stablemoe_ds.distributed.libraries import settle_libraries

settle_libraries()
