"""mnist_corner.py: its data, its measures, its fairness between the priors, and its errors."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import mnist_corner
import pmsn

SHARED = Path(__file__).parents[2] / "shared" / "data"
SMALL = ["--images", "512", "--epochs", "1", "--starts", "1", "--batch_size", "128"]
DIGITS = mnist_corner.load_digits("synthetic", None)[0]
BACKGROUNDS = mnist_corner.load_backgrounds("synthetic", None, None)[0]
SETTINGS = dict(contrast=0.5, deform=0.35, prior_weight=3.0, lr=2e-3, images=512, epochs=1,
                batch_size=128, seeds=[0])

def train(exponent, shift=0, starts=1):
    """A short run, four steps per start. `shift` changes the labels of the test images."""
    args = SimpleNamespace(**SETTINGS, starts=starts)
    digits, digit = mnist_corner.sample(*DIGITS, 1.0, 512, 0)
    backgrounds, background = mnist_corner.sample(*BACKGROUNDS, 0.0, 512, 1)
    torch.manual_seed(0)
    test = {"images": mnist_corner.make_view(digits[:64], backgrounds[:64], args),
            "digit": (digit[:64] + shift) % 10, "background": (background[:64] + shift) % 10}
    data, prior = [digits, backgrounds], pmsn.power_law_prior(10, exponent)
    return mnist_corner.train("", prior, data, test, args, 0, [0.0], None)

def spy(monkeypatch, losses=()):
    """A list of the (weights, views) of every step. Start i gets losses[i], if there is one."""
    steps, forward = [], pmsn.PMSN.forward

    def watched(model, views):
        loss, terms = forward(model, views)
        if len(steps) < 4 * len(losses):
            loss = loss + (losses[len(steps) // 4] - loss).detach()
        weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        steps.append((weights, torch.stack(views)))
        return loss, terms
    monkeypatch.setattr(pmsn.PMSN, "forward", watched)
    return steps

def failure(capsys, *arguments):
    """The message of a run that must end with status 2 and one line after the usage."""
    with pytest.raises(SystemExit, match="^2$"):
        mnist_corner.main([*SMALL, *map(str, arguments)])
    _, message = capsys.readouterr().err.split("error: ")
    assert message.count("\n") == 1
    return message

def make_folder(folder, classes=2, images=10):
    folder.mkdir()
    for c in range(classes):
        (folder / f"class{c}").mkdir()
        for i in range(images):
            pixels = np.random.default_rng(c * 100 + i).integers(0, 255, (40, 50, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"class{c}" / f"{i}.png")
    return folder

def test_frequencies_follow_the_exponent_and_no_image_repeats_more_than_it_must():
    labels = torch.arange(3).repeat_interleave(torch.tensor([30, 4, 100]))
    chosen, found = mnist_corner.sample(torch.arange(134), labels, 1.0, 110, 3)
    assert torch.equal(labels[chosen], found) and not torch.equal(found, found.sort().values)
    assert torch.bincount(found).tolist() == [60, 30, 20]  # 110 times 6, 3 and 2 elevenths
    frequent, rare, many = torch.bincount(chosen, minlength=134).split([30, 4, 100])
    assert set(frequent.tolist()) == {2} and set(rare.tolist()) == {7, 8} and many.max() == 1

def test_digit_and_background_are_independent():
    _, digit = mnist_corner.sample(*DIGITS, 1.0, 5000, 0)
    _, background = mnist_corner.sample(*BACKGROUNDS, 0.0, 5000, 1)
    assert torch.bincount(background).tolist() == [500] * 10
    joint = np.histogram2d(digit, background, bins=10)[0] / 5000
    assert abs(joint - np.outer(joint.sum(1), joint.sum(0))).max() < 0.01

@pytest.mark.parametrize("deform, low, high", [(0.0, 0.02, 0.15), (1.0, 0.15, 1.0)])
def test_views_change_digit_and_background(deform, low, high):
    torch.manual_seed(0)
    args = SimpleNamespace(contrast=1.0, deform=deform)
    views = [mnist_corner.make_view(DIGITS[0][:10], BACKGROUNDS[0], args) for _ in range(2)]
    change = (views[0] - views[1]).abs()
    assert low < change[..., :16, :16].mean() < high  # at deform 0 there is only noise
    assert change[..., 16:, 16:].mean() > 0.3  # another phase of the grating

def test_synthetic_digits_differ_in_every_font():
    for font in DIGITS[0].flatten(1).split(10):
        assert (torch.cdist(font, font) + 100 * torch.eye(10)).min() > 1.5

def test_agreement_against_brute_force():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(60, 5)), rng.integers(0, 3, 60)
    unit, expected = features / np.linalg.norm(features, axis=1, keepdims=True), 0
    for i in range(60):
        order = [j for j in np.argsort(-(unit @ unit[i])) if j != i][:10]
        expected += sum(labels[j] == labels[i] for j in order) / 600
    found = mnist_corner.agreement(torch.tensor(features), torch.tensor(labels))
    assert abs(found - expected) < 1e-6

def test_both_priors_get_the_same_weights_and_batches_and_no_label_trains(monkeypatch):
    steps = spy(monkeypatch)
    for exponent, shift in ((1.0, 0), (0.0, 0), (0.0, 1)):
        train(exponent, shift)
    power_law, uniform, other_labels = steps[:8], steps[8:16], steps[16:]
    assert torch.equal(power_law[0][0], uniform[0][0])
    assert not torch.equal(power_law[1][0], uniform[1][0])  # after a step the prior has acted
    for step in range(8):
        assert torch.equal(power_law[step][1], uniform[step][1])
        assert torch.equal(uniform[step][0], other_labels[step][0])

def test_starts_see_one_quarter_and_the_lowest_loss_goes_on(monkeypatch):
    steps = spy(monkeypatch, losses=[3.0, 1.0, 2.0, 4.0])
    _, history, losses = train(0.0, starts=4)
    assert losses == [3.0, 1.0, 2.0, 4.0] and len(history) == 2 and len(steps) == 20
    for _, views in (steps[4], steps[7], steps[16]):  # top right, and gray elsewhere
        assert views[..., :16, 16:].std() > 0.1
        assert views[..., 16:, :].abs().max() == views[..., :16, :16].abs().max() == 0
    assert steps[19][1][..., 16:, :16].std() > 0.1  # at last the whole image
    train(0.0, starts=0)  # the whole image at once
    assert len(steps) == 28 and all(views[..., 16:, :16].std() > 0.1 for _, views in steps[20:])

def test_folders_hold_out_every_fifth_image_unless_scenes_are_few(tmp_path):
    folder = make_folder(tmp_path / "images", classes=3)
    (folder / "class0" / "._0.png").write_bytes(b"not an image")
    (folder / "class0" / "notes.txt").write_text("not an image")
    training, test = mnist_corner.load_backgrounds(folder, None, None)
    assert training[1].bincount().tolist() == [8] * 3 and test[1].bincount().tolist() == [2] * 3
    assert torch.cdist(training[0].flatten(1), test[0].flatten(1)).min() > 1  # none is in both
    training, test = mnist_corner.load_backgrounds(folder, None, 2)
    assert training[1].tolist() == [0, 0, 1, 1, 2, 2] and torch.equal(training[0], test[0])

def test_cifar_and_mnist_as_torchvision_gives_them(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 99, (40, 32, 32, 3), dtype=np.uint8)
    def cifar(root, transform, download):
        items = [(transform(Image.fromarray(image)), 0) for image in pixels]
        return type("CIFAR", (list,), {"targets": [0, 1] * 20, "classes": ["a", "b"]})(items)
    def mnist(root, train, download):
        data = torch.full((20, 28, 28), 255 if train else 51, dtype=torch.uint8)
        return SimpleNamespace(data=data, targets=torch.arange(20) % 10)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", cifar)
    monkeypatch.setattr("torchvision.datasets.MNIST", mnist)
    (images, labels), (test, _) = mnist_corner.load_backgrounds("CIFAR10", "data", None)
    assert len(test) == 8 and labels.bincount().tolist() == [16, 16]
    luma = pixels[2] @ np.array([0.299, 0.587, 0.114])  # images 0 and 1 are held out
    expected = 0.5 + 0.35 * (luma - luma.mean()) / luma.std(ddof=1)
    np.testing.assert_allclose(images[0, 0], expected, atol=0.04)  # gray is rounded to integers
    for (images, labels), gray in zip(mnist_corner.load_digits("MNIST", "data"), (1.0, 0.2)):
        torch.testing.assert_close(images, torch.full((20, 1, 20, 20), gray))
        assert labels.tolist() == [*range(10)] * 2

@pytest.mark.parametrize("options, word", [
    ("--digits SVHN", "SVHN"), ("--backgrounds no/such", "'no/such'. --digits synthetic"),
    ("--prototypes 1", "from 2"), ("--batch_size 601", "--images 512"), ("--exponent 50", "to 4"),
    ("--contrast nan", "to 1"), ("--prior_weight inf", "inf"), ("--out /proc/x", "/proc/x"),
    ("--prior_weight 1e39", "not finite"), ("--lr 1e30", "not finite")])
def test_bad_options_are_one_clear_line(options, word, tmp_path, capsys):
    assert word in failure(capsys, "--out", tmp_path, *options.split())

@pytest.mark.parametrize("classes, images, word", [
    (0, 0, "class folder"), (2, 0, "class0"), (1, 9, "two classes"), (2, 1, "--scenes 1")])
def test_bad_folders_are_named(classes, images, word, tmp_path, capsys):
    folder = make_folder(tmp_path / "images", classes, images)
    assert word in failure(capsys, "--backgrounds", folder, "--out", tmp_path)

def test_unreadable_image_failed_download_and_full_disk(tmp_path, monkeypatch, capsys):
    image = make_folder(tmp_path / "images") / "class1" / "3.png"
    image.write_bytes(image.read_bytes()[:500])
    assert str(image) in failure(capsys, "--backgrounds", image.parents[1], "--out", tmp_path)
    error = RuntimeError("downloading:\nno route")
    monkeypatch.setattr("torchvision.datasets.MNIST", Mock(side_effect=error))
    assert "downloading: no route" in failure(capsys, "--digits", "MNIST", "--out", tmp_path)
    monkeypatch.setattr(mnist_corner, "train", Mock(return_value=train(1.0)))
    for function in ("matplotlib.figure.Figure.savefig", "pathlib.Path.write_text"):
        monkeypatch.setattr(function, Mock(side_effect=OSError(28, "No space left on device")))
        assert "disk full" in failure(capsys, "--out", tmp_path)

def test_quick_run_end_to_end(tmp_path):
    command = [sys.executable, mnist_corner.__file__, "--quick", "--out", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    table = result.stdout.split("\n\n")[0].splitlines()
    assert len(table) == 1 + 2 * 3 * 2 and len(set(map(len, table))) == 1  # aligned
    results = json.loads((tmp_path / "results.json").read_text())
    assert [run["prior"] for run in results["runs"]] == ["power_law", "uniform"]
    assert results["config"]["exponent"] == 1 and results["summary"]["uniform"]["n"] == 1
    for name in ("neighbors", "prototypes", "training"):
        assert min(Image.open(tmp_path / f"{name}.png").size) > 300

@pytest.mark.skipif(not SHARED.is_dir(), reason="MNIST and CIFAR-10 are not in ../shared/data")
def test_real_images_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_: None)  # saves time
    mnist_corner.main([*SMALL, "--out", str(tmp_path), "--digits", "MNIST", "--root", str(SHARED),
                       "--backgrounds", str(SHARED / "cifar10" / "test"), "--scenes", "2"])
    for row in json.loads((tmp_path / "results.json").read_text())["summary"].values():
        assert 0.1 < row["same_digit_encoder"]["mean"] < 1  # 0.1 is chance
