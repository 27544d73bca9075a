"""The PMSN module: who gets a gradient, who is a copy of whom, what moves when."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import pmsn


def small_encoder():
    """A linear encoder with BatchNorm: running statistics in encoder and head."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 6), nn.BatchNorm1d(6), nn.GELU())
    encoder.embed_dim = 6
    return encoder


def small_pmsn(seed=0, **options):
    torch.manual_seed(seed)
    head = pmsn.projection_head(6, hidden_dim=7, output_dim=5)
    options = {"patch_drop": 0.0, **options}
    return pmsn.PMSN(small_encoder(), pmsn.power_law_prior(4, 1.0), head=head, output_dim=5, **options).double()


def random_views(batch=6, seed=0, count=2):
    """Target view, one masked anchor view, `count` unmasked anchor views: one entry per forward pass."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n * batch, 3, 4, 4, generator=generator, dtype=torch.float64) for n in (1, 1, count)]


def state(*modules):
    """Every floating-point parameter and buffer as NumPy arrays."""
    return [v.detach().numpy().copy() for m in modules for v in m.state_dict().values() if v.is_floating_point()]


@pytest.mark.parametrize("entries", [2, 3])
def test_gradients_reach_the_anchor_branch_and_the_prototypes_only(entries):
    """From the masked anchors alone, and with unmasked ones."""
    model = small_pmsn()
    loss, _ = model(random_views()[:entries])
    loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("target"):
            assert not parameter.requires_grad and parameter.grad is None, name
        else:
            # BatchNorm takes the mean off: a bias before it gets a gradient of 0 up to rounding
            before_norm = name in ("encoder.1.bias", "head.fc1.bias", "head.fc2.bias")
            assert before_norm or parameter.grad.abs().max() > 1e-6, name


def test_target_shares_no_memory_with_the_anchor_branch():
    model = small_pmsn()
    anchors = [*model.encoder.state_dict().values(), *model.head.state_dict().values()]
    targets = [*model.target_encoder.state_dict().values(), *model.target_head.state_dict().values()]
    assert len(anchors) == len(targets) > 0
    for anchor, target in zip(anchors, targets):
        assert torch.equal(anchor, target)  # a copy at first
    assert not {x.untyped_storage().data_ptr() for x in anchors} & {x.untyped_storage().data_ptr() for x in targets}
    before = state(model.target_encoder, model.target_head)
    with torch.no_grad():
        for tensor in anchors:
            tensor.add_(1)
    for old, new in zip(before, state(model.target_encoder, model.target_head)):
        np.testing.assert_array_equal(old, new)


def test_target_follows_the_exact_moving_average():
    """target <- m target + (1 - m) anchor in NumPy over several steps of training, BatchNorm statistics included."""
    model = small_pmsn()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    expected = state(model.target_encoder, model.target_head)
    start = [x.copy() for x in expected]
    for step, momentum in enumerate([0.9, 0.5, 0.99, 0.0, 0.7]):
        loss, _ = model(random_views(seed=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target(momentum)
        for old, new in zip(expected, state(model.encoder, model.head)):
            old *= momentum
            old += (1 - momentum) * new
        for old, new in zip(expected, state(model.target_encoder, model.target_head)):
            np.testing.assert_allclose(new, old, atol=1e-12)
    assert all(np.abs(a - b).max() > 0 for a, b in zip(start, expected))  # all of it moved
    norms = [(model.encoder[2], model.target_encoder[2]), (model.head.bn1, model.target_head.bn1)]
    for anchor, target in norms:
        assert anchor.num_batches_tracked == 5 * 2 and anchor.momentum > 0 and target.running_var.min() > 0


def test_target_forwards_do_not_move_running_statistics():
    """Forward passes move the anchor branch's statistics, the target's wait for update_target; also in the encoder."""
    model = small_pmsn()
    target, anchor = state(model.target_encoder, model.target_head), state(model.encoder, model.head)
    for seed in range(3):
        model(random_views(seed=seed))
    for old, new in zip(target, state(model.target_encoder, model.target_head)):
        np.testing.assert_array_equal(old, new)
    assert any(np.abs(old - new).max() > 1e-3 for old, new in zip(anchor, state(model.encoder, model.head)))


def test_running_statistics_of_the_head_are_batchnorms():
    """projection_head against the same layers with nn.BatchNorm1d, in training and in evaluation."""
    torch.manual_seed(0)
    head = pmsn.projection_head(6, hidden_dim=7, output_dim=5).double()
    oracle = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.GELU(), nn.Linear(7, 7), nn.BatchNorm1d(7), nn.GELU(),
                           nn.Linear(7, 5)).double()
    oracle.load_state_dict(dict(zip(oracle.state_dict(), copy.deepcopy(head.state_dict()).values())))
    for _ in range(3):
        x = torch.randn(9, 6, dtype=torch.float64)
        torch.testing.assert_close(head(x), oracle(x))
    torch.testing.assert_close(head.eval()(x), oracle.eval()(x))
    assert [p.shape for p in pmsn.projection_head(384).parameters()][::4] == [(2048, 384), (2048, 2048), (256, 2048)]


def test_forward_is_the_loss_of_its_branches():
    """Anchors in view-major order: masked first, then the others; each entry one pass, so one BatchNorm batch each."""
    options = {"temperature": 0.2, "weight": 2.0, "sharpening": 0.5}
    model = small_pmsn(**options)
    with torch.no_grad():
        model.target_encoder[1].weight.mul_(-1)  # so that it matters which branch sees the target view
    parts = copy.deepcopy(model)
    target, masked, unmasked = random_views()
    loss, _ = model([target, masked, unmasked])
    anchors = torch.cat([parts.head(parts.encoder(masked)), parts.head(parts.encoder(unmasked))])
    targets = parts.target_head(parts.target_encoder(target))
    expected, _ = pmsn.pmsn_loss(anchors, targets, parts.prototypes, parts.prior, **options)
    torch.testing.assert_close(loss, expected)
    without, _ = pmsn.pmsn_loss(anchors[:6], targets, parts.prototypes, parts.prior, **options)
    torch.testing.assert_close(copy.deepcopy(parts)([target, masked])[0], without)  # no unmasked anchors
    model.loss_options["weight"] = 0.0  # a schedule may change the options
    loss, terms = model([target, masked, unmasked])
    torch.testing.assert_close(loss.detach(), terms["cross_entropy"])


def test_only_masked_anchors_lose_patches():
    """An encoder that writes down what it is asked."""
    asked = []

    class Recorder(nn.Module):
        embed_dim = 6

        def forward(self, images, patch_drop=0.0):
            asked.append((images.shape[0], patch_drop))
            return images.flatten(1)[:, :6]

    model = pmsn.PMSN(Recorder(), pmsn.uniform_prior(4), output_dim=8, patch_drop=0.3)
    model([torch.randn(n, 3, 4, 4) for n in (2, 4, 6, 8)])
    assert sorted(asked) == [(2, 0.0), (4, 0.3), (6, 0.0), (8, 0.0)]


def test_training_with_masked_transformer_under_autocast():
    """The whole module in bfloat16 autocast on the CPU: finite float32 loss, near the float32 one, finite gradients."""
    torch.manual_seed(0)
    encoder = pmsn.VisionTransformer(image_size=16, patch_size=4, embed_dim=12, depth=1, num_heads=3)
    model = pmsn.PMSN(encoder, pmsn.power_law_prior(8, 1.0), head=pmsn.projection_head(12, 16, 8), output_dim=8)
    views = [torch.randn(n, 3, size, size) for n, size in ((8, 16), (8, 16), (16, 8))]
    losses = []
    for autocast in (False, True):
        torch.manual_seed(1)  # the same patches dropped
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss, _ = copy.deepcopy(model)(views) if not autocast else model(views)
        losses.append(loss)
    assert losses[1].dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), abs=0.2)
    losses[1].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.update_target(0.99)
    assert all(v.isfinite().all() for v in model.state_dict().values())


@pytest.mark.parametrize("prior", [[0.5, 0.5, 0.0], [0.7, 0.7, -0.4], [0.5, 0.5, 0.5], [[0.5, 0.5]]])
def test_no_prior_is_refused(prior):
    with pytest.raises(ValueError, match="prior"):
        pmsn.PMSN(small_encoder(), torch.tensor(prior), patch_drop=0.0)


def test_prior_is_saved_and_prototypes_are_trained():
    model = small_pmsn()
    assert "prior" in model.state_dict() and "prototypes" in dict(model.named_parameters())
    assert model.prototypes.shape == (4, 5) and model.prototypes.requires_grad
