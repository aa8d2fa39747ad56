"""The losses: their gradients, their value on cases that can be worked out by hand."""

import itertools
import math

import pytest
import torch

from specvlm.config import Recipe
from specvlm.targets.base import Choice
from specvlm.training import feature_loss, logit_losses
from specvlm.training.losses import choice_losses, ranking_loss

INF = math.inf
PLAIN, ALL = Recipe(), Recipe(l1_weight=0.5, ranking_weight=2.0)


def test_gradients_in_float64():
    torch.manual_seed(0)
    logits, teacher_logits = torch.randn(2, 4, 7, dtype=torch.float64)
    features, teacher_features = 2 * torch.randn(2, 4, 5, dtype=torch.float64)
    some, few = torch.tensor([1, 4, 6]), torch.randn(4, 3, dtype=torch.float64)
    shares = torch.tensor([1.0, 0.8, 0.0, 0.5], dtype=torch.float64)
    for own, vocabulary, weights in ((logits, None, None), (few, some, None), (few, some, shares)):
        given = {"vocabulary": vocabulary, "weights": weights}
        own.requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, given=given: tuple(logit_losses(x, teacher_logits, ALL, **given).parts.values()), (own,)
        )
    assert torch.autograd.gradcheck(lambda x: feature_loss(x, teacher_features), (features.requires_grad_(),))


def test_worked_out_by_hand():
    teacher = torch.tensor([[0.0, 0.0]])
    draft = torch.tensor([[0.0, torch.log(torch.tensor(3.0))]])  # q = 1/4, 3/4; p = 1/2, 1/2
    found = logit_losses(draft, teacher, PLAIN)
    assert torch.isclose(found.parts["cross_entropy"], -torch.log(torch.tensor(3 / 16)) / 2)
    assert found.agreement == 0
    assert torch.isclose(feature_loss(torch.tensor([[0.5, 3.0]]), torch.zeros(1, 2)), torch.tensor((0.125 + 2.5) / 2))


def test_a_part_of_the_vocabulary():
    teacher = torch.tensor([[5.0, 0.0, -torch.inf, 0.0], [0.0, 7.0, 0.0, 1.0]])
    draft = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    found = logit_losses(draft, teacher, PLAIN, vocabulary=torch.tensor([1, 3]))
    log_q = torch.log_softmax(draft[0], dim=0)
    p = torch.softmax(torch.tensor([7.0, 1.0]), dim=0)
    assert torch.isclose(found.parts["cross_entropy"], -(log_q.mean() + (p * log_q).sum()) / 2)
    assert found.agreement == 0.5  # the likeliest token of the first row is none that the draft has


def test_no_row_at_all():
    found = logit_losses(*torch.randn(2, 0, 4), ALL)
    assert {name: float(part) for name, part in found.parts.items()} == {"cross_entropy": 0, "l1": 0, "ranking": 0}
    assert found.agreement == 0
    assert feature_loss(*torch.randn(2, 0, 4)) == 0


def test_the_cross_entropy_takes_a_reduced_vocabulary():
    """Once 0 * -inf made the loss NaN."""
    teacher = torch.tensor([[1.0, -INF, 0.0]])
    draft = torch.tensor([[0.0, -INF, 0.0]], requires_grad=True)
    cross_entropy = logit_losses(draft, teacher, PLAIN).parts["cross_entropy"]
    cross_entropy.backward()
    assert math.isclose(cross_entropy.detach(), math.log(2), rel_tol=1e-6)
    torch.testing.assert_close(draft.grad, torch.tensor([[0.5, 0, 0.5]]) - teacher.softmax(-1))


def test_only_the_draft_learns_from_logits():
    logits, teacher_logits = torch.randn(2, 3, 7).requires_grad_().unbind()
    teacher_logits.retain_grad()
    losses = logit_losses(logits, teacher_logits, ALL)
    losses.weighed(ALL).backward()
    assert teacher_logits.grad is None
    assert not losses.agreement.requires_grad


def test_ranking_gradients_in_float64():
    logits, teacher_logits = torch.randn(2, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    teacher_logits[1, :7] = -INF
    for k in (1, 2, 5, 9):
        assert torch.autograd.gradcheck(ranking_loss, (logits.requires_grad_(), teacher_logits, k))


def test_ranking_is_the_probability_of_an_order():
    """Over all the orders that a teacher may have, the probabilities that the losses stand for sum to 1."""
    draft = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0])
    probabilities = []
    for order in itertools.permutations(range(4)):
        teacher = torch.full((5,), -9.0)
        teacher[list(order)] = torch.tensor([4.0, 3.0, 2.0, 1.0])
        loss = float(ranking_loss(draft[None], teacher[None], 4))
        weights = draft[list(order)].exp().tolist()
        assert math.isclose(math.exp(-loss), math.prod(weights[i] / sum(weights[i:]) for i in range(4)), rel_tol=1e-5)
        probabilities.append(math.exp(-loss))
    assert math.isclose(sum(probabilities), 1, rel_tol=1e-5)


@pytest.mark.parametrize(
    ("draft", "teacher", "k", "loss"),
    [
        ([0.0, 0.0, 0.0], [3.0, 2.0, 1.0], 3, math.log(3) + math.log(2)),
        ([0.0, 0.0, 7.0], [3.0, 2.0, 1.0], 2, math.log(2)),  # the rest does not matter
        ([5.0, 0.0, 7.0], [3.0, 2.0, 1.0], 1, 0.0),
        ([0.0, 0.0, 9.0], [3.0, 2.0, -INF], 3, math.log(2)),  # what the teacher lacks does not count
        ([0.0, 0.0, -INF], [3.0, 2.0, -INF], 3, math.log(2)),
        ([-INF, -INF, -INF], [3.0, -INF, -INF], 2, INF),
        ([0.0, 0.0, -INF], [3.0, 2.0, 1.0], 3, INF),
        ([-INF, 0.0, 0.0], [3.0, 2.0, 1.0], 2, INF),
        ([0.0, 500.0, 0.0], [3.0, 2.0, 1.0], 2, 500.0),
    ],
)
def test_ranking_worked_out_by_hand(draft, teacher, k, loss):
    logits = torch.tensor([draft, [0.0, 0.0, 0.0]], requires_grad=True)
    found = ranking_loss(logits, torch.tensor([teacher, [1.0, 2.0, 3.0]]), k)
    torch.testing.assert_close(found[0].detach(), torch.tensor(loss))
    found.sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[1].any() == (k > 1)


def test_ranking_keeps_the_dtype_and_takes_no_rows():
    for dtype, wide in (
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ):
        logits = torch.zeros(2, 5, dtype=dtype, requires_grad=True)
        loss = ranking_loss(logits, torch.randn(2, 5), 3)
        loss.sum().backward()
        assert (loss.dtype, logits.grad.dtype) == (wide, dtype)
    assert ranking_loss(torch.zeros(0, 5), torch.zeros(0, 5), 3).shape == (0,)


@pytest.mark.parametrize(
    ("k", "vocabulary", "error", "message"),
    [
        (0, 5, ValueError, "^k: expected an integer from 1 to 5, got 0"),
        (6, 5, ValueError, "^k: expected an integer from 1 to 5, got 6"),
        (2.0, 5, TypeError, "^k: expected an integer, got 2.0"),
        (2, 4, ValueError, r"^teacher_logits: expected shape \[2, 5\], got \[2, 4\]"),
    ],
)
def test_ranking_refuses(k, vocabulary, error, message):
    with pytest.raises(error, match=message):
        ranking_loss(torch.zeros(2, 5), torch.zeros(2, vocabulary), k)


def test_parts_are_weighed_by_the_recipe():
    logits, teacher_logits = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(0))
    found = logit_losses(logits, teacher_logits, ALL)
    p, q = teacher_logits.softmax(-1), logits.softmax(-1)
    torch.testing.assert_close(found.parts["l1"], (p - q).abs().sum(-1).mean())
    torch.testing.assert_close(found.parts["ranking"], ranking_loss(logits, teacher_logits, 10).mean())
    expected = 0.1 * found.parts["cross_entropy"] + 0.5 * found.parts["l1"] + 2 * found.parts["ranking"]
    torch.testing.assert_close(found.weighed(ALL), expected)
    assert set(logit_losses(logits, teacher_logits, PLAIN).parts) == {"cross_entropy"}


def test_a_gates_losses():
    rows = torch.tensor([1.0, 0.25])
    even = Choice(("all", "pool 4"), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]), rows)
    found = choice_losses(even).parts
    assert (float(found["balance"]), float(found["rows"])) == (0, 0.625)
    always = Choice(even.options, torch.tensor([[0.0, 1.0]] * 2), torch.tensor([1, 1]), rows)
    torch.testing.assert_close(choice_losses(always).parts["balance"], torch.tensor(math.log(2)))
    assert float(choice_losses(always).parts["rows"]) == 0.25
    probabilities = torch.tensor([[0.2, 0.8], [0.5, 0.5]], dtype=torch.float64, requires_grad=True)

    def losses(given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(choice_losses(Choice(even.options, given, even.picked, rows.double())).parts.values())

    assert torch.autograd.gradcheck(losses, probabilities)
