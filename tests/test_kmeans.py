"""toy_kmeans.py against scikit-learn, enumeration, and formulas that are written out again."""

import itertools
import json
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from support import results
import pmsn
import toy_kmeans

SGD = torch.optim.SGD


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def objective_of(points, clusters):
    """The objective of K-means by its formula, from points (N, d) and clusters (N,)."""
    parts = [points[clusters == cluster].numpy() for cluster in clusters.unique()]
    return sum(((part - part.mean(axis=0)) ** 2).sum() for part in parts)


def test_adjusted_rand_index_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the oracle here")
    torch.manual_seed(0)
    for k in (2, 3, 6):
        first, second = torch.randint(k, (50,)), torch.randint(4, (50,))
        mixed = torch.where(torch.rand(50) < 0.5, first, second)
        for other in (second, mixed):
            oracle = metrics.adjusted_rand_score(first.numpy(), other.numpy())
            assert toy_kmeans.adjusted_rand_index(first, other) == pytest.approx(oracle, abs=1e-12)
    one, singles = torch.zeros(50, dtype=torch.long), torch.arange(50)
    for trivial in (one, singles):
        assert toy_kmeans.adjusted_rand_index(trivial, trivial) == 1
        assert metrics.adjusted_rand_score(trivial.numpy(), trivial.numpy()) == 1
    assert toy_kmeans.adjusted_rand_index(one, singles) == 0
    assert metrics.adjusted_rand_score(one.numpy(), singles.numpy()) == 0


@pytest.mark.parametrize("k", [2, 5])
def test_kmeans_finds_the_objective_of_scikit_learn(k):
    cluster = pytest.importorskip("sklearn.cluster", reason="scikit-learn is the oracle here")
    torch.manual_seed(1)
    points = torch.randn(60, 3, dtype=torch.float64) + 3 * torch.randn(5, 3).repeat(12, 1)
    clusters, objective = toy_kmeans.kmeans(points, k, starts=100)
    oracle = cluster.KMeans(k, n_init=100, tol=0, random_state=0).fit(points.numpy())
    assert objective == pytest.approx(oracle.inertia_, rel=1e-9)
    assert objective_of(points, clusters) == pytest.approx(objective, rel=1e-9)


@pytest.mark.parametrize("k", [2, 3])
def test_kmeans_is_the_best_of_all_partitions(k):
    """And one start of several is not always the best, so the starts are compared."""
    every = torch.cartesian_prod(*[torch.arange(k)] * 6)
    worse = 0
    for _ in range(4):
        points = torch.randn(6, 2, dtype=torch.float64)
        best = min(objective_of(points, clusters) for clusters in every)
        clusters, objective = toy_kmeans.kmeans(points, k, starts=50)
        assert objective == pytest.approx(best, rel=1e-9)
        assert objective_of(points, clusters) == pytest.approx(best, rel=1e-9)
        alone = [toy_kmeans.kmeans(points, k, starts=1)[1] for _ in range(10)]
        worse += max(alone) > 1.001 * best
    assert worse > 0


def test_all_starts_of_kmeans_run_to_their_end():
    """From the same centroids, Lloyd's algorithm in NumPy for more iterations than it needs."""
    points = torch.randn(200, 2, dtype=torch.float64)
    x, iterations = points.numpy(), set()
    for seed in range(5):
        torch.manual_seed(seed)
        _, objective = toy_kmeans.kmeans(points, 5, starts=4)
        torch.manual_seed(seed)
        ends = []
        for chosen in torch.rand(4, 200).argsort(dim=1)[:, :5]:
            centroids, objectives = x[chosen], []
            for _ in range(60):
                clusters = ((x[:, None] - centroids) ** 2).sum(axis=2).argmin(axis=1)
                centroids = np.stack([x[clusters == k].mean(axis=0) for k in range(5)])
                objectives.append(objective_of(points, torch.tensor(clusters)))
            assert objectives[-1] == objectives[-2]
            iterations.add(objectives.index(objectives[-1]))
            ends.append(objectives[-1])
        assert objective == pytest.approx(min(ends), rel=1e-9)
    assert max(iterations) > min(iterations) + 5  # Some starts must wait for others.


def test_kmeans_with_equal_sizes_is_the_best_of_all_halves():
    for _ in range(4):
        points = torch.randn(10, 2, dtype=torch.float64)
        clusters, objective = toy_kmeans.kmeans(points, 2, starts=100, equal_sizes=True)
        assert torch.bincount(clusters).tolist() == [5, 5]
        assert objective_of(points, clusters) == pytest.approx(objective, rel=1e-9)
        halves = itertools.combinations(range(10), 5)
        best = min(objective_of(points, torch.zeros(10).index_fill(0, torch.tensor(half), 1))
                   for half in halves)
        assert objective == pytest.approx(best, rel=1e-9)


def test_kmeans_survives_empty_clusters():
    clusters, objective = toy_kmeans.kmeans(torch.zeros(4, 2), 3, starts=2)
    assert objective == 0 and clusters.tolist() == [0, 0, 0, 0]


def test_runs_side_by_side_are_those_of_a_loop(float64, monkeypatch):
    """Each run alone, as a layer with an optimizer of its own, with the same random numbers."""
    optimizers = []

    def remembered(*arguments, **options):
        optimizers.append(SGD(*arguments, **options))
        return optimizers[-1]
    monkeypatch.setattr(torch.optim, "SGD", remembered)
    points = torch.randn(3, 50, 2) + 3 * torch.randn(3, 1, 2)
    prior = pmsn.power_law_prior(2, 1.5).double()
    torch.manual_seed(1)
    clusters = toy_kmeans.fit_pmsn(points, prior, starts=4, steps=6, noise=0.2)
    (weights, biases, prototypes), = [group["params"] for group in optimizers[0].param_groups]

    torch.manual_seed(1)
    first_angles = 2 * math.pi * torch.rand(3, 1)
    noise = 0.2 * torch.stack([torch.randn(12, 50, 2) for _ in range(12)])  # (2 * steps, R, N, 2)
    noise = noise.view(6, 2, 3, 4, 50, 2)
    chosen = set()
    for data_set in range(3):
        centered = points[data_set] - points[data_set].mean(dim=0)
        found = []
        for start in range(4):
            angle = first_angles[data_set].item() + math.pi / 2 * start
            direction = [math.cos(angle), math.sin(angle)]
            threshold = np.quantile(centered.numpy() @ direction, prior[0].item())
            encoder = nn.Linear(2, 2)
            encoder.weight.data = torch.tensor([direction, [0, 0]])
            encoder.bias.data = torch.tensor([-threshold, 1])
            corners = nn.Parameter(torch.tensor([[-1.0, 0], [1, 0]]))
            optimizer = SGD([*encoder.parameters(), corners], lr=0.3, momentum=0.8)
            for noises in noise[:, :, data_set, start]:
                anchors, targets = encoder(centered + noises[0]), encoder(centered + noises[1])
                loss, _ = pmsn.pmsn_loss(anchors, targets, corners, prior)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            trained = zip((weights, biases, prototypes), (encoder.weight, encoder.bias, corners))
            for of_all_runs, alone in trained:
                torch.testing.assert_close(of_all_runs[4 * data_set + start], alone)
            nearest = nn.functional.cosine_similarity(encoder(centered)[:, None], corners, dim=2)
            found.append((loss.item(), start, nearest.argmax(dim=1).tolist()))
        _, start, best = min(found)
        assert clusters[data_set].tolist() == best
        chosen.add(start)
    assert len(chosen) > 1  # Otherwise a fixed start would do.


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


def test_quick_run_finds_groups_with_the_matched_prior_that_kmeans_cuts(
        tmp_path, monkeypatch, capsys):
    """In this process, because a new one needs seconds for its imports."""
    out = tmp_path / "new" / "folder"
    options = ["--quick", "--seed", "1000", "--imbalance", "5", "--out", str(out)]
    done = []

    def run_here(experiment, jobs, args, keep):
        experiment, args = pickle.loads(pickle.dumps((experiment, args)))  # as another process
        for job in jobs:
            if len(done) == 3:
                raise KeyboardInterrupt
            keep(job, experiment(*job, args), 0)
            done.append(job)
    monkeypatch.setattr(results, "run_in_processes", run_here)
    with pytest.raises(SystemExit, match="^130$"):
        toy_kmeans.main(options)
    assert done == [(None,), (1,), (5,)]
    done.clear()
    toy_kmeans.main(options)  # continues
    assert done == [(10,)]
    printed = capsys.readouterr().out
    written = {path.name for path in out.iterdir()}
    assert written == {"lock", "results.json", "kmeans.png", "hidden_prior.png"}

    content = json.loads((out / "results.json").read_text())
    shares = {run["loss"]: list(run["results"].values())
              for run in content["runs"] if "loss" in run}
    assert set(shares) == {"SimCLR", "VICReg", "SwAV", "MSN", "PMSN"}
    for loss, of_loss in shares.items():
        wanted = [6 / 11, 3 / 11, 2 / 11] if loss == "PMSN" else [1 / 3] * 3
        assert of_loss == pytest.approx(wanted), loss
    assert content["config"]["prior"] == pytest.approx(shares["PMSN"])

    runs = [run for run in content["runs"] if "method" in run]
    assert sorted((run["method"], run["imbalance"], run["seed"]) for run in runs) == sorted(
        itertools.product(toy_kmeans.METHODS, (1, 5, 10), (1000, 1001, 1002)))
    mean = {}
    for method, imbalance in itertools.product(toy_kmeans.METHODS, (1, 10)):
        assert method in printed
        mean[method, imbalance] = np.mean([
            run["results"]["adjusted_rand_index"] for run in runs
            if (run["method"], run["imbalance"]) == (method, imbalance)])
    assert min(mean[method, 1] for method in ("K-means", "MSN", "PMSN matched")) >= 0.95
    assert mean["PMSN matched", 10] >= 0.95
    assert abs(mean["K-means", 10]) <= 0.1 and abs(mean["MSN", 10]) <= 0.1
    assert mean["PMSN half", 10] < mean["PMSN matched", 10] > mean["PMSN 1.5x", 10]
