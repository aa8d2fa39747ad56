"""The losses: their gradients, their value on cases that can be worked out by hand."""

import torch

from specvlm.training import feature_loss, logit_losses


def test_gradients_in_float64():
    torch.manual_seed(0)
    logits, teacher_logits = torch.randn(2, 4, 7, dtype=torch.float64)
    features, teacher_features = 2 * torch.randn(2, 4, 5, dtype=torch.float64)
    some, few = torch.tensor([1, 4, 6]), torch.randn(4, 3, dtype=torch.float64)
    for own, vocabulary in ((logits, None), (few, some)):
        own.requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, ids=vocabulary: logit_losses(x, teacher_logits, ids).cross_entropy, (own,)
        )
    assert torch.autograd.gradcheck(lambda x: feature_loss(x, teacher_features), (features.requires_grad_(),))


def test_worked_out_by_hand():
    teacher = torch.tensor([[0.0, 0.0]])
    draft = torch.tensor([[0.0, torch.log(torch.tensor(3.0))]])  # q = 1/4, 3/4; p = 1/2, 1/2
    found = logit_losses(draft, teacher)
    assert torch.isclose(found.cross_entropy, -torch.log(torch.tensor(3 / 16)) / 2)
    assert (found.agreement, found.feature) == (0, 0)
    assert torch.isclose(feature_loss(torch.tensor([[0.5, 3.0]]), torch.zeros(1, 2)), torch.tensor((0.125 + 2.5) / 2))


def test_a_part_of_the_vocabulary():
    teacher = torch.tensor([[5.0, 0.0, -torch.inf, 0.0], [0.0, 7.0, 0.0, 1.0]])
    draft = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    found = logit_losses(draft, teacher, torch.tensor([1, 3]))
    log_q = torch.log_softmax(draft[0], dim=0)
    p = torch.softmax(torch.tensor([7.0, 1.0]), dim=0)
    assert torch.isclose(found.cross_entropy, -(log_q.mean() + (p * log_q).sum()) / 2)
    assert found.agreement == 0.5  # the likeliest token of the first row is none that the draft has


def test_no_row_at_all():
    found = logit_losses(*torch.randn(2, 0, 4))
    assert (found.cross_entropy, found.feature, found.agreement) == (0, 0, 0)
    assert feature_loss(*torch.randn(2, 0, 4)) == 0
