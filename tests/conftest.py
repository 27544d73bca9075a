"""Tests, and the processes that they start, use one thread: on small tensors more threads wait."""

import os
import pickle
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


@pytest.fixture
def jobs_here(monkeypatch):
    """Jobs of run_or_continue run in this process, where stubs work, but are sent by pickle."""
    def run_in_processes(experiment, jobs, args, keep):
        for job in jobs:
            function, arguments = pickle.loads(pickle.dumps((experiment, (*job, args))))
            keep(job, pickle.loads(pickle.dumps(function(*arguments))), 0.0)
    monkeypatch.setattr("support.results.run_in_processes", run_in_processes)


@pytest.fixture
def coarse_figures(monkeypatch):
    """Figures have half as many pixels per side, which takes half of the time."""
    from support.figures import Figure
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *place, dpi, **options: savefig(
        figure, *place, dpi=dpi / 2, **options))
