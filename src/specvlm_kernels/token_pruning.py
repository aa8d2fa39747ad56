"""Fewer visual tokens by their scores: the best stay, in the order they had.

A token's rank is how many others go before it,

    rank(t) = #{u : s_u > s_t, or s_u = s_t and u < t},       s = scores, or x . query; NaN counts as -inf

so ranks are a permutation whatever the scores, and the best `keep` are those of rank < keep. Nothing is sorted: one
kernel counts every token's rank, T^2 comparisons that all run at once (8 million at 2,880 tokens), and writes the token
of each rank that stays, 4 bytes each. In a second kernel the program of one such token counts how many of the kept come
before it in the picture, which is its row in the result, and copies it there. With a query a kernel before these reads
x once and writes a score a token in fp32: the order of an attention's weights.

    out[j] = x[indices[j]],      dx[indices[j]] = dout[j], zero elsewhere

The selection has no gradient, so neither scores nor query get one. dx is written once, zeros and rows in one pass: a
program finds by the same counting which of its tokens were kept, and where their rows are.

Memory traffic is 2 keep C elements, T C more to score by a query, and backward (keep + T) C. No mask, no sorted copy
and no [B, keep, C] index is made, which `gather` would ask for; backward keeps the indices only.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ._checks import FLOATS, KERNEL_FLOATS, check_tensor, check_whole
from ._dispatch import kernel_operator
from .reference import token_pooling as reference
from .token_pooling import check_tokens

#: Tokens and channels that a program scores at a time.
SCORE_TOKENS, SCORE_CHANNELS = 4, 1024

#: Tokens a program ranks, and tokens it compares them with at a time.
RANK_TOKENS, RANK_OTHERS = 16, 128

#: Channels of a kept token that a program copies, and kept tokens that it counts at a time.
COPY_CHANNELS, COPY_OTHERS = 2048, 512

#: Tokens and channels a program of the gradient, and kept tokens that it looks at at a time.
GRADIENT_TOKENS, GRADIENT_CHANNELS, GRADIENT_OTHERS = 8, 1024, 128


@triton.jit(do_not_specialize=["tokens"])
def _similarity_kernel(
    x, query, scores, tokens, channels, stride_b, stride_t, stride_c, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    blocks = tl.cdiv(tokens, BLOCK_T)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_t = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    p_x = x + i_b * stride_b + o_t.to(tl.int64)[:, None] * stride_t
    b_sum = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for first in range(0, channels, BLOCK_C):
        o_c = first + tl.arange(0, BLOCK_C)
        m_c = o_c < channels
        b_query = tl.load(query + i_b * channels + o_c, mask=m_c, other=0.0).to(tl.float32)
        p_tile = p_x + o_c.to(tl.int64)[None, :] * stride_c
        b_sum += tl.load(p_tile, mask=m_t[:, None] & m_c[None, :], other=0.0).to(tl.float32) * b_query[None, :]
    tl.store(scores + i_b * tokens + o_t, tl.sum(b_sum, 1), mask=m_t)


@triton.jit
def _load_scores(p_scores, o_t, tokens, stride_t):
    """fp32; -inf where NaN and past the tokens."""
    b_score = tl.load(p_scores + o_t.to(tl.int64) * stride_t, mask=o_t < tokens, other=-float("inf")).to(tl.float32)
    return tl.where(b_score == b_score, b_score, -float("inf"))


@triton.jit(do_not_specialize=["tokens", "keep"])
def _rank_kernel(scores, order, tokens, keep, stride_b, stride_t, BLOCK_T: tl.constexpr, BLOCK_U: tl.constexpr):
    blocks = tl.cdiv(tokens, BLOCK_T)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_t = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    p_scores = scores + i_b * stride_b
    b_score = _load_scores(p_scores, o_t, tokens, stride_t)[:, None]
    b_rank = tl.zeros([BLOCK_T], tl.int32)
    for first in range(0, tokens, BLOCK_U):
        o_u = first + tl.arange(0, BLOCK_U)
        b_other = _load_scores(p_scores, o_u, tokens, stride_t)[None, :]
        # Past the tokens: -inf and a later index, before nobody.
        m_before = (b_other > b_score) | ((b_other == b_score) & (o_u[None, :] < o_t[:, None]))
        b_rank += tl.sum(m_before.to(tl.int32), 1)
    tl.store(order + i_b * keep + b_rank, o_t, mask=(o_t < tokens) & (b_rank < keep))


@triton.jit(do_not_specialize=["keep"])
def _gather_kernel(
    x, order, out, indices, keep, channels, stride_b, stride_t, stride_c,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(channels, BLOCK_C)
    i_row = (tl.program_id(0) // tiles).to(tl.int64)
    i_b, i_c = i_row // keep, tl.program_id(0) % tiles
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    i_token = tl.load(order + i_row)
    b_x = tl.load(x + i_b * stride_b + i_token.to(tl.int64) * stride_t + o_c.to(tl.int64) * stride_c, mask=m_c)

    b_before = tl.zeros([BLOCK_K], tl.int32)
    for first in range(0, keep, BLOCK_K):
        o_k = first + tl.arange(0, BLOCK_K)
        b_other = tl.load(order + i_b * keep + o_k, mask=o_k < keep, other=i_token)
        b_before += (b_other < i_token).to(tl.int32)
    o_row = i_b * keep + tl.sum(b_before, 0)
    tl.store(out + o_row * channels + o_c, b_x, mask=m_c)
    if i_c == 0:
        tl.store(indices + o_row, i_token.to(tl.int64))


@triton.jit(do_not_specialize=["tokens", "keep"])
def _scatter_kernel(
    grad, indices, out, tokens, keep, channels, stride_b, stride_k, stride_c,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles, blocks = tl.cdiv(channels, BLOCK_C), tl.cdiv(tokens, BLOCK_T)
    i_block = tl.program_id(0) // tiles
    i_b = (i_block // blocks).to(tl.int64)
    o_t = i_block % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    m_t, m_c = o_t < tokens, o_c < channels

    b_row, b_kept = tl.zeros([BLOCK_T], tl.int32), tl.zeros([BLOCK_T], tl.int32)
    for first in range(0, keep, BLOCK_K):
        o_k = first + tl.arange(0, BLOCK_K)
        b_index = tl.load(indices + i_b * keep + o_k, mask=o_k < keep, other=tokens).to(tl.int32)[None, :]
        b_row += tl.sum((b_index < o_t[:, None]).to(tl.int32), 1)
        b_kept += tl.sum((b_index == o_t[:, None]).to(tl.int32), 1)
    m_kept = m_t & (b_kept > 0)
    p_grad = grad + i_b * stride_b + b_row.to(tl.int64)[:, None] * stride_k + o_c.to(tl.int64)[None, :] * stride_c
    b_grad = tl.load(p_grad, mask=m_kept[:, None] & m_c[None, :], other=0.0)
    p_out = out + (i_b * tokens + o_t[:, None]) * channels + o_c[None, :]
    tl.store(p_out, b_grad, mask=m_t[:, None] & m_c[None, :])


def launch_similarity(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """x . query in fp32: [B, T]."""
    batch, tokens, channels = x.shape
    scores = torch.empty((batch, tokens), dtype=torch.float32, device=x.device)
    _similarity_kernel[(batch * triton.cdiv(tokens, SCORE_TOKENS),)](
        x, query.contiguous(), scores, tokens, channels, *x.stride(),
        BLOCK_T=SCORE_TOKENS, BLOCK_C=min(SCORE_CHANNELS, triton.next_power_of_2(channels)), num_warps=4,
    )  # fmt: skip
    return scores


def launch_prune_tokens(
    x: torch.Tensor, scores: torch.Tensor | None, query: torch.Tensor | None, keep: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the kernels; arguments as in `prune_tokens`, already checked: scores or a query."""
    batch, tokens, channels = x.shape
    if query is not None:
        scores = launch_similarity(x, query)
    assert scores is not None
    order = torch.empty((batch, keep), dtype=torch.int32, device=x.device)
    out = torch.empty((batch, keep, channels), dtype=x.dtype, device=x.device)
    indices = torch.empty((batch, keep), dtype=torch.int64, device=x.device)
    _rank_kernel[(batch * triton.cdiv(tokens, RANK_TOKENS),)](
        scores, order, tokens, keep, *scores.stride(), BLOCK_T=RANK_TOKENS, BLOCK_U=RANK_OTHERS, num_warps=4
    )
    tile = min(COPY_CHANNELS, triton.next_power_of_2(channels))
    _gather_kernel[(batch * keep * triton.cdiv(channels, tile),)](
        x, order, out, indices, keep, channels, *x.stride(), BLOCK_K=COPY_OTHERS, BLOCK_C=tile, num_warps=4
    )
    return out, indices


def launch_prune_tokens_backward(grad: torch.Tensor, indices: torch.Tensor, tokens: int) -> torch.Tensor:
    """The gradient of x [B, tokens, C] from that of the kept rows, whose ascending indices are [B, keep]."""
    batch, keep, channels = grad.shape
    tile = min(GRADIENT_CHANNELS, triton.next_power_of_2(channels))
    out = torch.empty((batch, tokens, channels), dtype=grad.dtype, device=grad.device)
    _scatter_kernel[(batch * triton.cdiv(tokens, GRADIENT_TOKENS) * triton.cdiv(channels, tile),)](
        grad, indices, out, tokens, keep, channels, *grad.stride(),
        BLOCK_T=GRADIENT_TOKENS, BLOCK_K=GRADIENT_OTHERS, BLOCK_C=tile, num_warps=4,
    )  # fmt: skip
    return out


_prune = kernel_operator("prune_tokens", launch_prune_tokens)
_prune_backward = kernel_operator("prune_tokens_backward", launch_prune_tokens_backward)


@_prune.register_fake
def _(
    x: torch.Tensor, scores: torch.Tensor | None, query: torch.Tensor | None, keep: int
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, channels = x.shape
    return x.new_empty(batch, keep, channels), x.new_empty(batch, keep, dtype=torch.int64)


@_prune_backward.register_fake
def _(grad: torch.Tensor, indices: torch.Tensor, tokens: int) -> torch.Tensor:
    return grad.new_empty(grad.shape[0], tokens, grad.shape[2])


def _prune_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(indices)
    ctx.tokens = inputs[0].shape[1]


def _prune_gradient(ctx: Any, grad: torch.Tensor, _: None) -> tuple[torch.Tensor | None, None, None, None]:
    (indices,) = ctx.saved_tensors
    return _prune_backward(grad, indices, ctx.tokens) if ctx.needs_input_grad[0] else None, None, None, None


_prune.register_autograd(_prune_gradient, setup_context=_prune_context)


def prune_tokens(
    x: torch.Tensor, scores: torch.Tensor | None, keep: int, *, query: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best `keep` tokens in their own order; differentiable in x.

    Args:
        x: [B, T, C] tokens; fp32, fp16 or bf16 (on CPU fp64 too), any strides.
        scores: [B, T] in any of these dtypes, any strides. NaN counts as -inf. None: a token's score is its scalar
            product with the query.
        keep: how many stay, from 1 to T. Of equal scores the lower index stays.
        query: [B, C], dtype of x, where there are no scores.

    Returns:
        The kept tokens [B, keep, C] and their indices [B, keep] int64, ascending. The gradient of x is that of the kept
        tokens in their places and zero elsewhere; scores and query get none, since the selection has none.

    Raises:
        ValueError: a wrong shape, dtype, device or keep; scores and a query, or neither.

    Example:
        >>> x, scores = torch.tensor([[[5.0], [6.0], [7.0]]]), torch.tensor([[0.3, 0.1, 0.2]])
        >>> [part.flatten().tolist() for part in prune_tokens(x, scores, 2)]
        [[5.0, 7.0], [0, 2]]
    """
    kernel = check_tokens(x)
    batch, tokens, channels = x.shape
    if (scores is None) == (query is None):
        raise ValueError(f"scores: expected scores or a query, got {'neither' if scores is None else 'both'}")
    if scores is not None:
        check_tensor("scores", scores, (batch, tokens), KERNEL_FLOATS if kernel else FLOATS, x.device)
    if query is not None:
        check_tensor("query", query, (batch, channels), x.dtype, x.device)
    check_whole("keep", keep, 1, tokens)
    if not kernel:
        return reference.prune_tokens(x, scores, keep, query=query)
    return _prune(x, scores, query, keep)
