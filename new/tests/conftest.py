"""Shared by all tests: the repository root on the path, one thread, the same seed before each."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)  # small tensors: more threads would only wait for each other


@pytest.fixture(autouse=True)
def seeded():
    """Each test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)
