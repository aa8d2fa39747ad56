"""Temperature, top-k and top-p of a row of logits, as one number that the row's tokens are held against.

Both filters are thresholds of w = logits / temperature. A token stays if what lies strictly above it, counted in tokens
or in probability, is less than k, or than p; so all of a row that the filters come to is one number, the lowest w that
stays, its *border*. Ties at a border stay, the token that crosses p stays, and the largest always stays.

No softmax is written and nothing is sorted. Floats are mapped to integers of the same order, and one program a row
bisects between the least and the largest of them, in turn by value and by key: each pass counts what lies above the
middle and moves the end that gives way to a key that occurs, so it ends at the border exactly, after ten passes or so
and never more than 64. For top-k a row of up to `WHOLE_ROW` tokens is read once and stays in registers. Probabilities
are summed as integers, in units of 2^-40 of the most likely token's: integer sums do not depend on the order, so
neither does the nucleus.
"""

import torch
import triton
import triton.language as tl

#: Rows of up to this many tokens are held in registers while their border is searched for.
WHOLE_ROW = 32768

#: Tokens of a longer row that the search holds at a time.
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
def key_float(b_key):
    """The floats of int32 keys."""
    return (b_key ^ ((b_key >> 31) & LARGEST_32)).to(tl.float32, bitcast=True)


@triton.jit
def key_value(b_key):
    """The fp32 value in a packed key."""
    return key_float((b_key >> 32).to(tl.int32))


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
def _above(b_w, b_key, middle, largest, MASS: tl.constexpr):
    """What lies above `middle`, token by token: its amount; and the next key above, and the last that is not."""
    m_above = b_key > middle
    b_amount = tl.where(m_above, _mass(b_w, largest), 0) if MASS else m_above.to(tl.int32)
    return b_amount, tl.where(m_above, b_key, LARGEST_32), tl.where(m_above, LEAST_32, b_key)


@triton.jit
def _search(
    p_row, b_row, low, high, limit, largest, vocabulary, stride_v, temperature,
    MASS: tl.constexpr, WHOLE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The least key that occurs in [low, high] and has less than `limit` above it; low and high occur."""
    turn = 0
    while low < high:
        middle = (low & high) + ((low ^ high) >> 1)
        if turn % 2 == 0:  # whatever that comes to between infinities: every other turn halves the keys
            half = float_key(0.5 * key_float(low) + 0.5 * key_float(high))
            middle = tl.minimum(tl.maximum(half, low), high - 1)
        turn += 1
        if WHOLE:
            b_key = tl.where(tl.arange(0, TILE) < vocabulary, float_key(b_row), LEAST_32)
            b_sum, b_next, b_last = _above(b_row, b_key, middle, largest, MASS)
        else:
            b_sum = tl.full([TILE], 0, tl.int64 if MASS else tl.int32)
            b_next = tl.full([TILE], LARGEST_32, tl.int32)
            b_last = tl.full([TILE], LEAST_32, tl.int32)
            for i_first in range(0, vocabulary, TILE):
                b_w, b_key = _key_tile(p_row, i_first, vocabulary, stride_v, temperature, TILE)
                b_amount, b_above, b_below = _above(b_w, b_key, middle, largest, MASS)
                b_sum += b_amount
                b_next, b_last = tl.minimum(b_next, b_above), tl.maximum(b_last, b_below)
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
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, STARTED: tl.constexpr, WHOLE: tl.constexpr, TILE: tl.constexpr,
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
    b_row = tl.full([TILE], -float("inf"), tl.float32)  # the row, or where it is too long the largest of each place
    for i_first in range(0, TILE if WHOLE else vocabulary, TILE):
        b_w, b_key = _key_tile(p_row, i_first, vocabulary, stride_v, t, TILE)
        b_least = tl.minimum(b_least, tl.where(b_key == LEAST_32, LARGEST_32, b_key))
        b_row = tl.maximum(b_row, b_w)
    largest = tl.max(b_row, 0)
    low, high = tl.min(b_least, 0), float_key(largest)
    if STARTED:
        low = tl.load(border + i_row)

    if TOP_K and (k > 0) & (k < vocabulary):
        low = _search(p_row, b_row, low, high, k, largest, vocabulary, stride_v, t, False, WHOLE, TILE)
    if TOP_P and p < 1:
        # Of what lies further below the largest than this, all tokens together have less than 1 - p.
        bound = float_key(largest - tl.log(vocabulary / (1.0 - p)) - 1e-3)
        b_total = tl.full([TILE], 0, tl.int64)
        b_least = tl.full([TILE], LARGEST_32, tl.int32)
        for i_first in range(0, vocabulary, TILE):
            b_w, b_key = _key_tile(p_row, i_first, vocabulary, stride_v, t, TILE)
            b_total += tl.where(b_key >= low, _mass(b_w, largest), 0)
            b_least = tl.minimum(b_least, tl.where(b_key >= tl.maximum(low, bound), b_key, LARGEST_32))
        limit = p.to(tl.float64) * tl.sum(b_total, 0).to(tl.float64)
        low = tl.minimum(tl.min(b_least, 0), high)
        low = _search(p_row, b_row, low, high, limit, largest, vocabulary, stride_v, t, True, WHOLE, TILE)
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
    per_row = [isinstance(x, torch.Tensor) for x in (temperature, top_k, top_p)]
    by_k, by_p = per_row[1] or bool(top_k > 0), per_row[2] or bool(top_p < 1)
    size = max(16, triton.next_power_of_2(vocabulary))

    def launch(by_k: bool, by_p: bool, started: bool, whole: bool) -> None:
        tile = size if whole else min(SEARCH_TILE, size)
        _border_kernel[(batch * nodes,)](
            logits, argument(temperature, float), argument(top_k, int), argument(top_p, float), border,
            nodes, vocabulary, *logits.stride(),
            PER_ROW_T=per_row[0], PER_ROW_K=per_row[1], PER_ROW_P=per_row[2],
            TOP_K=by_k, TOP_P=by_p, STARTED=started, WHOLE=whole,
            TILE=tile, num_warps=max(1, min(16, tile // 512)),
        )  # fmt: skip

    # Two launches where there are two filters: registers hold a row that is counted, but no integers of 64 bits beside.
    if by_k:
        launch(True, False, False, size <= WHOLE_ROW)
    if by_p:
        launch(False, True, by_k, False)
    return border
