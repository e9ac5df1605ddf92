from stablemoe_ds.distributed.libraries import import_megatron

import_megatron()
