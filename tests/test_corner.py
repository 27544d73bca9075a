"""mnist_corner.py: its data, its measures, and its fairness between the priors."""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
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
SETTINGS = dict(digits="synthetic", backgrounds="synthetic", root="data",
                exponent=1.0, overcluster=None, prior_weight=1.0, sinkhorn_iterations=0,
                relative_sharpening=False, contrast=0.5, deform=0.2, images=512, epochs=1, starts=9)
GRID = [(row, column, 16) for row in (0, 8, 16) for column in (0, 8, 16)]
DIGITS = mnist_corner.load_digits("synthetic", None)[0]
BACKGROUNDS = mnist_corner.load_backgrounds("synthetic", None)

def run(exponent, **settings):
    """A short run, of two steps per start and two on whole images -> what results.json gets."""
    with tempfile.TemporaryDirectory() as out:
        args = SimpleNamespace(**{**SETTINGS, "out": Path(out), **settings})
        return mnist_corner.experiment(0, exponent, args)[0]

def spy(monkeypatch, losses=()):
    """A list of the (weights, views) of every step. Start i gets losses[i], if there is one."""
    steps, forward = [], pmsn.PMSN.forward

    def watched(model, views, **options):
        loss, terms = forward(model, views, **options)
        if len(steps) < 2 * len(losses):
            loss = loss + (losses[len(steps) % len(losses)] - loss).detach()
        weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        steps.append((weights, torch.stack(views)))
        return loss, terms
    monkeypatch.setattr(pmsn.PMSN, "forward", watched)
    return steps

def test_frequencies_follow_the_exponent():
    labels = torch.arange(3).repeat_interleave(torch.tensor([30, 4, 100]))
    torch.manual_seed(0)
    index = mnist_corner.sample(labels, 1.0, 11000)
    counts = torch.bincount(labels[index])
    assert (counts - torch.tensor([6000, 3000, 2000])).abs().max() < 200  # four sigma
    rare = torch.bincount(index)[30:34]  # all images of a class are equally frequent
    assert (rare - 750).abs().max() < 120

@pytest.mark.parametrize("deform, low, high", [(0.0, 0.02, 0.15), (1.0, 0.15, 1.0)])
def test_views_change_digit_and_background(deform, low, high):
    torch.manual_seed(0)
    args = SimpleNamespace(contrast=1.0, deform=deform)
    views = [mnist_corner.make_view(DIGITS[0][:10], BACKGROUNDS, args) for _ in range(2)]
    change = (views[0] - views[1]).abs()
    assert low < change[..., :16, :16].mean() < high  # at deform 0 there is only noise
    assert change[..., 16:, 16:].mean() > 0.3  # another phase of the grating

def test_agreement_against_numpy():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(60, 5)), rng.integers(0, 3, 60)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    nearest = np.argsort(-unit @ unit.T, axis=1)[:, 1:11]  # The first one is the image itself.
    expected = (labels[nearest] == labels[:, None]).mean()
    found = mnist_corner.agreement(torch.tensor(features), torch.tensor(labels))
    assert abs(found - expected) < 1e-6

@pytest.mark.slow
def test_all_priors_get_the_same_weights_and_views_and_no_label_trains(monkeypatch):
    steps = spy(monkeypatch)
    run(1.0), run(0.0)
    training, (images, labels) = mnist_corner.load_digits("synthetic", None)
    monkeypatch.setattr(mnist_corner, "load_digits", lambda *_: [training, (images, 9 - labels)])
    run(0.0)
    # Two steps of nine starts, then two steps on whole images.
    power_law, uniform, other_labels = steps[:20], steps[20:40], steps[40:]
    assert torch.equal(power_law[0][0], uniform[0][0])
    assert not torch.equal(power_law[9][0], uniform[9][0])  # after a step the prior has acted
    for step in range(20):
        assert torch.equal(power_law[step][1], uniform[step][1])
        assert torch.equal(uniform[step][0], other_labels[step][0])

@pytest.mark.slow
def test_starts_see_one_window_each_and_the_lowest_loss_goes_on(monkeypatch):
    widen = Mock(wraps=mnist_corner.widen)
    monkeypatch.setattr(mnist_corner, "widen", widen)
    losses = [3.0, 4.0, 2.0, 5.0, 1.5, 1.0, 6.0, 7.0, 8.0]
    steps = spy(monkeypatch, losses)
    record = run(0.0)
    assert [start["window"] for start in record["starts"]] == GRID
    assert [start["loss"] for start in record["starts"]] == losses
    top, bottom = (torch.cat([steps[i][1], steps[i + 2][1]], dim=-1) for i in (0, 6))
    views = torch.cat([top, bottom], dim=-2)
    for (row, column, _), (weights, crops) in zip(GRID, steps):
        assert torch.equal(crops, views[..., row : row + 16, column : column + 16])
        assert torch.equal(weights, steps[0][0])
    assert widen.call_args.args[0].window == (8, 16, 16)
    assert len(steps) == 20 and steps[18][1].shape == (2, 256, 1, 32, 32)
    run(0.0, starts=0)  # the only start sees whole images
    assert [views.shape[-1] for _, views in steps[20:]] == [32] * 4

@pytest.mark.parametrize("window", GRID)
def test_a_widened_model_reads_its_window_and_can_learn_the_rest(window):
    start = mnist_corner.make_start(window, 0, 1.0, SimpleNamespace(**SETTINGS))
    model, (row, column) = start.models[0], (window[0] // 8, window[1] // 8)
    whole, encoders = torch.randn(5, 1, 32, 32), [model.encoder, model.target_encoder]
    expected = []
    for encoder in encoders:
        positions = encoder[:-2](whole)[:, :, row : row + 2, column : column + 2]
        expected.append(encoder[-1](positions.flatten(1)))
    mnist_corner.widen(start)
    torch.testing.assert_close([encoder(whole) for encoder in encoders], expected)
    assert not model.target_encoder[-1].weight.requires_grad
    model.encoder(whole).sum().backward()
    assert model.encoder[-1].weight.grad.ne(0).all()

@pytest.mark.slow
def test_overclustering_trains_too_and_is_not_in_the_loss(monkeypatch):
    steps = spy(monkeypatch, losses=[1.0, 100.0] * 9)
    record = run(1.0, overcluster=30)
    assert len(steps) == 2 * 18 + 2  # not on whole images
    assert len(steps[1][0]) - len(steps[0][0]) == 20 * 64  # 30 prototypes, not 10
    # The second model of the first start in its first and second step: prototypes, then encoder.
    assert not torch.equal(steps[1][0][: 30 * 64], steps[19][0][: 30 * 64])
    encoder = slice(30 * 64, 30 * 64 + 800)
    assert torch.equal(steps[1][0][encoder], steps[0][0][10 * 64 :][:800])
    assert all(start["loss"] == 1.0 for start in record["starts"])

def test_the_figure_says_which_exponents_prefer_the_digit(tmp_path, monkeypatch):
    suptitle = Mock()
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", suptitle)
    summary = {}
    for exponent, digit, background in [(0.0, 3, 1), (0.5, 2, 2.5), (1.0, 1, 3), (2.0, 3, 3.15)]:
        values = {"digit_start": digit, "background_start": background, "same_digit": 0.5}
        summary[exponent] = {key: {"mean": x, "std": 0.1} for key, x in values.items()} | {"n": 4}
    mnist_corner.plot_preference(summary, 1.0, tmp_path / "preference.png")
    text = suptitle.call_args.args[0]
    assert "exponents 0.5, 1\n" in text and "n = 4" in text

@pytest.mark.slow
def test_a_loss_that_no_start_has_is_left_out_everywhere(tmp_path, monkeypatch):
    """One start on whole images encodes the digit or the background, but not both."""
    record = run(0.0, starts=0)
    assert len({"digit_start", "background_start"} & set(record["results"])) == 1
    both = {"digit_start": 1.0, "background_start": 2.0, "same_digit": 0.5, "loss": math.nan}
    one = {"digit_start": 3.0, "same_digit": 0.5, "loss": math.inf}
    runs = [{"exponent": 1.0, "results": mnist_corner.finite(x)} for x in (both, one)]
    summary = mnist_corner.summarize(runs, key=lambda run: run["exponent"])
    assert summary[1.0] == {"n": 2, "digit_start": {"mean": 2.0, "std": pytest.approx(2**0.5)},
                            "same_digit": {"mean": 0.5, "std": 0.0}}
    assert mnist_corner.cell(summary[1.0], "digit_start") == "2.000 ± 1.414"
    assert mnist_corner.cell(summary[1.0], "background_start") == "-"
    suptitle = Mock()
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", suptitle)
    mnist_corner.plot_preference(summary, 1.0, tmp_path / "preference.png")
    assert "no exponent that has both kinds of starts" in suptitle.call_args.args[0]

def test_a_file_is_replaced_when_the_new_one_is_complete(tmp_path, monkeypatch):
    results, model = tmp_path / "results.json", tmp_path / "model.pt"
    mnist_corner.save({"path": tmp_path, "loss": 1.0}, results)
    mnist_corner.save({"weight": torch.ones(2)}, model)
    with pytest.raises(ValueError):
        mnist_corner.save({"loss": math.nan}, results)  # It would be no JSON.
    with monkeypatch.context() as patch:

        def is_killed(*_):
            for temporary in tmp_path.glob("*.tmp"):
                temporary.write_bytes(temporary.read_bytes()[:3])
            raise KeyboardInterrupt
        patch.setattr(os, "replace", is_killed)
        for content, path in (({"loss": 2.0}, results), ({"weight": torch.zeros(2)}, model)):
            with pytest.raises(KeyboardInterrupt):
                mnist_corner.save(content, path)
    assert json.loads(results.read_text()) == {"path": str(tmp_path), "loss": 1.0}
    assert torch.load(model, weights_only=True)["weight"].tolist() == [1, 1]
    mnist_corner.save({"loss": 2.0}, results)
    assert json.loads(results.read_text()) == {"loss": 2.0}

def test_cifar_as_torchvision_gives_it(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 99, (40, 32, 32, 3), dtype=np.uint8)
    def cifar(root, transform, download):
        items = [(transform(Image.fromarray(image)), 0) for image in pixels]
        return type("CIFAR", (list,), {"targets": [1, 1, 0, 1, 0] * 8})(items)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", cifar)
    images = mnist_corner.load_backgrounds("CIFAR10", "data")
    assert images.shape == (2, 1, 32, 32)
    for image, first in zip(images, (2, 0)):  # the first image of each class
        luma = pixels[first] @ np.array([0.299, 0.587, 0.114])
        expected = 0.5 + 0.35 * (luma - luma.mean()) / luma.std(ddof=1)
        np.testing.assert_allclose(image[0], expected, atol=0.04)  # gray is rounded to integers

@pytest.mark.slow
def test_quick_run_finds_the_digit_and_has_the_bits_of_one_process(tmp_path):
    options = "--quick --deform 0.1 --out".split()
    command = [sys.executable, mnist_corner.__file__, *options, tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    progress, table = (part.splitlines() for part in result.stdout.split("\n\n"))
    rows = [line for line in progress if "runs done" not in line]
    assert len(rows) == 1 + 2 * 3 and len(set(map(len, rows))) == 1  # aligned
    assert progress[-1] == "2 of 2 runs done, about 0 s left"
    assert len(table) == 2 + 2 + 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert [record["exponent"] for record in results["runs"]] == [0, 1]
    assert results["config"]["exponent"] == 1 and results["summary"]["0.0"]["n"] == 1
    record = results["runs"][1]
    assert record == json.loads(json.dumps(run(1.0, images=1024, epochs=2, deform=0.1)))
    found = [start["same_digit"] for start in record["starts"]]
    assert np.argmax(found) == 0 and record["starts"][0]["loss"] < 1.5
    assert record["results"]["same_digit"] > 0.7 > 2 * record["results"]["same_background"]
    assert (tmp_path / "model_1_0.pt").exists() and (tmp_path / "model_0_0.pt").exists()
    assert min(Image.open(tmp_path / "neighbors.png").size) > 300

@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="child processes are in /proc")
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_ends_all_its_processes(stop, tmp_path):
    """The program handles SIGTERM as Ctrl-C. It cannot handle SIGKILL, but its workers notice."""
    options = "--images 256 --starts 0 --epochs 1000000 --workers 2 --out".split()
    command = [sys.executable, mnist_corner.__file__, *options, tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(workers := children.read_text().split()) < 3:  # with the resource tracker
        time.sleep(0.1)
    if stop == signal.SIGKILL:
        # A worker has finished an epoch when there is a line below the head of the table.
        assert process.stdout.readline() and process.stdout.readline()
    process.send_signal(stop)
    process.wait(timeout=30)
    assert process.returncode != 0 and not list(tmp_path.iterdir())
    deadline = time.time() + 20
    while left := [worker for worker in workers if Path(f"/proc/{worker}/exe").exists()]:
        if time.time() > deadline:
            for worker in left:
                os.kill(int(worker), signal.SIGKILL)
            pytest.fail(f"{len(left)} processes go on")
        time.sleep(0.1)

@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="MNIST and CIFAR-10 are not in ../shared/data")
def test_real_images_end_to_end():
    for images, labels in mnist_corner.load_digits("MNIST", str(SHARED)):
        assert images.shape == (len(labels), 1, 20, 20) and images.min() == 0 < images.max() <= 1
    record = run(1.0, digits="MNIST", root=str(SHARED), deform=0.0,
                 backgrounds=str(SHARED / "cifar10" / "test"))
    assert record["starts"][8]["same_background"] > 0.5 > 0.2 > record["starts"][8]["same_digit"]
    assert record["starts"][0]["same_digit"] > 0.5 > 0.2 > record["starts"][0]["same_background"]
