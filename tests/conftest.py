"""Which tests a process can run: Triton's interpreter is chosen when the process starts, a GPU is there or not."""

import os

import pytest
import torch

# Tests run several at a time, and tiny models gain nothing from a second thread.
torch.set_num_threads(1)

# What is held to float32, token for token, is float32 on a GPU, too.
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips, with its reason, what this process cannot run; `make test` starts one process for each kind."""
    for item in items:
        wants_interpreter = item.get_closest_marker("interpreter") is not None
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif wants_interpreter != INTERPRETED and not item.get_closest_marker("gpu"):
            reason = "needs TRITON_INTERPRET=1" if wants_interpreter else "cannot run under TRITON_INTERPRET=1"
            item.add_marker(pytest.mark.skip(reason=reason))
