"""Every public op has a twin in plain torch with the same name and signature."""

import inspect

import pytest

import specvlm_kernels
from specvlm_kernels import reference


@pytest.mark.parametrize("name", specvlm_kernels.__all__)
def test_the_reference_has_the_same_signature(name):
    op, twin = getattr(specvlm_kernels, name), getattr(reference, name)
    assert inspect.signature(op) == inspect.signature(twin)


def test_the_reference_has_nothing_else():
    assert reference.__all__ == specvlm_kernels.__all__
