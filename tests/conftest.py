"""Shared by all tests: the repository root on the path, one thread, the same seed before each."""

import os
import socket
import sys
from pathlib import Path

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # results are compared bit for bit: on the CPU everywhere
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)  # small tensors: more threads would only wait for each other


@pytest.fixture(autouse=True)
def seeded():
    """Each test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def batch():
    """Images (3, 3, 16, 16), context_idx (3, 5) and target_idx (3, 2, 4)."""
    order = torch.rand(3, 16).argsort(1)
    return torch.randn(3, 3, 16, 16), order[:, :5].sort(1).values, order[:, 5:13].view(3, 2, 4)


@pytest.fixture
def port() -> str:
    """A free port for processes to meet."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])
