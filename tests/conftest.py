"""Tests, and the processes that they start, use one thread: on small tensors more threads wait."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("PYTHONUNBUFFERED", None)  # It mixes the lines of several processes.

import torch

torch.set_num_threads(1)

def pytest_collection_modifyitems(items):
    """Fast tests come first, otherwise the order stays."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
