"""Propositions 1 to 4 of the paper, to be read from top to bottom.

They say in which sense VICReg, MSN, SwAV and SimCLR are K-means with clusters of equal size. Above
each test stands its claim. The test computes both sides on random instances and compares them.

We know the paper's exact statements of propositions 2 to 4 in words only. The claims here are our
own precise versions, and the paper's may differ. Proposition 1 is the paper's, as we know it.

Notation: the rows of X (N, d) are the points x_n. P (N, K) is a membership matrix: P_nk is 1 if
point n is in cluster k, and 0 otherwise. Cluster k has size n_k and mean mu_k. None is empty.
"""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import pmsn
import toy_kmeans

EXACT = 1e-9  # Both sides are float64.


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def on_sphere(*shape):
    return F.normalize(normal(*shape), dim=-1)


def memberships(n, k):
    """All membership matrices without an empty cluster: (number, N, K)."""
    choices = torch.cartesian_prod(*[torch.arange(k)] * n)
    member = F.one_hot(choices, k).double()
    return member[(member.sum(dim=1) > 0).all(dim=1)]


def all_sizes(n, k):
    """All (n_1, ..., n_K) with sum n, each at least 1."""
    for cuts in itertools.combinations(range(1, n), k - 1):
        yield torch.tensor([0, *cuts, n]).diff()


def kmeans_objective(x, member):
    """sum_n |x_n - mu_k(n)|^2: (N, d), (..., N, K) -> (...)."""
    means = (member.mT @ x) / member.sum(dim=-2)[..., None]
    return (x - member @ means).square().sum(dim=(-1, -2))


def test_memberships_and_objective_against_counting_and_a_loop():
    assert len(memberships(5, 3).unique(dim=0)) == 3**5 - 3 * 2**5 + 3  # inclusion and exclusion
    assert len(list(all_sizes(12, 4))) == math.comb(11, 3)
    x, member = normal(12, 3), F.one_hot(torch.arange(12) % 3).double()
    parts = [x.numpy()[k::3] for k in range(3)]
    by_hand = sum(((part - part.mean(axis=0)) ** 2).sum() for part in parts)
    assert kmeans_objective(x, member).item() == pytest.approx(by_hand, rel=1e-12)


# ---- Proposition 1: K-means is a problem about memberships alone ---------------------------------
# Claim: for every P,  sum_n |x_n - mu_k(n)|^2  =  |X|^2 - tr((P'P)^-1 P'XX'P).
# The left side is explicit K-means, with centroids. The right side is implicit K-means, without.
# Proof: X - P (P'P)^-1 P'X is X minus a projection of X. So both problems have the same optimum.
def implicit_objective(x, member):
    inner = torch.linalg.solve(member.mT @ member, member.mT @ x @ x.T @ member)
    return x.square().sum() - inner.diagonal(dim1=-2, dim2=-1).sum(dim=-1)


def test_1_explicit_and_implicit_objective_are_the_same_number():
    torch.manual_seed(0)
    for _ in range(20):
        x = normal(50, 3)
        member = F.one_hot(torch.cat([torch.arange(5), torch.randint(5, (45,))])).double()
        implicit = implicit_objective(x, member).item()
        assert kmeans_objective(x, member).item() == pytest.approx(implicit, abs=EXACT)


def test_1_explicit_and_implicit_kmeans_have_the_same_optimum():
    torch.manual_seed(1)
    for k in [2, 3] * 10:
        x = normal(7, 2)
        implicit = implicit_objective(x, memberships(7, k)).min().item()  # the best of all P
        _, explicit = toy_kmeans.kmeans(x, k, starts=50)
        oracle = KMeans(k, n_init=50, random_state=0).fit(x.numpy())
        assert [explicit, oracle.inertia_] == pytest.approx([implicit] * 2, abs=EXACT)


# ---- Proposition 2: VICReg -----------------------------------------------------------------------
# Assumption: the embedding of image n is corner k(n) of a regular simplex (K, K-1), scaled so that
# clusters of equal size give unit variances.
# Claim (a): the variance and covariance terms are both 0 if and only if all sizes are equal.
# Proof: with shares s_k, the K-1 variances sum to K (1 - sum_k s_k^2) <= K-1. All of them reach 1
# only for s_k = 1/K, and there the covariance is the identity.
def test_2a_variance_and_covariance_vanish_only_for_equal_sizes():
    for sizes in [*all_sizes(12, 2), *all_sizes(12, 3), *all_sizes(12, 4)]:
        term = toy_kmeans.volume_terms(sizes, pmsn.power_law_prior(len(sizes), 0.0))["VICReg"]
        assert (term < 1e-6) == bool((sizes == 12 // len(sizes)).all()), sizes

# Claim (b): let positive pairs (i, j) be drawn with probability proportional to x_i . x_j >= 0. For
# equal sizes, the invariance term is an increasing affine function of the K-means objective J:
#     invariance  =  2K / (K-1) * (1 - N/K * (|X|^2 - J) / sum_ij x_i . x_j).
# Proof: a pair of different clusters contributes 2K / (K-1), and other pairs contribute 0. The sum
# of x_i . x_j over the pairs inside clusters is sum_k n_k^2 |mu_k|^2 = N/K * (|X|^2 - J).
def test_2b_invariance_is_affine_in_the_kmeans_objective():
    torch.manual_seed(3)
    for k in [2, 3] * 10:
        x = torch.randint(1, 5, (6, 2)).double()
        times = (x @ x.T).long().flatten()  # how often (i, j) is a positive pair
        pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))
        first, second = pairs.repeat_interleave(times, dim=0).T
        for member in memberships(6, k):
            if (member.sum(dim=0) == 6 // k).all():
                z = math.sqrt(k - 1) * member @ toy_kmeans.simplex(k)
                _, terms = pmsn.vicreg_loss(z[first], z[second])
                inside = 6 / k * (x.square().sum() - kmeans_objective(x, member))
                affine = 2 * k / (k - 1) * (1 - inside / times.sum())
                assert terms["invariance"].item() == pytest.approx(affine.item(), abs=EXACT)


# ---- Proposition 3: MSN and PMSN -----------------------------------------------------------------
# Assumption: embeddings z and prototypes q have unit length. The prototypes are the means of a
# mixture of K Gaussians with covariance T times the identity, and pi are its weights.
def mixtures():
    """Random instances: z, targets (40, 3), q (K, 3), uniform weights and pi (K,)."""
    torch.manual_seed(4)
    for k in [2, 3, 4, 5] * 5:
        prior = 1 / torch.arange(1, k + 1).double()
        uniform = torch.full_like(prior, 1 / k)
        yield on_sphere(40, 3), on_sphere(40, 3), on_sphere(k, 3), uniform, prior / prior.sum()


def mixture(z, q, prior, temperature):
    """The mean of -log p(z), and log p(cluster | z) (N, K), by torch.distributions."""
    gaussians = MultivariateNormal(q, temperature * torch.eye(3, dtype=q.dtype))
    log_likelihood = MixtureSameFamily(Categorical(prior), gaussians).log_prob(z)
    log_joint = gaussians.log_prob(z[:, None]) + prior.log()
    return -log_likelihood.mean().item(), log_joint.log_softmax(dim=1)


def prior_kl(r, prior):
    """KL(r_bar || pi) by pmsn_loss, for any assignments r (N, K)."""
    # We need embeddings whose predictions are r. The logits of a row can have any mean. We choose
    # the mean that gives all rows the same length, and the temperature 1 / length.
    logits = r.log() - r.log().mean(dim=1, keepdim=True)
    squares = logits.square().sum(dim=1, keepdim=True)
    z = logits + ((squares.max() - squares).clamp_min(0) / len(prior)).sqrt()
    temperature = 1 / squares.max().sqrt().item()
    corners = torch.eye(len(prior), dtype=r.dtype)
    return pmsn.pmsn_loss(z, z, corners, prior, temperature=temperature)[1]["prior_kl"].item()


def test_prior_kl_is_a_numpy_formula():
    torch.manual_seed(5)
    r, prior = normal(30, 4).softmax(dim=1), pmsn.power_law_prior(4, 1.5).double()
    mean = r.numpy().mean(axis=0)
    by_hand = (mean * np.log(mean / prior.numpy())).sum()
    assert prior_kl(r, prior) == pytest.approx(by_hand, rel=1e-9)

# Claim (a): MSN's prediction is the posterior under uniform weights, and its cross-entropy is the
# expected negative log posterior, where the sharpened targets give the clusters.
def test_3a_cross_entropy_of_msn_is_the_expected_negative_log_posterior():
    for z, targets, q, uniform, _ in mixtures():
        _, terms = pmsn.pmsn_loss(z, targets, q, uniform, temperature=0.1, sharpening=0.25)
        _, log_posterior = mixture(z, q, uniform, 0.1)
        _, log_posterior_of_targets = mixture(targets, q, uniform, 0.1)
        assigned = (log_posterior_of_targets / 0.25).softmax(dim=1)
        expected = -(assigned * log_posterior).sum(dim=1).mean()
        assert terms["cross_entropy"].item() == pytest.approx(expected.item(), abs=EXACT)

# Claim (b): for all weights pi, the negative log-likelihood of the mixture is the minimum over soft
# assignments r (N, K) of the free energy
#     distortion + information + KL(r_bar || pi) + d/2 log(2 * 3.14 * T),     where
#     distortion = mean_n sum_k r_nk |z_n - q_k|^2 / 2T,   information = H(r_bar) - mean_n H(r_n).
# The minimum is at the posterior. Any other r costs mean_n KL(r_n || posterior_n) more. The term
# KL(r_bar || pi) is PMSN's. For uniform pi it is MSN's, and the posterior is MSN's prediction.
def free_energy(r, z, q, kl, temperature=0.1):
    distortion = (r * torch.cdist(z, q).square()).sum(dim=1).mean() / (2 * temperature)
    information = (r * (r / r.mean(dim=0)).log()).sum(dim=1).mean()
    return (distortion + information).item() + kl + 1.5 * math.log(2 * math.pi * temperature)


def test_3b_the_likelihood_contains_the_terms_of_msn_and_pmsn():
    for z, _, q, uniform, prior in mixtures():
        nll, log_posterior = mixture(z, q, uniform, 0.1)
        _, terms = pmsn.pmsn_loss(z, z, q, uniform, temperature=0.1)
        energy = free_energy(log_posterior.exp(), z, q, terms["prior_kl"].item())
        assert energy == pytest.approx(nll, abs=EXACT)

        nll, log_posterior = mixture(z, q, prior, 0.1)
        r = log_posterior.exp()
        assert free_energy(r, z, q, prior_kl(r, prior)) == pytest.approx(nll, abs=EXACT)
        r = normal(40, len(q)).softmax(dim=1)
        excess = (r * (r.log() - log_posterior)).sum(dim=1).mean().item()
        assert free_energy(r, z, q, prior_kl(r, prior)) == pytest.approx(nll + excess, abs=EXACT)

# Claim (c): as T vanishes, 2T times the negative log-likelihood (without its constant) becomes the
# K-means objective per point, with centroids q. It is larger by at most 2T log(1 / min pi).
def test_3c_likelihood_becomes_kmeans_as_the_temperature_vanishes():
    t = 1e-4
    for z, _, q, _, prior in mixtures():
        nll, _ = mixture(z, q, prior, t)
        scaled = 2 * t * (nll - 1.5 * math.log(2 * math.pi * t))
        objective = torch.cdist(z, q).square().amin(dim=1).mean().item()
        assert -EXACT <= scaled - objective <= 2 * t * math.log(1 / prior.min().item())


# ---- Proposition 4: SwAV and SimCLR --------------------------------------------------------------
# Claim (a): as epsilon vanishes, Sinkhorn onto pi of softmax(z . q / epsilon) becomes the best
# assignment with sizes N pi: the largest sum of z . q, so for unit vectors the smallest sum of
# squared distances. It is off by at most epsilon log K per row. SwAV's pi is uniform.
@pytest.mark.parametrize("sizes", [(2, 2, 2), (3, 2, 1)])
def test_4a_codes_are_the_best_assignment_of_their_sizes(sizes):
    torch.manual_seed(6)
    every = memberships(6, 3)
    allowed = every[(every.sum(dim=1) == torch.tensor(sizes)).all(dim=1)]
    log_prior = (torch.tensor(sizes).double() / 6).log()
    for _ in range(20):
        score = on_sphere(6, 2) @ on_sphere(3, 2).T
        code = pmsn.sinkhorn((score / 0.02).log_softmax(dim=1), log_prior, 500).exp()
        best = (allowed * score).sum(dim=(1, 2)).max().item() / 6
        assert abs(best - (code * score).sum().item() / 6) <= 0.02 * math.log(3)


def test_4a_codes_are_scipys_assignment():
    torch.manual_seed(7)
    score, log_prior = normal(6, 3), (torch.tensor([3, 2, 1]).double() / 6).log()
    code = pmsn.sinkhorn((score / 0.02).log_softmax(dim=1), log_prior, 2000)
    columns = np.repeat(np.arange(3), [3, 2, 1])  # a prototype with n places is n columns
    rows, chosen = linear_sum_assignment(score.numpy()[:, columns], maximize=True)
    assert np.array_equal(code.argmax(dim=1).numpy()[rows], columns[chosen])

# Claim (b): let z have unit length, and let positives be drawn uniformly from the same cluster.
# Then T * alignment + 1 of SimCLR is the K-means objective per point.
@pytest.mark.parametrize("sizes", [(6, 6), (2, 4, 6), (3, 3, 6), (4, 4, 4)])
def test_4b_alignment_of_simclr_is_the_kmeans_objective(sizes):
    torch.manual_seed(8)
    clusters = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    # Each point is first in 12 pairs. All members of its cluster are second equally often.
    pairs = [(i, j) for i in range(12) for j in range(12) if clusters[i] == clusters[j]
             for _ in range(12 // sizes[clusters[i]])]
    first, second = torch.tensor(pairs).T
    for _ in range(5):
        z = on_sphere(12, 3)
        _, terms = pmsn.simclr_loss(z[first], z[second], temperature=0.1)
        objective = kmeans_objective(z, F.one_hot(clusters).double()).item() / 12
        assert 0.1 * terms["alignment"].item() + 1 == pytest.approx(objective, abs=EXACT)

# Claim (c): for clusters that are the corners of a regular simplex, SimCLR's uniformity is
#     sum_k n_k/N log((2 n_k - 1) e^(1/T) + 2 (N - n_k) e^(-1/((K-1) T))),
# and over all sizes it is smallest where they are equal.
@pytest.mark.parametrize("k", [2, 3, 4])
def test_4c_uniformity_of_simclr_is_smallest_for_equal_sizes(k):
    near, far = math.exp(1 / 0.1), math.exp(-1 / (k - 1) / 0.1)
    values = {}
    for sizes in all_sizes(12, k):
        value = toy_kmeans.volume_terms(sizes, pmsn.power_law_prior(k, 0.0))["SimCLR"]
        closed_form = sum(n / 12 * math.log((2 * n - 1) * near + 2 * (12 - n) * far)
                          for n in sizes.tolist())
        assert value == pytest.approx(closed_form, abs=EXACT)
        values[tuple(sizes.tolist())] = value
    assert min(values, key=values.get) == (12 // k,) * k
