"""toy_kmeans.py against scikit-learn, enumeration, and formulas that are written out again."""

import itertools
import json

import numpy as np
import pytest
import torch

import pmsn
import toy_kmeans

def test_adjusted_rand_index_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the oracle here")
    torch.manual_seed(0)
    for k in (2, 3, 6):
        first, second = torch.randint(k, (50,)), torch.randint(4, (50,))
        mixed = torch.where(torch.rand(50) < 0.5, first, second)
        for other in (second, mixed):
            oracle = metrics.adjusted_rand_score(first.numpy(), other.numpy())
            assert toy_kmeans.adjusted_rand_index(first, other) == pytest.approx(oracle, abs=1e-12)
    assert toy_kmeans.adjusted_rand_index(0 * first, 0 * first) == 1

@pytest.mark.parametrize("k", [2, 5])
def test_kmeans_finds_the_objective_of_scikit_learn(k):
    cluster = pytest.importorskip("sklearn.cluster", reason="scikit-learn is the oracle here")
    torch.manual_seed(1)
    points = torch.randn(60, 3, dtype=torch.float64) + 3 * torch.randn(5, 3).repeat(12, 1)
    _, objective = toy_kmeans.kmeans(points, k, starts=100)
    oracle = cluster.KMeans(k, n_init=100, tol=0, random_state=0).fit(points.numpy())
    assert objective == pytest.approx(oracle.inertia_, rel=1e-9)

def test_kmeans_with_equal_sizes_is_the_best_of_all_halves():
    torch.manual_seed(3)
    for _ in range(4):
        points = torch.randn(10, 2, dtype=torch.float64)
        clusters, objective = toy_kmeans.kmeans(points, 2, starts=100, equal_sizes=True)
        assert torch.bincount(clusters).tolist() == [5, 5]
        costs = []
        for half in itertools.combinations(range(10), 5):
            parts = points.numpy()[list(half)], np.delete(points.numpy(), list(half), axis=0)
            costs.append(sum(((part - part.mean(axis=0)) ** 2).sum() for part in parts))
        assert objective == pytest.approx(min(costs), rel=1e-9)

def test_kmeans_survives_empty_clusters():
    clusters, objective = toy_kmeans.kmeans(torch.zeros(4, 2), 3, starts=2)
    assert objective == 0 and clusters.tolist() == [0, 0, 0, 0]

@pytest.mark.parametrize("sizes", [(80, 15, 5), (98, 1, 1), (34, 33, 33), (90, 10)])
def test_vicreg_prefers_equal_sizes_at_the_corners_of_a_simplex_only(sizes):
    """Whitened one-hot vectors in K - 1 dimensions cost it nothing, whatever the sizes."""
    one_hot = np.repeat(np.eye(len(sizes)), sizes, axis=0)
    one_hot -= one_hot.mean(axis=0)
    variances, axes = np.linalg.eigh(np.cov(one_hot.T))
    assert abs(variances[0]) < 1e-12 < variances[1]  # K - 1 dimensions
    whitened = one_hot @ axes[:, 1:] / np.sqrt(variances[1:])  # (N, K - 1)
    covariances = np.atleast_2d(np.cov(whitened.T))
    np.testing.assert_allclose(covariances, np.eye(len(sizes) - 1), atol=1e-10)
    _, terms = pmsn.vicreg_loss(torch.tensor(whitened), torch.tensor(whitened))
    assert terms["variance"] == 0 and terms["covariance"] < 1e-20
    prior = pmsn.power_law_prior(len(sizes), 0.0)
    at_corners = toy_kmeans.volume_terms(torch.tensor(sizes), prior)["VICReg"]
    assert at_corners > (5 if max(sizes) > 50 else 0)

@pytest.mark.slow
def test_quick_run_finds_groups_with_the_matched_prior_that_kmeans_cuts(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    toy_kmeans.main(["--quick", "--seed", "1000", "--imbalance", "5", "--out", str(out)])
    printed = capsys.readouterr().out
    written = {path.name for path in out.iterdir()}
    assert written == {"results.json", "kmeans.png", "hidden_prior.png"}
    results = json.loads((out / "results.json").read_text())
    mean = {}
    for method, row in results["adjusted_rand_index"].items():
        assert method in printed and set(row) == {"1", "5.0", "10"}
        assert all(len(values) == 3 for values in row.values())
        mean[method] = [np.mean(row[ratio]) for ratio in ("1", "10")]
    assert set(mean) == set(toy_kmeans.METHODS)
    assert min(mean["K-means"][0], mean["MSN"][0], *mean["PMSN matched"]) >= 0.95
    assert abs(mean["K-means"][1]) <= 0.1 and abs(mean["MSN"][1]) <= 0.1
    assert mean["PMSN half"][1] < mean["PMSN matched"][1] > mean["PMSN 1.5x"][1]
    for loss, shares in results["preferred_shares"].items():
        wanted = [6 / 11, 3 / 11, 2 / 11] if loss == "PMSN" else [1 / 3] * 3
        assert shares == pytest.approx(wanted), loss
    assert results["config"]["seed"] == 1000 and "s left" in printed
