"""Page-locking of host memory, so that a GPU's copy engine reads it directly."""

from __future__ import annotations

import warnings
from typing import Any

import torch

COST = (
    "copies from it pass through a staging buffer: about half the link's bandwidth, and not while the GPU computes "
    "(ESTIMATED, from CUDA's documentation of pageable copies)"
)


def lock(block: torch.Tensor, cudart: Any = None) -> bool:
    """Page-lock ``block`` (contiguous, on the host) for the CUDA device; False, with a warning, when refused.

    Args:
        cudart: what registers memory (default: PyTorch's own; for tests).
    """
    refusal = (cudart or torch.cuda.cudart()).cudaHostRegister(block.data_ptr(), block.nbytes, 0)
    if int(refusal) == 0:
        return True
    warnings.warn(
        f"the system refused to page-lock {block.nbytes:,} bytes of experts (CUDA error {int(refusal)}); {COST}. "
        "Raise the limit on locked memory (ulimit -l) or use fewer bits",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def unlock(block: torch.Tensor, cudart: Any = None) -> None:
    """Undo `lock` where it succeeded; do so before the memory is freed."""
    (cudart or torch.cuda.cudart()).cudaHostUnregister(block.data_ptr())
