"""A decoder layer's products in plain torch: what the kernels are tested against, and what serves on CPU.

Products stay in the dtype of their weights, which a library sums in fp32: another copy of the weights costs more than
the product. Of an e4m3 weight there has to be one, in fp32.
"""

import torch
import torch.nn.functional as F

from .decoder_ops import gated_silu


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    weight_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain torch twin of `specvlm_kernels.linear`."""
    return F.linear(x, weight, bias) if weight_scale is None else _scaled(x, weight, bias, weight_scale).to(x.dtype)


def linear_parts(x: torch.Tensor, weight: torch.Tensor, *, weight_scale: torch.Tensor | None = None) -> torch.Tensor:
    """Plain torch twin of `specvlm_kernels.linear_parts`, in one part."""
    if weight_scale is not None:
        return _scaled(x, weight, None, weight_scale)[None]
    return F.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32))[None]


def gated_linear(x: torch.Tensor, weight: torch.Tensor, *, weight_scale: torch.Tensor | None = None) -> torch.Tensor:
    """Plain torch twin of `specvlm_kernels.gated_linear`."""
    return gated_silu(linear(x, weight, weight_scale=weight_scale))


def _scaled(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, weight_scale: torch.Tensor
) -> torch.Tensor:
    """The product with an e4m3 weight, in fp32 (fp64 of fp64)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    product = F.linear(x.to(dtype), weight.to(dtype)) * weight_scale.to(dtype)
    return product if bias is None else product + bias.to(dtype)
