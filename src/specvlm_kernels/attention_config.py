"""How tree attention is cut into programs: an explicit choice, which a tuner or a benchmark may make otherwise."""

from dataclasses import dataclass

import torch
import triton

from ._dispatch import compute_capability
from .fp8 import FP8, is_native

#: Programs of a full slab: a half-full one still has about two for each of 132 multiprocessors.
TARGET_PROGRAMS = 512

#: Fewer keys than this in a split cost more in partials than the split gains.
SMALLEST_SPLIT = 128

#: Largest tile of keys, and what splits are a multiple of.
LARGEST_TILE = 64

#: The compute capability on which a tile of 128 rows computes a row as one of 64 does.
HOPPER = 90


@dataclass(frozen=True, slots=True)
class TreeAttentionConfig:
    """How `tree_attention` is cut into programs; see `default_config`.

    Attributes:
        split: keys a program, a multiple of `block_n`.
        block_m: rows (nodes times heads of a group) a program.
        block_n: keys a tile, at most 64: a tile's bits of a row fit one word.
        num_warps: warps a program.
        num_stages: tiles in flight in the prefix loop.
        last_merges: the last program of a tile of rows to be done merges the splits, instead of a second kernel.
    """

    split: int
    block_m: int = 64
    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 2
    last_merges: bool = False

    def __post_init__(self) -> None:
        if self.block_n not in (16, 32, 64):
            raise ValueError(f"block_n: expected 16, 32 or 64, got {self.block_n}")
        if self.block_m < 16 or self.block_m & (self.block_m - 1):
            raise ValueError(f"block_m: expected a power of two of at least 16, got {self.block_m}")
        if self.split <= 0 or self.split % self.block_n:
            raise ValueError(f"split: expected a positive multiple of block_n = {self.block_n}, got {self.split}")


def default_config(
    capacity: int, kv_heads: int, dtype: torch.dtype, rows: int = 1, *, cache_dtype: torch.dtype | None = None
) -> TreeAttentionConfig:
    """The cut for a slab: a function of what stays the same for a whole answer, so that rows stay the same too.

    The height of a tile alone follows the number of rows, and only where both heights compute a row by the same
    instructions: on Hopper, whose tensor cores take 64 rows by a group of 4 warps, so that a tile of 128 is two such
    groups. There 128 nodes read a key once. A tile of 128 for every call would spend twice the arithmetic on few rows,
    half of which do not exist. None of this is measured yet.

    Args:
        capacity: S of the slab.
        kv_heads: Hkv.
        dtype: of q.
        rows: a KV head's, nodes times heads of a group.
        cache_dtype: of the slab; None: that of q.
    """
    splits = triton.cdiv(TARGET_PROGRAMS, kv_heads)
    split = max(SMALLEST_SPLIT, triton.cdiv(triton.cdiv(capacity, splits), LARGEST_TILE) * LARGEST_TILE)
    if dtype == torch.float32:  # full fp32 has no tensor cores: products run from registers, and larger tiles spill
        return TreeAttentionConfig(split=split, block_m=16, block_n=16, num_warps=8)
    if cache_dtype == FP8 and not is_native():  # decoding takes registers, which larger tiles do not leave on gfx942
        return TreeAttentionConfig(split=split, block_n=16, num_warps=8)
    # Rows of one split leave in their own dtype, by 64-bit addresses: with tiles of 64 keys sm_80 spills.
    block_n = 32 if capacity <= split else 64
    if rows > 64 and compute_capability() == HOPPER:
        return TreeAttentionConfig(split=split, block_m=128, block_n=block_n, num_warps=8)
    return TreeAttentionConfig(split=split, block_n=block_n)
