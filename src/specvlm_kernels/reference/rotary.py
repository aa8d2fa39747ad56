"""Rotation and what it is written into, in plain torch: what the kernels are tested against, and what serves on CPU."""

import torch

from .decoder_linear import linear
from .kv_cache import write_kv


def rotary_write_kv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain torch twin of `specvlm_kernels.rotary_write_kv`."""
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    heads = qkv.unflatten(2, (-1, head_dim))  # [B, T, Hq + 2 Hkv, D]
    turning, values = heads[:, :, :-kv_heads], heads[:, :, -kv_heads:]
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    low, high = turning.to(dtype).chunk(2, dim=-1)
    c, s = (table[positions.long()].unsqueeze(2).to(dtype) for table in (cos, sin))
    turned = torch.cat([low * c - high * s, high * c + low * s], dim=-1).to(qkv.dtype)
    k, v = turned[:, :, -kv_heads:].detach().transpose(1, 2), values.detach().transpose(1, 2)
    write_kv(k_cache, v_cache, k, v, kv_len, k_scale=k_scale, v_scale=v_scale)
    return turned[:, :, :-kv_heads].contiguous()


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
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain torch twin of `specvlm_kernels.rotary_linear`."""
    qkv = linear(x, weight, bias, weight_scale=weight_scale)
    return rotary_write_kv(qkv, cos, sin, positions, k_cache, v_cache, kv_len, k_scale=k_scale, v_scale=v_scale)
