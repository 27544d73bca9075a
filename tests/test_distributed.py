"""pmsn.py with two real processes against one process that has the whole batch, in float64.

The prior is skewed and the processes have different data, so a mean over one process alone shows.
The head has no BatchNorm, because nn.SyncBatchNorm does not run on CPUs.
"""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import pmsn
from support.runs import rank
from test_pmsn import close, random_inputs
from test_runs import together

WORLD_SIZE, BATCH = 2, 4  # BATCH counts the images of both processes.
OPTIONS = {"temperature": 0.2, "sinkhorn_iterations": 2, "prior_weight": 3.0}
PRIOR = torch.tensor([0.55, 0.2, 0.12, 0.08, 0.05], dtype=torch.float64)


def train_two_steps(rank):
    """A small PMSN: the losses of both steps, terms, gradients and parameters after them."""
    torch.manual_seed(0)
    encoder = pmsn.VisionTransformer(image_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2)
    head = nn.Sequential(nn.Linear(8, 10), nn.GELU(), nn.Linear(10, 6))
    model = pmsn.PMSN(encoder, PRIOR, head=head, output_dim=6, patch_drop=0).double()
    views = []
    for count, size in ((1, 16), (1, 16), (2, 8)):
        view = torch.randn(count, BATCH, 3, size, size).double()
        view[:, BATCH // 2 :] += 1  # The second half of the images is brighter.
        share = view if rank is None else view.chunk(WORLD_SIZE, dim=1)[rank]
        views.append(share.flatten(0, 1))  # view-major
    network = model if rank is None else DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss, terms = network(views, **OPTIONS)
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        model.update_target(0.9)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"losses": torch.stack(losses), "terms": terms, "gradients": gradients,
            "state": model.state_dict()}


def loss_in_any_order(rank):
    """The loss of a batch, or of one half of it, and the prior in the order that it takes."""
    anchors, targets, prototypes = random_inputs(views=1, batch=10)
    if rank is not None:
        anchors, targets = anchors.chunk(WORLD_SIZE)[rank], targets.chunk(WORLD_SIZE)[rank]
    loss, terms = pmsn.pmsn_loss(anchors, targets, prototypes, PRIOR, any_order=True,
                                 relative_sharpening=True, sinkhorn_iterations=2)
    alone = pmsn.log_predictions(anchors, prototypes, 0.1).exp().mean(dim=0)
    return {"loss": loss, "prior_kl": terms["prior_kl"], "order": alone.argsort()}


@pytest.fixture(scope="module")
def found():
    """What each process has trained, and its loss in any order."""
    return together(WORLD_SIZE, lambda: {**train_two_steps(rank()),
                                         "any_order": loss_in_any_order(rank())})


def test_training_with_two_processes_is_training_with_the_whole_batch(found):
    """DDP averages gradients, and here the average must be exact (up to float32 positions)."""
    whole = train_two_steps(None)
    close((found[0]["losses"] + found[1]["losses"]) / 2, whole["losses"], 1e-7)
    assert (found[0]["losses"] - found[1]["losses"]).abs().min() > 1e-3  # They do differ.
    assert whole["gradients"]["prototypes"].abs().max() > 1e-3
    for model in found:
        for part in ("gradients", "state"):
            assert model[part].keys() == whole[part].keys()
            for name, value in whole[part].items():
                close(model[part][name], value, 1e-7)
        for name in ("prior_kl", "mean_prediction", "effective_prototypes"):
            close(model["terms"][name], whole["terms"][name], 1e-6)


def test_the_order_of_the_prior_is_the_one_of_the_whole_batch(found):
    whole, (first, second) = loss_in_any_order(None), (model["any_order"] for model in found)
    close((first["loss"] + second["loss"]) / 2, whole["loss"], 1e-12)
    for half in (first, second):
        close(half["prior_kl"], whole["prior_kl"], 1e-12)
        assert not torch.equal(half["order"], whole["order"])  # alone it would take another one
