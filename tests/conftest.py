"""Tests, and the processes that they start, use one thread: on small tensors more threads wait."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
