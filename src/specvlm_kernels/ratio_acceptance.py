"""The ratio test: exact in distribution for a draft that samples on its own, without the target's noise.

At a node p is the law of the target's draw and q the law that its children were drawn from. They are looked at in the
order of their index, which is the order in which they were drawn:

    child x is taken if u q(x) < p(x),  u uniform in (0, 1);    else  p <- (p - q)+, q <- q without x, both to sum 1

Where all are refused, the bonus token is drawn from what p has become. So the emitted token has the law p whatever q is
(SpecInfer, Miao et al., 2024; without replacement: RSD, Jeon et al., 2024). Drawn with replacement, q stays as it is,
and a token that comes again is refused: p(x) is 0 then, and the test is strict.

u is a function of seed, position and token in a noise stream of its own, of which no draft may have seen anything. The
bonus token is drawn in the same stream: a refused token has p(x) = 0 from then on, so no number serves twice. `accept`
needs no q, and takes more from a draft that shares its noise.

The laws of all rows are summed up beforehand (`laws`). Then a program a row of the batch walks, and keeps p and q of
the node that it stands at in memory, 8 bytes a token, which a refused child reads and writes once.
"""

import torch
import triton
import triton.language as tl

from ._checks import FLOATS, KERNEL_FLOATS, check_tensor
from ._dispatch import on_device
from .acceptance import as_rows, as_settings, check_walk, empty_walk
from .filters import LEAST_32, LEAST_64, argument, key_token, launch_border, pack_key, setting
from .laws import launch_laws, share_tile
from .noise import race_tile, uniform
from .reference import ratio_acceptance as reference
from .reference.acceptance import Accepted
from .reference.noise import RATIO_STREAM

#: Tokens that the walk holds at a time.
TILE = 4096

STREAM = tl.constexpr(RATIO_STREAM)


@triton.jit
def _start(
    p_target, p_draft, p_left, p_source, stride_v, stride_v_draft, t, lowest,
    best, total, draft_best, draft_total, vocabulary, TILE: tl.constexpr,
):  # fmt: skip
    """Writes p and q of a row to where the walk keeps them, and returns their sums."""
    b_left, b_source = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    tl.debug_barrier()
    for i_first in range(0, vocabulary, TILE):
        o_token = i_first + tl.arange(0, TILE)
        m_token = o_token < vocabulary
        b_p = share_tile(p_target, o_token, vocabulary, stride_v, t, lowest, best, total)
        b_q = share_tile(p_draft, o_token, vocabulary, stride_v_draft, 1.0, LEAST_32, draft_best, draft_total)
        b_q = tl.where(draft_total > 0.0, b_q, 0.0)  # a row without a value above -inf draws nothing
        tl.store(p_left + o_token, b_p, mask=m_token)
        tl.store(p_source + o_token, b_q, mask=m_token)
        b_left += tl.where(m_token, b_p, 0.0)
        b_source += tl.where(m_token, b_q, 0.0)
    tl.debug_barrier()
    return tl.sum(b_left, 0), tl.sum(b_source, 0)


@triton.jit
def _refuse(p_left, p_source, left, source, token, vocabulary, REPLACEMENT: tl.constexpr, TILE: tl.constexpr):
    """Takes the law of a refused child out of what is left, and the token out of that law; returns their sums."""
    scale = tl.where(source > 0.0, left / source, 0.0)
    b_left, b_source = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    tl.debug_barrier()
    for i_first in range(0, vocabulary, TILE):
        o_token = i_first + tl.arange(0, TILE)
        m_token = o_token < vocabulary
        b_q = tl.load(p_source + o_token, mask=m_token, other=0.0)
        b_p = tl.maximum(tl.load(p_left + o_token, mask=m_token, other=0.0) - scale * b_q, 0.0)
        if not REPLACEMENT:
            b_q = tl.where(o_token == token, 0.0, b_q)
            tl.store(p_source + o_token, b_q, mask=m_token)
        tl.store(p_left + o_token, b_p, mask=m_token)
        b_left += b_p
        b_source += b_q
    tl.debug_barrier()
    return tl.sum(b_left, 0), tl.sum(b_source, 0)


@triton.jit(do_not_specialize=["temperature", "nodes"])
def _ratio_walk_kernel(
    logits, draft_logits, tokens, parents, positions, temperature, seed, border, best, total, draft_best, draft_total,
    kept, path, length, next_token, nodes, vocabulary, stride_b, stride_n, stride_v,
    stride_b_draft, stride_n_draft, stride_v_draft,
    PER_ROW_T: tl.constexpr, SAMPLED: tl.constexpr, FILTERED: tl.constexpr, REPLACEMENT: tl.constexpr,
    NODES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    first_row = tl.program_id(0) * nodes
    o_node = tl.arange(0, NODES)
    m_node = o_node < nodes
    b_token = tl.load(tokens + first_row + o_node, mask=m_node, other=-1)
    b_parent = tl.load(parents + first_row + o_node, mask=m_node, other=-1)
    b_place = tl.load(positions + first_row + o_node, mask=m_node, other=0).to(tl.int64) + 1
    m_node = m_node & (b_token >= 0) & (b_token < vocabulary)
    t = setting(temperature, i_b, PER_ROW_T, tl.float32)
    p_target, p_draft = logits + i_b * stride_b, draft_logits + i_b * stride_b_draft
    p_left = kept + 2 * i_b * vocabulary
    p_source = p_left + vocabulary

    node, count, going, looks = 0, 0, 1, 1
    left = 1.0
    b_path = tl.full([NODES], -1, tl.int32)
    while going > 0:
        row, i_node = first_row + node, tl.cast(node, tl.int64)
        lowest = LEAST_32
        if FILTERED:
            lowest = tl.load(border + row)
        left, source = _start(
            p_target + i_node * stride_n, p_draft + i_node * stride_n_draft, p_left, p_source,
            stride_v, stride_v_draft, t, lowest, tl.load(best + row), tl.load(total + row), tl.load(draft_best + row),
            tl.load(draft_total + row), vocabulary, TILE,
        )  # fmt: skip
        # Children come after their parents: whatever `parents` holds, the walk ends.
        m_child = m_node & (b_parent == node) & (o_node > node) & (looks > 0)
        child, taken = tl.min(tl.where(m_child, o_node, NODES), 0), NODES
        while child < taken:
            token = tl.sum(tl.where(o_node == child, b_token, 0), 0).to(tl.int32)
            coin = 0.5
            if SAMPLED:
                place = tl.sum(tl.where(o_node == node, b_place, 0), 0)
                coin = uniform(token.to(tl.int64), place, tl.load(seed + i_b), STREAM)
            if coin * tl.load(p_source + token) * left < tl.load(p_left + token) * source:
                taken = child
            else:
                left, source = _refuse(p_left, p_source, left, source, token, vocabulary, REPLACEMENT, TILE)
                child = tl.min(tl.where(m_child & (o_node > child), o_node, NODES), 0)
        going = 0
        if taken < NODES:
            b_path = tl.where(o_node == count, taken, b_path)
            count += 1
            node, going = taken, 1
        elif left == 0.0:  # only by rounding, where p and q are all but equal: then the draw is from p
            going, looks = 1, 0

    place = tl.sum(tl.where(o_node == node, b_place, 0), 0)
    b_key = tl.full([TILE], LEAST_64, tl.int64)
    for i_first in range(0, vocabulary, TILE):
        o_token = i_first + tl.arange(0, TILE)
        m_token = o_token < vocabulary
        b_z = tl.log(tl.load(p_left + o_token, mask=m_token, other=0.0))
        if SAMPLED:
            b_z += race_tile(i_first, place, tl.load(seed + i_b), STREAM, TILE)
        b_key = tl.maximum(b_key, tl.where(m_token, pack_key(b_z, o_token), LEAST_64))
    tl.store(path + first_row + o_node, b_path, mask=o_node < nodes)
    tl.store(length + i_b, count)
    tl.store(next_token + i_b, key_token(tl.max(b_key, 0)))


def launch_accept_ratio(
    logits: torch.Tensor,
    draft_logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    positions: torch.Tensor,
    temperature: float | torch.Tensor,
    top_k: int | torch.Tensor,
    top_p: float | torch.Tensor,
    seed: torch.Tensor | None,
    replacement: bool,
) -> Accepted:
    """The kernels of `accept_ratio`; arguments already checked. No seed: temperature is 0 on every row."""
    if seed is None:
        temperature = 0.0
    batch, nodes, vocabulary = logits.shape
    border = launch_border(logits, temperature, top_k, top_p)
    laws, draft_laws = launch_laws(logits, temperature, border), launch_laws(draft_logits, 1.0, None)
    path, length, next_token = empty_walk(batch, nodes, logits.device)
    kept = torch.empty((batch, 2, vocabulary), dtype=torch.float32, device=logits.device)
    tile = min(TILE, max(16, triton.next_power_of_2(vocabulary)))
    _ratio_walk_kernel[(batch,)](
        logits, draft_logits, tokens.contiguous(), parents.contiguous(), positions.contiguous(),
        argument(temperature, float), None if seed is None else seed.contiguous(), border, laws.best, laws.total,
        draft_laws.best, draft_laws.total, kept, path, length, next_token, nodes, vocabulary,
        *logits.stride(), *draft_logits.stride(),
        PER_ROW_T=isinstance(temperature, torch.Tensor), SAMPLED=seed is not None, FILTERED=border is not None,
        REPLACEMENT=replacement, NODES=triton.next_power_of_2(nodes), TILE=tile,
        num_warps=max(1, min(16, tile // 256)),
    )  # fmt: skip
    return Accepted(path, length, next_token)


@torch.library.custom_op("specvlm_kernels::accept_ratio", mutates_args=())
def _accept_ratio(
    logits: torch.Tensor,
    draft_logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor | None,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    seed: torch.Tensor | None,
    replacement: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    settings = as_settings(temperature, top_k, top_p, seed)
    walk = accept_ratio(logits, draft_logits, tokens, parents, positions, **settings, replacement=replacement)
    return walk.path, walk.length, walk.next_token


@_accept_ratio.register_fake
def _(logits: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return empty_walk(logits.shape[0], logits.shape[1], logits.device)


def accept_ratio(
    logits: torch.Tensor,
    draft_logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    positions: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 0.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    seed: torch.Tensor | None = None,
    replacement: bool = False,
) -> Accepted:
    """Accepts by the ratio of target's to draft's probability: the same law of the answer, but not the same answer.

    For drafts that sample independently of the target's noise; the draws at the same seed are others than `accept`'s,
    and hang on what was drafted. At temperature 0 it accepts what `accept` accepts, where siblings differ.

    With p the law of the target's draw at a node, after temperature, top-k and top-p, and q the law that its children
    were drawn from: in the order of their indices a child x is taken if u q(x) < p(x), u in (0, 1) its own. If not, p
    becomes (p - q)+, and q loses x (with replacement it does not), both scaled to sum 1. Where no child is taken the
    bonus token is drawn from p.

    This is exact only if the children of a node, in the order of their indices, are successive draws from q, and none
    was left out for the token that it is: `draft_topk`, with the draft's own temperature and noise, makes such, without
    replacement.

    Args:
        logits: [B, N, V], N >= 1; as in `draw`.
        draft_logits: [B, N, V] in any of its dtypes and strides, softmax(draft_logits[b, i]) being the q that the
            children of node i were drawn from: divided by the draft's temperature, -inf for what it never proposes.
            Rows of nodes without children may hold anything.
        tokens, parents, positions: as in `accept`.
        temperature, top_k, top_p: the target's, as in `draw`.
        seed: [B] int64, as in `draw`. Its noise is that of stream 1; a draft that drew with the same seed in stream 0,
            as `draft_topk` does, knows nothing of it.
        replacement: the children of a node are independent draws, among which a token may come again, as in SpecInfer.

    Returns:
        As `accept`.

    Raises:
        ValueError: as in `accept`; draft_logits of another shape, dtype or device.

    Sources: SpecInfer (Miao et al., 2024), recursive rejection sampling (Jeon et al., 2024).
    """
    kernel = check_walk(logits, tokens, parents, positions, temperature, top_k, top_p, seed)
    check_tensor("draft_logits", draft_logits, logits.shape, KERNEL_FLOATS if kernel else FLOATS, logits.device)
    if not isinstance(replacement, bool):
        raise ValueError(f"replacement: expected True or False, got {replacement!r}")
    if torch.compiler.is_compiling():
        settings = as_rows(logits, temperature, top_k, top_p)
        return Accepted(*_accept_ratio(logits, draft_logits, tokens, parents, positions, *settings, seed, replacement))
    if not kernel:
        return reference.accept_ratio(
            logits, draft_logits, tokens, parents, positions,
            temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, replacement=replacement,
        )  # fmt: skip
    with on_device(logits):
        return launch_accept_ratio(
            logits, draft_logits, tokens, parents, positions, temperature, top_k, top_p, seed, replacement
        )
