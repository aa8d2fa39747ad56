"""A decoder layer's products in plain torch: what the kernels are tested against, and what serves on CPU.

Products stay in the dtype of their weights, which a library sums in fp32: another copy of the weights costs more than
the product.
"""

import torch
import torch.nn.functional as F

from .decoder_ops import gated_silu, rotary_write_kv


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Plain torch twin of `specvlm_kernels.linear`."""
    return F.linear(x, weight, bias)


def linear_parts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Plain torch twin of `specvlm_kernels.linear_parts`, in one part."""
    return F.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32))[None]


def gated_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Plain torch twin of `specvlm_kernels.gated_linear`."""
    return gated_silu(F.linear(x, weight))


def rotary_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
) -> torch.Tensor:
    """Plain torch twin of `specvlm_kernels.rotary_linear`."""
    return rotary_write_kv(F.linear(x, weight, bias), cos, sin, positions, k_cache, v_cache, kv_len)
