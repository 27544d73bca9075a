"""Nearest neighbours and k-NN accuracy against brute force and scikit-learn."""

import numpy as np
import pytest
import torch

import pmsn


def features(count, seed, dim=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    return x * torch.rand(count, 1, generator=generator, dtype=torch.float64).mul(3).exp()  # norms must not matter


@pytest.mark.parametrize("k, block", [(1, 7), (5, 7), (12, 7), (5, 1), (5, 4096), (53, 10), (53, 4096)])
def test_neighbours_equal_brute_force(k, block):
    """53 images, 24 queries: blocks that do not divide them, smaller than k, larger than all."""
    bank, queries = features(53, seed=0), features(24, seed=1)
    similarity, index = pmsn.neighbours(queries, bank, k, block=block)
    assert similarity.shape == index.shape == (24, k)
    for i, query in enumerate(queries.numpy()):
        cosine = np.array([query @ row / np.linalg.norm(query) / np.linalg.norm(row) for row in bank.numpy()])
        nearest = sorted(range(53), key=lambda j: -cosine[j])[:k]
        assert index[i].tolist() == nearest
        np.testing.assert_allclose(similarity[i], cosine[nearest], atol=1e-12)


def test_a_query_in_the_bank_finds_itself():
    bank = features(20, seed=0)
    similarity, index = pmsn.neighbours(bank, bank, 1, block=6)
    assert index[:, 0].tolist() == list(range(20))
    torch.testing.assert_close(similarity[:, 0], torch.ones(20, dtype=torch.float64))


@pytest.mark.parametrize("k", [0, -1, 21])
def test_neighbours_refuse(k):
    with pytest.raises(ValueError, match="k must"):
        pmsn.neighbours(features(3, seed=0), features(20, seed=1), k)


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (10, 0.07), (10, 1.0), (40, 0.3)])
def test_knn_accuracy_equals_scikit_learn(k, temperature):
    """KNeighborsClassifier by cosine with weight exp(similarity / temperature); 101 and 67 images, blocks of 16."""
    sklearn_neighbors = pytest.importorskip("sklearn.neighbors", reason="scikit-learn is the oracle of this test")
    centres = features(6, seed=2)
    train_labels, test_labels = torch.arange(101) % 6, torch.arange(67) % 6
    train = centres[train_labels] + 4 * features(101, seed=3)
    test = centres[test_labels] + 4 * features(67, seed=4)
    oracle = sklearn_neighbors.KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / temperature))
    expected = oracle.fit(train, train_labels).score(test, test_labels)
    assert 0.25 < expected < 0.95
    got = pmsn.knn_accuracy(train, train_labels, test, test_labels, k=k, temperature=temperature, block=16)
    assert got == pytest.approx(expected, abs=1e-12)


def test_knn_votes_by_hand():
    """Two fair neighbours against one near one: cosines 1, .8, .8. At temperature 1 the two win (2 exp(.8) > exp(1)),
    at .1 the near one does (2 exp(8) < exp(10)). Labels may be lists; defaults run on a bank larger than k."""
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6], [-1.0, 0.0]])
    query = torch.tensor([[2.0, 0.0]])
    assert pmsn.knn_accuracy(train, [1, 0, 0, 2], query, [0], k=3, temperature=1.0) == 1.0
    assert pmsn.knn_accuracy(train, [1, 0, 0, 2], query, [1], k=3, temperature=0.1) == 1.0
    assert pmsn.knn_accuracy(train, [1, 0, 0, 2], query, [0], k=3, temperature=0.1) == 0.0
