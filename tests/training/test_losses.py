"""The losses: their gradients, their value on cases that can be worked out by hand."""

import torch

from specvlm.training import distillation_losses


def test_gradients_in_float64():
    torch.manual_seed(0)
    logits, teacher_logits = torch.randn(2, 2, 3, 7, dtype=torch.float64)
    features, teacher_features = 2 * torch.randn(2, 2, 3, 5, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, True]])

    def losses(draft_logits, draft_features):
        found = distillation_losses(draft_logits, draft_features, teacher_logits, teacher_features, mask)
        return found.cross_entropy, found.feature

    assert torch.autograd.gradcheck(losses, (logits.requires_grad_(), features.requires_grad_()))


def test_rows_outside_the_mask_count_for_nothing():
    torch.manual_seed(0)
    logits, teacher_logits = torch.randn(2, 4, 7)
    features, teacher_features = torch.randn(2, 4, 5)
    mask = torch.tensor([True, False, True, False])
    kept = distillation_losses(logits, features, teacher_logits, teacher_features, mask)
    spoiled_logits, spoiled_features = logits.clone(), features.clone()
    spoiled_logits[~mask] = torch.nan
    spoiled_features[~mask] = torch.inf
    spoiled = distillation_losses(spoiled_logits, spoiled_features, teacher_logits, teacher_features, mask)
    assert (kept.cross_entropy, kept.feature) == (spoiled.cross_entropy, spoiled.feature)


def test_worked_out_by_hand():
    teacher = torch.tensor([[0.0, 0.0]])
    draft = torch.tensor([[0.0, torch.log(torch.tensor(3.0))]])  # q = 1/4, 3/4; p = 1/2, 1/2
    found = distillation_losses(draft, torch.tensor([[0.5, 3.0]]), teacher, torch.zeros(1, 2), torch.tensor([True]))
    assert torch.isclose(found.cross_entropy, -torch.log(torch.tensor(3 / 16)) / 2)
    assert torch.isclose(found.feature, torch.tensor((0.125 + 2.5) / 2))
    assert found.agreement == 0


def test_no_row_at_all():
    found = distillation_losses(*torch.randn(2, 3, 4), *torch.randn(2, 3, 4), torch.zeros(3, dtype=torch.bool))
    assert (found.cross_entropy, found.feature, found.agreement) == (0, 0, 0)
