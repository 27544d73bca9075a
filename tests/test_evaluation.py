"""support/evaluation.py: features, k-NN, linear probe, against scikit-learn, NumPy and by hand."""

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pmsn
from support import evaluation
from support.evaluation import (agreement, extract, knn_predictions, linear_probe,
                                logistic_regression, nearest_neighbors, other_neighbors, purity)
from support.images import Images, center_crop, find_images
from support.runs import UserError
from test_images import draw, reader
from test_pmsn import close
from test_runs import together


# ---- Features ------------------------------------------------------------------------------------
def small_vit():
    torch.manual_seed(0)
    return pmsn.VisionTransformer(image_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2)


def features_of(count, *broken):
    """Features of gray images, which do not split evenly over two processes, and their indices."""
    images = Images(range(0, 30 * count, 30), lambda image: image, reader(*broken))
    return extract(small_vit(), images, workers=0)


def test_the_first_of_two_processes_has_the_features_of_all_images():
    """Also of a single image, which is too few for both processes."""
    expected, indices = features_of(7)
    assert indices.tolist() == [*range(7)] and len(expected.unique(dim=0)) == 7
    first, second = together(2, lambda: (features_of(7), features_of(1), features_of(7, 30)))
    close(first[0][0], expected, 1e-7)
    assert torch.equal(first[0][1], indices)
    close(first[1][0], expected[:1], 1e-7)
    # The second image is broken, which is the first one of the second process.
    close(first[2][0], expected[[0, 2, 3, 4, 5, 6]], 1e-7)
    assert first[2][1].tolist() == [0, 2, 3, 4, 5, 6]
    assert second == (None, None, None)


def test_unreadable_images_have_no_features(tmp_path):
    """In training, the next image takes its place."""
    folder = draw(tmp_path, (4, 4))
    (folder / "train/class0/002.jpg").write_text("no image")
    (paths, _), _ = find_images(folder)
    images = Images(paths, functools.partial(center_crop, size=16))
    features, indices = extract(small_vit(), images, 0)
    assert len(features) == 7 and indices.tolist() == [0, 1, 3, 4, 5, 6, 7]
    replaced, index, readable = images[2]
    assert (index, readable) == (2, False) and torch.equal(replaced, images[3][0])


def test_one_percent_of_unreadable_images_counts_over_all_processes():
    """Each of the two processes may have one of seven images, but not both of them."""
    first, second = together(2, lambda: features_of(7, 30, 60))
    assert isinstance(first, UserError) and second is None
    assert str(first) == "2 of 7 images cannot be read, which is more than 1%"


def test_a_single_image_that_cannot_be_read_is_no_data_set():
    with pytest.raises(UserError, match="^1 of 1 images cannot be read"):
        features_of(1, 0)


def test_features_are_those_of_evaluation_mode():
    """An encoder with BatchNorm uses its statistics, and is in training mode again afterwards."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.BatchNorm1d(5))
    images = Images(range(3), lambda image: image, lambda i: torch.full(
        (3, 8, 8), 50 * int(i), dtype=torch.uint8))
    features, _ = extract(encoder, images, 0)
    pixels = torch.tensor([0, 50, 100]) / 255
    mean, std = torch.tensor([pmsn.IMAGENET_MEAN, pmsn.IMAGENET_STD])
    x = ((pixels[:, None] - mean) / std).repeat_interleave(64, dim=1)
    expected = encoder[1](x) / math.sqrt(1 + 1e-5)
    torch.testing.assert_close(features, expected.detach(), atol=1e-5, rtol=1e-5)
    assert encoder.training and encoder[2].num_batches_tracked == 0


def test_shots_are_counted_on_training_images(monkeypatch):
    """Features are the label, but classes 1 and 4 look like the most frequent one."""
    counts = torch.tensor([150, 100, 20, 19, 3])
    labels, test_labels = torch.arange(5).repeat_interleave(counts), torch.arange(5).repeat(4)
    features, test_features = torch.eye(5)[labels], torch.eye(5)[test_labels]
    test_features[(test_labels == 1) | (test_labels == 4)] = torch.eye(5)[0]
    answers = iter([(features, torch.arange(len(labels))), (test_features, torch.arange(20))])
    monkeypatch.setattr(evaluation, "extract", lambda *_: next(answers))
    found = evaluation.evaluate(None, ([], labels), ([], test_labels), image_size=16, workers=0)
    expected = {"all": 0.6, "many": 1.0, "medium": 0.5, "few": 0.5}
    for method in ("knn", "linear"):
        for name, value in expected.items():
            assert found[f"{method}_{name}"] == pytest.approx(value)


class Brightness(nn.Linear):
    """An encoder that takes the mean of all pixels, as a direction in the plane."""

    def __init__(self):
        super().__init__(1, 2)

    def forward(self, images):
        return F.pad(images.mean(dim=(1, 2, 3))[:, None], (0, 1), value=1.0)


def test_labels_are_those_of_the_readable_images(tmp_path):
    """Dark and bright images take turns. Two processes have the same accuracies as one."""
    paths, labels = [str(tmp_path / f"{i:02}.png") for i in range(60)], torch.arange(60) % 2
    for i, path in enumerate(paths):
        Image.new("L", (16, 16), 200 * (i % 2) + i % 30).save(path)
    for broken in (1, 44):  # one for training, and one for validation
        Path(paths[broken]).write_text("no image")

    def found():
        return evaluation.evaluate(Brightness(), (paths[:40], labels[:40]),
                                   (paths[40:], labels[40:]), image_size=16, workers=0)

    expected = {f"{method}_{group}": 1.0 for method in ("knn", "linear")
                for group in ("all", "medium", "few")}  # 20 dark images, and 19 bright ones
    assert found() == expected and together(2, found) == [expected, expected]


# ---- Nearest neighbors ---------------------------------------------------------------------------
def overlapping_classes():
    """Features and labels of 4 classes, one with half of the 2000 training and 1030 test images."""
    generator = torch.Generator().manual_seed(2)
    centers, noise = torch.randn(3034, 32, generator=generator).double().split([4, 3030])
    labels = (torch.arange(3030) % 6).clamp_max(3)
    features = centers[labels] + 3 * noise
    return features[:2000], labels[:2000], features[2000:], labels[2000:]


@pytest.mark.parametrize("options", [
    {}, {"k": 1}, {"k": 10, "temperature": 1.0}, {"k": 40, "temperature": 0.3}])
def test_knn_equals_scikit_learn(options):
    """The defaults are k = 20 and the temperature .07."""
    neighbors = pytest.importorskip("sklearn.neighbors", reason="scikit-learn is the oracle")
    features, labels, test_features, _ = overlapping_classes()
    k, temperature = options.get("k", 20), options.get("temperature", 0.07)
    oracle = neighbors.KNeighborsClassifier(
        k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature))
    expected = oracle.fit(features, labels).predict(test_features)
    got = knn_predictions(features, labels, test_features, **options)
    assert got.tolist() == expected.tolist()
    _, index = nearest_neighbors(test_features, features, k)
    assert index.tolist() == oracle.kneighbors(test_features)[1].tolist()


def test_with_few_images_all_of_them_are_neighbors():
    """Three images: two near ones outvote the nearest one of another class."""
    features = torch.tensor([[1.0, 0.0], [0.9, 0.3], [0.9, 0.31]])
    labels = torch.tensor([5, 7, 7])
    assert knn_predictions(features, labels, torch.tensor([[1.0, 0.05]]), k=20).tolist() == [7]
    assert knn_predictions(features, labels, torch.tensor([[1.0, 0.05]]), k=1).tolist() == [5]
    assert agreement(features, labels) == pytest.approx(2 / 6)


def numpy_knn(features, labels, test_features, k, temperature):
    """Weighted k-NN in float64, with the logarithms of the votes, which cannot underflow."""
    unit, test_unit = (np.asarray(x, dtype=np.float64) for x in (features, test_features))
    unit, test_unit = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (unit, test_unit))
    answers = []
    for cosines in test_unit @ unit.T:
        scores = {}
        for i in np.argsort(-cosines)[:k]:
            scores.setdefault(int(labels[i]), []).append(cosines[i] / temperature)
        votes = {c: np.logaddexp.reduce(of_class) for c, of_class in scores.items()}
        answers.append(max(votes, key=votes.get))
    return answers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.1, 0.001])
def test_votes_that_underflow_still_count(temperature, dtype):
    """The nearest image has a cosine of about .5, and exp(-.5 / .001) is 0 in float32."""
    features, labels, test_features, _ = overlapping_classes()
    features, test_features = features[300:600].to(dtype), test_features[:200].to(dtype)
    labels = labels[300:600] + 1
    cosines, _ = nearest_neighbors(test_features, features, 1)
    assert cosines.median() < 0.6
    found = knn_predictions(features, labels, test_features, 20, temperature)
    assert found.tolist() == numpy_knn(features, labels, test_features, 20, temperature)
    assert {*found.tolist()} == {1, 2, 3, 4}  # No image has the class 0.


KEYS = torch.tensor([7, 1034, 2435099, 10**12])  # as in a data base of species


@pytest.mark.parametrize("classify", [knn_predictions, linear_probe])
def test_numbers_of_classes_may_have_gaps(classify):
    features, labels, test_features, _ = overlapping_classes()
    features, labels = features[:300], labels[:300]
    expected = classify(features, labels, test_features)
    assert {*expected.tolist()} == {0, 1, 2, 3}
    assert torch.equal(classify(features, KEYS[labels], test_features), KEYS[expected])


@pytest.mark.parametrize("classify", [knn_predictions, linear_probe])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16,
                                   torch.uint32, torch.uint64])
def test_labels_may_have_any_integer_dtype(dtype, classify):
    features, labels, test_features, _ = overlapping_classes()
    features, labels = features[:99], 20 * labels[:99]
    found = classify(features, labels.to(dtype), test_features)
    assert torch.equal(found.long(), classify(features, labels, test_features))


def test_blocks_have_64_mib_and_at_least_one_row():
    assert evaluation.rows_per_block(8142) == 64 * 2**20 // (4 * 8142)
    assert evaluation.rows_per_block(2**24) == evaluation.rows_per_block(10**9) == 1


def test_an_image_is_no_neighbor_of_itself_among_equal_images():
    """20 rows of one direction, 3 of another one, and one that is alone. All others are equal."""
    features = torch.tensor(20 * [[1.0, 0]] + 3 * [[0.0, 1]] + [[-1.0, 0.1]])
    rows = torch.tensor([0, 7, 19, 20, 22, 23])
    found = other_neighbors(features, rows, 2)
    assert found.shape == (6, 2)
    for row, neighbors in zip(rows.tolist(), found.tolist()):
        assert row not in neighbors and len(set(neighbors)) == 2
        group = range(20) if row < 20 else range(20, 23)  # The last row is near the second group.
        assert set(neighbors) <= set(group)
    # Each label of the first group is there once, so no neighbor has the label of its image.
    assert agreement(features[:20], torch.arange(20)) == 0


def test_agreement_against_numpy():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(60, 5)), rng.integers(0, 3, 60)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    nearest = np.argsort(-unit @ unit.T, axis=1)[:, 1:11]  # The first one is the image itself.
    expected = (labels[nearest] == labels[:, None]).mean()
    assert abs(agreement(torch.tensor(features), torch.tensor(labels)) - expected) < 1e-6


# ---- Logistic regression -------------------------------------------------------------------------
def standardize(x, test_x):
    """Mean 0 and standard deviation 1 of the training features, 0 for constant ones."""
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
    return [torch.where(std > 1e-5, (z - mean) / std, 0.0) for z in (x, test_x)]


def few_and_many_dimensions(name):
    """Four kinds of features (N, d) and labels: what is easy, correlated, unequal, and pixels."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(4000, 40, generator=generator)
    if name == "groups":
        labels = torch.arange(4000) % 10
        return torch.randn(10, 40, generator=generator)[labels] + noise, labels
    if name == "correlated":  # Variances fall by a factor of a million.
        labels = torch.arange(4000) % 10
        x = torch.randn(10, 40, generator=generator)[labels] + noise
        return x * torch.logspace(0, -3, 40) @ torch.randn(40, 40, generator=generator), labels
    if name == "long tail":  # Class c has a share of about 1 / c.
        labels = (4000 ** torch.rand(4000, generator=generator)).log2().long()
        return torch.randn(12, 40, generator=generator)[labels] + noise, labels
    digits = pytest.importorskip("sklearn.datasets", reason="its handwritten digits").load_digits()
    order = torch.randperm(len(digits.data), generator=generator)
    pixels = torch.from_numpy(digits.data).float() @ torch.randn(64, 160, generator=generator)
    return pixels.relu()[order], torch.from_numpy(digits.target)[order]


@pytest.mark.parametrize("name", ["groups", "correlated", "long tail", "handwritten digits"])
@pytest.mark.parametrize("images_per_dimension", [0.25, 1, 4, 10])
def test_linear_probe_equals_scikit_learn(name, images_per_dimension):
    """The same penalty, with as few images as a quarter of the dimensions, in three precisions."""
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is the oracle")
    features, labels = few_and_many_dimensions(name)
    n = min(int(images_per_dimension * features.shape[1]), len(labels) - 500)
    x, test_x = features[:n], features[n:]
    # Some labels may be missing among so few images. scikit-learn takes only those that exist.
    labels, test_labels = labels[:n], labels[n:]
    unit, test_unit = standardize(x, test_x)
    for penalty in (1.0, 0.1):
        oracle = linear_model.LogisticRegression(C=1 / penalty, max_iter=5000, tol=1e-6)
        expected = torch.from_numpy(oracle.fit(unit.double(), labels).predict(test_unit.double()))
        accuracy = (expected == test_labels).double().mean().item()
        got = linear_probe(x, labels, test_x, penalty)
        assert (got == test_labels).double().mean().item() == pytest.approx(accuracy, abs=0.005)
        assert (got == expected).double().mean() > 0.99
    for dtype in (torch.float16, torch.bfloat16):
        x16, test_x16 = ((x / x.std()).to(dtype) for x in (x, test_x))
        oracle.fit(*(standardize(x16.double(), test_x16.double())[0], labels))
        expected = oracle.score(standardize(x16.double(), test_x16.double())[1], test_labels)
        got = linear_probe(x16, labels, test_x16, penalty)
        assert (got == test_labels).double().mean().item() == pytest.approx(expected, abs=0.01)


def test_logistic_regression_has_no_gradient_in_float64():
    """At the minimum the derivatives are 0. Classes 1 and 4 have no images."""
    x, labels, *_ = overlapping_classes()
    x, labels = x[:300], torch.tensor([0, 2, 3, 5])[labels[:300]]
    for with_bias in (True, False):
        weight, bias = logistic_regression(x, labels, 2.0, with_bias)
        error = (x @ weight + bias).softmax(dim=1) - F.one_hot(labels, 6)  # (300, 6)
        close(x.T @ error + 2.0 * weight, torch.zeros(32, 6), 1e-2)
        close(error.sum(dim=0) if with_bias else bias, torch.zeros(6), 1e-2)


def test_the_probe_does_not_depend_on_where_it_is_called():
    """In inference mode, without or with gradients, under autocast, with a graph behind features.

    Shifts and scales of features do not matter, nor does a feature that is constant in training.
    """
    x, labels, test_x, _ = overlapping_classes()
    x, test_x, labels = x[:200].float(), test_x.float(), labels[:200]
    expected = linear_probe(x, labels, test_x)
    with torch.inference_mode():
        assert torch.equal(linear_probe(x * 1, labels * 1, test_x * 1), expected)
    with torch.no_grad():
        assert torch.equal(linear_probe(x, labels.int(), test_x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_probe(x, labels, test_x), expected)
    graph = x.clone().requires_grad_() * 1
    assert torch.equal(linear_probe(graph, labels, test_x), expected)
    scale = torch.logspace(-6, 6, 32)
    moved, test_moved = (F.pad(scale * (10 + x), (0, 1), value=10.1) for x in (x, test_x))
    moved, test_moved = F.pad(moved, (0, 1)), F.pad(test_moved, (0, 1), value=3.0)
    # Classes may have any numbers, and a feature may vary by a hundred-thousandth.
    names = torch.tensor([5, 7, 10**12, 10**12 + 1])
    assert torch.equal(linear_probe(x, names[labels], test_x), names[expected])
    small = [1 + 1e-4 * z[:, :1] / x.abs().amax() for z in (x, test_x)]
    alone = [z[:, :1].contiguous() for z in (x, test_x)]
    found, right = (linear_probe(*pair[:1], labels, pair[1]) for pair in (small, alone))
    assert (found == right).double().mean() > 0.9
    assert (linear_probe(moved, labels, test_moved) == expected).double().mean() > 0.99


# ---- Blocks --------------------------------------------------------------------------------------
def test_blocks_of_two_rows_give_what_one_block_gives(monkeypatch):
    x, labels, test_x, _ = overlapping_classes()
    x, labels, test_x = x[:51], KEYS[labels[:51]], test_x[:301]

    def everything():
        return [*nearest_neighbors(test_x, x, 7), knn_predictions(x, labels, test_x, 7),
                *logistic_regression(x, labels.unique(return_inverse=True)[1], 1.0),
                linear_probe(x, labels, test_x)]

    expected = everything()
    monkeypatch.setattr(evaluation, "rows_per_block", lambda columns: 2)
    cosines, index, by_neighbors, weight, bias, by_probe = everything()
    close(cosines, expected[0], 1e-12)
    close(weight, expected[3], 1e-4)
    close(bias, expected[4], 1e-4)
    for found, whole in zip((index, by_neighbors, by_probe), [expected[i] for i in (1, 2, 5)]):
        assert torch.equal(found, whole)


class Largest(TorchDispatchMode):
    """The largest number of elements of a tensor that an operation returns in this context."""
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return found


@pytest.mark.parametrize("classify", [
    lambda *arguments: knn_predictions(*arguments, k=2), linear_probe])
def test_no_matrix_is_larger_than_a_block(classify, monkeypatch):
    """Here a block has 2500 numbers, and a matrix of all images and classes would have 60,000.

    The largest other ones are the test features, and weights of the probe with their biases.
    """
    test_features, features, labels = torch.randn(400, 5), torch.randn(150, 5), torch.arange(150)
    monkeypatch.setattr(evaluation, "rows_per_block", lambda columns: 2500 // columns)
    with Largest() as largest:
        classify(features, labels, test_features)
    assert 2000 <= largest.numel <= 2500


# ---- Groups --------------------------------------------------------------------------------------
def test_purity_by_hand():
    groups = torch.tensor([0, 0, 0, 2, 2, 2, 2])
    labels = torch.tensor([5, 5, 2, 0, 1, 2, 1])  # two of three, two of four
    assert purity(groups, labels) == pytest.approx(4 / 7)


def test_weighted_purity_by_hand():
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    labels = torch.tensor([5, 5, 2, 0, 1, 2, 3])  # two of three, one of four
    found = purity(groups, labels, torch.tensor([0.75, 0.25]))
    assert found == pytest.approx(0.75 * 2 / 3 + 0.25 / 4)


# ---- Wrong arguments -----------------------------------------------------------------------------
BAD_FEATURES = [  # features, labels, test features
    [torch.ones(3, 2), torch.tensor([0, 1, -1]), torch.ones(1, 2)],
    [torch.ones(3, 2), torch.tensor([0.0, 1.0, 1.0]), torch.ones(1, 2)],
    [torch.ones(3, 2), torch.tensor([0, 1]), torch.ones(1, 2)],
    [torch.ones(3, 2), torch.tensor([[0, 1, 1]]), torch.ones(1, 2)],
    [torch.ones(0, 2), torch.tensor([], dtype=torch.long), torch.ones(1, 2)],
    [torch.ones(3, 2), torch.tensor([0, 1, 1]), torch.ones(1, 3)],
    [torch.ones(3), torch.tensor([0, 1, 1]), torch.ones(1)],
    [torch.tensor([[0.0], [math.nan]]), torch.tensor([0, 1]), torch.ones(1, 1)],
    [torch.ones(2, 1), torch.tensor([0, 1]), torch.tensor([[math.inf]])],
    [torch.ones(3, 2), torch.tensor([0, 1, 1]), torch.ones(1, 2).double()],
    [torch.ones(3, 2).half(), torch.tensor([0, 1, 1]), torch.ones(1, 2)]]


@pytest.mark.parametrize("function, arguments, message", [
    (lambda x: knn_predictions(*x, k=1), BAD_FEATURES, "labels|features"),
    (lambda x: linear_probe(*x), BAD_FEATURES, "labels|features"),
    (lambda x: logistic_regression(*x[:2], 1.0), BAD_FEATURES[:5], "labels|features"),
    (lambda x: knn_predictions(torch.eye(3), torch.arange(3), torch.eye(3), x), [0], "k"),
    (lambda x: nearest_neighbors(torch.eye(3), torch.eye(3), x), [0, 4, -1], "k must be from 1 to"),
    (lambda x: knn_predictions(torch.eye(3), torch.arange(3), torch.eye(3), 1, x), [0, -1],
     "temperature"),
    (lambda x: linear_probe(torch.eye(3), torch.arange(3), torch.eye(3), x),
     [-1.0, math.nan, math.inf], "penalty")])
def test_wrong_arguments_are_refused(function, arguments, message):
    for wrong in arguments:
        with pytest.raises(ValueError, match=message):
            function(wrong)


def test_one_row_that_is_not_finite_is_counted():
    test_features = torch.ones(4, 2)
    test_features[2] = math.nan
    with pytest.raises(ValueError, match="^1 of 4 rows of the test features are not finite$"):
        knn_predictions(torch.eye(2), torch.arange(2), test_features, 1)


def test_effective_prototypes_by_hand():
    assert evaluation.effective_prototypes(torch.full((8,), 1 / 8)) == pytest.approx(8)
    assert evaluation.effective_prototypes(torch.tensor([0.5, 0.5, 0.0])) == pytest.approx(2)
