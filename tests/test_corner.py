"""mnist_corner.py: images, measures, fairness between the priors, figures and whole runs."""

import contextlib
import itertools
import json
import math
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import mnist_corner
import pmsn
from support import drawings, results
from support.evaluation import agreement
from support.heads import CACHED_VIEWS, Heads, find_grouping, loss_of_table, train, two_views_of

SHARED = Path(__file__).parents[2] / "shared" / "data"
ARGS = dict(mnist=False, root="data", backgrounds=None, curve=False, joint=False, any_order=False,
            quick=False)
FEATURES = ("digit", "background")
BATCH = 64
SHORT = {"images": 2 * BATCH, "epochs": (1, 1, 1), "heads": 3}  # two steps of each training


@contextlib.contextmanager
def short():
    """Two steps of each training, three heads, and a fifth of the test images."""
    draw = mnist_corner.CornerImages.draw

    def fewer(images, count, balanced=False):
        return draw(images, count // 5 if count >= 2000 else count, balanced)
    with (patch.dict(mnist_corner.SYNTHETIC, SHORT), patch.dict(mnist_corner.MNIST, SHORT),
          patch("support.heads.BATCH_SIZE", BATCH),
          patch.object(mnist_corner.CornerImages, "draw", fewer)):
        yield


def short_networks(seed, long_tailed, contrast, args):
    with short():
        return mnist_corner.experiment("networks", seed, long_tailed, contrast, args)


@pytest.fixture
def run(tmp_path):
    def run(long_tailed, **changes):
        return short_networks(0, long_tailed, 0.8,
                              SimpleNamespace(**{**ARGS, "out": tmp_path, **changes}))
    return run


def corner_images(long_tailed, test=False, **settings):
    settings = {**mnist_corner.SYNTHETIC, **settings}
    return mnist_corner.load_images(SimpleNamespace(**ARGS), long_tailed, settings)[test]


def spy(monkeypatch):
    """Lists of (model, its weights, views) of every step of heads and of students."""
    steps = {"heads": [], "students": []}
    for name, kind in (("heads", Heads), ("students", pmsn.PMSN)):

        def watched(model, *views, forward=kind.forward, name=name, **options):
            weights = torch.cat([p.detach().flatten() for p in model.parameters()
                                 if p.requires_grad])
            inputs = views if name == "heads" else views[0]
            steps[name].append((model, weights, torch.stack(tuple(inputs))))
            return forward(model, *views, **options)
        monkeypatch.setattr(kind, "forward", watched)
    return steps


STEEP = 1.25  # the exponent of the long-tailed feature and of its prior


def power_law(count, exponent=STEEP):
    shares = np.arange(1.0, count + 1) ** -exponent
    return shares / shares.sum()


# ---- Data ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("long_tailed", FEATURES)
@pytest.mark.parametrize("test", [False, True])
def test_one_feature_is_long_tailed_and_the_other_one_balanced(long_tailed, test, monkeypatch):
    """However many images of each digit there are. The balanced feature has five classes."""
    # Ten classes of unequal sizes: 2 k + 1 images have the root k.
    labels = [(7 * torch.arange(n).sqrt().long()) % 10 for n in (300, 200)]
    monkeypatch.setattr(mnist_corner, "load_digits", lambda args: [
        (torch.zeros(len(part), 1, 20, 20), part) for part in labels])
    images = corner_images(long_tailed, test)
    assert len(images.images[0]) == len(images.labels[0]) == (200 if test else 300)
    for balanced in (False, True):
        pairs = images.draw(20_000, balanced)
        found = images.labels_of(pairs)
        assert torch.equal(found["digit"], labels[test][pairs[:, 0]])
        for feature in FEATURES:
            classes, exponent = (10, STEEP * (1 - balanced)) if feature == long_tailed else (5, 0)
            np.testing.assert_allclose(found[feature].bincount() / 20_000,
                                       power_law(classes, exponent), atol=0.015)
        together = torch.stack([*found.values()]).double()
        assert abs(torch.corrcoef(together)[0, 1]) < 0.04
    if test:  # The images of a class are equally frequent.
        counts = pairs[found["digit"] == 1, 0].bincount(minlength=200)[labels[1] == 1]
        assert counts.float().std() < 0.3 * counts.float().mean()


def test_a_network_is_judged_on_what_it_was_trained_for(run, monkeypatch):
    """Training and `judge` see long-tailed images, and neighbors are those of balanced images."""
    seen, judge = {}, mnist_corner.judge

    def spied_judge(model, losses, images, labels):
        seen["judge"] = labels
        return judge(model, losses, images, labels)

    def spied_neighbors(whose, representations, labels):
        seen["neighbors"] = labels
        return {}
    draws, draw = [], mnist_corner.CornerImages.draw

    def spied_draw(images, count, balanced=False):
        pairs = draw(images, count, balanced)
        draws.append((count, images.labels_of(pairs)))
        return pairs
    monkeypatch.setattr(mnist_corner, "judge", spied_judge)
    monkeypatch.setattr(mnist_corner, "neighbors", spied_neighbors)
    monkeypatch.setattr(mnist_corner.CornerImages, "draw", spied_draw)
    run("digit", curve=True)  # without step 3
    assert draws[0][0] == 2 * BATCH  # the images of the training come first
    for labels, exponent in ((draws[0][1], STEEP), (seen["judge"], STEEP), (seen["neighbors"], 0)):
        for what, shares in (("digit", power_law(10, exponent)), ("background", power_law(5, 0))):
            found = labels[what].bincount(minlength=len(shares)) / len(labels[what])
            np.testing.assert_allclose(found, shares, atol=0.08)


@pytest.mark.parametrize("long_tailed", FEATURES)
def test_a_view_shows_another_class_as_often_as_two_views_of_says(long_tailed, monkeypatch):
    """Digit and background are replaced independently, by draws from the data's own frequencies."""
    rate = 0.3
    monkeypatch.setattr(mnist_corner, "DISAGREE", rate)
    monkeypatch.setattr(mnist_corner.CornerImages, "render", lambda images, pairs: pairs)
    images = corner_images(long_tailed)
    shares = {feature: power_law(10) if feature == long_tailed else np.full(5, 0.2)
              for feature in FEATURES}
    fixed = images.view(torch.tensor([[1, 3]]).expand(50_000, 2))  # of the same image
    for column, feature, own in zip(fixed.T, FEATURES, (1, 3)):
        expected = rate * shares[feature]  # a replaced one can have its class
        expected[own] += 1 - rate
        np.testing.assert_allclose(column.bincount(minlength=len(expected)) / 50_000, expected,
                                   atol=0.008)
    others = (fixed != torch.tensor([1, 3])).double()
    assert (others.prod(dim=1).mean() - others.mean(dim=0).prod()).abs() < 0.005

    # Two views of random images: how often they show each pair of classes.
    pairs = images.draw(100_000)
    views = torch.stack([images.view(pairs) for _ in range(2)])  # (2, N, 2)
    for i, feature in enumerate(FEATURES):
        n = len(shares[feature])
        expected = two_views_of(torch.from_numpy(shares[feature]), rate)
        first, second = views[:, :, i]
        counts = (first * n + second).bincount(minlength=n * n).view(n, n)
        np.testing.assert_allclose(counts / 100_000, expected, atol=0.006)


def test_without_disagreement_a_view_is_its_image(monkeypatch):
    monkeypatch.setattr(mnist_corner, "DISAGREE", 0.0)
    monkeypatch.setattr(mnist_corner.CornerImages, "render", lambda images, pairs: pairs)
    images = corner_images("digit")
    pairs = images.draw(1000)
    assert torch.equal(images.view(pairs), pairs)


def test_images_show_what_their_labels_say():
    """By the most similar of many templates: the digits as drawn, and crops of the gratings."""
    images = corner_images("digit", deform=0.0, contrast=0.8)
    pairs = torch.stack([torch.randint(10, (200,)), torch.randint(10, (200,))], dim=1)
    found, labels = images.render(pairs), images.labels_of(pairs)
    assert found.shape == (200, 1, 32, 32)
    digits, gratings = drawings.draw_digits("DejaVuSans")[0], drawings.draw_gratings()
    corners = 2 * drawings.digit_view(digits, 0.0) - 1
    crops = 2 * (0.5 + 0.8 * (drawings.background_view(gratings.repeat(60, 1, 1, 1)) - 0.5)) - 1
    for templates, what, rows in ((corners, "digit", slice(0, 16)),
                                  (crops, "background", slice(16, 32))):
        seen = found[:, :, rows, :16].flatten(1)
        templates = templates[:, :, rows, :16].flatten(1)
        nearest = torch.cdist(seen, templates).argmin(dim=1) % 10
        assert (nearest == labels[what]).float().mean() > 0.98
    noise = found[:, 0, :16, :16] - corners[labels["digit"], 0]
    assert noise.std().item() == pytest.approx(0.1, rel=0.03) and noise.mean().abs() < 0.003


def test_the_square_hides_the_background_and_the_contrast_is_that_of_the_rest():
    one, other = torch.tensor([[3, 1]] * 8), torch.tensor([[3, 4]] * 8)
    views = {}
    for contrast in (0.0, 0.3, 1.0):
        for name, pairs in (("one", one), ("other", other)):
            torch.manual_seed(1)  # the same deformations and noise
            views[contrast, name] = corner_images("digit", contrast=contrast).render(pairs)
    square = torch.zeros(32, 32, dtype=torch.bool)
    square[:16, :16] = True
    gray = views[0.0, "one"]
    for view in views.values():
        assert torch.equal(view[..., square], gray[..., square])
    assert torch.equal(views[0.0, "other"], gray)
    for name in ("one", "other"):
        full, low = views[1.0, name] - gray, views[0.3, name] - gray
        torch.testing.assert_close(low, 0.3 * full, atol=1e-5, rtol=0)
        assert full[..., ~square].abs().mean() > 0.5
    difference = (views[1.0, "one"] - views[1.0, "other"]).abs()
    assert difference[..., ~square].mean() > 0.3


@pytest.mark.parametrize("deform, low, high", [(0.0, 0.05, 0.15), (1.0, 0.3, 2.0)])
def test_views_change_digit_and_background(deform, low, high):
    images = corner_images("digit", deform=deform, contrast=1.0)
    pairs = images.draw(100)
    change = (images.render(pairs) - images.render(pairs)).abs()
    assert low < change[..., :16, :16].mean() < high  # at deform 0 there is only noise
    assert change[..., 16:, 16:].mean() > 0.4  # the grating has moved


def test_cifar_as_torchvision_gives_it(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 99, (40, 32, 32, 3), dtype=np.uint8)
    def cifar(root, transform, download):
        items = [(transform(Image.fromarray(image)), 0) for image in pixels]
        return type("CIFAR", (list,), {"targets": [9, 9, *range(8), 1, 8] + 28 * [0]})(items)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", cifar)
    images = mnist_corner.load_backgrounds(SimpleNamespace(**{**ARGS, "mnist": True}))
    assert images.shape == (10, 1, 32, 32)
    for image, first in zip(images, [2, 3, 4, 5, 6, 7, 8, 9, 11, 0]):  # the first of each class
        luma = pixels[first] @ np.array([0.299, 0.587, 0.114])
        expected = 0.5 + 0.35 * (luma - luma.mean()) / luma.std(ddof=1)
        np.testing.assert_allclose(image[0], expected, atol=0.04)  # gray is rounded to integers


def test_backgrounds_are_ten_folders(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 30), (9, 99, 199)).save(tmp_path / name / "1.png")
    args = SimpleNamespace(**{**ARGS, "mnist": True, "backgrounds": str(tmp_path)})
    with pytest.raises(RuntimeError, match="ten folders of images, got 3"):
        mnist_corner.load_backgrounds(args)


# ---- Fairness ------------------------------------------------------------------------------------
def test_both_priors_get_the_same_weights_and_views(run, monkeypatch):
    """Heads, and students, whose teachers are the winners of their own prior."""
    judge, winners, best = mnist_corner.judge, [], (1, 2)

    def loss_prefers(model, losses, *data):
        """The head with the lowest loss is another one for each prior."""
        losses[best[len(winners)]] = 0.001
        winners.append(model)
        return judge(model, losses, *data)
    steps = spy(monkeypatch)
    monkeypatch.setattr(mnist_corner, "judge", loss_prefers)
    records = run("digit")
    priors = [pmsn.power_law_prior(5, exponent) for exponent in (0.0, STEEP)]
    for name, parts in steps.items():
        assert len(parts) == 4
        first, second, *later = parts
        assert torch.equal(first[1], second[1])
        assert not torch.equal(later[0][1], later[1][1])  # After a step the prior has acted.
        for (one, _, views), (other, _, same) in (parts[:2], later):
            assert torch.equal(views, same) and not torch.equal(views[0], views[1])
            for model, prior in zip((one, other), priors):
                torch.testing.assert_close(model.prior, prior)
        assert not torch.equal(first[2], later[0][2])
    for i, (model, *_) in enumerate(steps["students"][:2]):
        assert torch.equal(model.prototypes, winners[i].prototypes[best[i]])
        features = torch.randn(5, 128)
        torch.testing.assert_close(model.target_head(features), winners[i].head(best[i])(features))
        assert records[i]["results"]["loss"] == pytest.approx(0.001)
        heads = records[i]["heads"]
        assert [head["loss"] for head in heads].index(min(h["loss"] for h in heads)) == best[i]


def test_heads_see_views_of_the_same_images(run, monkeypatch):
    """Their inputs are cached features, of two of the views, which are the encoder's."""
    monkeypatch.setattr(mnist_corner.CornerImages, "render", lambda images, pairs: pairs.float())
    monkeypatch.setattr(mnist_corner, "DISAGREE", 0.0)
    monkeypatch.setattr(mnist_corner, "judge", Mock(side_effect=KeyboardInterrupt))
    seen = []

    class Encoder(nn.Module):
        """Features are the pair itself, and the number of the call. So two views differ."""
        def forward(self, pairs):
            seen.append(len(pairs))
            return torch.cat([pairs, torch.full((len(pairs), 126), float(len(seen)))], dim=1)
    monkeypatch.setattr(mnist_corner, "train_encoder", lambda *args: Encoder())
    steps = spy(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run("digit")
    assert sum(seen) == CACHED_VIEWS * 2 * BATCH
    for _, _, (first, second) in steps["heads"]:
        assert torch.equal(first[:, :2], second[:, :2]) and first[:, 1].std() > 0.5
        assert (first[:, 2] != second[:, 2]).all()


def other_labels(labels):
    """The same groups of digits with other labels, among the first five and among the others."""
    return torch.where(labels < 5, 4 - labels, 14 - labels)


def test_no_label_trains(run, monkeypatch):
    """Here the digits are balanced, so that their labels do not matter for the choice of images."""
    steps, load_digits = spy(monkeypatch), mnist_corner.load_digits
    first = run("background")
    monkeypatch.setattr(mnist_corner, "load_digits", lambda args: [
        (images, other_labels(labels)) for images, labels in load_digits(args)])
    second = run("background")
    for parts in steps.values():
        assert len(parts) == 8
        for one, other in zip(parts[:4], parts[4:]):
            assert torch.equal(one[1], other[1]) and torch.equal(one[2], other[2])
    for one, other in zip(first, second):
        assert one["results"] == pytest.approx(other["results"], nan_ok=True)


@pytest.mark.parametrize("any_order", [False, True])
def test_the_prior_has_any_order_only_if_asked(any_order, run, monkeypatch):
    """For heads and students of both priors, in two steps each."""
    loss, found = pmsn.pmsn_loss, []

    def watched(*arguments, any_order=False, **options):
        found.append(any_order)
        return loss(*arguments, any_order=any_order, **options)
    monkeypatch.setattr(pmsn, "pmsn_loss", watched)
    run("digit", any_order=any_order)
    assert found == 8 * [any_order]


def test_in_joint_training_the_encoders_learn_and_nothing_teaches(run, monkeypatch, tmp_path):
    monkeypatch.setattr(pmsn, "simclr_loss", Mock(side_effect=AssertionError("no SimCLR")))
    steps = spy(monkeypatch)
    records = run("digit", joint=True)
    first, second, *later = steps["heads"]
    assert len(later) == 2 and not steps["students"] and not list(tmp_path.glob("*.pt"))
    assert torch.equal(first[1], second[1]) and torch.equal(first[2], second[2])
    assert first[2].shape == (2, BATCH, 1, 32, 32)
    torch.manual_seed(0)
    untrained = drawings.make_encoder(32)
    for model in (first[0], second[0]):
        moved = [(trained - old).abs().max() for trained, old in zip(
            model.network[0].parameters(), untrained.parameters())]
        assert 1e-5 < min(moved) and max(moved) < 0.02
    for model, record in zip((first[0], second[0]), records):
        assert len(record["heads"]) == 3 and record["results"]["loss"] == min(
            head["loss"] for head in record["heads"])
        assert not any(name.startswith("student") for name in record["results"])


# ---- Measures ------------------------------------------------------------------------------------
def test_the_winner_and_the_best_heads_of_each_feature_by_hand():
    rows = [(0.5, 1.0, 0.2), (0.3, 0.1, 0.9), (0.2, 0.4, 0.4), (0.4, 0.8, 0.3), (0.6, 0.9, 0.0)]
    heads = [dict(zip(("loss", *FEATURES), row)) for row in rows]
    assert mnist_corner.sum_up(heads) == pytest.approx({
        "loss": 0.2, "digit": 0.4, "background": 0.4, "difference": 0.0,
        "share_of_digit_heads": 0.6, "best_digit_loss": 0.4, "best_background_loss": 0.2})
    alone = mnist_corner.sum_up(heads[:1])
    assert alone["best_digit_loss"] == 0.5 and math.isnan(alone["best_background_loss"])
    alone = mnist_corner.sum_up(heads[1:2])
    assert math.isnan(alone["best_digit_loss"]) and alone["best_background_loss"] == 0.3
    assert alone["share_of_digit_heads"] == 0 and alone["difference"] == pytest.approx(-0.8)


def test_representations_by_hand():
    """Each network in eval mode, and predictions at the temperature of the loss."""
    encoder, head = nn.Sequential(nn.Linear(6, 128), nn.Dropout()), drawings.make_head(8)
    head(2 * torch.randn(50, 128) + 1)  # statistics of BatchNorm
    prototypes, images = torch.randn(5, 8), torch.randn(30, 6)
    mean, var = head[1].running_mean.clone(), head[1].running_var.clone()
    found = mnist_corner.represent(encoder, head, prototypes, images)
    features = images @ encoder[0].weight.T + encoder[0].bias
    projections = (features @ head[0].weight.T + head[0].bias - mean) / (var + 1e-5).sqrt()
    assert list(found) == ["encoder", "projection", "prediction"]
    torch.testing.assert_close(found["encoder"], features)
    torch.testing.assert_close(found["projection"], projections, atol=1e-5, rtol=1e-4)
    z, q = (x.detach().double().numpy() for x in (projections, prototypes))
    for row, predicted in zip(z, found["prediction"]):
        cosines = [row @ k / np.linalg.norm(row) / np.linalg.norm(k) for k in q]
        p = np.exp(10 * np.array(cosines))
        np.testing.assert_allclose(predicted, p / p.sum(), atol=1e-4)


def test_neighbors_by_hand():
    """The share of the 10 nearest of 40 images, without the image itself."""
    representations = {"encoder": torch.randn(40, 7), "prediction": torch.rand(40, 5)}
    labels = {"digit": torch.randint(3, (40,)), "background": torch.randint(2, (40,))}
    found = mnist_corner.neighbors("winner", representations, labels)
    for (name, x), what in itertools.product(representations.items(), FEATURES):
        x, same = x.double().numpy(), []
        for i in range(40):
            cosines = {j: x[i] @ x[j] / np.linalg.norm(x[j]) for j in range(40) if j != i}
            nearest = sorted(cosines, key=cosines.get)[-10:]
            same += [labels[what][j] == labels[what][i] for j in nearest]
        assert found.pop(f"winner_{name}_{what}") == pytest.approx(np.mean(same))
    assert not found


# ---- What a loss could be at best ----------------------------------------------------------------
def test_groups_by_both_features_cost_nothing_unless_views_disagree(monkeypatch):
    """So without disagreement no prior prefers a feature. With it, each prior prefers its own.

    Five groups of ten classes cannot have the shares of a prior of both kinds, but groups of the 50
    pairs of classes can have any shares, nearly.
    """
    uniform, steep = mnist_corner.lowest_losses(0.05, None)
    assert [row["exponent"] for row in (uniform, steep)] == [0.0, STEEP]
    lowest = uniform["results"]
    assert lowest["balanced"] + 0.05 < min(lowest["long_tailed"], lowest["both"])
    lowest = steep["results"]
    assert lowest["long_tailed"] + 0.02 < lowest["both"] < lowest["balanced"] - 0.02

    monkeypatch.setattr(find_grouping, "__defaults__", (20, 300))  # faster
    for row, fits, other in zip(mnist_corner.lowest_losses(0.0, None),
                                ("balanced", "long_tailed"), ("long_tailed", "balanced")):
        lowest = row["results"]
        assert lowest["both"] < lowest[fits] + 0.01 and lowest["both"] < 0.01
        assert lowest[other] > 0.04


@pytest.mark.parametrize("disagree", [0.0, 0.05])
def test_a_grouping_by_both_features_can_ignore_one(disagree):
    """It is the table of the other one, and has its loss. A search from random tables misses it."""
    long_tailed, balanced = (two_views_of(pmsn.power_law_prior(n, exponent), disagree)
                             for n, exponent in ((10, STEEP), (5, 0.0)))
    both, prior = torch.kron(long_tailed, balanced), pmsn.power_law_prior(5, STEEP)
    of_long_tailed, of_balanced = torch.randn(10, 5), torch.randn(5, 5)
    for table, two_views, wide in (
            (of_long_tailed, long_tailed, of_long_tailed.repeat_interleave(5, dim=0)),
            (of_balanced, balanced, of_balanced.repeat(10, 1))):
        torch.testing.assert_close(loss_of_table(wide, both, prior),
                                   loss_of_table(table, two_views, prior))


# ---- Figures and whole runs ----------------------------------------------------------------------
def made_up_runs(differences, contrasts=(0.4,)):
    """Runs of seeds 0, 1 ... with these differences {(long_tailed, exponent): one per seed}."""
    return [{"seed": seed, "long_tailed": long_tailed, "exponent": exponent, "contrast": contrast,
             "results": {"difference": contrast / 0.4 * difference, "loss": 0.3,
                         "student_prediction_digit": 0.25, "student_prediction_background": 0.75},
             "heads": [{"loss": 0.3, "digit": 1.0, "background": 0.5}]}
            for (long_tailed, exponent), values in differences.items()
            for seed, difference in enumerate(values) for contrast in contrasts]


DIFFERENCES = {("digit", 0.0): (-1.0, -0.5, 0.2), ("digit", STEEP): (1.5, 1.0, 0.5),
               ("background", 0.0): (0.75, 0.5, 1.0), ("background", STEEP): (-0.5, 0.25, -1.0)}


def test_who_fits_the_prior_and_how_far_a_winner_moves_by_hand():
    runs = made_up_runs(DIFFERENCES)
    assert [mnist_corner.fits_prior(run) for run in runs] == [
        True, True, False, True, True, True, True, True, True, True, False, True]
    assert [mnist_corner.fits_prior(run, 0.5) for run in runs] == [
        True, False, False, True, True, False, True, False, True, False, False, True]
    runs = runs[::-1]  # Seeds are matched, in any order.
    assert sorted(mnist_corner.interactions(runs, 0.0)) == pytest.approx([-1.75, -1.0, -0.8])
    assert sorted(mnist_corner.interactions(runs, STEEP)) == pytest.approx([0.75, 1.5, 2.0])


def texts_of(figure):
    """All titles of a figure."""
    return [text.get_text() for text in (figure._suptitle, figure._supxlabel) if text] + [
        ax.get_title() for ax in figure.axes]


def test_the_titles_count_what_the_figures_show():
    runs = made_up_runs(DIFFERENCES)
    references = [{"disagree": disagree, "exponent": exponent,
                   "results": {"long_tailed": 0.1, "balanced": 0.2 if disagree else 0, "both": 0.3}}
                  for disagree in (0.0, 0.05) for exponent in (0.0, STEEP)]
    figure = mnist_corner.plot_preference(runs, references)
    title, left, right = texts_of(figure)
    assert "10 of 12 cases (n = 3 seeds)" in title
    assert (left, right) == ("long-tailed digits, balanced backgrounds",
                             "long-tailed backgrounds, balanced digits")
    for ax, long_tailed in zip(figure.axes, FEATURES):
        dots, stars = ([line for line in ax.lines if line.get_marker() == marker]
                       for marker in ".*")
        assert [list(line.get_xdata()) for line in dots] == 2 * [3 * [0.5]]
        for line, exponent in zip(stars, (0.0, STEEP)):
            assert tuple(line.get_xdata()) == DIFFERENCES[long_tailed, exponent]
        # A reference without disagreement is not shown. Digits are at the right.
        found = {(line.get_segments()[0][0, 1], line.get_segments()[0][0, 0] > 0)
                 for line in ax.collections}
        assert found == {(0.1, long_tailed == "digit"), (0.2, long_tailed != "digit")}

    rows = torch.arange(9).repeat(5, 1)
    pictures = {arm: {"images": torch.zeros(5, 9, 1, 32, 32), "digit": rows % 3,
                      "background": rows % 2} for arm in DIFFERENCES}
    figure = mnist_corner.plot_neighbors(pictures, runs)
    texts = texts_of(figure)
    assert "n = 3 seeds" in texts[1]
    assert texts[2:] == [f"long-tailed {long_tailed}s, {prior} prior\n"
                         "neighbors: same digit 0.25, same background 0.75"
                         for long_tailed in FEATURES for prior in ("uniform", "power-law")]
    shown = figure.axes[0].images[0].get_array()
    for column in range(9):  # Its frame is above for the digit, and below for the background.
        above, below = shown[0, 38 * column + 19], shown[37, 38 * column + 19]
        if column == 0:
            assert above.max() == below.max() == 0
        else:
            assert (above.argmax() == 1 and above.max() < 0.7) == (column % 3 == 0)
            assert (below.argmax() == 2 and below.max() < 0.8) == (column % 2 == 0)


def test_the_curve_shows_means_and_intervals():
    runs = made_up_runs(DIFFERENCES, contrasts=(0.8, 0.4))
    figure = mnist_corner.plot_curve(runs)
    assert "n = 3 seeds" in texts_of(figure)[0]
    for ax, long_tailed in zip(figure.axes, FEATURES):
        for container, exponent in zip(ax.containers, (0.0, STEEP)):
            line, _, (bars,) = container.lines
            values = np.outer((1, 2), DIFFERENCES[long_tailed, exponent])
            half = 4.303 * values.std(axis=1, ddof=1) / math.sqrt(3)
            assert line.get_xdata().tolist() == [0.4, 0.8]
            np.testing.assert_allclose(line.get_ydata().astype(float), values.mean(axis=1))
            bottom, top = np.array([bar[:, 1] for bar in bars.get_segments()]).T
            np.testing.assert_allclose(top - bottom, 2 * half)


def test_two_processes_have_the_bits_of_one(run, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "CONTEXT", multiprocessing.get_context("fork"))
    args, found = SimpleNamespace(**ARGS, out=tmp_path, workers=2), {}
    jobs = [(0, long_tailed, 0.8) for long_tailed in FEATURES]
    results.run_in_processes(short_networks, jobs, args,
                             lambda job, runs, seconds: found.update({job[1]: runs}))
    for long_tailed in FEATURES:
        # As text, because NaN is not equal to itself.
        assert json.dumps(found[long_tailed]) == json.dumps(run(long_tailed))
        assert len(found[long_tailed]) == 2


@pytest.fixture
def short_runs(monkeypatch, jobs_here, coarse_figures):
    monkeypatch.setattr(find_grouping, "__defaults__", (3, 10))
    with short():
        yield


def test_a_curve_has_a_figure_of_its_own(tmp_path, short_runs, monkeypatch, capsys):
    monkeypatch.setattr(mnist_corner, "CURVE", (0.3, 0.9))
    teach = Mock()
    monkeypatch.setattr(mnist_corner, "teach", teach)
    mnist_corner.main(["--curve", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "curve.png", "lock"}
    runs = json.loads((tmp_path / "results.json").read_text())["runs"][:-4]
    assert [(run["long_tailed"], run["contrast"], run["exponent"]) for run in runs] == [
        *itertools.product(FEATURES, (0.3, 0.9), (0.0, STEEP))]
    for one, other in zip(runs[:2], runs[2:4]):
        assert one["results"]["loss"] != other["results"]["loss"]  # The contrast was used.
    assert not teach.called and not any("student" in name for name in runs[0]["results"])
    output = capsys.readouterr()
    _, _, table = output.out.split("\n\n")
    assert output.err == ""  # No other figure was tried.
    assert len([line for line in table.splitlines() if line.split()[0] in FEATURES]) == 8


def test_joint_training_has_no_figure_3(tmp_path, short_runs, monkeypatch, capsys):
    monkeypatch.setattr(mnist_corner, "train_encoder", Mock(side_effect=AssertionError))
    mnist_corner.main(["--joint", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.json", "preference.png", "lock"}
    assert capsys.readouterr().err == ""


def test_a_killed_run_continues_and_draws_its_figures_from_files(
        tmp_path, short_runs, monkeypatch, capsys):
    """A whole run of two steps per part. It is killed in its second job, and started again."""
    options = ["--out", str(tmp_path)]
    trainings = []

    def spied_train(*arguments):
        title, = [x for x in arguments if isinstance(x, str)]
        trainings.append(tuple(title.split()[i] for i in (1, 3)))
        if len(trainings) == 5:
            raise KeyboardInterrupt
        return train(*arguments)
    monkeypatch.setattr("support.heads.train", spied_train)
    with pytest.raises(SystemExit, match="^130$"):
        mnist_corner.main(options)
    parts = ("encoder", "heads", "student")
    assert trainings == [*itertools.product(["digit"], parts), *itertools.product(
        ["background"], parts[:2])]
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [run["long_tailed"] for run in runs] == ["digit", "digit"]
    assert not list(tmp_path.glob("*.png"))

    capsys.readouterr()
    mnist_corner.main(options)
    assert trainings[5:] == [*itertools.product(["background"], parts)]
    progress, lowest, winners = (part.splitlines()
                                 for part in capsys.readouterr().out.split("\n\n"))
    rows = [line.split() for line in progress if len(line.split()) > 3]
    for part, losses in (("encoder", 1), ("heads", 2), ("student", 2)):
        assert [len(row) - 6 for row in rows if row[3:4] == [part]] == [losses]
    assert len(lowest) == 2 + 4
    # The table is aligned.
    assert len({len(line) for line in winners[1:6]}) == 1
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["runs"][:2] == runs
    runs, last = content["runs"][:4], content["runs"][4:]
    assert [(run["long_tailed"], run["exponent"]) for run in runs] == [
        *itertools.product(FEATURES, (0, STEEP))]
    assert [(row["disagree"], row["exponent"]) for row in last] == [
        *itertools.product((0, mnist_corner.DISAGREE), (0, STEEP))]
    assert content["config"]["heads"] == 3 and not content["config"]["joint"]
    assert "contrast" not in content["config"]  # It is in the jobs.
    right = sum((run["results"]["difference"] > 0)
                == ((run["long_tailed"] == "digit") == (run["exponent"] == STEEP)) for run in runs)
    assert winners[6].endswith(f": {right} of 4")
    for line, exponent in zip(winners[7:9], (0, STEEP), strict=True):
        digit, background = (run["results"]["difference"] for run in runs
                             if run["exponent"] == exponent)
        assert f"the winner moves {digit - background:+.2f} nats to the digit" in line
    for row, run in zip(winners[2:6], runs):
        assert f"{run['results']['loss']:.3f}" in row.split()
    for long_tailed in FEATURES:
        models_are_those_of_the_figure(tmp_path, long_tailed)
    figures = {name: (tmp_path / name).read_bytes() for name in ("neighbors.png", "preference.png")}
    for name in figures:
        assert min(Image.open(tmp_path / name).size) > 300
        (tmp_path / name).unlink()

    mnist_corner.main(options)  # Nothing is left to do, and the figures come from the files.
    assert len(trainings) == 8
    assert {name: (tmp_path / name).read_bytes() for name in figures} == figures
    assert json.loads((tmp_path / "results.json").read_text())["runs"] == content["runs"]

    # Without the images there is no figure 3. This costs nothing else.
    (tmp_path / "preference.png").unlink()
    (tmp_path / "pictures_digit_0.pt").unlink()
    mnist_corner.main(options)
    assert "warning: cannot draw neighbors.png" in capsys.readouterr().err
    assert (tmp_path / "preference.png").read_bytes() == figures["preference.png"]


def models_are_those_of_the_figure(folder, long_tailed):
    """Rows of figure 3 begin with five digits, and go on with ever less similar predictions."""
    pictures = torch.load(folder / f"pictures_{long_tailed}_0.pt", weights_only=True)
    models = []
    for exponent in (0.0, STEEP):
        model = drawings.make_pmsn(drawings.make_encoder(32), 5, exponent, mnist_corner.DIM)
        model.load_state_dict(torch.load(folder / f"model_{long_tailed}_{exponent:g}_0.pt",
                                         weights_only=True))
        models.append(model.eval())
        shown = pictures[exponent]
        with torch.no_grad():
            z = model.head(model.encoder(shown["images"].flatten(0, 1)))
            p = pmsn.log_predictions(z, model.prototypes, 0.1).exp().unflatten(0, (5, 9))
        similarity = nn.functional.cosine_similarity(p, p[:, :1], dim=2)
        assert (similarity[:, 0] > 1 - 1e-6).all() and (similarity.diff(dim=1) < 1e-6).all()
        # After so few steps predictions can be equal, and another image can come first.
        assert len(shown["digit"][:, 0].unique()) >= 3
    # One encoder for both winners, and a new network for each.
    first, second = (model.target_encoder.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(models[0].encoder[0].weight, models[1].encoder[0].weight)
    assert not torch.equal(models[0].encoder[0].weight, first["0.weight"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="MNIST and CIFAR-10 are not in ../shared/data")
def test_real_images_end_to_end(run, tmp_path):
    real = {"mnist": True, "root": str(SHARED), "backgrounds": str(SHARED / "cifar10" / "test")}
    images_end_to_end(run, tmp_path, real)


def test_images_of_files_end_to_end(run, tmp_path):
    """Drawn digits in files like those of MNIST, and backgrounds in ten folders."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    digits = drawings.draw_digits("DejaVuSans")[0][torch.arange(600) % 10]
    pixels = torch.nn.functional.interpolate(255 * digits, 28).byte().numpy()
    labels = (np.arange(600) % 10).astype(np.uint8)
    for name in ("train", "t10k"):  # numbers of four bytes, then the content
        (raw / f"{name}-images-idx3-ubyte").write_bytes(
            np.array([0x803, 600, 28, 28], ">i4").tobytes() + pixels.tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(
            np.array([0x801, 600], ">i4").tobytes() + labels.tobytes())
    for i, grating in enumerate(drawings.draw_gratings()):
        folder = tmp_path / "backgrounds" / str(i)
        folder.mkdir(parents=True)
        Image.fromarray((255 * grating[0, :32, :32]).byte().numpy()).save(folder / "0.png")
    images_end_to_end(run, tmp_path, {"mnist": True, "root": str(tmp_path),
                                      "backgrounds": str(tmp_path / "backgrounds")})


def images_end_to_end(run, tmp_path, options):
    args = SimpleNamespace(**{**ARGS, **options})
    for images, labels in mnist_corner.load_digits(args):
        assert images.shape == (len(labels), 1, 20, 20) and images.min() == 0 < images.max() <= 1
    assert mnist_corner.load_backgrounds(args).shape == (10, 1, 32, 32)
    records = run("digit", **options)
    assert len(records) == 2
    for record in records:
        assert math.isfinite(record["results"]["loss"]) and len(record["heads"]) == 3
        # An untrained network already tells backgrounds apart, each of which is one image.
        assert record["results"]["untrained_encoder_background"] > 0.6
    _, images = mnist_corner.load_images(args, "digit", mnist_corner.MNIST)
    pairs = images.draw(1000, balanced=True)
    corners = images.render(pairs)[..., :16, :16].flatten(1)
    assert agreement(corners, images.labels_of(pairs)["digit"]) > 0.6
    for exponent in (0.0, STEEP):
        model = drawings.make_pmsn(drawings.make_encoder(32), 5, exponent, mnist_corner.DIM)
        model.load_state_dict(torch.load(tmp_path / f"model_digit_{exponent:g}_0.pt",
                                         weights_only=True))
