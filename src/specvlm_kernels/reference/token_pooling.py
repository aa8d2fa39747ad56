"""Fewer visual tokens in plain torch: what the kernels are tested against, and what serves on CPU.

Made of torch's own operators, so gradients of any order come from autograd.
"""

import torch
import torch.nn.functional as F


def pool_tokens(x: torch.Tensor, grid: tuple[int, int], stride: int) -> torch.Tensor:
    """Plain torch twin of `specvlm_kernels.pool_tokens`."""
    stride = min(stride, max(grid))
    planes = _planes(x, grid)
    pooled = F.avg_pool2d(planes, stride, ceil_mode=True, count_include_pad=False)
    return pooled.flatten(2).transpose(1, 2).to(x.dtype).contiguous()


def conv_tokens(
    x: torch.Tensor, grid: tuple[int, int], weight: torch.Tensor, bias: torch.Tensor | None, stride: int
) -> torch.Tensor:
    """Plain torch twin of `specvlm_kernels.conv_tokens`."""
    planes = _planes(x, grid)
    weight, bias = weight.to(planes.dtype), None if bias is None else bias.to(planes.dtype)
    out = F.conv2d(planes, weight.unsqueeze(1), bias, min(stride, max(grid)), groups=len(weight))
    return out.flatten(2).transpose(1, 2).to(x.dtype).contiguous()


def prune_tokens(
    x: torch.Tensor, scores: torch.Tensor | None, keep: int, *, query: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch twin of `specvlm_kernels.prune_tokens`."""
    with torch.no_grad():
        if query is not None:
            dtype = torch.promote_types(x.dtype, torch.float32)
            scores = torch.einsum("btc,bc->bt", x.to(dtype), query.to(dtype))
        assert scores is not None
        ranked = scores.masked_fill(scores.isnan(), -torch.inf).sort(dim=1, descending=True, stable=True).indices
        indices = ranked[:, :keep].sort(dim=1).values
    return x.gather(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[-1])), indices


def resample_tokens(
    x: torch.Tensor,
    queries: torch.Tensor,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Plain torch twin of `specvlm_kernels.resample_tokens`."""
    heads, dim = queries.shape[1:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows, queries = x.to(dtype), queries.to(dtype)
    key_weight, value_weight = (w.to(dtype).unflatten(0, (heads, dim)) for w in (key_weight, value_weight))
    folded = torch.einsum("qhd,hdc->qhc", queries, key_weight) * (dim**-0.5 if scale is None else scale)
    weights = torch.einsum("qhc,btc->bqht", folded, rows).softmax(-1)
    mean = torch.einsum("bqht,btc->bqhc", weights, rows)
    return torch.einsum("bqhc,hdc->bqhd", mean, value_weight).flatten(2).to(x.dtype)


def _planes(x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """[B, H * W, C] -> [B, C, H, W], in max(dtype, fp32)."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).transpose(1, 2).unflatten(2, grid)
