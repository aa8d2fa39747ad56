"""What lies between a decoder layer's products, in plain torch: what the kernels are tested against, and what serves
on CPU, where each asks for few operations."""

import torch
import torch.nn.functional as F


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, *, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch twin of `specvlm_kernels.add_rms_norm`."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    total = x
    if x.dim() == 4:
        total = x[0] if x.shape[0] == 1 else x.sum(0)
    if residual is not None:
        total = (total + residual.to(dtype)).contiguous()  # one of them is in `dtype`, or they are of one
    total = total.to(weight.dtype)
    normed = F.rms_norm(total.to(dtype), weight.shape, weight.to(dtype), eps)
    return normed.to(weight.dtype).contiguous(), total


def gated_silu(gate_up: torch.Tensor) -> torch.Tensor:
    """Plain torch twin of `specvlm_kernels.gated_silu`."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype).contiguous()
