"""The laws that draws follow: every row's softmax, as the few numbers that any of its probabilities is made from.

With w the logits after temperature, m their largest and the sums over the tokens that the filters leave,

    p_v = exp(w_v - m) / S,     S = sum exp(w - m),     exp(-H) = exp(sum exp(w - m) (w - m) / S) / S

H being the entropy. A row whose temperature is 0, or without a value above -inf, has one token alone: its draw. There S
is 0, which says so. One program a row reads it twice, for m and for the sums; no softmax is written.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .filters import LEAST_32, LEAST_64, argument, float_key, key_token, key_value, pack_key, scaled_tile, setting

#: Tokens that a program holds at a time.
TILE = 4096


class Laws(NamedTuple):
    """The laws of rows.

    Attributes:
        best: [B, N] int64, the packed key of the largest w.
        total: [B, N] fp32 S; 0 where the law is that token's alone.
        certainty: [B, N] fp32 exp(-H).
        border: [B, N] int32, the lowest w that the filters leave; None: all stay.
    """

    best: torch.Tensor
    total: torch.Tensor
    certainty: torch.Tensor
    border: torch.Tensor | None


@triton.jit
def weight_tile(p_row, o_token, vocabulary, stride_v, temperature, border, largest):
    """w - m, and exp of it where the filters leave a token; 0 elsewhere."""
    b_w = scaled_tile(p_row, o_token, vocabulary, stride_v, temperature)
    b_below = tl.where(b_w == largest, 0.0, b_w - largest)  # largest may be infinite
    m_stays = (o_token < vocabulary) & (float_key(b_w) >= border)
    return b_below, tl.where(m_stays, tl.exp(b_below), 0.0)


@triton.jit
def share_tile(p_row, o_token, vocabulary, stride_v, temperature, border, best, total):
    """Probabilities of tokens, fp32; `border`, `best` and `total` are their row's."""
    _, b_weight = weight_tile(p_row, o_token, vocabulary, stride_v, temperature, border, key_value(best))
    return tl.where(total > 0.0, b_weight / total, (o_token == key_token(best)).to(tl.float32))


@triton.jit(do_not_specialize=["temperature", "nodes"])
def _law_kernel(
    logits, temperature, border, best, total, certainty, nodes, vocabulary, stride_b, stride_n, stride_v,
    PER_ROW_T: tl.constexpr, FILTERED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0)
    i_b, i_n = i_row // nodes, i_row % nodes
    p_row = logits + i_b.to(tl.int64) * stride_b + i_n.to(tl.int64) * stride_n
    t = setting(temperature, i_b, PER_ROW_T, tl.float32)
    lowest = LEAST_32
    if FILTERED:
        lowest = tl.load(border + i_row)

    b_best = tl.full([TILE], LEAST_64, tl.int64)
    for i_first in range(0, vocabulary, TILE):
        o_token = i_first + tl.arange(0, TILE)
        b_key = pack_key(scaled_tile(p_row, o_token, vocabulary, stride_v, t), o_token)
        b_best = tl.maximum(b_best, tl.where(o_token < vocabulary, b_key, LEAST_64))
    key = tl.max(b_best, 0)
    largest = key_value(key)
    tl.store(best + i_row, key)

    b_sum, b_slope = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    for i_first in range(0, vocabulary, TILE):
        o_token = i_first + tl.arange(0, TILE)
        b_below, b_weight = weight_tile(p_row, o_token, vocabulary, stride_v, t, lowest, largest)
        b_sum += b_weight
        b_slope += tl.where(b_weight > 0.0, b_weight * b_below, 0.0)
    m_spread = (t > 0) & (largest > -float("inf"))
    total_weight = tl.where(m_spread, tl.sum(b_sum, 0), 1.0)
    tl.store(total + i_row, tl.where(m_spread, total_weight, 0.0))
    tl.store(certainty + i_row, tl.where(m_spread, tl.exp(tl.sum(b_slope, 0) / total_weight) / total_weight, 1.0))


def launch_laws(logits: torch.Tensor, temperature: float | torch.Tensor, border: torch.Tensor | None) -> Laws:
    """The laws of logits [B, N, V] after temperature and filters."""
    batch, nodes, vocabulary = logits.shape
    best = torch.empty((batch, nodes), dtype=torch.int64, device=logits.device)
    total = torch.empty((batch, nodes), dtype=torch.float32, device=logits.device)
    certainty = torch.empty_like(total)
    tile = min(TILE, max(16, triton.next_power_of_2(vocabulary)))
    _law_kernel[(batch * nodes,)](
        logits, argument(temperature, float), border, best, total, certainty, nodes, vocabulary, *logits.stride(),
        PER_ROW_T=isinstance(temperature, torch.Tensor), FILTERED=border is not None,
        TILE=tile, num_warps=max(1, min(8, tile // 512)),
    )  # fmt: skip
    return Laws(best, total, certainty, border)
