"""extras/which_prior.py: its data, its measures by hand, and a whole run."""

import functools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import imbalance
import pmsn
import which_prior
from support import photographs


def test_glyphs_of_all_settings():
    """Test images are in other fonts, if there are several. Nine fonts are all of them."""
    for setting in which_prior.SETTINGS.values():
        args = SimpleNamespace(**which_prior.DEFAULT | {"prototypes": 64, **setting},
                               data="glyphs", classes=5, images=40)
        train, test, balanced = which_prior.make_data(1.0, 0.0, args)
        assert [len(x.labels) for x in (train, test, balanced)] == [40, 10, 20]
        assert len(train.glyphs) == len(balanced.glyphs) == 5 * args.fonts
        assert torch.equal(train.glyphs, test.glyphs) == (args.fonts == 1)
        assert {x.deform for x in (train, test, balanced)} == {args.deform}
    assert {len(which_prior.TRAIN_FONTS), 1} == {
        which_prior.DEFAULT["fonts"], which_prior.SETTINGS["one font"]["fonts"]}


def test_sharpening_falls_and_stays():
    """By hand: from .6 to .25 in 70% of the training, as in support.drawings.schedule."""
    args = SimpleNamespace(**which_prior.DEFAULT)
    found = [which_prior.sharpening_at(done, args) for done in (0, 0.35, 0.7, 1)]
    assert found == pytest.approx([0.6, 0.425, 0.25, 0.25])
    assert found == pytest.approx([which_prior.schedule(done)[1] for done in (0, 0.35, 0.7, 1)])
    constant = SimpleNamespace(sharpening=0.25, first_sharpening=0.25)
    assert {which_prior.sharpening_at(done, constant) for done in (0, 0.3, 1)} == {0.25}


def test_arms_that_are_one_model_count_once():
    runs = [{"prior_exponent": exponent, "loss": loss} for exponent, loss in (
        (None, "random"), (0.0, "plain"), (0.0, "relative"), (0.0, "both"), (0.0, "Sinkhorn"),
        (0.5, "plain"), (0.5, "relative"), (0.0, "plain"), (0.5, "both"), (None, "supervised"))]
    assert which_prior.arms_of(runs) == [
        (0.0, "plain"), (0.0, "both"), (0.5, "plain"), (0.5, "relative"), (0.5, "both")]


def test_the_cost_of_whole_classes_by_hand():
    """Shares .5, .3, .2 and two prototypes: .5 | .3 + .2, which the uniform prior has.

    With the prior .8, .2 it is .5 + .3 | .2, with .6, .4 it is .5 + .2 | .3. Two classes of
    three prototypes leave one of them empty.
    """
    shares = torch.tensor([0.3, 0.5, 0.2])
    for prior, filled in (((0.5, 0.5), (0.5, 0.5)), ((0.8, 0.2), (0.8, 0.2)),
                          ((0.6, 0.4), (0.5 + 0.2, 0.3))):
        expected = sum(f * math.log(f / p) for f, p in zip(filled, prior))
        found = which_prior.cost_of_whole_classes(shares, torch.tensor(prior))
        assert found == pytest.approx(expected, abs=1e-6)
    found = which_prior.cost_of_whole_classes(torch.tensor([0.5, 0.5]), torch.ones(3) / 3)
    assert found == pytest.approx(math.log(1.5), abs=1e-6)


def test_a_prior_is_met_within_a_tenth():
    row = {"prototypes_of_prior": {"mean": 50.0}}
    for number, expected in ((44.9, "no"), (45.1, "yes"), (54.9, "yes"), (55.1, "no")):
        assert which_prior.met({**row, "prototypes_of_all_images": {"mean": number}}) == expected
    assert which_prior.met({"knn": {"mean": 0.5}}) == ""


def test_gains_over_the_plain_uniform_prior_are_paired():
    runs = [{"setting": setting, "seed": seed, "prior_exponent": exponent, "loss": loss,
             "results": {"balanced_knn": value}} for setting, seed, exponent, loss, value in (
        ("default", 4, 0, "plain", 0.5), ("default", 4, 1, "both", 0.7),
        ("default", 2, 1, "both", 0.1), ("default", 2, 0, "plain", 0.4),
        ("one font", 2, 0, "plain", 0.9))]
    gains = which_prior.gains_over_plain(runs, "default", 1, "both")
    assert gains == [pytest.approx(-0.3), pytest.approx(0.2)]


def make_photographs(counts=(40, 40, 40), **options):
    """Photographs of three classes. Every pixel of image i has the value i."""
    images = torch.arange(sum(counts), dtype=torch.uint8)[:, None, None, None]
    return which_prior.Photographs(images.expand(-1, 3, 32, 32), **options)


def test_photographs_are_long_tailed_without_repetition():
    """Class 2 is the most frequent one, then 0, then 1: 36, 18 and 12 of 66 images."""
    data = make_photographs(order=[2, 0, 1], exponent=1.0, contrast=0.0, count=66)
    numbers = data.images[:, 0, 0, 0].long()
    assert len(numbers.unique()) == 66
    assert data.labels.bincount().tolist() == [36, 18, 12]
    # In a random order, so that BatchNorm's statistics do not come from one class at a time.
    assert data.labels[:33].bincount().tolist() == pytest.approx([18, 9, 6], abs=6)
    assert (numbers % 3).tolist() == [[2, 0, 1][label] for label in data.labels]
    everything = make_photographs(order=[2, 0, 1], exponent=0.0, contrast=0.0)
    assert everything.labels.bincount().tolist() == [40] * 3 and len(everything.images) == 120


def test_gratings_are_blended_into_photographs():
    """Gray photographs show nothing but their grating, which is theirs in all views."""
    data = make_photographs(order=[0, 1, 2], exponent=0.0, contrast=0.6)
    index = torch.arange(120)
    blended = data.blend(torch.full((120, 3, 32, 32), 0.4), index)
    gratings = (blended - 0.4 * 0.4) / 0.6
    assert gratings.min() > -0.01 and gratings.max() < 1.01
    spread = blended.flatten(1).std(dim=1)
    assert spread.min() > 0.1  # A photograph without a grating has no spread here.
    without = make_photographs(order=[0, 1, 2], exponent=0.0, contrast=0.0)
    assert without.blend(without.images, index) is without.images
    # The orientation of the edges tells the gratings apart, in any view.
    first, second = [imbalance.low_level(255 * data.views(index)[:, :1].expand(-1, 3, -1, -1))
                     ["orientation"] for _ in range(2)]
    assert (first - second).abs().median() < 0.1 < (first - second.roll(1)).abs().median()
    views = data.all_views()
    assert views.shape == (120, 3, 32, 32)


def test_gains_are_paired_by_seed_data_and_loss():
    runs = [{"seed": seed, "data_exponent": data, "contrast": 0.0, "prior_exponent": prior,
             "loss": "plain", "results": dict.fromkeys(which_prior.GAINS, value)}
            for seed, data, prior, value in (
                (0, 1, 0, 0.5), (0, 1, 1, 0.6), (1, 1, 1, 0.4), (1, 1, 0, 0.1), (0, 0, 0, 0.9))]
    runs.append({**runs[0], "loss": "random", "prior_exponent": None, "results": {"knn": 0.1}})
    which_prior.add_gains(runs)
    gains = [run["results"].get("gain_balanced_probe") for run in runs]
    assert gains == [0, pytest.approx(0.1), pytest.approx(0.3), 0, 0, None]


def test_means_of_head_middle_and_tail_by_hand():
    values = torch.tensor([1, 0, 1, 1, 0, 0, 1]) > 0
    found = which_prior.by_group("knn", values, torch.tensor([0, 0, 1, 2, 3, 4, 5]), 6)
    assert found == pytest.approx(
        {"knn": 4 / 7, "knn_head": 2 / 3, "knn_middle": 1 / 2, "knn_tail": 1 / 2})


def test_measures_by_hand():
    """Features are the corners of a cube, which are the prototypes, too.

    Prototype 0 has classes 0, 0, 1, prototype 1 has class 0, and prototype 3 has class 2, each of
    them eight times. In the balanced images prototype 0 has class 1 only.
    """
    def images(corners, labels, copies):
        features = 4 * torch.eye(4)[torch.tensor(corners).repeat(copies)]
        features = features + 0.01 * torch.randn(features.shape)
        return SimpleNamespace(labels=torch.tensor(labels).repeat(copies),
                               backgrounds=torch.tensor(corners).repeat(copies) % 2), features
    sets, views = zip(images([0, 0, 0, 1, 3], [0, 0, 1, 0, 2], 8),
                      images([0, 0, 1, 3], [0, 1, 0, 2], 11),
                      images([0, 1, 3], [1, 0, 2], 20))
    network = pmsn.PMSN(torch.nn.Identity(), pmsn.power_law_prior(4, 1.0),
                        head=torch.nn.Identity(), output_dim=4, patch_drop=0.0)
    network.prototypes.data = torch.eye(4)
    model = SimpleNamespace(network=network, tested_encoder=network.target_encoder)
    args = SimpleNamespace(classes=3, probe=True)
    found = which_prior.measure(model, sets, views, args)
    # The images of three prototypes: 24 with classes 0, 0, 1, then 8 with class 0, and 8 with 2.
    shares = np.array([[16, 8, 0], [8, 0, 0], [0, 0, 8]]) / 40
    independent = shares.sum(axis=1, keepdims=True) * shares.sum(axis=0)
    known = sum(p * math.log(p / q) for p, q in zip(shares.flat, independent.flat) if p)
    # Prototype 0 has background 0, and prototypes 1 and 3 have background 1.
    background = -0.6 * math.log(0.6) - 0.4 * math.log(0.4)
    prior = np.array([12, 6, 4, 3]) / 25
    expected = {"same_background": 1.0, "background_knn": 1.0,
                "prototypes_of_prior": math.exp(-sum(prior * np.log(prior))),
                **{f"purity{group}": value for group, value in (
                    ("", 4 / 5), ("_head", 1), ("_middle", 0), ("_tail", 1))}}
    for name in ("knn", "probe"):  # Of the test images, prototype 0 has class 0 and class 1.
        expected |= {name: 3 / 4, f"{name}_head": 1, f"{name}_middle": 0, f"{name}_tail": 1}
        name = f"balanced_{name}"
        expected |= {name: 3 / 4, f"{name}_head": 1 / 2, f"{name}_middle": 1, f"{name}_tail": 1}
    # Minus the little that shuffled labels have
    assert found.pop("class_information") == pytest.approx(known, abs=0.15)
    assert found.pop("background_information") == pytest.approx(background, abs=0.15)
    # Predictions are certain: exp of the entropy of the shares .6, .2, .2
    assert found.pop("prototypes_of_all_images") == pytest.approx(
        0.6 ** -0.6 * 0.2 ** -0.4, abs=0.05)
    assert found == pytest.approx(expected)
    # Probes are left out where they take too long.
    args.classes = 101
    found = which_prior.measure(model, sets, views, args)
    assert "balanced_probe" in found and "probe" not in found
    args.probe = False
    assert not any("probe" in name for name in which_prior.measure(model, sets, views, args))


def measure_nothing(*_):
    return {"knn": math.nan, "balanced_probe": 0.5}


def test_a_measure_without_a_value_is_left_out(tmp_path, jobs_here, monkeypatch, capsys):
    """The rarest classes can be without an image, and then nothing can be measured."""
    nothing = which_prior.by_group("knn", torch.ones(2) > 0, torch.tensor([0, 3]), 6)
    assert math.isnan(nothing["knn_tail"]) and nothing["knn_middle"] == 1
    monkeypatch.setattr(which_prior, "train", lambda *_: None)
    monkeypatch.setattr(which_prior, "make_models", lambda seed, args: [])
    monkeypatch.setattr(which_prior, "measure", measure_nothing)
    monkeypatch.setattr(which_prior, "write_figure", lambda *_: None)
    which_prior.main(["--quick", "--out", str(tmp_path)])
    runs = json.loads((tmp_path / "which_prior.json").read_text())["runs"]
    assert [(run["loss"], run["results"]) for run in runs] == [
        ("random", {"balanced_probe": 0.5}), ("supervised", {"balanced_probe": 0.5})]
    header, *rows = [line.split() for line in capsys.readouterr().out.splitlines()[-4:-1]]
    assert header[4:] == ["balanced_probe", "prior", "met"]
    assert [row[-2:] for row in rows] == [["random", "0.500"], ["supervised", "0.500"]]


def test_views_do_not_depend_on_which_models_there_are(monkeypatch):
    """Training begins with the same random numbers for one model and for three."""
    states = []
    monkeypatch.setattr(which_prior, "train", lambda *_: states.append(torch.get_rng_state()))
    monkeypatch.setattr(which_prior, "measure", measure_nothing)
    for losses in (["plain"], ["plain", "relative", "both"]):
        args = SimpleNamespace(data="glyphs", classes=3, images=256, prototypes=5, losses=losses,
                               prior_exponents=[1.0], from_labels=False, probe=True)
        which_prior.experiment("default", 3, 1.0, 0.0, args)
    assert torch.equal(*states)


@pytest.fixture
def short_probes(monkeypatch):
    """With a large penalty, the linear probe takes fewer steps."""
    monkeypatch.setattr(which_prior, "linear_probe",
                        functools.partial(which_prior.linear_probe, penalty=100.0))


def test_quick_run_end_to_end(tmp_path, jobs_here, short_probes, capsys):
    which_prior.main(["--quick", "--losses", "plain", "relative", "--classes", "8", "--seeds", "3",
                      "--out", str(tmp_path), "--workers", "1"])
    content = json.loads((tmp_path / "which_prior.json").read_text())
    runs = content["runs"]
    names = [(run["prior_exponent"], run["loss"]) for run in runs]
    results = [run["results"] for run in runs]
    assert names == [(None, "random"), (0, "plain"), (0, "relative"), (1, "plain"),
                     (1, "relative"), (None, "supervised")]
    kinds = {(run["seed"], run["data_exponent"], run["contrast"]) for run in runs}
    assert kinds == {(3, 1.0, 0.0)}
    assert results[1] == results[2]  # With the uniform prior, both ways are the same.
    assert all(results[i] != results[j] for i, j in ((1, 3), (3, 4), (2, 4)))
    assert all(0 < result[name] < 1 for result in results for name in ("knn", "probe"))
    assert results[0]["knn"] == pytest.approx(untrained_knn(3, 8, 512), abs=0.01)
    assert [len(run["history"]) for run in runs] == [0, 1, 1, 1, 1, 1]
    assert runs[3]["history"][0]["cross_entropy"] == results[3]["cross_entropy"]
    text = capsys.readouterr().out
    # Of 256 images of a mini-batch 4 per prototype, or 256 / H_64 and a 64th of it.
    rows = [line.split() for line in text.splitlines()[3:5]]
    assert [row[1:4] for row in rows] == [["0.00", "4.00", "4.0"], ["1.00", "0.84", "54.0"]]
    table = text.split("\n\n")[2].splitlines()
    assert len(table) == 2 + 6 + 1
    assert len({len(row.rpartition("  ")[0]) for row in table[1:-1]}) == 1  # aligned
    assert min(Image.open(tmp_path / "which_prior.png").size) > 300


def test_settings_end_to_end(tmp_path, jobs_here, short_probes, coarse_figures):
    """Two settings of the same seed, and the figure that compares them."""
    options = ["--classes", "4", "--prototypes", "5", "--out", str(tmp_path), "--workers", "1"]
    which_prior.main(["--quick", "--settings", "one font", "16 prototypes", *options])
    content = json.loads((tmp_path / "which_prior.json").read_text())
    prototypes = {run["setting"]: run["results"]["prototypes_of_prior"] for run in content["runs"]
                  if run["prior_exponent"] == 0}
    assert prototypes == {"one font": pytest.approx(5), "16 prototypes": pytest.approx(16)}
    assert min(Image.open(tmp_path / "settings.png").size) > 300


def untrained_knn(seed, classes, count):
    """The accuracy of weighted k-NN on features of an untrained encoder, by NumPy."""
    torch.manual_seed(seed)
    data = [which_prior.GlyphImages(fonts, classes, exponent, 0.0, n) for fonts, exponent, n in (
        (which_prior.TRAIN_FONTS, 1.0, count), (which_prior.TEST_FONTS, 0.0, count // 4),
        (which_prior.TRAIN_FONTS, 0.0, count // 2))]
    views = [images.all_views() for images in data]
    torch.manual_seed(seed)
    encoder = which_prior.make_encoder(32)
    with torch.no_grad():
        x, test_x = (F.normalize(encoder(view)).numpy() for view in views[:2])
    votes, cosines = np.zeros((len(test_x), classes)), test_x @ x.T
    for votes_of_one, row in zip(votes, cosines):
        nearest = np.argsort(-row)[:20]
        np.add.at(votes_of_one, data[0].labels.numpy()[nearest], np.exp(row[nearest] / 0.07))
    return np.mean(votes.argmax(axis=1) == data[1].labels.numpy())


def test_photographs_end_to_end(tmp_path, jobs_here, short_probes, monkeypatch, capsys):
    """Images of three classes, with colors that differ a little, from a folder."""
    monkeypatch.setattr(which_prior, "write_figure", lambda *_: None)  # see the quick run
    monkeypatch.setitem(which_prior.DEFAULT, "batch_size", 64)
    for split, count in (("train", 140), ("test", 20)):
        for c in range(3):
            (tmp_path / split / str(c)).mkdir(parents=True)
            for i in range(count):
                pixels = torch.rand(32, 32, 3) * 100 + 40 * torch.eye(3)[c] + 10 * (i % 5)
                Image.fromarray(pixels.byte().numpy()).save(tmp_path / split / str(c) / f"{i}.png")
    options = ["--data", str(tmp_path), "--epochs", "1", "--losses", "plain", "any_order",
               "--prior_exponents", "0", "1", "--data_exponents", "1", "--prototypes", "6",
               "--contrasts", "0.3", "--out", str(tmp_path / "out"), "--workers", "1"]
    with pytest.raises(SystemExit):
        which_prior.main([*options, "--images", "600"])
    assert "needs 327 images of the most frequent class, and there are 140" in (
        capsys.readouterr().err)
    with pytest.raises(SystemExit):
        which_prior.main([*options, "--images", "256", "--from_labels"])
    assert "needs one prototype per class: --prototypes 3" in capsys.readouterr().err
    which_prior.main([*options, "--images", "256"])
    runs = json.loads((tmp_path / "out/which_prior.json").read_text())["runs"]
    assert [(run["prior_exponent"], run["loss"]) for run in runs] == [
        (None, "random"), (0, "plain"), (0, "any_order"), (1, "plain"), (1, "any_order"),
        (None, "supervised")]
    assert runs[1]["results"] == runs[2]["results"] != runs[3]["results"]
    assert runs[-1]["results"]["balanced_probe"] > 0.9  # Colors are easy.
    which_prior.main([*options, "--images", "256", "--from_labels", "--prototypes", "3",
                      "--epochs", "2", "--out", str(tmp_path / "labels")])
    runs = json.loads((tmp_path / "labels/which_prior.json").read_text())["runs"]
    purity = [run["results"].get("purity") for run in runs]
    assert purity[0] is None and all(value > 0.9 for value in purity[1:])


def test_all_arms_start_equal_and_the_target_network_is_tested():
    args = SimpleNamespace(prior_exponents=[0.0, 1.0], losses=["plain", "relative", "any_order"],
                           data="photographs", classes=3, prototypes=6, from_labels=False)
    runs = [*which_prior.make_models(5, args), which_prior.make_supervised(5, args)]
    assert [(run.exponent, run.losses) for run in runs] == [
        (0, ["plain", "relative", "any_order"]), (1, ["plain"]), (1, ["relative"]),
        (1, ["any_order"]), (None, ["supervised"])]
    assert [run.options for run in runs[:4]] == [
        {}, {}, {"relative_sharpening": True}, {"any_order": True}]
    for run in runs[:4]:
        assert run.tested_encoder is run.network.target_encoder
        for name, value in runs[0].network.state_dict().items():
            if name != "prior":
                torch.testing.assert_close(run.network.state_dict()[name], value, rtol=0, atol=0)
    first = next(make_resnet_after_seed(5).parameters())
    torch.testing.assert_close(next(runs[-1].tested_encoder.parameters()), first, rtol=0, atol=0)
    torch.testing.assert_close(next(runs[0].tested_encoder.parameters()), first, rtol=0, atol=0)


def make_resnet_after_seed(seed):
    torch.manual_seed(seed)
    return photographs.make_resnet()


class FixedViews:
    """Twelve images in three batches of four. Views are noise on the image, in their order."""
    def __init__(self, channels):
        generator = torch.Generator().manual_seed(1)
        self.labels, self.seen = torch.arange(12) % 3, []
        self.images = torch.randn(12, channels, 32, 32, generator=generator)

    def views(self, index):
        self.seen.append(index.tolist())
        images = self.images[index]
        return images + 0.1 * torch.randn(images.shape)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["glyphs", "CIFAR10"])
def test_training_equals_a_plain_loop(name, float64, capsys):
    """PMSN and a supervised network, two epochs of three steps, written out for each of them."""
    args = SimpleNamespace(**which_prior.DEFAULT | {"batch_size": 4}, prior_exponents=[1.0],
                           losses=["any_order"], data=name, classes=3, prototypes=5, epochs=2,
                           from_labels=False)
    channels = 1 if name == "glyphs" else 3
    models, twins = [[*which_prior.make_models(0, args), which_prior.make_supervised(0, args)]
                     for _ in range(2)]
    data = FixedViews(channels)
    torch.manual_seed(7)
    which_prior.train(models, data, args, "")
    torch.manual_seed(7)
    twin_data, terms = FixedViews(channels), []
    for epoch in range(2):
        order = torch.randperm(12)
        for step in range(3):
            batch = order[4 * step : 4 * step + 4]
            target_view, anchor_view = twin_data.views(batch), twin_data.views(batch)
            done = (3 * epoch + step) / 6
            lr, sharpening, momentum = which_prior.schedule(done)
            if name == "CIFAR10":  # The first tenth of 6 steps is less than one step.
                lr, sharpening, momentum = 1e-3 * (1 + math.cos(math.pi * done)), 0.25, 0.99
            for twin in twins:
                network = twin.network
                if twin.exponent is None:
                    logits = network(anchor_view)
                    loss = -logits.log_softmax(1)[torch.arange(4), data.labels[batch]].mean()
                else:
                    with torch.no_grad():
                        targets = network.target_head(network.target_encoder(target_view))
                    anchors = network.head(network.encoder(anchor_view))
                    loss, of_step = pmsn.pmsn_loss(
                        anchors, targets, network.prototypes, pmsn.power_law_prior(5, 1.0),
                        sharpening=sharpening, any_order=True)
                    terms.append(of_step["cross_entropy"].item())
                twin.optimizer.param_groups[0]["lr"] = lr
                twin.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 3.0)
                twin.optimizer.step()
                if twin.exponent is not None:
                    with torch.no_grad():
                        for slow, fast in ((network.target_encoder, network.encoder),
                                           (network.target_head, network.head)):
                            for old, new in zip(slow.parameters(), fast.parameters()):
                                old.copy_(momentum * old + (1 - momentum) * new)
    assert data.seen == twin_data.seen and sorted(sum(data.seen[:6:2], [])) == list(range(12))
    for model, twin in zip(models, twins):
        for name, value in twin.network.state_dict().items():
            torch.testing.assert_close(model.network.state_dict()[name], value, rtol=1e-6,
                                       atol=1e-7, msg=name)
    found = [epoch["cross_entropy"] for epoch in models[0].history]
    assert found == pytest.approx([sum(terms[:3]) / 3, sum(terms[3:]) / 3], rel=1e-4)
    assert models[1].history == [{}, {}] and capsys.readouterr().out.count("\n") == 2


def test_all_priors_start_from_the_same_supervised_network(capsys):
    """It classifies by its prototypes, and each prior gets its weights, target network included."""
    args = SimpleNamespace(batch_size=4, prior_exponents=[0.0, 1.0], losses=["plain"],
                           data="CIFAR10", classes=3, prototypes=3, epochs=20, from_labels=True)
    models, supervised = which_prior.make_models(0, args), which_prior.make_supervised(0, args)
    start, data = supervised.network.pmsn, FixedViews(3)
    assert supervised.tested_encoder is start.encoder
    before = start.prototypes.clone()
    which_prior.train([supervised], data, args, "")
    which_prior.start_from(start, models)
    assert not torch.equal(start.prototypes, before)
    for model, exponent in zip(models, (0, 1), strict=True):
        network = model.network
        torch.testing.assert_close(network.prior, pmsn.power_law_prior(3, exponent))
        torch.testing.assert_close(network.prototypes, start.prototypes, rtol=0, atol=0)
        for ours, theirs in (("encoder", "encoder"), ("target_encoder", "encoder"),
                             ("head", "head"), ("target_head", "head")):
            for mine, parameter in zip(getattr(network, ours).parameters(),
                                       getattr(start, theirs).parameters(), strict=True):
                torch.testing.assert_close(mine, parameter, rtol=0, atol=0)
        # The nearest prototype is the class, for the target network too.
        embeddings = network.target_head(network.target_encoder(data.images))
        nearest = F.normalize(embeddings) @ F.normalize(network.prototypes).T
        assert nearest.argmax(dim=1).tolist() == data.labels.tolist()
        assert {id(x) for x in model.optimizer.param_groups[0]["params"]} >= {
            id(network.prototypes), *map(id, network.encoder.parameters())}


def test_too_few_images_are_an_error():
    """Rounding of the class sizes can leave less than a mini-batch. Nothing would be trained."""
    data = SimpleNamespace(labels=torch.zeros(255))
    with pytest.raises(which_prior.UserError, match="255 images are less than one mini-batch"):
        which_prior.train([], data, SimpleNamespace(epochs=1, batch_size=256), "")
