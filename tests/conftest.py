"""Tests, and the processes that they start, use one thread: on small tensors more threads wait."""

import os
import random

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("PYTHONUNBUFFERED", None)  # It mixes the lines of several processes.

import numpy as np
import pytest
import torch

torch.set_num_threads(1)

@pytest.fixture(autouse=True)
def seeds():
    """A test has the same random numbers alone, after other tests, and in any process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)

def pytest_collection_modifyitems(items):
    """Fast tests come first, otherwise the order stays."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
