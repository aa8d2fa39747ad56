"""Drafts without a model, and trees grown from them level by level."""

import torch

from specvlm.policies import Eagle2, TreePolicy
from specvlm.tree import Candidates, Growth, Plan


class RandomDraft:
    """The same children of the same path, whoever asks: log-probabilities from a coarse grid, so that many tie."""

    def __init__(self, seed: int, width: int, steps: int) -> None:
        self.seed, self.width, self.steps = seed, width, steps

    def __call__(self, path: tuple[int, ...]) -> list[tuple[int, float]]:
        generator = torch.Generator().manual_seed(hash((self.seed, path)) % 2**31)
        tokens = torch.randperm(50, generator=generator)[: self.width].tolist()
        scores = -torch.randint(0, self.steps, (self.width,), generator=generator).double() / 4
        return list(zip(tokens, scores.sort(descending=True).values.float().tolist(), strict=True))


def grow(roots: list[int], plan: Plan, drafts: list, policy: TreePolicy | None = None) -> Candidates:
    """Grows a batch level by level; a draft gives the (token, log-probability) pairs below the node that a path of
    tokens leads to."""
    policy = policy or Eagle2(plan)
    growth = Growth(torch.tensor(roots), plan)
    paths: list[list[tuple[int, ...]]] = [[()] for _ in roots]
    for level in range(plan.depth):
        grown = [[draft(path) for path in row] for draft, row in zip(drafts, paths, strict=True)]
        tokens = torch.tensor([[[t for t, _ in node] for node in row] for row in grown])
        scores = torch.tensor([[[s for _, s in node] for node in row] for row in grown])
        growth.expand(tokens, policy.admit(scores, growth.parent_scores, level + 1, plan))
        if level + 1 < plan.depth:
            beam = growth.beam()
            paths = [
                [(*row[parent], token) for token, parent in zip(*pair, strict=True)]
                for row, pair in zip(
                    paths, zip(beam.tokens.tolist(), beam.parent_rows.tolist(), strict=True), strict=True
                )
            ]
    return growth.candidates()
