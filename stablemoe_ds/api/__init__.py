"""What ``import stablemoe_ds`` shows. Libraries are settled here, before any module of this room imports DeepSpeed."""

from stablemoe_ds.distributed.libraries import settle_libraries

settle_libraries()
