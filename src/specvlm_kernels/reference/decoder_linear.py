"""A decoder layer's products in plain torch: what the kernels are tested against, and what serves on CPU.

Products stay in the dtype of their weights, which a library sums in fp32: another copy of the weights costs more than
the product.
"""

import torch
import torch.nn.functional as F

from .decoder_ops import gated_silu


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Plain torch twin of `specvlm_kernels.linear`."""
    return F.linear(x, weight, bias)


def linear_parts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Plain torch twin of `specvlm_kernels.linear_parts`, in one part."""
    return F.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32))[None]


def gated_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Plain torch twin of `specvlm_kernels.gated_linear`."""
    return gated_silu(F.linear(x, weight))
