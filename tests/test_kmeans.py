"""toy_kmeans.py against scikit-learn, SciPy, enumeration and formulas written out again."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pmsn
import toy_kmeans

REPOSITORY = Path(__file__).parents[1]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- Agreement, data, K-means ----------------------------------------------------------------------------------------


def test_adjusted_rand_index_by_hand():
    # table [[2, 1], [0, 3]]: pairs together 1 + 0 + 0 + 3 = 4; rows 3 + 3, columns 1 + 6; expected 6 * 7 / 15
    first, second = [0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]
    assert toy_kmeans.adjusted_rand_index(first, second) == pytest.approx((4 - 2.8) / (6.5 - 2.8))
    assert toy_kmeans.adjusted_rand_index([0, 0, 1], [1, 1, 0]) == 1
    assert toy_kmeans.adjusted_rand_index([0, 0, 0], [0, 0, 0]) == 1


def test_adjusted_rand_index_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the oracle here")
    rng = np.random.default_rng(0)
    for k in (2, 3, 6):
        first, second = rng.integers(k, size=50), rng.integers(4, size=50)
        mixed = np.where(rng.random(50) < 0.5, first, second)
        for other in (second, mixed):
            assert toy_kmeans.adjusted_rand_index(torch.tensor(first), torch.tensor(other)) == pytest.approx(
                metrics.adjusted_rand_score(first, other), abs=1e-12)


@pytest.mark.parametrize("imbalance, sizes", [(1, [200, 200]), (10, [364, 36]), (50, [392, 8]), (1000, [399, 1])])
def test_groups_have_the_sizes_asked_for(imbalance, sizes):
    points, groups = toy_kmeans.two_groups(400, imbalance, seed=1)
    assert torch.bincount(groups).tolist() == sizes
    large = points[groups == 0]
    assert large[:, 0].std() == pytest.approx(0.25, rel=0.2) and large[:, 1].std() == pytest.approx(1, rel=0.2)
    assert points[groups == 1, 0].mean() - large[:, 0].mean() == pytest.approx(toy_kmeans.DISTANCE, abs=0.8)
    assert torch.equal(points, toy_kmeans.two_groups(400, imbalance, seed=1)[0])


@pytest.mark.parametrize("k", [2, 3, 5])
def test_kmeans_reaches_scikit_learns_objective(k):
    cluster = pytest.importorskip("sklearn.cluster", reason="scikit-learn is the oracle here")
    points = torch.randn(3, 60, 2, generator=generator(k), dtype=torch.float64)
    clusters, objective = toy_kmeans.kmeans(points, k, generator(), starts=60)
    for x, c, value in zip(points.numpy(), clusters.numpy(), objective.tolist()):
        oracle = cluster.KMeans(k, n_init=60, random_state=0).fit(x)
        assert value <= oracle.inertia_ * (1 + 1e-6)
        by_hand = sum(((x[c == j] - x[c == j].mean(axis=0)) ** 2).sum() for j in range(k))
        assert value == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize("sizes", [(5, 5), (7, 3), (1, 9)])
def test_kmeans_with_sizes_is_the_best_of_all_partitions_of_these_sizes(sizes):
    points = torch.randn(4, 10, 2, generator=generator(3), dtype=torch.float64)
    clusters, objective = toy_kmeans.kmeans(points, 2, generator(), sizes=sizes, starts=100)
    for x, c, value in zip(points.numpy(), clusters, objective.tolist()):
        assert torch.bincount(c).tolist() == list(sizes)
        costs = []
        for first in itertools.combinations(range(10), sizes[0]):
            parts = x[list(first)], np.delete(x, list(first), axis=0)
            costs.append(sum(((part - part.mean(axis=0)) ** 2).sum() for part in parts))
        assert value == pytest.approx(min(costs), rel=1e-9)


def test_an_empty_cluster_keeps_its_centroid():
    points = torch.zeros(1, 4, 2)
    clusters, objective = toy_kmeans.kmeans(points, 3, generator(), starts=2)
    assert objective.item() == 0 and clusters.shape == (1, 4)


def test_matched_prior_finds_the_groups_that_kmeans_cuts():
    """The issue's numbers: at 10:1 at least .95 against at most .5 over 20 data seeds, at 1:1 both at least .95."""
    scores, _ = toy_kmeans.sweep(400, list(range(1000, 1020)), (1, 10))
    mean = {name: {ratio: np.mean(values) for ratio, values in s.items()} for name, s in scores.items()}
    assert all(len(values) == 20 for s in scores.values() for values in s.values())
    assert mean["PMSN, matched prior"][10] >= 0.95 and mean["PMSN, matched prior"][1] >= 0.95
    assert mean["K-means"][10] <= 0.5 and mean["K-means"][1] >= 0.95
    assert mean["MSN (uniform prior)"][10] <= 0.5 and mean["MSN (uniform prior)"][1] >= 0.95
    assert mean["PMSN, half the exponent"][10] < mean["PMSN, matched prior"][10]


# ---- Volume terms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3, 7])
def test_simplex_has_equal_angles(k):
    vertices = toy_kmeans.simplex(k)
    gram = vertices @ vertices.T
    wanted = torch.full((k, k), -1 / (k - 1), dtype=torch.float64).fill_diagonal_(1)
    torch.testing.assert_close(gram, wanted)


@pytest.mark.parametrize("sizes", [(3, 9), (2, 3, 7), (4, 4, 4), (1, 2, 3, 6)])
def test_volume_terms_are_their_formulas(sizes):
    """Formulas in the shares alone, or loops over the embeddings in NumPy."""
    k, n, share = len(sizes), sum(sizes), np.array(sizes) / sum(sizes)
    prior = pmsn.power_law_prior(k, 1.0)
    value = {name: term(torch.tensor(sizes)) for name, term in toy_kmeans.volume_terms(prior).items()}
    z = np.repeat(toy_kmeans.simplex(k).numpy(), sizes, axis=0)
    two = np.concatenate([z, z])
    simclr = np.mean([math.log(sum(math.exp(a @ b / 0.1) for j, b in enumerate(two) if j != i))
                      for i, a in enumerate(two)])
    assert value["SimCLR"] == pytest.approx(simclr, rel=1e-9)

    scaled = z * math.sqrt((k - 1) * (1 - 1e-4) * (n - 1) / n)
    covariance = np.cov(scaled.T).reshape(k - 1, k - 1)
    hinge = np.maximum(0, 1 - np.sqrt(np.diag(covariance) + 1e-4)).mean()
    off_diagonal = 2 * (np.sum(covariance**2) - np.sum(np.diag(covariance) ** 2)) / (k - 1)
    assert value["VICReg"] == pytest.approx(25 * hinge + off_diagonal, abs=1e-9)

    logits = toy_kmeans.simplex(k).numpy() @ toy_kmeans.simplex(k).numpy().T / 0.1
    p_bar = share @ (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
    assert value["MSN"] == pytest.approx((p_bar * np.log(p_bar * k)).sum(), abs=1e-6)
    assert value["PMSN"] == pytest.approx((p_bar * np.log(p_bar / prior.numpy())).sum(), abs=1e-6)

    code = np.exp(logits * 0.1 / 0.5)[np.repeat(np.arange(k), sizes)]
    for _ in range(300):
        code = code / code.mean(axis=0) / k
        code = code / code.sum(axis=1, keepdims=True)
    log_p = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))[np.repeat(np.arange(k), sizes)]
    assert value["SwAV"] == pytest.approx(-(code * log_p).sum(axis=1).mean(), rel=0.02)


@pytest.mark.parametrize("k, n", [(2, 40), (3, 24), (4, 12)])
def test_four_minima_are_uniform_and_pmsns_is_the_prior(k, n):
    """By enumeration of all sizes; the prior has whole sizes here."""
    sizes = {2: (32, 8), 3: (12, 8, 4), 4: (5, 4, 2, 1)}[k]
    terms = toy_kmeans.volume_terms(torch.tensor(sizes) / n)
    every = list(toy_kmeans.compositions(n, k))
    assert len(every) == math.comb(n - 1, k - 1) and all(s.sum() == n and (s > 0).all() for s in every)
    for name, term in terms.items():
        best = min(every, key=term)
        assert tuple(best.tolist()) == (sizes if name == "PMSN" else (n // k,) * k), name


def test_minimise_sizes_finds_a_known_minimum():
    target = torch.tensor([48, 24, 16, 12])
    found = toy_kmeans.minimise_sizes(lambda s: (s - target).square().sum().item(), 4, generator(), starts=1)
    assert torch.equal(found, target)
    assert torch.equal(toy_kmeans.minimise_sizes(lambda s: s[0].item(), 2, generator()), torch.tensor([1, 99]))


# ---- Propositions ----------------------------------------------------------------------------------------------------


def test_every_proposition_holds():
    tolerance = {"3  2T (-log likelihood), T = 1e-4 -> K-means objective": 2e-4 * math.log(12.5),  # least weight .08
                 "4  Sinkhorn, epsilon = .02 -> best equal-size assignment": 0.02 * math.log(3),
                 "4  Sinkhorn onto pi -> best assignment of sizes N pi": 0.02 * math.log(3)}
    rows = [row for p in (toy_kmeans.proposition_1, toy_kmeans.proposition_2, toy_kmeans.proposition_3,
                          toy_kmeans.proposition_4) for row in p(generator(7))]
    assert {row[0][0] for row in rows} == set("1234") and len({row[0] for row in rows}) == len(rows)
    assert tolerance.keys() <= {row[0] for row in rows}
    for what, left, right, difference, count in rows:
        assert abs(left - right) <= difference <= tolerance.get(what, 1e-9), what
        assert count >= 3


def test_row_reports_the_largest_difference():
    assert toy_kmeans.row("x", [(1.0, 1.5), (4.0, 2.0), (3.0, 3.0)]) == ("x", 3.0, 3.0, 2.0, 3)


def test_memberships_are_all_of_them():
    assert len(toy_kmeans.memberships(5, 3)) == 3**5 - 3 * 2**5 + 3  # surjections, by inclusion and exclusion
    assert len(toy_kmeans.memberships(5, 3).unique(dim=0)) == 150


@pytest.mark.parametrize("objective", [toy_kmeans.explicit_objective, toy_kmeans.implicit_objective])
def test_objectives_are_a_loop_over_clusters(objective):
    rng = np.random.default_rng(1)
    x, labels = rng.normal(size=(12, 3)), np.array([0, 1, 2] * 4)
    wanted = sum(((x[labels == k] - x[labels == k].mean(axis=0)) ** 2).sum() for k in range(3))
    member = torch.eye(3, dtype=torch.float64)[torch.tensor(labels)]
    assert objective(torch.tensor(x), member).item() == pytest.approx(wanted, rel=1e-12)


def test_best_memberships_are_scikit_learns_kmeans():
    cluster = pytest.importorskip("sklearn.cluster", reason="scikit-learn is the oracle here")
    points = torch.randn(7, 2, generator=generator(5), dtype=torch.float64)
    best = toy_kmeans.implicit_objective(points, toy_kmeans.memberships(7, 3)).min().item()
    assert best == pytest.approx(cluster.KMeans(3, n_init=100, random_state=0).fit(points.numpy()).inertia_, rel=1e-9)


def test_prior_term_is_the_kl_of_the_mean():
    assignments = torch.randn(30, 4, generator=generator(2), dtype=torch.float64).softmax(dim=-1)
    prior = pmsn.power_law_prior(4, 1.5).double()
    mean = assignments.numpy().mean(axis=0)
    wanted = (mean * np.log(mean / prior.numpy())).sum()
    assert toy_kmeans.prior_term(assignments, prior).item() == pytest.approx(wanted, rel=1e-6)


def test_likelihood_decomposes_as_proposition_3_says():
    """The same identity with SciPy's densities and no `pmsn` at all: what the rows call left and right."""
    stats = pytest.importorskip("scipy.stats", reason="SciPy is the oracle here")
    rng = np.random.default_rng(0)
    z, q, weights, t = rng.normal(size=(20, 3)), rng.normal(size=(3, 3)), np.array([0.6, 0.3, 0.1]), 0.1
    z, q = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (z, q))
    density = np.stack([stats.multivariate_normal(mean, t * np.eye(3)).pdf(z) for mean in q], axis=1)
    nll = -np.log(density @ weights).mean()
    r = density * weights / (density @ weights)[:, None]
    distortion = (r * ((z[:, None] - q) ** 2).sum(axis=2)).sum(axis=1).mean() / (2 * t)
    r_bar = r.mean(axis=0)
    information = (r * np.log(r / r_bar)).sum(axis=1).mean()
    kl = toy_kmeans.prior_term(torch.tensor(r), torch.tensor(weights)).item()
    assert nll == pytest.approx(distortion + information + kl + 1.5 * math.log(2 * math.pi * t), rel=1e-9)


def test_codes_are_scipys_optimal_assignment():
    optimize = pytest.importorskip("scipy.optimize", reason="SciPy is the oracle here")
    score = torch.randn(6, 3, generator=generator(4), dtype=torch.float64)
    code = pmsn.sinkhorn((score / 0.02).softmax(dim=-1), torch.tensor([3, 2, 1]).double() / 6, 2000)
    columns = np.repeat(np.arange(3), [3, 2, 1])  # a prototype with n places is n columns
    rows, chosen = optimize.linear_sum_assignment(score.numpy()[:, columns], maximize=True)
    assert np.array_equal(code.argmax(dim=1).numpy()[rows], columns[chosen])


# ---- Command line ----------------------------------------------------------------------------------------------------


def run(*arguments):
    return subprocess.run([sys.executable, str(REPOSITORY / "toy_kmeans.py"), *map(str, arguments)],
                          capture_output=True, text=True)


def test_quick_run_writes_everything(tmp_path):
    result = run("--quick", "--out", tmp_path, "--seed", 3)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "kmeans.png", "hidden_prior.png"}
    results = json.loads((tmp_path / "results.json").read_text())
    cell = results["sweep"]["PMSN, matched prior"]["10"]
    assert len(cell["values"]) == 5 and cell["mean"] == pytest.approx(np.mean(cell["values"]))
    assert cell["std"] == pytest.approx(np.std(cell["values"], ddof=1))
    assert set(results["sweep"]) == {name for name, *_ in toy_kmeans.CURVES}
    assert set(results["minima"]) == {"SimCLR", "VICReg", "SwAV", "MSN", "PMSN"}
    for name, shares in results["minima"].items():
        assert shares == pytest.approx(results["prior"] if name == "PMSN" else [0.25] * 4), name
    for row in results["propositions"]:
        assert row["what"] in result.stdout
    assert results["config"]["seeds"] == [3, 4, 5, 6, 7] and "Rand" in result.stdout


@pytest.mark.parametrize("arguments, message", [
    (["--clusters", "1"], "--clusters must be in 2..10, got 1"),
    (["--points", "0"], "--points must be at least 10, got 0"),
    (["--imbalance", "0.5"], "--imbalance must be in 1..1000, large group : small group, got 0.5"),
    (["--imbalance", "nan"], "--imbalance must be in 1..1000, large group : small group, got nan"),
    (["--seed", "-1"], "--seed must not be negative, got -1"),
    (["--out", "/proc/nowhere"], "cannot write to --out /proc/nowhere: No such file or directory"),
])
def test_bad_input_is_named(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(toy_kmeans.UserError) as error:
        toy_kmeans.main(arguments)
    assert str(error.value) == message and not list(tmp_path.iterdir())


def test_bad_input_is_one_line_and_status_2(tmp_path):
    result = run("--points", 0, "--out", tmp_path)
    assert result.returncode == 2 and not result.stdout
    assert result.stderr == "toy_kmeans.py: --points must be at least 10, got 0\n"
