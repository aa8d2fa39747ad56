"""Tree attention in plain torch: what the kernel is tested against, and what serves on CPU.

Both ask for few operations. A decoder calls this once a layer with one tree, so what follows from the tree alone (its
mask, and how many slots matter) is worked out once and remembered by the tree's words.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

WORD = 64


class _Visibility(NamedTuple):
    """What a tree's words say of the slots; each tensor is None where nothing needs masking."""

    length: int  # slots at the front of the slab that somebody sees
    mask: torch.Tensor | None  # [B, 1, Q * group, length], added to the scores: 0 or -inf
    unseen: torch.Tensor | None  # [B, 1, length, 1] slots that no row sees: they may hold NaN
    blind: torch.Tensor | None  # [B, Q, 1, 1] rows that see nothing


def pack_ancestors(parents: torch.Tensor) -> torch.Tensor:
    """[B, N] int32 parents (-1: none) -> [B, N, ceil(N / 64)] int64 ancestor bits; see `specvlm_kernels`."""
    words = -(-parents.shape[1] // WORD)
    rows = []
    for tree in parents.tolist():
        paths: list[int] = []
        for node, parent in enumerate(tree):
            paths.append(1 << node | (paths[parent] if parent >= 0 else 0))
        rows.append([[_signed(path >> WORD * word) for word in range(words)] for path in paths])
    return torch.tensor(rows, dtype=torch.int64, device=parents.device).reshape(*parents.shape, words)


def tree_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    ancestors: torch.Tensor,
    *,
    scale: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """[B, Q, Hq, D] rows over [B, Hkv, S, D] slabs -> [B, Q, Hq, D], and log-sum-exps; see `specvlm_kernels`."""
    batch, queries, heads, head_dim = q.shape
    if q.numel() == 0:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = out.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        return (out, lse) if return_lse else out
    kv_heads, capacity = k_cache.shape[1:3]
    group = heads // kv_heads
    dtype = torch.promote_types(q.dtype, torch.float32)
    words, lengths = tuple(ancestors.flatten().tolist()), tuple(kv_len.tolist())
    length, mask, unseen, blind = _visibility(words, lengths, queries, group, capacity, dtype, q.device)
    if group == 1:
        rows = q.transpose(1, 2)
    else:  # as in the kernel, the heads of a group are rows of one product
        rows = q.view(batch, queries, kv_heads, group, head_dim).transpose(1, 2)
        rows = rows.reshape(batch, kv_heads, queries * group, head_dim)
    k, v = k_cache.narrow(2, 0, length), v_cache.narrow(2, 0, length)
    if k.dtype != dtype:
        rows, k, v = rows.to(dtype), k.to(dtype), v.to(dtype)
    if k_scale is not None and v_scale is not None:
        k, v = k * k_scale[..., None, None].to(dtype), v * v_scale[..., None, None].to(dtype)
    if unseen is not None:
        k, v = k.masked_fill(unseen, 0.0), v.masked_fill(unseen, 0.0)
    out = F.scaled_dot_product_attention(rows, k, v, mask, scale=scale)
    if group == 1:
        out = out.transpose(1, 2)
    else:
        out = out.view(batch, kv_heads, queries, group, head_dim).transpose(1, 2).reshape(q.shape)
    if blind is not None:
        out = out.masked_fill(blind, 0.0)
    out = out.to(q.dtype).contiguous()
    if not return_lse:
        return out
    scores = rows @ k.mT * (head_dim**-0.5 if scale is None else scale)
    lse = (scores if mask is None else scores + mask).logsumexp(-1)  # [B, Hkv, Q * group]
    return out, lse.view(batch, kv_heads, queries, group).transpose(1, 2).reshape(batch, queries, heads)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # remembered across calls, so usable in any of them
def _visibility(
    words: tuple[int, ...],
    lengths: tuple[int, ...],
    queries: int,
    group: int,
    capacity: int,
    dtype: torch.dtype,
    device: torch.device,
) -> _Visibility:
    batch = len(lengths)
    if set(words) == {1} and len(set(lengths)) == 1 and queries == 1 and lengths[0] < capacity:
        return _Visibility(lengths[0] + 1, None, None, None)  # the root alone, behind all that is stored
    table = torch.tensor(words, dtype=torch.int64).view(batch, queries, -1, 1)
    tree = ((table >> torch.arange(WORD)) & 1).bool().flatten(2)  # [B, Q, W * 64]
    seen = torch.zeros(batch, queries, max(lengths) + tree.shape[-1], dtype=torch.bool)
    for row, bits, start in zip(seen, tree, lengths, strict=True):
        row[:, :start] = True
        row[:, start : start + bits.shape[-1]] = bits
    seen = seen[..., :capacity]
    named = seen.any(1)  # [B, slots]
    length = int(named.any(0).nonzero().max()) + 1 if named.any() else 0
    seen, named = seen[..., :length], named[:, :length]
    mask = unseen = blind = None
    if not seen.all():
        mask = torch.zeros(batch, 1, queries, length, dtype=dtype).masked_fill_(~seen.unsqueeze(1), -torch.inf)
        mask = mask.repeat_interleave(group, 2).to(device)
    if not named.all():
        unseen = ~named.view(batch, 1, length, 1).to(device)
    if length == 0 or not seen.any(2).all():
        blind = ~seen.any(2).view(batch, queries, 1, 1).to(device)
    return _Visibility(length, mask, unseen, blind)


def _signed(word: int) -> int:
    """The low 64 bits of `word` as the signed integer that int64 stores."""
    word &= (1 << WORD) - 1
    return word - (1 << WORD) if word >> (WORD - 1) else word
