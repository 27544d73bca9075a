"""The loss, its priors and its three relatives: closed forms worked by hand, plain NumPy loops, float64."""

import math

import numpy as np
import pytest
import torch

import pmsn


def random_inputs(views=3, batch=4, dim=6, num_prototypes=5, seed=0, dtype=torch.float64):
    """anchors (views * batch, dim), targets (batch, dim), prototypes (num_prototypes, dim), none of unit length."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(n, dim, generator=generator, dtype=torch.float64).to(dtype)
                 for n in (views * batch, batch, num_prototypes))


def numpy_predict(embedding, prototypes, temperature):
    """softmax over prototypes of cosine / temperature, for one embedding."""
    scores = []
    for q in prototypes:
        cosine = float(embedding @ q) / math.sqrt(embedding @ embedding) / math.sqrt(q @ q)
        scores.append(math.exp(cosine / temperature))
    return np.array(scores) / sum(scores)


def numpy_sinkhorn(probabilities, prior, iterations):
    """Column after column to its share, then row after row to 1, as in the published code of SwAV and MSN."""
    q = probabilities.copy()
    for _ in range(iterations):
        for k in range(q.shape[1]):
            q[:, k] *= prior[k] * len(q) / q[:, k].sum()
        for i in range(len(q)):
            q[i] /= q[i].sum()
    return q


def numpy_pmsn(anchors, targets, prototypes, prior, temperature, sharpening, weight, iterations=0, relative=False):
    """The loss as the paper writes it, one anchor at a time: anchor i belongs to target i modulo the batch."""
    anchors, targets, prototypes, prior = (np.asarray(x, np.float64) for x in (anchors, targets, prototypes, prior))
    codes = []
    for target in targets:
        p = numpy_predict(target, prototypes, temperature)
        p = prior * (p / prior) ** (1 / sharpening) if relative else p ** (1 / sharpening)
        codes.append(p / p.sum())
    codes = numpy_sinkhorn(np.array(codes), prior, iterations)
    cross_entropy, p_bar = 0.0, np.zeros(len(prior))
    for i, anchor in enumerate(anchors):
        p = numpy_predict(anchor, prototypes, temperature)
        cross_entropy -= float(codes[i % len(targets)] @ np.log(p)) / len(anchors)
        p_bar += p / len(anchors)
    kl = sum(p_bar[k] * math.log(p_bar[k] / prior[k]) for k in range(len(prior)))
    return cross_entropy + weight * kl, cross_entropy, kl, p_bar


def constant_answer(prior, temperature, batch=6):
    """Prototypes and one embedding, `batch` times, with softmax(z . q / temperature) = prior.

    The prototypes are the axes. z_k = temperature * (log prior_k + c), and c makes z a unit vector."""
    log_prior = prior.double().log()
    off_mean = log_prior - log_prior.mean()
    c = math.sqrt((temperature**-2 - off_mean.square().sum().item()) / len(prior))
    embedding = temperature * (off_mean + c)
    assert abs(embedding.norm().item() - 1) < 1e-12
    return embedding.expand(batch, -1), torch.eye(len(prior), dtype=torch.float64)


# ---- Priors ----------------------------------------------------------------------------------------------------------


def test_priors_by_hand():
    # 1 + 1/2 + 1/3 = 11/6
    torch.testing.assert_close(pmsn.power_law_prior(3, 1.0), torch.tensor([6 / 11, 3 / 11, 2 / 11]))
    # 1, 1/4, 1/9, 1/16 over 205/144
    torch.testing.assert_close(pmsn.power_law_prior(4, 2.0), torch.tensor([144.0, 36.0, 16.0, 9.0]) / 205)
    torch.testing.assert_close(pmsn.power_law_prior(4, 0.0), torch.full((4,), 0.25))
    torch.testing.assert_close(pmsn.uniform_prior(4), torch.full((4,), 0.25))
    torch.testing.assert_close(pmsn.class_prior([1, 5, 2]), torch.tensor([0.625, 0.25, 0.125]))  # largest first
    assert pmsn.power_law_prior(1024, 0.25).dtype == torch.float32


@pytest.mark.parametrize("call, word", [
    (lambda: pmsn.uniform_prior(1), "num_prototypes"),
    (lambda: pmsn.power_law_prior(0, 1.0), "num_prototypes"),
    (lambda: pmsn.power_law_prior(5, -0.1), "exponent"),
    (lambda: pmsn.power_law_prior(5, math.inf), "exponent"),
    (lambda: pmsn.power_law_prior(5, math.nan), "exponent"),
    (lambda: pmsn.class_prior([3, 0, 1]), "counts"),
    (lambda: pmsn.class_prior([3, -1]), "counts"),
    (lambda: pmsn.class_prior([3, math.nan]), "counts"),
    (lambda: pmsn.class_prior([3, math.inf]), "counts"),
    (lambda: pmsn.class_prior([3]), "counts"),
    (lambda: pmsn.class_prior([[1, 2], [3, 4]]), "counts"),
])
def test_priors_refuse(call, word):
    with pytest.raises(ValueError, match=word):
        call()


@pytest.mark.parametrize("prior", [
    [0.5, 0.5, 0.0], [0.6, 0.6, -0.2], [0.5, 0.5], [0.25, 0.25, 0.25, 0.25], [0.4, 0.4, 0.4], [0.3, 0.3, 0.3],
    [0.5, 0.5, math.nan], [[0.5, 0.3, 0.2]]])
def test_no_prior_is_refused(prior):
    """Zero, negative, wrong length, not summing to 1 (both sides), not a number, wrong rank."""
    anchors, targets, prototypes = random_inputs(num_prototypes=3)
    with pytest.raises(ValueError, match="prior"):
        pmsn.pmsn_loss(anchors, targets, prototypes, torch.tensor(prior))


@pytest.mark.parametrize("change, word", [
    ({"temperature": 0.0}, "temperature"), ({"temperature": -0.1}, "temperature"), ({"weight": -1.0}, "weight"),
    ({"sharpening": 0.0}, "sharpening"), ({"sharpening": 1.5}, "sharpening"), ({"sharpening": -1.0}, "sharpening"),
    ({"anchors": torch.ones(5, 6)}, "anchors"), ({"anchors": torch.ones(0, 6)}, "anchors"),
    ({"targets": torch.ones(0, 6)}, "targets")])
def test_loss_refuses(change, word):
    anchors, targets, prototypes = random_inputs(dtype=torch.float32)
    arguments = {"anchors": anchors, "targets": targets, "prototypes": prototypes, "prior": pmsn.uniform_prior(5)}
    with pytest.raises(ValueError, match=word):
        pmsn.pmsn_loss(**{**arguments, **change})


# ---- Value and gradient ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {"temperature": 0.1, "sharpening": 0.25, "weight": 1.0},
    {"temperature": 0.3, "sharpening": 1.0, "weight": 0.0},
    {"temperature": 0.2, "sharpening": 0.5, "weight": 2.5},
    {"temperature": 0.5, "sharpening": 0.5, "weight": 1.0, "iterations": 2},
    {"temperature": 0.5, "sharpening": 0.5, "weight": 1.0, "relative": True},
    {"temperature": 0.5, "sharpening": 0.4, "weight": 0.7, "relative": True, "iterations": 3}])
def test_loss_equals_numpy_loop(options):
    """Three views in view-major order, a skewed prior that is not sorted, every option; all four terms."""
    anchors, targets, prototypes = random_inputs()
    prior = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2], dtype=torch.float64)
    loss, cross_entropy, kl, p_bar = numpy_pmsn(anchors, targets, prototypes, prior, **options)
    renamed = {"iterations": "sinkhorn_iterations", "relative": "relative_sharpening"}
    renamed = {renamed.get(name, name): value for name, value in options.items()}
    got, terms = pmsn.pmsn_loss(anchors, targets, prototypes, prior, **renamed)
    assert got.item() == pytest.approx(loss, abs=1e-9)
    assert terms["cross_entropy"].item() == pytest.approx(cross_entropy, abs=1e-9)
    assert terms["prior_kl"].item() == pytest.approx(kl, abs=1e-9)
    np.testing.assert_allclose(terms["mean_prediction"], p_bar, atol=1e-9)
    assert terms["effective_prototypes"].item() == pytest.approx(math.exp(-(p_bar * np.log(p_bar)).sum()), abs=1e-8)


def test_defaults_are_the_papers():
    """Temperature .1, T .25, lambda 1, neither Sinkhorn nor relative sharpening."""
    anchors, targets, prototypes = random_inputs()
    prior = pmsn.power_law_prior(5, 1.0)
    expected = numpy_pmsn(anchors, targets, prototypes, prior, temperature=0.1, sharpening=0.25, weight=1.0)[0]
    assert pmsn.pmsn_loss(anchors, targets, prototypes, prior)[0].item() == pytest.approx(expected, abs=1e-6)


def test_uniform_prior_is_msn():
    """MSN: cross-entropy plus weight * (log K - H(p_bar)). Value and gradients, written out in plain torch, float64."""
    inputs = random_inputs(views=2)
    leaves = [[x.clone().requires_grad_() for x in inputs] for _ in range(2)]
    loss, terms = pmsn.pmsn_loss(*leaves[0], pmsn.uniform_prior(5), weight=1.5)

    z, z_target, q = (x / x.pow(2).sum(1, keepdim=True).sqrt() for x in leaves[1])
    p = torch.softmax(z @ q.T / 0.1, 1)
    p_target = torch.softmax(z_target @ q.T / 0.1, 1).detach() ** 4
    p_target = (p_target / p_target.sum(1, keepdim=True)).repeat(2, 1)
    p_bar = p.mean(0)
    mean_entropy = -(p_bar * p_bar.log()).sum()
    msn = -(p_target * p.log()).sum(1).mean() + 1.5 * (math.log(5) - mean_entropy)

    assert loss.item() == pytest.approx(msn.item(), abs=1e-6)
    assert terms["prior_kl"].item() == pytest.approx(math.log(5) - mean_entropy.item(), abs=1e-6)
    loss.backward()
    msn.backward()
    torch.testing.assert_close(leaves[0][0].grad, leaves[1][0].grad, atol=1e-6, rtol=0)
    torch.testing.assert_close(leaves[0][2].grad, leaves[1][2].grad, atol=1e-6, rtol=0)


def test_direction_of_the_divergence():
    """p_bar = (1/2, 1/2) against pi = (.8, .2): KL(p_bar || pi) = log 1.25 = .2231; KL(pi || p_bar) would be .1927."""
    prototypes = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    anchors = torch.tensor([[3.0, 3.0]])
    _, terms = pmsn.pmsn_loss(anchors, anchors, prototypes, torch.tensor([0.8, 0.2]))
    assert terms["prior_kl"].item() == pytest.approx(math.log(1.25), abs=1e-6)


@pytest.mark.parametrize("prior", [[0.2, 0.2, 0.2, 0.2, 0.2], [0.6, 0.2, 0.1, 0.06, 0.04], [0.05, 0.5, 0.1, 0.3, 0.05]])
def test_the_prior_term_alone_recovers_the_prior(prior):
    """loss(weight 1) - loss(weight 0) is the prior term; its minimum over embeddings and prototypes is p_bar = pi."""
    prior = torch.tensor(prior, dtype=torch.float64)
    anchors, _, prototypes = (x.requires_grad_() for x in random_inputs(views=1, batch=32))
    optimizer = torch.optim.Adam([anchors, prototypes], lr=0.03)
    for _ in range(300):
        with_term, terms = pmsn.pmsn_loss(anchors, anchors, prototypes, prior, weight=1.0)
        kl = with_term - pmsn.pmsn_loss(anchors, anchors, prototypes, prior, weight=0.0)[0]
        optimizer.zero_grad()
        kl.backward()
        optimizer.step()
    torch.testing.assert_close(terms["mean_prediction"], prior, atol=1e-3, rtol=0)
    assert abs(kl.item()) < 1e-4


def test_gradients_reach_anchors_and_prototypes_but_not_targets():
    anchors, targets, prototypes = (x.requires_grad_() for x in random_inputs())
    loss, terms = pmsn.pmsn_loss(anchors, targets, prototypes, pmsn.power_law_prior(5, 1.0), sinkhorn_iterations=2)
    loss.backward()
    assert anchors.grad.abs().sum(dim=1).min() > 0 and prototypes.grad.abs().sum(dim=1).min() > 0
    assert targets.grad is None
    assert not any(term.requires_grad for term in terms.values())


def test_gradient_equals_finite_differences_of_the_numpy_loop():
    """Also says that no gradient flows through p+: the loop's targets use the unmoved prototypes."""
    anchors, targets, prototypes = random_inputs(views=2, batch=2, dim=3, num_prototypes=3)
    prior = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    anchors.requires_grad_()
    pmsn.pmsn_loss(anchors, targets, prototypes, prior, temperature=0.5)[0].backward()
    for i in range(len(anchors)):
        for j in range(3):
            values = []
            for step in (-1e-5, 1e-5):
                moved = anchors.detach().clone()
                moved[i, j] += step
                values.append(numpy_pmsn(moved, targets, prototypes, prior, 0.5, 0.25, 1.0)[0])
            assert anchors.grad[i, j].item() == pytest.approx((values[1] - values[0]) / 2e-5, abs=1e-7)


# ---- Sharpening and Sinkhorn -----------------------------------------------------------------------------------------


def test_sharpen_by_hand():
    """(.2, .3, .5) at T = 1/2: squares .04, .09, .25 over .38; relative to (1/2, 1/4, 1/4): .08, .36, 1 over 1.44."""
    p = torch.tensor([[0.2, 0.3, 0.5]])
    torch.testing.assert_close(pmsn.sharpen(p, 0.5), torch.tensor([[4.0, 9.0, 25.0]]) / 38)
    relative = pmsn.sharpen(p, 0.5, torch.tensor([0.5, 0.25, 0.25]))
    torch.testing.assert_close(relative, torch.tensor([[0.08, 0.36, 1.0]]) / 1.44)
    torch.testing.assert_close(pmsn.sharpen(p, 1.0), p)
    torch.testing.assert_close(pmsn.sharpen(p, 0.25, torch.full((3,), 1 / 3)), pmsn.sharpen(p, 0.25))
    exact_zeros = torch.tensor([[0.0, 1.0, 0.0]])  # a prediction that underflowed
    assert torch.equal(pmsn.sharpen(exact_zeros, 0.25), exact_zeros)


def test_sinkhorn_reaches_any_marginal():
    """Many iterations: columns' means are pi, rows sum to 1; and the result is diag(u) P diag(v), which is unique."""
    p = torch.softmax(3 * random_inputs(views=5, batch=8)[0] @ random_inputs()[2].T / 10, dim=1)
    for prior in ([0.2] * 5, [0.1, 0.4, 0.05, 0.25, 0.2], [0.9, 0.05, 0.03, 0.01, 0.01]):
        prior = torch.tensor(prior, dtype=torch.float64)
        q = pmsn.sinkhorn(p, prior, iterations=2000)
        torch.testing.assert_close(q.mean(dim=0), prior, atol=1e-7, rtol=0)
        torch.testing.assert_close(q.sum(dim=1), torch.ones(40, dtype=torch.float64))
        ratio = (q / p).log()  # u_i + v_k: its double differences vanish
        assert (ratio - ratio[:1] - ratio[:, :1] + ratio[0, 0]).abs().max() < 1e-6


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_sinkhorn_with_the_uniform_prior_is_the_published_one(iterations):
    """SwAV's and MSN's code: total 1, then prototypes to 1/K, images to 1/B in turn; at last times B."""
    p = torch.softmax(random_inputs()[0] @ random_inputs()[2].T, dim=1)
    q = p.numpy().copy()
    q /= q.sum()
    for _ in range(iterations):
        q = q / q.sum(axis=0, keepdims=True) / q.shape[1]
        q = q / q.sum(axis=1, keepdims=True) / len(q)
    got = pmsn.sinkhorn(p, torch.full((5,), 0.2, dtype=torch.float64), iterations)
    np.testing.assert_allclose(got, q * len(q), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sinkhorn_with_columns_that_underflowed(dtype):
    """One-hot rows, all on prototype 0: exact zeros elsewhere. Identical rows must each end as pi."""
    p = torch.zeros(8, 4, dtype=dtype)
    p[:, 0] = 1
    prior = pmsn.power_law_prior(4, 1.5).to(dtype)
    torch.testing.assert_close(pmsn.sinkhorn(p, prior, 3), prior.expand(8, 4), atol=1e-5, rtol=0)
    p[5] = torch.tensor([0, 1, 0, 0], dtype=dtype)
    q = pmsn.sinkhorn(p, prior, 50)
    assert q.isfinite().all()
    torch.testing.assert_close(q.sum(dim=1), torch.ones(8, dtype=dtype))


def test_collapse_of_plain_sharpening_under_a_steep_prior():
    """Every image answers pi (K = 10, exponent 1.5, T = .25): KL = 0 whatever the remedy. What does it cost?

    Plain sharpening: -sum_k s_k log pi_k, s = pi^4 / sum pi^4, worked here in NumPy: .71 nats.
    Relative sharpening, or Sinkhorn onto pi: H(pi), nothing gained by the collapse."""
    prior = torch.arange(1, 11, dtype=torch.float64) ** -1.5
    prior = prior / prior.sum()
    pi = prior.numpy()
    sharpened = pi**4 / (pi**4).sum()
    collapsed, entropy = -(sharpened * np.log(pi)).sum(), -(pi * np.log(pi)).sum()
    assert collapsed == pytest.approx(0.7098, abs=1e-4) and entropy > 2 * collapsed

    z, prototypes = constant_answer(prior, temperature=0.1)
    relative, sinkhorn = {"relative_sharpening": True}, {"sinkhorn_iterations": 1}
    for options, cost in (({}, collapsed), (relative, entropy), (sinkhorn, entropy), (relative | sinkhorn, entropy)):
        _, terms = pmsn.pmsn_loss(z, z, prototypes, prior, **options)
        torch.testing.assert_close(terms["mean_prediction"], prior, atol=1e-9, rtol=0)
        assert terms["prior_kl"].item() == pytest.approx(0, abs=1e-9)
        assert terms["cross_entropy"].item() == pytest.approx(cost, abs=1e-6)

    p_target = pmsn.sharpen(prior.expand(6, 10), 0.25)
    torch.testing.assert_close(p_target[0], torch.from_numpy(sharpened))
    torch.testing.assert_close(pmsn.sharpen(prior.expand(6, 10), 0.25, prior)[0], prior)
    torch.testing.assert_close(pmsn.sinkhorn(p_target, prior, 1).mean(dim=0), prior)


def test_the_remedies_change_nothing_under_the_uniform_prior():
    """Relative sharpening is MSN's; Sinkhorn onto pi is MSN's Sinkhorn (the NumPy loop); H(pi) = log K for p = pi."""
    anchors, targets, prototypes = random_inputs()
    prior = torch.full((5,), 0.2, dtype=torch.float64)
    for iterations in (0, 3):
        expected = numpy_pmsn(anchors, targets, prototypes, prior, 0.1, 0.25, 1.0, iterations=iterations)[0]
        for relative in (False, True):
            loss, _ = pmsn.pmsn_loss(anchors, targets, prototypes, prior, sinkhorn_iterations=iterations,
                                     relative_sharpening=relative)
            assert loss.item() == pytest.approx(expected, abs=1e-9)
    z, prototypes = constant_answer(prior, temperature=0.1)
    for options in ({}, {"relative_sharpening": True}, {"sinkhorn_iterations": 3}):
        assert pmsn.pmsn_loss(z, z, prototypes, prior, **options)[0].item() == pytest.approx(math.log(5), abs=1e-6)


# ---- Numerical range -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("options", [{}, {"sinkhorn_iterations": 3}, {"relative_sharpening": True}])
def test_extreme_inputs_stay_finite(options, autocast):
    """Loss and gradients; the loss depends on directions only, so norms 1e-8 and 1e8 give that of the plain embeddings.

    `opposite`: every image on one prototype, where at temperature .01 all others underflow to an exact 0."""
    anchors, targets, prototypes = random_inputs(dtype=torch.float32)
    opposite = prototypes[:1].expand(12, -1).clone()
    cases = {"plain": (anchors, targets, prototypes), "tiny": (1e-8 * anchors, 1e-8 * targets, 1e-8 * prototypes),
             "huge": (1e8 * anchors, 1e8 * targets, 1e8 * prototypes),
             "identical": (torch.ones(12, 6), torch.ones(4, 6), prototypes),
             "identical prototypes": (anchors, targets, torch.ones(5, 6)),
             "zero": (0 * anchors, 0 * targets, prototypes),
             "opposite": (opposite, opposite[:4], torch.cat([prototypes[:1], -prototypes[:1].expand(4, -1)]))}
    prior = pmsn.power_law_prior(5, 1.5)
    for temperature in (0.1, 0.01):
        losses = {}
        for name, inputs in cases.items():
            leaves = [x.clone().requires_grad_() for x in inputs]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss, terms = pmsn.pmsn_loss(*leaves, prior, temperature=temperature, **options)
            loss.backward()
            assert loss.dtype == torch.float32 and loss.isfinite(), name
            assert all(term.isfinite().all() for term in terms.values()), name
            assert leaves[0].grad.isfinite().all() and leaves[2].grad.isfinite().all(), name
            losses[name] = loss.item()
        assert losses["tiny"] == pytest.approx(losses["plain"], rel=1e-4)
        assert losses["huge"] == pytest.approx(losses["plain"], rel=1e-4)


def test_bfloat16_embeddings_get_a_float32_loss():
    """Under autocast: exactly the float32 loss of the same (rounded) embeddings, and gradients in bfloat16."""
    inputs = [x.bfloat16() for x in random_inputs(dtype=torch.float32)]
    prior = pmsn.power_law_prior(5, 1.0)
    expected = pmsn.pmsn_loss(*(x.float() for x in inputs), prior)[0]
    inputs[0].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, terms = pmsn.pmsn_loss(*inputs, prior)
    assert loss.dtype == torch.float32 and torch.equal(loss.detach(), expected)
    loss.backward()
    assert inputs[0].grad.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        float_inputs = [x.detach().float() for x in inputs]
        assert torch.equal(pmsn.pmsn_loss(*float_inputs, prior)[0], expected)


def test_float32_against_float64():
    inputs = random_inputs(batch=8, dim=32, num_prototypes=64)
    prior = pmsn.power_law_prior(64, 0.25)
    for options in ({}, {"sinkhorn_iterations": 3}, {"relative_sharpening": True}):
        exact = pmsn.pmsn_loss(*inputs, prior.double(), **options)[0].item()
        loss, _ = pmsn.pmsn_loss(*(x.float() for x in inputs), prior, **options)
        assert loss.item() == pytest.approx(exact, abs=1e-4)


# ---- SimCLR, VICReg, SwAV --------------------------------------------------------------------------------------------


def two_views(batch=5, dim=4):
    views, _, prototypes = random_inputs(views=2, batch=batch, dim=dim, num_prototypes=6)
    return views[:batch], views[batch:], prototypes


def test_simclr_equals_numpy_loop():
    """Chen et al. 2020, equation 1: -log exp(sim(i, j)/t) / sum over k != i of exp(sim(i, k)/t), over all 2B views."""
    first, second, _ = two_views()
    z = np.concatenate([first, second])
    alignment = uniformity = 0.0
    for i in range(10):
        def sim(k):
            return float(z[i] @ z[k]) / np.linalg.norm(z[i]) / np.linalg.norm(z[k])
        alignment -= sim((i + 5) % 10) / 0.2 / 10
        uniformity += math.log(sum(math.exp(sim(k) / 0.2) for k in range(10) if k != i)) / 10
    loss, terms = pmsn.simclr_loss(first, second, temperature=0.2)
    assert terms["alignment"].item() == pytest.approx(alignment, abs=1e-9)
    assert terms["uniformity"].item() == pytest.approx(uniformity, abs=1e-9)
    assert loss.item() == pytest.approx(alignment + uniformity, abs=1e-9)


def test_vicreg_equals_numpy_loop():
    """Bardes et al. 2022, the published code's scaling: mean squared difference over all entries, the hinge and the
    off-diagonal covariances divided by d; the hinge is averaged over the two branches, the covariance is summed."""
    first, second, _ = two_views()
    first = 0.3 * first  # standard deviations on both sides of the hinge's 1
    invariance = variance = covariance = 0.0
    for i in range(5):
        for j in range(4):
            invariance += float(first[i, j] - second[i, j]) ** 2 / (5 * 4)
    for z in (first.numpy(), second.numpy()):
        cov = np.cov(z, rowvar=False)  # divides by n - 1
        for j in range(4):
            variance += max(0.0, 1 - math.sqrt(cov[j, j] + 1e-4)) / 4 / 2
            covariance += sum(cov[j, l] ** 2 for l in range(4) if l != j) / 4
    loss, terms = pmsn.vicreg_loss(first, second)
    assert 0 < terms["variance"].item() == pytest.approx(variance, abs=1e-9)
    assert terms["invariance"].item() == pytest.approx(invariance, abs=1e-9)
    assert terms["covariance"].item() == pytest.approx(covariance, abs=1e-9)
    assert loss.item() == pytest.approx(25 * invariance + 25 * variance + covariance, abs=1e-9)
    weighted = pmsn.vicreg_loss(first, second, invariance=2.0, variance=3.0, covariance=5.0)[0].item()
    assert weighted == pytest.approx(2 * invariance + 3 * variance + 5 * covariance, abs=1e-9)


def numpy_swav(first, second, prototypes, temperature, epsilon, iterations, softmax_first):
    """Caron et al. 2020, equations 2 and 3, published code: codes from exp(scores / epsilon), scaled over the whole."""
    views, q = [np.asarray(x) for x in (first, second)], np.asarray(prototypes)
    predictions, codes = [], []
    for z in views:
        predictions.append(np.array([numpy_predict(v, q, temperature) for v in z]))
        scores = np.array([[float(v @ k) / np.linalg.norm(v) / np.linalg.norm(k) for k in q] for v in z])
        code = np.exp(scores / epsilon)
        if softmax_first:
            code /= code.sum(axis=1, keepdims=True)
        codes.append(numpy_sinkhorn(code, np.full(len(q), 1 / len(q)), iterations))
    loss = 0.0
    for code, prediction in ((codes[0], predictions[1]), (codes[1], predictions[0])):
        for i in range(len(code)):
            loss -= float(code[i] @ np.log(prediction[i])) / len(code) / 2
    return loss, np.concatenate(predictions).mean(axis=0)


def test_swav_equals_numpy_loop():
    """Each view predicts the other's code. Converged codes are SwAV's exactly; with few iterations pmsn's start from
    the softmax, that is from one normalisation of the images more than SwAV's."""
    first, second, prototypes = two_views()
    options = {"temperature": 0.2, "epsilon": 0.5}
    expected, p_bar = numpy_swav(first, second, prototypes, **options, iterations=2, softmax_first=True)
    loss, terms = pmsn.swav_loss(first, second, prototypes, **options, sinkhorn_iterations=2)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert terms["cross_entropy"].item() == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(terms["mean_prediction"], p_bar, atol=1e-9)
    expected, _ = numpy_swav(first, second, prototypes, **options, iterations=100, softmax_first=False)
    loss, _ = pmsn.swav_loss(first, second, prototypes, **options, sinkhorn_iterations=100)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    expected, _ = numpy_swav(first, second, prototypes, temperature=0.1, epsilon=0.05, iterations=3, softmax_first=True)
    assert pmsn.swav_loss(first, second, prototypes)[0].item() == pytest.approx(expected, abs=1e-6)  # defaults


def test_codes_of_swav_carry_no_gradient():
    """Finite differences of the loss with frozen codes; the code side of the NumPy loop sees the unmoved views."""
    first, second, prototypes = (x.requires_grad_() for x in two_views())
    loss, _ = pmsn.swav_loss(first, second, prototypes, temperature=0.5, epsilon=0.5)
    loss.backward()
    with torch.no_grad():
        codes = []
        for z in (first, second):
            p = np.array([numpy_predict(v, prototypes.numpy(force=True), 0.5) for v in z.numpy(force=True)])
            codes.append(numpy_sinkhorn(p, np.full(6, 1 / 6), 3))
    for j in range(4):
        values = []
        for step in (-1e-5, 1e-5):
            moved = prototypes.numpy(force=True).copy()
            moved[0, j] += step
            pairs = ((codes[0], second), (codes[1], first))
            values.append(-sum(float(code[i] @ np.log(numpy_predict(z.numpy(force=True)[i], moved, 0.5)))
                               for code, z in pairs for i in range(5)) / 10)
        assert prototypes.grad[0, j].item() == pytest.approx((values[1] - values[0]) / 2e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["simclr_loss", "vicreg_loss", "swav_loss"])
def test_relatives_under_autocast(name):
    """bfloat16 embeddings: the float32 loss of the same (rounded) embeddings, whatever autocast would like."""
    first, second, prototypes = (x.bfloat16() for x in two_views())
    extra = (prototypes,) if name == "swav_loss" else ()
    expected = getattr(pmsn, name)(first.float(), second.float(), *(x.float() for x in extra))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = getattr(pmsn, name)(first, second, *extra)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


def test_sinkhorn_makes_the_two_sharpenings_one():
    """They differ by one factor a column, which Sinkhorn scales away: after convergence the targets are the same."""
    p = torch.softmax(2 * torch.randn(30, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=-1)
    prior = pmsn.power_law_prior(6, 1.5).double()
    plain, relative = pmsn.sharpen(p, 0.25), pmsn.sharpen(p, 0.25, prior)
    assert (plain - relative).abs().max() > 0.1
    torch.testing.assert_close(pmsn.sinkhorn(plain, prior, 500), pmsn.sinkhorn(relative, prior, 500), atol=1e-9, rtol=0)
