"""Two real processes over gloo against one process on the joined batch: losses, gradients, BatchNorm statistics.

The prior is skewed and the ranks' data differ, so a p_bar (or a BatchNorm, or a Sinkhorn) of one rank alone shows."""

import os

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import pmsn

WORLD_SIZE, BATCH, VIEWS = 2, 4, 2  # BATCH: images over all ranks
LOSS_OPTIONS = {"temperature": 0.2, "sinkhorn_iterations": 2, "weight": 3.0}
PRIOR = torch.tensor([0.55, 0.2, 0.12, 0.08, 0.05], dtype=torch.float64)

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch with gloo")


def of_rank(x, rank):
    """The share of `rank` in (M * BATCH, ...) in view-major order: its images in each view."""
    return x.unflatten(0, (-1, BATCH)).chunk(WORLD_SIZE, dim=1)[rank].flatten(0, 1)


def embeddings():
    """anchors (VIEWS * BATCH, d), targets (BATCH, d), prototypes (K, d); rank 1 leans to prototype 0."""
    generator = torch.Generator().manual_seed(0)
    anchors, targets, prototypes = (torch.randn(n, 6, generator=generator, dtype=torch.float64)
                                    for n in (VIEWS * BATCH, BATCH, len(PRIOR)))
    anchors.view(VIEWS, BATCH, 6)[:, BATCH // 2 :] += 3 * prototypes[0]
    targets[BATCH // 2 :] += prototypes[0]
    return anchors, targets, prototypes


def model_and_views():
    """A small PMSN in float64 with its BatchNorm head, and its views; the second rank's images are brighter."""
    torch.manual_seed(0)
    encoder = pmsn.VisionTransformer(image_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2)
    head = pmsn.projection_head(8, hidden_dim=10, output_dim=6)
    model = pmsn.PMSN(encoder, PRIOR, head=head, output_dim=6, patch_drop=0.0, **LOSS_OPTIONS).double()
    views = [torch.randn(n * BATCH, 3, size, size, dtype=torch.float64) for n, size in ((1, 16), (1, 16), (2, 8))]
    for view in views:
        view.unflatten(0, (-1, BATCH))[:, BATCH // 2 :] += 1
    return model, views


def loss_step(rank):
    """pmsn_loss on the data of `rank` (None: the joined batch): loss, gradients of anchors and of prototypes."""
    anchors, targets, prototypes = embeddings()
    if rank is not None:
        anchors, targets = of_rank(anchors, rank), of_rank(targets, rank)
    anchors, prototypes = anchors.clone().requires_grad_(), prototypes.requires_grad_()
    loss, terms = pmsn.pmsn_loss(anchors, targets, prototypes, PRIOR, **LOSS_OPTIONS)
    loss.backward()
    return {"loss": loss.detach(), "terms": terms, "anchors": anchors.grad, "prototypes": prototypes.grad}


def model_steps(rank, steps=2):
    """`steps` SGD steps of the module: losses, the first step's gradients, and the state afterwards."""
    model, views = model_and_views()
    wrapped = model if rank is None else DistributedDataParallel(model)
    if rank is not None:
        views = [of_rank(view, rank) for view in views]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses, gradients = [], None
    for _ in range(steps):
        optimizer.zero_grad()
        loss, _ = wrapped(views)
        loss.backward()
        gradients = gradients or {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        model.update_target(0.9)
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), "gradients": gradients, "state": dict(model.state_dict())}


def worker(rank, folder):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE)
    torch.save({"loss": loss_step(rank), "model": model_steps(rank)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two processes computed."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    torch.multiprocessing.spawn(worker, args=(folder,), nprocs=WORLD_SIZE)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(WORLD_SIZE)]


def test_loss_of_two_processes_is_that_of_the_joined_batch(ranks):
    """The ranks' losses and prototype gradients averaged, as DDP does; each rank's anchors get its part times W."""
    joined, parts = loss_step(None), [rank["loss"] for rank in ranks]
    close = {"atol": 1e-10, "rtol": 1e-10}
    torch.testing.assert_close(sum(part["loss"] for part in parts) / WORLD_SIZE, joined["loss"], **close)
    torch.testing.assert_close(sum(part["prototypes"] for part in parts) / WORLD_SIZE, joined["prototypes"], **close)
    for rank, part in enumerate(parts):
        torch.testing.assert_close(part["anchors"] / WORLD_SIZE, of_rank(joined["anchors"], rank), **close)
        for term in ("prior_kl", "mean_prediction", "effective_prototypes"):  # of all ranks
            torch.testing.assert_close(part["terms"][term], joined["terms"][term], **close)
    assert (parts[0]["loss"] - parts[1]["loss"]).abs() > 1e-3  # the ranks' cross-entropies do differ


def test_module_under_ddp_is_the_module_on_the_joined_batch(ranks):
    """Two SGD steps: losses, gradients (prototypes included), then parameters, target branch, running statistics."""
    joined, parts = model_steps(None), [rank["model"] for rank in ranks]
    close = {"atol": 1e-7, "rtol": 1e-6}  # position embeddings are interpolated in float32
    torch.testing.assert_close(sum(part["losses"] for part in parts) / WORLD_SIZE, joined["losses"], **close)
    assert {"prototypes", "encoder.cls_token", "head.bn1.weight"} <= joined["gradients"].keys()
    assert joined["gradients"]["prototypes"].abs().max() > 1e-3
    for part in parts:
        assert part["gradients"].keys() == joined["gradients"].keys()
        for name, gradient in joined["gradients"].items():
            torch.testing.assert_close(part["gradients"][name], gradient, **close, msg=lambda m, n=name: f"{n}: {m}")
        for name, value in joined["state"].items():
            torch.testing.assert_close(part["state"][name], value, **close, msg=lambda m, n=name: f"{n}: {m}")
    assert (joined["state"]["head.bn1.running_mean"]).abs().max() > 1e-3
