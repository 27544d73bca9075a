"""support/heads.py: heads and trainings against plain loops, measures, tables against NumPy."""

import copy
import itertools
import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score
from torch import nn

import pmsn
from support import drawings, heads

DIM = 6  # dimension of the embeddings
UNIFORM, STEEP = (pmsn.power_law_prior(5, exponent) for exponent in (0.0, 1.25))


# ---- Heads ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("any_order", [False, True])
def test_each_head_has_the_loss_of_its_own_prototypes(any_order):
    """It is the loss of pmsn.py for its entries, and so is its gradient. So heads learn alone."""
    model = heads.Heads(nn.Linear(6, 128), STEEP, 3, DIM, any_order=any_order)
    with torch.no_grad():
        for parameter in model.target.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    target_view, anchor_view = torch.randn(2, 40, 6)
    losses = model(target_view, anchor_view, 0.4)
    losses.sum().backward()
    encoder, (linear, _) = model.network
    target_encoder, (target_linear, _) = model.target
    of_features = 0.0
    for i, loss in enumerate(losses):
        part = slice(DIM * i, DIM * (i + 1))
        weight, bias, q, features = (x.detach().clone().requires_grad_() for x in (
            linear.weight[part], linear.bias[part], model.prototypes[i], encoder(anchor_view)))
        z = features @ weight.T + bias
        z_target = target_encoder(target_view) @ target_linear.weight[part].T
        z, z_target = ((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
                       for x in (z, z_target))
        expected, _ = pmsn.pmsn_loss(z, z_target, q, STEEP, sharpening=0.4, any_order=any_order)
        torch.testing.assert_close(loss, expected)
        expected.backward()
        torch.testing.assert_close(model.prototypes.grad[i], q.grad, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(linear.weight.grad[part], weight.grad, atol=1e-6, rtol=1e-4)
        of_features = of_features + features.grad
    expected = of_features.T @ anchor_view
    torch.testing.assert_close(encoder.weight.grad, expected, atol=1e-5, rtol=1e-4)
    assert all(p.grad is None for p in model.target.parameters())


def test_one_head_alone_computes_what_it_computes_among_all():
    """That of the target network, with its running statistics."""
    model = heads.Heads(nn.Linear(6, 128), STEEP, 3, DIM)
    with torch.no_grad():
        for parameter in model.target.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    for _ in range(3):
        model(*(1 + 2 * torch.randn(2, 40, 6)), 0.4)  # statistics of BatchNorm
    alone, inputs = [model.head(i) for i in range(3)], torch.randn(7, 6)
    encoder, whole = model.target.eval()
    expected = whole(encoder(inputs)).unflatten(1, (3, -1))
    for i, head in enumerate(alone):
        torch.testing.assert_close(head(encoder(inputs)), expected[:, i])
        assert not any(p.requires_grad for p in head.parameters())
    whole[0].weight.data.zero_()  # The heads are copies.
    torch.testing.assert_close(alone[2](encoder(inputs)), expected[:, 2])


# ---- Training ------------------------------------------------------------------------------------
def plain_training(parameters, loss_of_step, steps, lr_scale, after_step=lambda done: None):
    """AdamW with the schedule of the learning rate written out, and the norms of the gradients."""
    optimizer, norms = torch.optim.AdamW(parameters, weight_decay=0.05), []
    for step in range(steps):
        done = step / steps
        lr = 2e-3 * min(1, 0.02 + 20 * done) * (0.55 + 0.45 * math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = lr_scale * lr
        optimizer.zero_grad()
        loss_of_step(step, done).backward()
        norm = sum(p.grad.square().sum() for p in parameters).sqrt()
        for p in parameters:
            p.grad *= min(1, 3 / (norm.item() + 1e-6))
        norms.append(norm.item())
        optimizer.step()
        after_step(done)
    return norms


@pytest.mark.parametrize("any_order, scale", [(False, 5), (True, 5), (True, 20)])
def test_training_of_heads_equals_a_plain_loop(any_order, scale, monkeypatch):
    """Six steps of two epochs with both priors: weights, target network, prototypes and losses."""
    monkeypatch.setattr(heads, "BATCH_SIZE", 16)
    # In float64, because Adam turns the rounding of gradients that are 0 into steps.
    views = torch.randn(2, 48, 6).double()
    start = heads.Heads(nn.Linear(6, 128), STEEP, 2, DIM, any_order=any_order).double()
    batches, models = [], []
    for parameter in start.parameters():
        parameter.data *= scale  # Larger weights have smaller gradients, because of BatchNorm.
    for prior in (STEEP, UNIFORM):
        models.append(copy.deepcopy(start))
        models[-1].prior = prior

    def two_views(batch):
        batches.append(batch)
        return views[:, batch]
    losses = heads.train_heads(models, two_views, 2, 48, "")
    for epoch in (batches[:3], batches[3:]):
        assert torch.cat(epoch).sort().values.tolist() == list(range(48))
    assert not torch.equal(batches[0], batches[3]) and len(batches) == 6
    for model, found in zip(models, losses):
        network, target, prototypes = (copy.deepcopy(x) for x in (
            start.network, start.target, start.prototypes))
        per_step = []

        def loss_of_step(step, done):
            targets, anchors = views[:, batches[step]]
            targets, anchors = target(targets), network(anchors)
            each = [pmsn.pmsn_loss(anchors[:, part], targets[:, part], q, model.prior,
                                   sharpening=max(0.25, 1 - 1.5 * done), any_order=any_order)[0]
                    for q, part in zip(prototypes, (slice(0, DIM), slice(DIM, 2 * DIM)))]
            per_step.append(torch.stack(each).detach())
            return sum(each)

        def after_step(done):
            momentum = 0.9 + 0.09 * min(1, 1.5 * done)
            for slow, fast in zip(target.parameters(), network.parameters()):
                slow.data = momentum * slow + (1 - momentum) * fast.data
        parameters = [*network.parameters(), prototypes]
        norms = plain_training(parameters, loss_of_step, 6, 2.0, after_step)
        assert min(norms) > 3.2 if scale == 5 else max(norms) < 2.8  # Above 3 they are clipped.
        torch.testing.assert_close(found, torch.stack(per_step[3:]).mean(dim=0))
        for trained, expected in ((model.network, network), (model.target, target)):
            for name, value in expected.state_dict().items():
                torch.testing.assert_close(trained.state_dict()[name], value, atol=1e-9, rtol=0)
        torch.testing.assert_close(model.prototypes, prototypes, atol=1e-9, rtol=0)


def noisy(images):
    return images + 0.1 * torch.randn_like(images)


def test_simclr_sees_two_views_of_each_image(monkeypatch):
    """Each image of a batch is shown twice, and the encoder learns by the loss of SimCLR."""
    monkeypatch.setattr(heads, "BATCH_SIZE", 16)
    images, seen, loss = torch.randn(32, 1, 32, 32), [], Mock(wraps=pmsn.simclr_loss)

    def views_of(index):
        seen.append(index)
        return noisy(images[index])
    monkeypatch.setattr(pmsn, "simclr_loss", loss)
    torch.manual_seed(1)
    untrained = drawings.make_encoder(32)
    torch.manual_seed(1)
    encoder = heads.train_encoder(views_of, 32, 3, "")
    assert len(seen) == loss.call_count == 6
    for epoch in zip(seen[::2], seen[1::2]):
        for batch in epoch:
            assert torch.equal(batch[:16], batch[16:])
        shown = torch.cat([batch[:16] for batch in epoch])
        assert torch.equal(shown.sort().values, torch.arange(32))
    for call in loss.call_args_list:
        first, second = call.args
        assert first.shape == second.shape == (16, 64) and call.kwargs == {"temperature": 0.2}
    for old, new in zip(untrained.parameters(), encoder.parameters()):
        assert not torch.equal(old, new) and not new.requires_grad


def test_cached_views_are_two_different_views_of_the_same_images():
    """Features are the number of the image and the number of the call, so that views differ."""
    calls = []

    def views_of(index):
        calls.append(len(index))
        return torch.stack([index, torch.full_like(index, len(calls))], dim=1)
    views = heads.cache_views(lambda images: images + 1000, views_of, 700)
    assert calls == [512, 188] * heads.CACHED_VIEWS
    two_views, found = heads.two_cached_views(views), set()
    for _ in range(200):
        batch = torch.randint(700, (64,))
        first, second = two_views(batch)
        assert torch.equal(first[:, 0], 1000 + batch) and torch.equal(second[:, 0], 1000 + batch)
        pairs = torch.stack([first[:, 1], second[:, 1]], dim=1)
        found |= {((one - 1001) // 2, (other - 1001) // 2) for one, other in pairs.tolist()}
    assert found == {*itertools.permutations(range(heads.CACHED_VIEWS), 2)}


@pytest.mark.parametrize("any_order", [False, True])
def test_a_winner_teaches_and_stays_as_it_is(any_order, monkeypatch):
    """Six steps equal a plain loop, whose targets come from the winner in eval mode."""
    monkeypatch.setattr(heads, "BATCH_SIZE", 8)
    images, seen = torch.randn(24, 1, 32, 32), []

    def views_of(index):
        seen.append(noisy(images[index]).double())
        return seen[-1]
    encoder, head = drawings.make_encoder(32), drawings.make_head(DIM)
    head(3 * torch.randn(50, 128) + 1)  # statistics of BatchNorm
    winner = encoder.double().requires_grad_(False), head.double().eval().requires_grad_(False)
    q = torch.randn(5, DIM).double()
    students = [heads.make_student(*winner, q.clone(), prior).double()
                for prior in (STEEP, UNIFORM)]
    starts, before = copy.deepcopy(students), copy.deepcopy(winner)
    heads.teach(students, views_of, 24, 2, "", any_order=any_order)
    assert len(seen) == 12
    for student, start, prior in zip(students, starts, (STEEP, UNIFORM)):
        def loss_of_step(step, done):
            target_view, anchor_view = seen[2 * step : 2 * step + 2]
            return pmsn.pmsn_loss(start.head(start.encoder(anchor_view)),
                                  before[1](before[0](target_view)), q, prior.double(),
                                  sharpening=0.25, any_order=any_order)[0]
        parameters = [*start.encoder.parameters(), *start.head.parameters()]
        plain_training(parameters, loss_of_step, 6, 1.0)
        for name in ("encoder", "head"):
            trained, expected = (getattr(x, name).state_dict() for x in (student, start))
            for key in expected:
                torch.testing.assert_close(trained[key], expected[key], atol=1e-8, rtol=0)
        for part, old in zip((student.target_encoder, student.target_head), before):
            for key, value in part.state_dict().items():
                assert torch.equal(value, old.state_dict()[key]), key
        assert torch.equal(student.prototypes, q)


# ---- Measures ------------------------------------------------------------------------------------
@pytest.mark.parametrize("prototypes, classes", [(5, 10), (5, 5), (3, 10), (1, 4)])
def test_information_against_scikit_learn(prototypes, classes):
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=500)
    for groups in (rng.integers(prototypes, size=500), labels * 3 % prototypes, labels % 2 * 4):
        found = heads.information(torch.from_numpy(groups), torch.from_numpy(labels))
        assert found == pytest.approx(mutual_info_score(groups, labels), abs=1e-9)


def test_each_head_is_judged_by_its_own_prototypes():
    """Head 0 groups by the digit, head 1 by nothing, and head 2 by the background."""
    model = heads.Heads(nn.Identity(), UNIFORM, 3, DIM)
    model.prototypes.data = torch.stack([torch.eye(5, DIM).roll(i, 1) for i in range(3)])
    model.target = nn.BatchNorm1d(3 * DIM, affine=False)  # 1 : 1 in eval mode
    labels = {"digit": torch.arange(500) % 5, "background": torch.arange(500) // 5 % 5}
    chosen = [labels["digit"], torch.zeros(500, dtype=torch.long), (labels["background"] + 2) % 5]
    images = torch.cat([7 * q[index] for q, index in zip(model.prototypes, chosen)], dim=1)
    found = heads.judge(model, torch.tensor([0.3, 0.1, 0.2]), images, labels)
    expected = [(0.3, math.log(5), 0), (0.1, 0, 0), (0.2, 0, math.log(5))]
    for head, values in zip(found, expected, strict=True):
        assert list(head.values()) == pytest.approx(list(values), abs=1e-6)
        assert list(head) == ["loss", "digit", "background"]
    assert not model.target.running_mean.any()  # It was in eval mode.


# ---- What a loss could be at best ----------------------------------------------------------------
def table_loss(logits, two_views, prior, sharpening=0.25, of_target=None):
    """The loss of PMSN by a loop over all pairs of classes that two views can show, in NumPy."""
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    q = p if of_target is None else of_target
    q = q ** (1 / sharpening) / (q ** (1 / sharpening)).sum(axis=1, keepdims=True)
    loss, p_bar = 0.0, 0.0
    for i, j in np.ndindex(*two_views.shape):
        loss -= two_views[i, j] * (q[i] * np.log(p[j])).sum()
        p_bar = p_bar + two_views[i, j] * p[j]
    # The largest share of the prior goes to the prototype that is used most, and so on.
    return loss + (np.sort(p_bar) * np.log(np.sort(p_bar) / np.sort(prior))).sum()


@pytest.mark.parametrize("sharpening", [0.25, 0.7])
@pytest.mark.parametrize("prior", [[0.25] * 4, [0.5, 0.25, 0.15, 0.1]])
def test_loss_of_a_table_against_numpy(sharpening, prior):
    """And its gradient against differences. The targets are constants."""
    rng = np.random.default_rng(0)
    logits, prior = rng.normal(size=(6, 4)), np.array(prior)
    two_views = rng.random((6, 6))
    two_views = (two_views + two_views.T) / (two_views + two_views.T).sum()
    table = torch.from_numpy(logits).requires_grad_()
    loss = heads.loss_of_table(table, torch.from_numpy(two_views), torch.from_numpy(prior),
                               sharpening)
    assert loss.item() == pytest.approx(table_loss(logits, two_views, prior, sharpening), abs=1e-9)
    loss.backward()
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for place in np.ndindex(6, 4):
        change = np.zeros((6, 4))
        change[place] = 1e-5
        slope = (table_loss(logits + change, two_views, prior, sharpening, p)
                 - table_loss(logits - change, two_views, prior, sharpening, p)) / 2e-5
        assert table.grad[place].item() == pytest.approx(slope, abs=1e-8)


def test_the_loss_of_a_table_is_the_loss_of_its_images():
    """200 images, as often as the table says, with embeddings that give its predictions."""
    two_views = torch.tensor([[80.0, 10, 0], [10, 40, 5], [0, 5, 50]])
    embeddings = nn.functional.normalize(torch.randn(3, 6).double())
    prototypes, prior = torch.randn(4, 6).double(), pmsn.power_law_prior(4, 1.0)
    first, second = (torch.tensor([pair[view] for pair in np.ndindex(3, 3)
                                   for _ in range(int(two_views[pair]))]) for view in (0, 1))
    expected, _ = pmsn.pmsn_loss(embeddings[second], embeddings[first], prototypes, prior,
                                 any_order=True)
    logits = pmsn.log_predictions(embeddings, prototypes, 0.1)
    found = heads.loss_of_table(logits, two_views.double() / 200, prior.double())
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("disagree", [0.0, 0.05, 1.0])
def test_two_views_by_enumeration(disagree):
    """Over the class of the image, and what each view shows in its place, if anything."""
    shares = np.array([0.5, 0.25, 0.15, 0.1])
    expected = np.zeros((4, 4))
    shown = [(None, 1 - disagree), *((k, disagree * share) for k, share in enumerate(shares))]
    for label, (first, p_first), (second, p_second) in itertools.product(range(4), shown, shown):
        place = label if first is None else first, label if second is None else second
        expected[place] += shares[label] * p_first * p_second
    np.testing.assert_allclose(heads.two_views_of(torch.from_numpy(shares), disagree), expected,
                               atol=1e-7)
