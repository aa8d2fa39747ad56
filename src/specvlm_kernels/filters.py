"""Temperature, top-k and top-p of a row of logits, as one number that the row's tokens are held against.

Both filters are thresholds of w = logits / temperature. A token stays if what lies strictly above it, counted in tokens
or in probability, is less than k, or than p; so all of a row that the filters come to is one number, the lowest w that
stays, its *border*. Ties at a border stay, the token that crosses p stays, and the largest always stays.

No softmax is written and nothing is sorted. Floats are mapped to integers of the same order, and one program a row
bisects between the least and the largest of them: each pass counts what lies above the middle and moves the end that
gives way to a key that occurs, so it ends at the border exactly, after a dozen passes or so and never more than 32.
Probabilities are summed as integers, in units of 2^-40 of the most likely token's: integer sums do not depend on the
order, so neither does the nucleus.
"""

import torch
import triton
import triton.language as tl

#: Tokens that the search for a border holds at a time.
SEARCH_TILE = 8192

LEAST_32 = tl.constexpr(-(2**31))
LARGEST_32 = tl.constexpr(2**31 - 1)
LEAST_64 = tl.constexpr(-(2**63))
LARGEST_64 = tl.constexpr(2**63 - 1)
MASS_UNITS = tl.constexpr(2.0**40)


@triton.jit
def setting(x, i_b, PER_ROW: tl.constexpr, DTYPE: tl.constexpr):
    """A sampling setting of batch row i_b, from a [B] tensor or a number."""
    return tl.cast(tl.load(x + i_b) if PER_ROW else x, DTYPE)


@triton.jit
def float_key(b_x):
    """int32 keys in the order of the floats; -0 and 0 share one."""
    b_bits = tl.where(b_x == 0.0, 0.0, b_x).to(tl.int32, bitcast=True)
    return b_bits ^ ((b_bits >> 31) & LARGEST_32)


@triton.jit
def pack_key(b_z, o_token):
    """int64 keys in the order of (value, lowest token first)."""
    return (float_key(b_z).to(tl.int64) << 32) | (o_token ^ LARGEST_32).to(tl.int64)


@triton.jit
def key_token(b_key):
    """The token in a packed key."""
    return (b_key & LARGEST_32) ^ LARGEST_32


@triton.jit
def key_value(b_key):
    """The fp32 value in a packed key."""
    b_bits = (b_key >> 32).to(tl.int32)
    return (b_bits ^ ((b_bits >> 31) & LARGEST_32)).to(tl.float32, bitcast=True)


@triton.jit
def scaled_tile(p_row, o_token, vocabulary, stride_v, temperature):
    """Logits after temperature, fp32; -inf where NaN and past the vocabulary."""
    p_logits = p_row + o_token.to(tl.int64) * stride_v
    b_w = tl.load(p_logits, mask=o_token < vocabulary, other=-float("inf")).to(tl.float32)
    # Rounded as torch rounds, so that both backends filter the same numbers.
    b_w = tl.div_rn(b_w, tl.where(temperature > 0, temperature, 1.0))
    return tl.where(b_w == b_w, b_w, -float("inf"))


@triton.jit
def _mass(b_w, largest):
    """Probability in units of 2^-40 of the most likely token's."""
    b_e = tl.where(b_w == largest, 1.0, tl.exp(b_w - largest))  # largest may be infinite
    return (b_e * MASS_UNITS).to(tl.int64)


@triton.jit
def _key_tile(p_row, i_first, vocabulary, stride_v, temperature, TILE: tl.constexpr):
    o_token = i_first + tl.arange(0, TILE)
    b_w = scaled_tile(p_row, o_token, vocabulary, stride_v, temperature)
    return b_w, tl.where(o_token < vocabulary, float_key(b_w), LEAST_32)


@triton.jit
def _search(
    p_row, low, high, limit, largest, vocabulary, stride_v, temperature, MASS: tl.constexpr, TILE: tl.constexpr
):
    """The least key that occurs in [low, high] and has less than `limit` above it; low and high occur."""
    while low < high:
        middle = (low & high) + ((low ^ high) >> 1)
        b_sum = tl.full([TILE], 0, tl.int64 if MASS else tl.int32)
        b_next = tl.full([TILE], LARGEST_32, tl.int32)
        b_last = tl.full([TILE], LEAST_32, tl.int32)
        for i_first in range(0, vocabulary, TILE):
            b_w, b_key = _key_tile(p_row, i_first, vocabulary, stride_v, temperature, TILE)
            m_above = b_key > middle
            b_sum += tl.where(m_above, _mass(b_w, largest), 0) if MASS else m_above.to(tl.int32)
            b_next = tl.minimum(b_next, tl.where(m_above, b_key, LARGEST_32))
            b_last = tl.maximum(b_last, tl.where(m_above, LEAST_32, b_key))
        above = tl.sum(b_sum, 0)
        if (above.to(tl.float64) if MASS else above) < limit:
            high = tl.max(b_last, 0)
        else:
            low = tl.min(b_next, 0)
    return high


@triton.jit(do_not_specialize=["temperature", "top_k", "top_p", "nodes"])
def _border_kernel(
    logits, temperature, top_k, top_p, border, nodes, vocabulary, stride_b, stride_n, stride_v,
    PER_ROW_T: tl.constexpr, PER_ROW_K: tl.constexpr, PER_ROW_P: tl.constexpr,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0)
    i_b, i_n = i_row // nodes, i_row % nodes
    t = setting(temperature, i_b, PER_ROW_T, tl.float32)
    k = setting(top_k, i_b, PER_ROW_K, tl.int64)
    p = setting(top_p, i_b, PER_ROW_P, tl.float32)
    if not (t > 0):
        tl.store(border + i_row, LEAST_32)
        return
    p_row = logits + i_b.to(tl.int64) * stride_b + i_n.to(tl.int64) * stride_n

    b_least = tl.full([TILE], LARGEST_32, tl.int32)
    b_largest = tl.full([TILE], -float("inf"), tl.float32)
    for i_first in range(0, vocabulary, TILE):
        b_w, b_key = _key_tile(p_row, i_first, vocabulary, stride_v, t, TILE)
        b_least = tl.minimum(b_least, tl.where(b_key == LEAST_32, LARGEST_32, b_key))
        b_largest = tl.maximum(b_largest, b_w)
    largest = tl.max(b_largest, 0)
    low, high = tl.min(b_least, 0), float_key(largest)

    if TOP_K and (k > 0) & (k < vocabulary):
        low = _search(p_row, low, high, k, largest, vocabulary, stride_v, t, False, TILE)
    if TOP_P and p < 1:
        b_total = tl.full([TILE], 0, tl.int64)
        for i_first in range(0, vocabulary, TILE):
            b_w, b_key = _key_tile(p_row, i_first, vocabulary, stride_v, t, TILE)
            b_total += tl.where(b_key >= low, _mass(b_w, largest), 0)
        limit = p.to(tl.float64) * tl.sum(b_total, 0).to(tl.float64)
        low = _search(p_row, low, high, limit, largest, vocabulary, stride_v, t, True, TILE)
    tl.store(border + i_row, low)


def argument(x: float | torch.Tensor, number: type) -> float | torch.Tensor:
    """A sampling setting as a kernel takes it: a number of one type, or a dense tensor."""
    return x.contiguous() if isinstance(x, torch.Tensor) else number(x)


def is_zero(x: float | torch.Tensor) -> bool:
    """Whether the host knows that a setting is 0 on every row."""
    return not isinstance(x, torch.Tensor) and x == 0


def launch_border(
    logits: torch.Tensor,
    temperature: float | torch.Tensor,
    top_k: int | torch.Tensor,
    top_p: float | torch.Tensor,
) -> torch.Tensor | None:
    """The lowest w of each row that both filters leave, as an order-preserving int32 [B, N].

    None where the host knows that they leave everything, or that nothing is sampled.
    """
    if is_zero(temperature) or (is_zero(top_k) and not isinstance(top_p, torch.Tensor) and top_p == 1):
        return None
    batch, nodes, vocabulary = logits.shape
    border = torch.empty((batch, nodes), dtype=torch.int32, device=logits.device)
    tile = min(SEARCH_TILE, max(16, triton.next_power_of_2(vocabulary)))
    per_row = [isinstance(x, torch.Tensor) for x in (temperature, top_k, top_p)]
    _border_kernel[(batch * nodes,)](
        logits, argument(temperature, float), argument(top_k, int), argument(top_p, float), border,
        nodes, vocabulary, *logits.stride(),
        PER_ROW_T=per_row[0], PER_ROW_K=per_row[1], PER_ROW_P=per_row[2],
        TOP_K=per_row[1] or top_k > 0, TOP_P=per_row[2] or top_p < 1,
        TILE=tile, num_warps=max(1, min(16, tile // 512)),
    )  # fmt: skip
    return border
