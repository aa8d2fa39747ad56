"""The poison that kernel tests give to what an op allocates reaches everything that it returns."""

from unittest import mock

import pytest
import torch

import specvlm_kernels
from specvlm.doctor import CASES, _tensors
from specvlm_kernels.ancestors import _pack_ancestors_kernel
from tests.kernels.watch import WILD, launched


@pytest.mark.interpreter
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_what_a_kernel_leaves_unwritten_shows(case):
    """Here no kernel runs at all."""
    with launched(), mock.patch.object(type(_pack_ancestors_kernel), "run", return_value=None):
        returned = _tensors(getattr(specvlm_kernels, case.op)(**case.arguments(torch.float32)))
    for one in returned:
        assert bool((one.isnan() if one.is_floating_point() else one == WILD).all())
