"""What drafts that grow trees share: steps that were not read yet."""

import torch

from specvlm.drafts.growing import merged
from specvlm.state import Step


def step(first: int, width: int, count: int) -> Step:
    """`width` tokens from `first` on, each with itself as its feature, of which `count` are said."""
    tokens = torch.arange(first, first + width)[None]
    return Step(tokens, tokens[..., None].float(), torch.tensor([count], dtype=torch.int32))


def test_runs_of_single_tokens_become_one_step_and_others_stand_alone():
    steps = [step(10, 3, 2), step(20, 1, 1), step(30, 1, 1), step(40, 4, 3), step(50, 1, 1)]
    found = merged(steps)
    assert [one.tokens.tolist() for one in found] == [[[10, 11, 12]], [[20, 30]], [[40, 41, 42, 43]], [[50]]]
    assert [one.count.tolist() for one in found] == [[2], [2], [3], [1]]
    assert all(torch.equal(one.features[..., 0], one.tokens.float()) for one in found)
    assert {one.count.dtype for one in found} == {torch.int32}
