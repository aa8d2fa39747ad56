"""Acceptance that changes the answer for speed: what is likely enough, or near enough, passes for what was drawn.

Neither is ever a default. `accept_typical` (Medusa, Cai et al., 2024) takes a child whose probability p under its
parent's law beats a threshold that falls with the law's entropy H:

    p > min(epsilon, delta exp(-H))

A program a row of the batch gathers the probability of every node, climbs from all nodes to the root at once, and keeps
the longest path whose nodes all pass. `accept_within` (Spec-VLA, Wang et al., 2025) takes the child nearest to its
parent's draw, if it is at most a radius away: the walk of `accept`, whose radius is 0.
"""

import torch
import triton
import triton.language as tl

from ._checks import check_between, check_span, check_whole
from ._dispatch import on_device
from .acceptance import as_rows, as_settings, check_walk, empty_walk, launch_draw, launch_keys, launch_walk, merged
from .filters import LEAST_32, argument, launch_border, setting
from .laws import Laws, launch_laws, share_tile
from .reference import relaxed_acceptance as reference
from .reference.acceptance import Accepted


@triton.jit(do_not_specialize=["temperature", "epsilon", "delta", "nodes", "tiles"])
def _typical_walk_kernel(
    logits, keys, tokens, parents, temperature, border, best, total, certainty, log_p, path, length, next_token,
    epsilon, delta, nodes, tiles, vocabulary, stride_b, stride_n, stride_v,
    PER_ROW_T: tl.constexpr, FILTERED: tl.constexpr, NODES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_node = tl.arange(0, NODES)
    m_node = o_node < nodes
    o_row = i_b * nodes + o_node
    b_token = tl.load(tokens + o_row, mask=m_node, other=-1)
    b_parent = tl.load(parents + o_row, mask=m_node, other=-1)
    m_node = m_node & (b_parent >= 0) & (b_parent < o_node) & (b_token >= 0) & (b_token < vocabulary)
    o_above = i_b * nodes + tl.where(m_node, b_parent, 0)
    t = setting(temperature, i_b, PER_ROW_T, tl.float32)
    b_lowest = tl.full([NODES], LEAST_32, tl.int32)
    if FILTERED:
        b_lowest = tl.load(border + o_above)

    p_row = logits + i_b * stride_b + tl.where(m_node, b_parent, 0).to(tl.int64) * stride_n
    o_token = tl.where(m_node, b_token, 0)
    b_p = share_tile(
        p_row, o_token, vocabulary, stride_v, t, b_lowest, tl.load(best + o_above), tl.load(total + o_above)
    )
    m_node = m_node & (b_p > tl.minimum(epsilon, delta * tl.load(certainty + o_above)))
    tl.store(log_p + o_row, tl.where(m_node, tl.log(b_p), -float("inf")), mask=o_node < nodes)
    tl.debug_barrier()

    # All nodes climb together, strictly down whatever `parents` holds; 0 is the root, -1 is nowhere.
    b_at = tl.where(o_node < nodes, o_node, -1)
    b_depth, b_score = tl.zeros([NODES], tl.int32), tl.zeros([NODES], tl.float32)
    while tl.max(b_at, 0) > 0:
        m_up = b_at > 0
        b_score += tl.load(log_p + i_b * nodes + b_at, mask=m_up, other=0.0)
        b_depth += m_up.to(tl.int32)
        b_up = tl.load(parents + i_b * nodes + b_at, mask=m_up, other=-1)
        b_at = tl.where(m_up, tl.where(b_up < b_at, tl.maximum(b_up, -1), -1), b_at)

    b_depth = tl.where((b_at == 0) & (b_score > -float("inf")), b_depth, -1)
    count = tl.max(b_depth, 0)
    b_score = tl.where(b_depth == count, b_score, -float("inf"))
    last = tl.min(tl.where((b_depth == count) & (b_score == tl.max(b_score, 0)), o_node, NODES), 0)

    b_path = tl.full([NODES], -1, tl.int32)
    node, place = last, count
    while node > 0:
        place -= 1
        b_path = tl.where(o_node == place, node, b_path)
        node = tl.load(parents + i_b * nodes + node)
    tl.store(path + o_row, b_path, mask=o_node < nodes)
    tl.store(length + i_b, count)
    b_drawn = merged(keys, i_b * nodes + o_node, o_node < nodes, tiles, TILES)
    tl.store(next_token + i_b, tl.sum(tl.where(o_node == last, b_drawn, 0), 0))


def launch_typical_walk(
    logits: torch.Tensor,
    keys: torch.Tensor,
    laws: Laws,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    temperature: float | torch.Tensor,
    epsilon: float,
    delta: float,
) -> Accepted:
    """The longest path that passes, given every row's draw in packed keys [B, N, tiles] and its law."""
    batch, nodes, tiles = keys.shape
    path, length, next_token = empty_walk(batch, nodes, keys.device)
    log_p = torch.empty((batch, nodes), dtype=torch.float32, device=keys.device)
    _typical_walk_kernel[(batch,)](
        logits, keys, tokens.contiguous(), parents.contiguous(), argument(temperature, float),
        laws.border, laws.best, laws.total, laws.certainty, log_p, path, length, next_token,
        float(epsilon), float(delta), nodes, tiles, logits.shape[2], *logits.stride(),
        PER_ROW_T=isinstance(temperature, torch.Tensor), FILTERED=laws.border is not None,
        NODES=triton.next_power_of_2(nodes), TILES=triton.next_power_of_2(tiles), num_warps=4,
    )  # fmt: skip
    return Accepted(path, length, next_token)


def launch_accept_typical(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    positions: torch.Tensor,
    epsilon: float,
    delta: float,
    temperature: float | torch.Tensor,
    top_k: int | torch.Tensor,
    top_p: float | torch.Tensor,
    seed: torch.Tensor | None,
) -> Accepted:
    """The kernels of `accept_typical`; arguments already checked. No seed: temperature is 0 on every row."""
    if seed is None:
        temperature = 0.0
    border = launch_border(logits, temperature, top_k, top_p)
    keys = launch_draw(logits, positions, temperature, seed, border)
    laws = launch_laws(logits, temperature, border)
    return launch_typical_walk(logits, keys, laws, tokens, parents, temperature, epsilon, delta)


@torch.library.custom_op("specvlm_kernels::accept_typical", mutates_args=())
def _accept_typical(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    positions: torch.Tensor,
    epsilon: float,
    delta: float,
    temperature: torch.Tensor | None,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    settings = as_settings(temperature, top_k, top_p, seed)
    walk = accept_typical(logits, tokens, parents, positions, epsilon=epsilon, delta=delta, **settings)
    return walk.path, walk.length, walk.next_token


@torch.library.custom_op("specvlm_kernels::accept_within", mutates_args=())
def _accept_within(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    positions: torch.Tensor,
    radius: int,
    first: int,
    end: int,
    temperature: torch.Tensor | None,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    settings = as_settings(temperature, top_k, top_p, seed)
    walk = accept_within(logits, tokens, parents, positions, radius, ordinal=(first, end), **settings)
    return walk.path, walk.length, walk.next_token


@_accept_typical.register_fake
@_accept_within.register_fake
def _(logits: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return empty_walk(logits.shape[0], logits.shape[1], logits.device)


def accept_typical(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    positions: torch.Tensor,
    *,
    epsilon: float = 0.09,
    delta: float = 0.3,
    temperature: float | torch.Tensor = 0.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    seed: torch.Tensor | None = None,
) -> Accepted:
    """Changes the answer: accepts what the target finds likely enough, drawn or not; see `accept` for what keeps it.

    A child passes if p > min(epsilon, delta * exp(-H)), with p its probability under its parent's law after
    temperature, top-k and top-p, and H that law's entropy in nats. Taken is the longest path whose nodes all pass; of
    equals the most probable, then the one that ends at the lowest index. The bonus token is the draw at its end, as in
    `accept`. At temperature 0 only the argmax is likely at all.

    Args:
        logits: [B, N, V], N >= 1; as in `draw`.
        tokens, parents, positions: as in `accept`.
        epsilon: from 0 to 1, the probability that always does.
        delta: from 0 to 1; the smaller, the less an unsure target asks for.
        temperature, top_k, top_p, seed: as in `draw`.

    Returns:
        As `accept`.

    Raises:
        ValueError: as in `accept`; epsilon or delta outside its range.

    Source: Medusa (Cai et al., 2024), section 2.3.1.
    """
    kernel = check_walk(logits, tokens, parents, positions, temperature, top_k, top_p, seed)
    check_between("epsilon", epsilon, 0, 1)
    check_between("delta", delta, 0, 1)
    if torch.compiler.is_compiling():
        settings = as_rows(logits, temperature, top_k, top_p)
        return Accepted(*_accept_typical(logits, tokens, parents, positions, epsilon, delta, *settings, seed))
    if not kernel:
        return reference.accept_typical(
            logits, tokens, parents, positions, epsilon=epsilon, delta=delta,
            temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        )  # fmt: skip
    with on_device(logits):
        return launch_accept_typical(
            logits, tokens, parents, positions, epsilon, delta, temperature, top_k, top_p, seed
        )


def accept_within(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    positions: torch.Tensor,
    radius: int,
    *,
    ordinal: tuple[int, int] | None = None,
    temperature: float | torch.Tensor = 0.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    seed: torch.Tensor | None = None,
) -> Accepted:
    """Changes the answer where radius is above 0: accepts ids near the target's draw, for ids that stand in an order.

    Such are a robot's action tokens, where the next bin is nearly the same movement. At every node the child nearest to
    the draw is taken, the lowest index of equals, if it is at most `radius` ids away. With radius 0 this is `accept`.

    Args:
        logits: [B, N, V], N >= 1; as in `draw`.
        tokens, parents, positions: as in `accept`.
        radius: a whole number from 0.
        ordinal: the first id that stands in the order, and the first behind it; any other draw is matched by an equal
            token alone. None: all ids.
        temperature, top_k, top_p, seed: as in `draw`.

    Returns:
        As `accept`: what is emitted are the accepted nodes' own tokens, then the draw after them.

    Raises:
        ValueError: as in `accept`; a wrong radius or range.

    Source: Spec-VLA (Wang et al., 2025).
    """
    kernel = check_walk(logits, tokens, parents, positions, temperature, top_k, top_p, seed)
    check_whole("radius", radius, 0, 2**31 - 2)
    ordinal = (0, logits.shape[-1]) if ordinal is None else ordinal
    check_span("ordinal", ordinal, logits.shape[-1])
    if torch.compiler.is_compiling():
        settings = as_rows(logits, temperature, top_k, top_p)
        return Accepted(*_accept_within(logits, tokens, parents, positions, radius, *ordinal, *settings, seed))
    if not kernel:
        return reference.accept_within(
            logits, tokens, parents, positions, radius, ordinal=ordinal,
            temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        )  # fmt: skip
    with on_device(logits):
        keys = launch_keys(logits, positions, temperature, top_k, top_p, seed)
        return launch_walk(keys, tokens, parents, radius, ordinal)
