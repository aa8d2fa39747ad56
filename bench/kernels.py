"""Times the kernels on the GPU at hand, against its copy bandwidth and against plain torch.

    python -m bench.kernels

Every op is first held against its reference; a wrong one is not timed. A measurement is a CUDA graph that runs the op
over many layers (or places in caches, or batches of logits) in turn, as a decoder does: so the host's share is out of
it, and KV is read from memory, not from the L2 cache. The last line is JSON.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton

import specvlm_kernels
from bench.machine import machine
from specvlm_kernels import (
    accept,
    compact_kv,
    conv_tokens,
    draft_topk,
    draw,
    pack_ancestors,
    pool_tokens,
    prune_tokens,
    reference,
    resample_tokens,
    soft_cross_entropy,
    total_variation,
    tree_attention,
)
from specvlm_kernels.reference.acceptance import perturbed

#: What a measurement walks through before it comes back: several times any L2 cache. One node's logits (64 KB) stay
#: inside it even so, as they do behind a head's product.
ROTATION_BYTES, MOST_TURNS = 1 << 30, 256
REPEATS, WARM_UP = 50, 5
TREE_SEED = 0

#: How far scores may be off; proposed tokens are compared where scores lie further apart.
SCORE_GAP = 1e-3

MODELS = {"7B": (32, 32), "13B": (40, 40), "GQA 32/8": (32, 8)}  # query heads, KV heads; head dimension 128
CONTEXTS = (600, 2048, 8192)
NODES = (1, 64)
VOCABULARY = 32064

#: Rows that a training step's answers come to, and the vocabularies of LLaVA-1.5 and Qwen2.5-VL-7B.
TAUGHT, TAUGHT_VOCABULARIES = 2048, (32064, 152064)

#: Visual tokens as grids: a picture of LLaVA-1.5, and five of them.
TOKEN_GRIDS = ((24, 24), (120, 24))


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one call: median and the tenth and ninetieth percentile."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table; `bytes` is what the op cannot help reading and writing."""

    op: str
    shape: str
    bytes: int
    kernel: Timing
    baseline: Timing
    baseline_name: str


def timed(call: Callable[[int], object], turns: int) -> Timing:
    """Times call(0), ..., call(turns - 1) as one graph; a result is one call's share."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for turn in range(min(turns, 3)):
            call(turn)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(turns):
            call(turn)
    for _ in range(WARM_UP):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    times = [1e3 * start.elapsed_time(end) / turns for start, end in itertools.pairwise(marks)]
    p10, median, p90 = torch.tensor(times).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return Timing(median, p10, p90)


def copy_bandwidth() -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(ROTATION_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * ROTATION_BYTES / (timed(lambda _: target.copy_(source), 4).median * 1e-6)


def random_parents(nodes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(TREE_SEED)
    parents = [-1] + [int(torch.randint(0, i, (), generator=generator)) for i in range(1, nodes)]
    return torch.tensor([parents], dtype=torch.int32, device="cuda")


def bench_tree_attention(model: str, context: int, nodes: int) -> Result:
    heads, kv_heads, head_dim = *MODELS[model], 128
    capacity = triton.next_power_of_2(context + nodes)
    length = context + nodes
    layer_bytes = 2 * 2 * kv_heads * length * head_dim
    layers = math.ceil(ROTATION_BYTES / layer_bytes)
    slab = torch.randn(layers, 2, 1, kv_heads, capacity, head_dim, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(1, nodes, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    kv_len = torch.tensor([context], dtype=torch.int32, device="cuda")
    words = pack_ancestors(random_parents(nodes))

    out = tree_attention(q, slab[0, 0], slab[0, 1], kv_len, words)
    exact = reference.tree_attention(q.double(), slab[0, 0].double(), slab[0, 1].double(), kv_len, words)
    bits = (words[..., None] >> torch.arange(64, device="cuda")) & 1
    mask = F.pad(bits.bool().flatten(2)[..., :nodes], (context, 0), value=True)[:, None]

    def sdpa(layer: int) -> torch.Tensor:
        k, v = slab[layer, 0, :, :, :length], slab[layer, 1, :, :, :length]
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask, enable_gqa=heads != kv_heads)

    plain_error = (sdpa(0).transpose(1, 2) - exact).abs().max()
    error = (out - exact).abs().max()
    require(bool(error <= 2 * plain_error + 4 * 2**-8 * (1 + exact.abs().max())), f"tree_attention is off by {error}")
    return Result(
        "tree_attention",
        f"{model}, {context} slots, {nodes} nodes",
        layer_bytes + 2 * q.nbytes,
        timed(lambda layer: tree_attention(q, slab[layer, 0], slab[layer, 1], kv_len, words), layers),
        timed(sdpa, layers),
        "SDPA with a mask",
    )


def bench_compact_kv(model: str) -> Result:
    kv_heads, head_dim, layers, capacity, reach = MODELS[model][1], 128, 32, 640, 32
    nodes = [2, 5, 11, 30]
    path = torch.tensor([nodes + [-1] * 60], dtype=torch.int32, device="cuda")
    length = torch.tensor([len(nodes)], dtype=torch.int32, device="cuda")
    moved = 2 * 2 * layers * 2 * kv_heads * len(nodes) * head_dim
    # A path is a few rows of a cache: so each turn has its own place in one, `reach` slots from the next.
    starts = torch.arange(0, capacity, reach, dtype=torch.int32, device="cuda")[:, None]
    count = math.ceil(ROTATION_BYTES / (moved * len(starts)))
    caches = torch.randn(count, layers, 2, 1, kv_heads, capacity, head_dim, device="cuda", dtype=torch.bfloat16)
    sources = starts + torch.tensor(nodes, device="cuda")
    targets = starts + torch.arange(1, 1 + len(nodes), device="cuda")

    ours, theirs = caches[0].clone(), caches[0].clone()
    compact_kv(ours, starts[-1], path, length)
    reference.compact_kv(theirs, starts[-1], path, length)
    require(torch.equal(ours, theirs), "compact_kv moved wrongly")

    def compacted(turn: int) -> None:
        compact_kv(caches[turn // len(starts)], starts[turn % len(starts)], path, length)

    def indexed(turn: int) -> None:
        cache, place = caches[turn // len(starts)], turn % len(starts)
        cache.index_copy_(4, targets[place], cache.index_select(4, sources[place]))

    turns = count * len(starts)
    return Result(
        "compact_kv",
        f"{model}, {layers} layers, {len(nodes)} rows",
        moved,
        timed(compacted, turns),
        timed(indexed, turns),
        "index_select, index_copy",
    )


def bench_draws(nodes: int, temperature: float, top_k: int, top_p: float) -> list[Result]:
    turns = min(MOST_TURNS, math.ceil(ROTATION_BYTES / (2 * nodes * VOCABULARY)))
    logits = 3 * torch.randn(turns, 1, nodes, VOCABULARY, device="cuda", dtype=torch.bfloat16)
    positions = torch.arange(600, 600 + nodes, dtype=torch.int32, device="cuda")[None]
    parents, seed = random_parents(nodes), torch.tensor([7], device="cuda")
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}

    drawn = draw(logits[0], positions, **options)
    noisy = perturbed(logits[0].float(), positions, temperature, top_k, top_p, seed if temperature else None)
    lost = noisy.amax(-1) - noisy.gather(-1, drawn[..., None])[..., 0]
    require(bool((lost <= 1e-4).all()), f"draw missed the best by {lost.max()}")

    # Every node is its parent's draw, so there is a path to walk. The reference walks along the same draws.
    above = parents.clamp(min=0).long()
    tokens = [draw(batch, positions, **options).gather(1, above) for batch in logits]
    walk = accept(logits[0], tokens[0], parents, positions, **options)
    expected = reference.accept(F.one_hot(drawn, VOCABULARY).float(), tokens[0], parents, positions)
    for name in ("path", "length", "next_token"):
        require(torch.equal(getattr(walk, name), getattr(expected, name)), f"accept is wrong in {name}")
    require(nodes == 1 or bool((walk.length > 0).all()), "accept had no path to walk")

    def plain(turn: int) -> torch.Tensor:
        if not temperature:
            return logits[turn].argmax(-1)
        z = logits[turn].float() / temperature
        if top_k:
            z = z.masked_fill(z < z.topk(top_k).values[..., -1:], -math.inf)
        if top_p < 1:
            ordered, ids = z.sort(dim=-1)
            cut = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
            z = z.masked_fill(cut.scatter(-1, ids, cut), -math.inf)
        p = z.softmax(-1)
        return (p / torch.empty_like(p).exponential_()).argmax(-1)

    shape = f"{nodes} nodes, V {VOCABULARY}, temperature {temperature:g}, top_k {top_k}, top_p {top_p:g}"
    baseline = timed(plain, turns)
    read = 2 * nodes * VOCABULARY
    return [
        Result("draw", shape, read, timed(lambda i: draw(logits[i], positions, **options), turns), baseline, "torch"),
        Result(
            "accept",
            shape,
            read,
            timed(lambda i: accept(logits[i], tokens[i], parents, positions, **options), turns),
            baseline,
            "torch, draws alone",
        ),
    ]


def bench_draft_topk(nodes: int, k: int, temperature: float) -> Result:
    turns = min(MOST_TURNS, math.ceil(ROTATION_BYTES / (2 * nodes * VOCABULARY)))
    logits = 3 * torch.randn(turns, 1, nodes, VOCABULARY, device="cuda", dtype=torch.bfloat16)
    positions = torch.arange(600, 600 + nodes, dtype=torch.int32, device="cuda")[None]
    options: dict[str, Any] = {"temperature": temperature, "seed": torch.tensor([7], device="cuda")}
    tokens, scores = draft_topk(logits[0], k, positions, **options)
    best, exact = reference.draft_topk(logits[0], k + 1, positions, **options)
    require(bool((scores - exact[..., :k]).abs().max() <= SCORE_GAP), "draft_topk scores are off")
    wide = exact[..., :-1] - exact[..., 1:] > SCORE_GAP  # after each of the k
    clear = wide & F.pad(wide[..., :-1], (1, 0), value=True)
    require(bool((tokens == best[..., :k])[clear].all()), "draft_topk proposes other tokens")
    return Result(
        "draft_topk",
        f"{nodes} nodes, k {k}, V {VOCABULARY}, temperature {temperature:g}",
        2 * nodes * VOCABULARY,
        timed(lambda i: draft_topk(logits[i], k, positions, **options), turns),
        timed(lambda i: logits[i].float().log_softmax(-1).topk(k), turns),
        "log_softmax, topk",
    )


def bench_reduced_topk(nodes: int, k: int, ids: int) -> Result:
    """A draft of every fourth token or so, against the same logits spread over the whole vocabulary."""
    turns = min(MOST_TURNS, math.ceil(ROTATION_BYTES / (2 * nodes * VOCABULARY)))
    logits = 3 * torch.randn(turns, 1, nodes, ids, device="cuda", dtype=torch.bfloat16)
    positions = torch.arange(600, 600 + nodes, dtype=torch.int32, device="cuda")[None]
    vocabulary = torch.randperm(VOCABULARY, device="cuda")[:ids].sort().values
    options: dict[str, Any] = {"temperature": 1.0, "seed": torch.tensor([7], device="cuda")}

    def spread(turn: int) -> torch.Tensor:
        whole = logits.new_full((1, nodes, VOCABULARY), -math.inf)
        return whole.index_copy_(-1, vocabulary, logits[turn])

    tokens, scores = draft_topk(logits[0], k, positions, vocabulary=vocabulary, **options)
    expected = draft_topk(spread(0), k, positions, **options)
    require(torch.equal(tokens, expected[0]), "draft_topk of a reduced vocabulary proposes other tokens")
    require(bool((scores - expected[1]).abs().max() <= SCORE_GAP), "draft_topk scores of a reduced vocabulary are off")
    return Result(
        "draft_topk",
        f"{nodes} nodes, k {k}, {ids} of V {VOCABULARY}, temperature 1",
        2 * nodes * ids + vocabulary.nbytes,
        timed(lambda i: draft_topk(logits[i], k, positions, vocabulary=vocabulary, **options), turns),
        timed(lambda i: draft_topk(spread(i), k, positions, **options), turns),
        "spread, draft_topk",
    )


def bench_other_rules(nodes: int) -> Iterator[Result]:
    """The acceptance rules beside `accept`, which is their baseline."""
    turns = min(MOST_TURNS, math.ceil(ROTATION_BYTES / (2 * 2 * nodes * VOCABULARY)))
    logits, drafts = (
        3 * torch.randn(turns, 1, nodes, VOCABULARY, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    positions = torch.arange(600, 600 + nodes, dtype=torch.int32, device="cuda")[None]
    parents, tokens = random_parents(nodes), torch.randint(VOCABULARY, (1, nodes), device="cuda")
    options: dict[str, Any] = {"temperature": 1.0, "seed": torch.tensor([7], device="cuda")}
    rest = (tokens, parents, positions)
    rules: dict[str, tuple[Callable[[Any, int], Any], int]] = {
        "accept_ratio": (lambda ops, i: ops.accept_ratio(logits[i], drafts[i], *rest, **options), 2),
        "accept_typical": (lambda ops, i: ops.accept_typical(logits[i], *rest, **options), 1),
        "accept_within": (lambda ops, i: ops.accept_within(logits[i], *rest, 9, **options), 1),
    }
    baseline = timed(lambda i: accept(logits[i], *rest, **options), turns)
    for name, (call, reads) in rules.items():
        got, expected = call(specvlm_kernels, 0), call(reference, 0)
        for part in ("path", "length", "next_token"):
            require(torch.equal(getattr(got, part), getattr(expected, part)), f"{name} is wrong in {part}")
        kernel = timed(lambda i, call=call: call(specvlm_kernels, i), turns)
        shape = f"{nodes} nodes, V {VOCABULARY}, temperature 1"
        yield Result(name, shape, reads * 2 * nodes * VOCABULARY, kernel, baseline, "accept")


def plain_cross_entropy(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    p = teacher_logits.float().softmax(-1)
    return -(p * logits.float().log_softmax(-1)).sum(-1)


def plain_variation(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    return (logits.float().softmax(-1) - teacher_logits.float().softmax(-1)).abs().sum(-1)


def bench_loss(
    name: str, loss: Callable[..., torch.Tensor], plain: Callable[..., torch.Tensor], vocabulary: int
) -> Result:
    """A step's loss, forward and backward."""
    turns = math.ceil(ROTATION_BYTES / (4 * TAUGHT * vocabulary))
    shape = (turns, TAUGHT, vocabulary)
    logits = [x.mul_(3).requires_grad_() for x in torch.randn(shape, device="cuda", dtype=torch.bfloat16)]
    teachers = 3 * torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    def step(loss: Callable[..., torch.Tensor], turn: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = loss(logits[turn], teachers[turn])
        return found.detach(), torch.autograd.grad(found.sum(), logits[turn])[0]

    rows = slice(0, 64)  # in fp64
    z = logits[0][rows].detach().double().requires_grad_()
    exact = getattr(reference, name)(z, teachers[0][rows].double())
    exact = (exact.detach(), torch.autograd.grad(exact.sum(), z)[0])
    for got, usual, true in zip(step(loss, 0), step(plain, 0), exact, strict=True):
        error, usual_error = (got[rows] - true).abs().max(), (usual[rows] - true).abs().max()
        floor = 4 * torch.finfo(got.dtype).eps * true.abs().max()
        require(bool(error <= 2 * usual_error + floor), f"{name} is off by {error}")
    return Result(
        f"{name}, forward and backward",
        f"{TAUGHT} rows, V {vocabulary}",
        2 * (2 + 2 + 1) * TAUGHT * vocabulary,  # both read twice, the gradient written
        timed(lambda turn: step(loss, turn), turns),
        timed(lambda turn: step(plain, turn), turns),
        "torch",
    )


def random_tokens(model: str, grid: tuple[int, int]) -> torch.Tensor:
    """[turns, 1, tokens, channels], as wide as the model."""
    tokens, channels = math.prod(grid), 128 * MODELS[model][0]
    turns = min(MOST_TURNS, math.ceil(ROTATION_BYTES / (2 * tokens * channels)))
    return torch.randn(turns, 1, tokens, channels, device="cuda", dtype=torch.bfloat16)


def require_close(name: str, out: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """At most twice the error of plain torch in the same dtype, and a few roundings."""
    error, other = (out - exact).abs().max(), (plain - exact).abs().max()
    require(bool(error <= 2 * other + 4 * 2**-8 * (1 + exact.abs().max())), f"{name} is off by {error}")


def bench_grid_ops(model: str, grid: tuple[int, int], kernel: int = 3, stride: int = 2) -> Iterator[Result]:
    x = random_tokens(model, grid)
    turns, _, tokens, channels = x.shape
    weight = torch.randn(channels, kernel, kernel, device="cuda", dtype=torch.bfloat16) / kernel
    bias = torch.randn(channels, device="cuda", dtype=torch.bfloat16)

    def pooled(turn: int) -> torch.Tensor:
        planes = x[turn].transpose(1, 2).unflatten(2, grid)
        out = F.avg_pool2d(planes, stride, ceil_mode=True, count_include_pad=False)
        return out.flatten(2).transpose(1, 2).contiguous()

    def convolved(turn: int) -> torch.Tensor:
        planes = x[turn].transpose(1, 2).unflatten(2, grid)
        out = F.conv2d(planes, weight[:, None], bias, stride, groups=channels)
        return out.flatten(2).transpose(1, 2).contiguous()

    out = pool_tokens(x[0], grid, stride)
    require_close("pool_tokens", out, pooled(0), reference.pool_tokens(x[0].double(), grid, stride))
    yield Result(
        "pool_tokens",
        f"{model}, {tokens} tokens, stride {stride}",
        2 * channels * (tokens + out.shape[1]),
        timed(lambda turn: pool_tokens(x[turn], grid, stride), turns),
        timed(pooled, turns),
        "avg_pool2d",
    )
    out = conv_tokens(x[0], grid, weight, bias, stride)
    exact = reference.conv_tokens(x[0].double(), grid, weight.double(), bias.double(), stride)
    require_close("conv_tokens", out, convolved(0), exact)
    seen = math.prod((size - kernel) // stride * stride + kernel for size in grid)
    yield Result(
        "conv_tokens",
        f"{model}, {tokens} tokens, window {kernel}, stride {stride}",
        2 * channels * (seen + out.shape[1]) + weight.nbytes + bias.nbytes,
        timed(lambda turn: conv_tokens(x[turn], grid, weight, bias, stride), turns),
        timed(convolved, turns),
        "conv2d",
    )


def bench_prune_tokens(model: str, grid: tuple[int, int]) -> Iterator[Result]:
    x = random_tokens(model, grid)
    turns, _, tokens, channels = x.shape
    keep, scores = tokens // 4, torch.randn(turns, 1, tokens, device="cuda")
    query = torch.randn(1, channels, device="cuda", dtype=torch.bfloat16) / channels**0.5

    def gathered(turn: int, scores: torch.Tensor) -> torch.Tensor:
        indices = scores.topk(keep).indices.sort().values
        return x[turn].gather(1, indices[..., None].expand(-1, -1, channels))

    out, indices = prune_tokens(x[0], scores[0], keep)
    expected = reference.prune_tokens(x[0], scores[0], keep)
    require(torch.equal(out, expected[0]) and torch.equal(indices, expected[1]), "prune_tokens keeps other tokens")
    yield Result(
        "prune_tokens",
        f"{model}, {keep} of {tokens} tokens",
        2 * 2 * channels * keep + scores[0].nbytes + indices.nbytes,
        timed(lambda turn: prune_tokens(x[turn], scores[turn], keep), turns),
        timed(lambda turn: gathered(turn, scores[turn]), turns),
        "topk, sort, gather",
    )
    out, indices = prune_tokens(x[0], None, keep, query=query)
    exact = torch.einsum("btc,bc->bt", x[0].double(), query.double())
    lost = exact.topk(keep).values.min() - exact.gather(1, indices).min()
    require(bool(lost <= SCORE_GAP), f"prune_tokens by a query missed the best by {lost}")
    yield Result(
        "prune_tokens",
        f"{model}, {keep} of {tokens} tokens by a query",
        2 * channels * (tokens + keep) + indices.nbytes,
        timed(lambda turn: prune_tokens(x[turn], None, keep, query=query), turns),
        timed(lambda turn: gathered(turn, torch.mv(x[turn, 0], query[0])[None]), turns),
        "mv, topk, sort, gather",
    )


def bench_resample_tokens(model: str, grid: tuple[int, int], count: int = 2) -> Result:
    x = random_tokens(model, grid)
    turns, _, tokens, channels = x.shape
    heads = MODELS[model][0]
    # Weights outweigh the tokens: they are walked through, too.
    layers = math.ceil(ROTATION_BYTES / (2 * 2 * channels**2))
    weights = torch.randn(layers, 2, channels, channels, device="cuda", dtype=torch.bfloat16) / channels**0.5
    queries = torch.randn(count, heads, 128, device="cuda", dtype=torch.bfloat16)

    def resampled(turn: int) -> torch.Tensor:
        return resample_tokens(x[turn], queries, *weights[turn % layers])

    def attended(turn: int) -> torch.Tensor:
        k, v = (F.linear(x[turn], w).unflatten(2, (heads, 128)).transpose(1, 2) for w in weights[turn % layers])
        return F.scaled_dot_product_attention(queries.transpose(0, 1)[None], k, v).transpose(1, 2).flatten(2)

    out = resampled(0)
    exact = reference.resample_tokens(x[0].double(), queries.double(), *weights[0].double())
    require_close("resample_tokens", out, attended(0), exact)
    return Result(
        "resample_tokens",
        f"{model}, {count} queries of {tokens} tokens",
        x[0].nbytes + weights[0].nbytes + queries.nbytes + out.nbytes,
        timed(resampled, turns),
        timed(attended, turns),
        "keys, values, SDPA",
    )


def require(fits: bool, message: str) -> None:
    """Ends the benchmark where an op is wrong: the time of a wrong answer is of no use."""
    if not fits:
        raise SystemExit(f"bench.kernels: {message}; nothing is reported")


def main() -> None:
    """Runs everything and prints a Markdown table, then one line of JSON."""
    if not torch.cuda.is_available():
        raise SystemExit("bench.kernels: needs a CUDA device, found none")
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copies at {bandwidth / 1e12:.2f} TB/s\n")
    print("| op | shape | µs | p10 to p90 | of copy bandwidth | baseline | µs | speedup |")
    print("|---|---|--:|--:|--:|---|--:|--:|")
    results = []
    for result in measurements():
        results.append(result)
        kernel, baseline = result.kernel, result.baseline
        share = result.bytes / (kernel.median * 1e-6) / bandwidth
        print(
            f"| {result.op} | {result.shape} | {kernel.median:.1f} | {kernel.p10:.1f} to {kernel.p90:.1f} "
            f"| {share:.0%} "
            f"| {result.baseline_name} | {baseline.median:.1f} | {baseline.median / kernel.median:.2f} |",
            flush=True,
        )
    print()
    print(
        json.dumps(
            machine()
            | {"cuda": torch.version.cuda, "copy_bytes_per_second": bandwidth}
            | {"results": [asdict(result) for result in results]}
        )
    )


def measurements() -> Iterator[Result]:
    """Each result as it comes."""
    for model in MODELS:
        for context in CONTEXTS:
            for nodes in NODES:
                yield bench_tree_attention(model, context, nodes)
        yield bench_compact_kv(model)
    for nodes in NODES:
        for settings in ((0.0, 0, 1.0), (1.0, 0, 1.0), (0.8, 50, 0.9)):
            yield from bench_draws(nodes, *settings)
    for temperature in (0.0, 1.0):
        yield bench_draft_topk(8, 8, temperature)
    yield bench_reduced_topk(8, 8, VOCABULARY // 4)
    yield from bench_other_rules(64)
    for vocabulary in TAUGHT_VOCABULARIES:
        yield bench_loss("soft_cross_entropy", soft_cross_entropy, plain_cross_entropy, vocabulary)
        yield bench_loss("total_variation", total_variation, plain_variation, vocabulary)

    for model, grid in itertools.product(("7B", "13B"), TOKEN_GRIDS):
        yield from bench_grid_ops(model, grid)
        yield from bench_prune_tokens(model, grid)
        yield bench_resample_tokens(model, grid)


if __name__ == "__main__":
    main()
