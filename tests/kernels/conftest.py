"""The devices a kernel test runs on: the CPU through Triton's interpreter, and a GPU."""

import pytest


@pytest.fixture(
    scope="session",
    params=[pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)],
)
def device(request: pytest.FixtureRequest) -> str:
    """Where the kernel under test runs; never where it would be the reference."""
    return request.param
