"""What has to be settled before DeepSpeed and megatron-core are imported."""

from __future__ import annotations

import logging
import os
import warnings


def settle_libraries() -> None:
    """Choose DeepSpeed's accelerator and keep the libraries from talking about what does not concern a user.

    Both say at import that TransformerEngine, apex or a GPU are missing, which this project does not need.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    # Workers of a loader and launched ranks start anew, so the module patterns are given again in each.
    for module in (r"megatron\.", r"deepspeed\.", r"torch\.distributed\."):
        warnings.filterwarnings("ignore", module=module)
    for name in ("DeepSpeed", "megatron", "megatron.core"):
        logging.getLogger(name).setLevel(logging.ERROR)
