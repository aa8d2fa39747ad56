"""Draws, acceptance and proposals: logits of a whole tree, read once, against plain torch."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from bench.kernels.attention import random_parents
from bench.kernels.registry import Call, Case, Place, Problem, require
from specvlm_kernels import Accepted, accept, accept_ratio, accept_typical, accept_within, draft_topk, draw, reference
from specvlm_kernels.reference.acceptance import perturbed

#: LLaVA-1.5's vocabulary without padding, and Qwen2.5-VL-7B's.
VOCABULARIES = (32000, 152064)
#: temperature, top_k, top_p
SETTINGS = ((0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, 0, 0.9), (0.8, 50, 0.9))
NODES = (1, 64)

#: The rules beside `accept`, and how many sets of logits they read.
RULES = {"accept_ratio": 2, "accept_typical": 1, "accept_within": 1}
RADIUS = 9

#: How far scores may be off; proposed tokens are compared where scores lie further apart.
SCORE_GAP = 1e-3


def draw_cases() -> Iterator[Case]:
    """One node and 64 under every setting; a large vocabulary; the other rules of acceptance; proposals of 8 nodes."""
    for vocabulary in VOCABULARIES:
        for nodes in NODES if vocabulary == VOCABULARIES[0] else NODES[1:]:
            for settings in SETTINGS:
                yield draw_case("draw", nodes, vocabulary, *settings)
                yield draw_case("accept", nodes, vocabulary, *settings)
    for op in RULES:
        yield rule_case(op, 64, VOCABULARIES[0])
    for temperature in (0.0, 1.0):
        yield topk_case(8, 8, VOCABULARIES[0], temperature)
    yield reduced_topk_case(8, 8, VOCABULARIES[0] // 4, VOCABULARIES[0])


def draw_case(op: str, nodes: int, vocabulary: int, temperature: float, top_k: int, top_p: float) -> Case:
    settings = f"temperature {temperature:g}, top_k {top_k}, top_p {top_p:g}"
    return Case(
        op,
        f"{nodes} node{'s' * (nodes > 1)}, V {vocabulary}, {settings}",
        2 * nodes * vocabulary,
        lambda place: draw_problem(place, op, nodes, vocabulary, temperature, top_k, top_p),
        facts={"nodes": nodes, "vocabulary": vocabulary, "temperature": temperature, "top_k": top_k, "top_p": top_p},
    )


def draw_problem(
    place: Place, op: str, nodes: int, vocabulary: int, temperature: float, top_k: int, top_p: float
) -> Problem:
    turns = place.turns(2 * nodes * vocabulary)
    logits = 3 * place.randn(turns, 1, nodes, vocabulary)
    positions, parents = place.int32([range(600, 600 + nodes)]), place.int32([random_parents(nodes)])
    seed = torch.tensor([7], device=place.device)
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    # Every node is its parent's draw, so there is a path to walk.
    above = parents.clamp(min=0).long()

    def drawn_along(batch: torch.Tensor) -> torch.Tensor:
        return draw(batch, positions, **options).gather(1, above)

    tokens = [drawn_along(batch) for batch in logits] if op == "accept" else []

    def check_draw() -> None:
        found = draw(logits[0], positions, **options)
        noisy = perturbed(logits[0].float(), positions, temperature, top_k, top_p, seed if temperature else None)
        lost = noisy.amax(-1) - noisy.gather(-1, found[..., None])[..., 0]
        require((lost <= 1e-4).all(), f"draw missed the best by {lost.max():.3g}")

    def check_accept() -> None:
        """The reference walks along the same draws."""
        check_draw()
        found = F.one_hot(draw(logits[0], positions, **options), vocabulary).float()
        walk = accept(logits[0], tokens[0], parents, positions, **options)
        expected = reference.accept(found, tokens[0], parents, positions)
        for name in ("path", "length", "next_token"):
            require(torch.equal(getattr(walk, name), getattr(expected, name)), f"accept is wrong in {name}")
        require(nodes == 1 or bool((walk.length > 0).all()), "accept had no path to walk")

    def plain(x: torch.Tensor) -> torch.Tensor:
        if not temperature:
            return x.argmax(-1)
        z = x.float() / temperature
        if top_k:
            z = z.masked_fill(z < z.topk(top_k).values[..., -1:], -math.inf)
        if top_p < 1:
            ordered, ids = z.sort(dim=-1)
            cut = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
            z = z.masked_fill(torch.zeros_like(cut).scatter(-1, ids, cut), -math.inf)
        p = z.softmax(-1)
        return (p / torch.empty_like(p).exponential_()).argmax(-1)

    def compiled() -> Call:
        fast = place.compiled(plain, dynamic=False)
        return lambda turn: fast(logits[turn])

    note = ", draws alone" if op == "accept" else ""
    baselines = {f"torch{note}": lambda: lambda turn: plain(logits[turn]), f"torch.compile{note}": compiled}
    if op == "draw":
        return Problem(check_draw, lambda i: draw(logits[i], positions, **options), turns, baselines)
    return Problem(
        check_accept, lambda i: accept(logits[i], tokens[i], parents, positions, **options), turns, baselines
    )


def rule_case(op: str, nodes: int, vocabulary: int) -> Case:
    return Case(
        op,
        f"{nodes} nodes, V {vocabulary}, temperature 1",
        2 * RULES[op] * nodes * vocabulary,
        lambda place: rule_problem(place, op, nodes, vocabulary),
        facts={"nodes": nodes, "vocabulary": vocabulary, "temperature": 1.0},
    )


def rule_problem(place: Place, op: str, nodes: int, vocabulary: int) -> Problem:
    """Against `accept` on the same tree."""
    turns = place.turns(2 * RULES[op] * nodes * vocabulary)
    logits, drafts = (3 * place.randn(turns, 1, nodes, vocabulary) for _ in range(2))
    tokens = torch.randint(vocabulary, (1, nodes), device=place.device)
    tree = tokens, place.int32([random_parents(nodes)]), place.int32([range(600, 600 + nodes)])
    options: dict[str, Any] = {"temperature": 1.0, "seed": torch.tensor([7], device=place.device)}

    def by(rule: Callable[..., Accepted], turn: int) -> Accepted:
        first = (logits[turn], drafts[turn]) if op == "accept_ratio" else (logits[turn],)
        return rule(*first, *tree, *((RADIUS,) if op == "accept_within" else ()), **options)

    def run(turn: int) -> Accepted:
        rules = {"accept_ratio": accept_ratio, "accept_typical": accept_typical, "accept_within": accept_within}
        return by(rules[op], turn)

    def check() -> None:
        walk, expected = run(0), by(getattr(reference, op), 0)
        for name in ("path", "length", "next_token"):
            require(torch.equal(getattr(walk, name), getattr(expected, name)), f"{op} is wrong in {name}")

    return Problem(
        check,
        run,
        turns,
        {"accept": lambda: lambda turn: accept(logits[turn], *tree, **options)},
    )


def reduced_topk_case(nodes: int, k: int, ids: int, vocabulary: int) -> Case:
    return Case(
        "draft_topk",
        f"{nodes} nodes, k {k}, {ids} of V {vocabulary}, temperature 1",
        2 * nodes * ids + 8 * ids,
        lambda place: reduced_topk_problem(place, nodes, k, ids, vocabulary),
        facts={"nodes": nodes, "vocabulary": ids, "temperature": 1.0},
    )


def reduced_topk_problem(place: Place, nodes: int, k: int, ids: int, vocabulary: int) -> Problem:
    """Against logits that are spread over the whole vocabulary first."""
    turns = place.turns(2 * nodes * ids)
    logits = 3 * place.randn(turns, 1, nodes, ids)
    positions = place.int32([range(600, 600 + nodes)])
    known = torch.randperm(vocabulary, device=place.device)[:ids].sort().values
    options: dict[str, Any] = {"temperature": 1.0, "seed": torch.tensor([7], device=place.device)}

    def run(turn: int) -> tuple[torch.Tensor, torch.Tensor]:
        return draft_topk(logits[turn], k, positions, vocabulary=known, **options)

    def whole(turn: int) -> torch.Tensor:
        return logits.new_full((1, nodes, vocabulary), -math.inf).index_copy_(-1, known, logits[turn])

    def spread(turn: int) -> tuple[torch.Tensor, torch.Tensor]:
        return draft_topk(whole(turn), k, positions, **options)

    def check() -> None:
        tokens, scores = run(0)
        expected, exact = reference.draft_topk(whole(0), k, positions, **options)
        require(torch.equal(tokens, expected), "draft_topk of a reduced vocabulary proposes other tokens")
        require((scores - exact).abs().max() <= SCORE_GAP, "draft_topk scores of a reduced vocabulary are off")

    return Problem(check, run, turns, {"spread, draft_topk": lambda: spread})


def topk_case(nodes: int, k: int, vocabulary: int, temperature: float) -> Case:
    return Case(
        "draft_topk",
        f"{nodes} nodes, k {k}, V {vocabulary}, temperature {temperature:g}",
        2 * nodes * vocabulary,
        lambda place: topk_problem(place, nodes, k, vocabulary, temperature),
        facts={"nodes": nodes, "vocabulary": vocabulary, "temperature": temperature},
    )


def topk_problem(place: Place, nodes: int, k: int, vocabulary: int, temperature: float) -> Problem:
    turns = place.turns(2 * nodes * vocabulary)
    logits = 3 * place.randn(turns, 1, nodes, vocabulary)
    positions = place.int32([range(600, 600 + nodes)])
    options: dict[str, Any] = {"temperature": temperature, "seed": torch.tensor([7], device=place.device)}

    def check() -> None:
        tokens, scores = draft_topk(logits[0], k, positions, **options)
        best, exact = reference.draft_topk(logits[0], k + 1, positions, **options)
        require((scores - exact[..., :k]).abs().max() <= SCORE_GAP, "draft_topk scores are off")
        wide = exact[..., :-1] - exact[..., 1:] > SCORE_GAP  # after each of the k
        clear = wide & F.pad(wide[..., :-1], (1, 0), value=True)
        require((tokens == best[..., :k])[clear].all(), "draft_topk proposes other tokens")

    def plain(x: torch.Tensor) -> Any:
        return x.float().log_softmax(-1).topk(k)

    def compiled() -> Call:
        fast = place.compiled(plain, dynamic=False)
        return lambda turn: fast(logits[turn])

    return Problem(
        check,
        lambda turn: draft_topk(logits[turn], k, positions, **options),
        turns,
        {"log_softmax, topk": lambda: lambda turn: plain(logits[turn])},
        {"torch.compile": compiled},
    )
