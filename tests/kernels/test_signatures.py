"""Every public op has a twin in plain torch with the same name and signature."""

import inspect

import pytest

import specvlm_kernels
from specvlm_kernels import noise, reference

OPS = [(specvlm_kernels, reference, name) for name in specvlm_kernels.__all__]
NOISE = [(noise, reference.noise, name) for name in ("philox_integers", "race_noise")]


@pytest.mark.parametrize(("ops", "twins", "name"), OPS + NOISE, ids=lambda x: x if isinstance(x, str) else "")
def test_the_reference_has_the_same_signature(ops, twins, name):
    op, twin = getattr(ops, name), getattr(twins, name)
    assert inspect.signature(op) == inspect.signature(twin)


def test_the_reference_has_nothing_else():
    assert reference.__all__ == specvlm_kernels.__all__
