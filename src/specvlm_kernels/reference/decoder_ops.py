"""What lies between a decoder layer's products, in plain torch: what the kernels are tested against, and what serves
on CPU, where each asks for few operations."""

import torch
import torch.nn.functional as F

from .kv_cache import write_kv


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, *, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch twin of `specvlm_kernels.add_rms_norm`."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    total = x
    if x.dim() == 4:
        total = x[0] if x.shape[0] == 1 else x.sum(0)
    if residual is not None:
        total = total + residual.to(dtype)  # one of them is in `dtype`, or they are of one
    total = total.to(weight.dtype)
    return F.rms_norm(total.to(dtype), weight.shape, weight.to(dtype), eps).to(weight.dtype), total


def rotary_write_kv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
) -> torch.Tensor:
    """Plain torch twin of `specvlm_kernels.rotary_write_kv`."""
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    heads = qkv.unflatten(2, (-1, head_dim))  # [B, T, Hq + 2 Hkv, D]
    turning, values = heads[:, :, :-kv_heads], heads[:, :, -kv_heads:]
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    low, high = turning.to(dtype).chunk(2, dim=-1)
    c, s = (table[positions.long()].unsqueeze(2).to(dtype) for table in (cos, sin))
    turned = torch.cat([low * c - high * s, high * c + low * s], dim=-1).to(qkv.dtype)
    write_kv(k_cache, v_cache, turned[:, :, -kv_heads:].transpose(1, 2), values.transpose(1, 2), kv_len)
    return turned[:, :, :-kv_heads].contiguous()


def gated_silu(gate_up: torch.Tensor) -> torch.Tensor:
    """Plain torch twin of `specvlm_kernels.gated_silu`."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)
