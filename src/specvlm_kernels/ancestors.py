"""Ancestors as bits: for every node of a tree, which nodes lie on its path to the root.

A mask of the tree in ceil(N / 64) words a row. Rows climb together, a step of all of them at a time, and set the bit of
the node where they stand; so a tree costs as many steps as it is deep.
"""

import torch
import triton
import triton.language as tl

from . import reference
from ._checks import check_parents, check_tensor
from ._dispatch import on_device, takes_kernel

#: Ancestor bits in a word.
WORD = 64

#: Rows that one program handles.
PACK_ROWS = 128


@triton.jit(do_not_specialize=["nodes", "words"])
def _pack_ancestors_kernel(parents, out, nodes, words, BLOCK_N: tl.constexpr):
    i_word, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < nodes

    # All rows climb together; a row that has passed its root stays at -1.
    b_node = tl.where(m_n, o_n, -1)
    b_bits = tl.zeros([BLOCK_N], tl.uint64)
    while tl.max(b_node, 0) >= 0:
        b_bit = tl.full([BLOCK_N], 1, tl.uint64) << (b_node & 63).to(tl.uint64)
        b_bits |= tl.where((b_node >= 0) & (b_node // 64 == i_word), b_bit, 0)
        b_parent = tl.load(parents + i_b * nodes + b_node, mask=b_node >= 0, other=-1)
        # Strictly down, whatever came: it ends, and reads inside the row.
        b_node = tl.where(b_parent < b_node, tl.maximum(b_parent, -1), -1)

    tl.store(out + (i_b * nodes + o_n) * words + i_word, b_bits.to(tl.int64, bitcast=True), mask=m_n)


def launch_pack_ancestors(parents: torch.Tensor) -> torch.Tensor:
    """Runs the kernel; arguments as in `pack_ancestors`, already checked."""
    batch, nodes = parents.shape
    words = triton.cdiv(nodes, WORD)
    out = torch.empty((batch, nodes, words), dtype=torch.int64, device=parents.device)
    if out.numel():
        grid = (triton.cdiv(nodes, PACK_ROWS), words, batch)
        _pack_ancestors_kernel[grid](parents.contiguous(), out, nodes, words, BLOCK_N=PACK_ROWS, num_warps=4)
    return out


@torch.library.custom_op("specvlm_kernels::pack_ancestors", mutates_args=())
def _pack_ancestors(parents: torch.Tensor) -> torch.Tensor:
    return pack_ancestors(parents)


@_pack_ancestors.register_fake
def _(parents: torch.Tensor) -> torch.Tensor:
    return parents.new_empty((*parents.shape, -(-parents.shape[1] // WORD)), dtype=torch.int64)


def pack_ancestors(parents: torch.Tensor) -> torch.Tensor:
    """Packs, for every node of a tree, the nodes on its path to the root into bits.

    Args:
        parents: [B, N] int32; parents[b, i] < i, and -1 where a node has no parent.

    Returns:
        [B, N, W] int64, W = ceil(N / 64). Bit j % 64 of word j // 64 of row i: node j is node i or above it. Bit 63 is
        the sign. A row without a parent holds its own bit alone.

    Raises:
        ValueError: a wrong shape or dtype; on CPU also a parent outside [-1, i). On a GPU such a parent ends the path.

    Example:
        >>> pack_ancestors(torch.tensor([[-1, 0, 0, 2]], dtype=torch.int32))[0, :, 0].tolist()
        [1, 3, 5, 13]
    """
    check_tensor("parents", parents, ("B", "N"), torch.int32)
    check_parents(parents)
    kernel = takes_kernel("parents", parents)
    if torch.compiler.is_compiling():
        return _pack_ancestors(parents)
    if not kernel:
        return reference.pack_ancestors(parents)
    with on_device(parents):
        return launch_pack_ancestors(parents)
