"""extras/rcdm.py: the sampler and the loss in closed form, what the condition does, a whole run."""

import json
import pickle
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import mnist_corner
import rcdm
from test_corner import ARGS, short_experiment

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with two models of mnist_corner.py after a few steps each."""
    folder = tmp_path_factory.mktemp("models")
    args = {**ARGS, "ordinary": True, "tries": 1, "out": folder}
    short_experiment(0, "digit", SimpleNamespace(**args))
    (folder / "results.json").write_text(json.dumps({"config": args}, default=str))
    return folder

def test_sampler_maps_noise_to_a_normal_distribution():
    """If images have the mean 1 and the std .5, the velocity E[noise - image | x_t] is known."""
    def velocity(x, t):
        center, variance = 1 - t, 0.25 * (1 - t) ** 2 + t**2  # of x_t
        image = 1 + 0.25 * (1 - t) / variance * (x - center)
        noise = t / variance * (x - center)
        return noise - image
    noise = torch.randn(100, 1)
    torch.testing.assert_close(rcdm.sample(velocity, noise), 1 + 0.5 * noise, atol=0.005, rtol=0)

def test_sampler_maps_noise_to_a_mixture():
    """x = (1 - t) * image + t * noise. A third of the images are near -2, the others near 1."""
    means, shares, std = np.array([-2.0, 1.0]), np.array([1 / 3, 2 / 3]), 0.2

    def velocity(x, t):
        """The expectation of noise - image, given x: each part of the mixture is normal."""
        variance = (1 - t) ** 2 * std**2 + t**2
        distance = x.numpy()[:, None] - (1 - t) * means
        posterior = shares * np.exp(-(distance**2) / (2 * variance))
        posterior /= posterior.sum(axis=1, keepdims=True)
        change = (t - (1 - t) * std**2) / variance * distance - means
        return torch.from_numpy((posterior * change).sum(axis=1))
    noise = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = rcdm.sample(velocity, noise, steps=200)
    left, right = images[images < -0.5], images[images > -0.5]
    assert len(left) / len(images) == pytest.approx(1 / 3, abs=0.015)
    for part, mean in ((left, -2.0), (right, 1.0)):
        assert part.mean().item() == pytest.approx(mean, abs=0.02)
        assert part.std().item() == pytest.approx(std, abs=0.02)

def test_loss_against_numpy():
    images, seen = torch.rand(4000, 1, 2, 2), {}
    def model(x, times, projections):
        seen.update(x=x.double().numpy(), times=times.double().numpy(), projections=projections)
        return 0.5 * x
    loss = rcdm.flow_loss(model, images, "projections")
    x, t, x0 = seen["x"], seen["times"][:, None, None, None], images.double().numpy()
    noise = (x - (1 - t) * x0) / t
    assert loss.item() == pytest.approx(((0.5 * x - (noise - x0)) ** 2).mean(), rel=1e-4)
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    # The time is logit-normal: 68% within one sigma.
    assert np.mean(abs(np.log(t / (1 - t))) < 1) == pytest.approx(0.683, abs=0.03)

@pytest.mark.slow
def test_a_model_trained_on_two_projections_draws_the_right_image():
    torch.manual_seed(0)
    images = torch.full((2, 1, 32, 32), -0.8)
    images[0, :, :16], images[1, :, :, 16:] = 0.8, 0.8  # the upper half, the right half
    projections = F.normalize(torch.randn(2, 32), dim=1)
    unet = rcdm.UNet()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    for _ in range(150):
        index = torch.randint(2, (8,))
        loss = rcdm.flow_loss(unet, images[index], projections[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = rcdm.draw(unet, projections, torch.randn(1, 3, 1, 32, 32))
    distance = (drawn[:, :, None] - images).abs().mean(dim=(3, 4, 5))  # (2, 3, 2)
    for row in (0, 1):
        assert (distance[row, :, row] < 0.5 * distance[row, :, 1 - row]).all()

def test_weighted_purity_by_hand():
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    labels = torch.tensor([5, 5, 2, 0, 1, 2, 3])  # two of three, one of four
    found = rcdm.purity(groups, labels, torch.tensor([0.75, 0.25]))
    assert found == pytest.approx(0.75 * 2 / 3 + 0.25 / 4)

def test_measures_of_perfect_samples(tmp_path, monkeypatch):
    """Every pixel of an image is its digit here, and prototype k stands for the digit k."""
    model = SimpleNamespace(prototypes=2 * torch.eye(10, 32))

    def batch(source, count, exponent, test=False):
        digits = torch.arange(10).repeat_interleave(count // 55 * torch.arange(1, 11))
        digits = digits[torch.randperm(len(digits))]
        images = digits.view(-1, 1, 1, 1).expand(-1, 1, 32, 32).float()
        return images, {"digit": digits, "background": torch.zeros_like(digits)}

    def draw(unet, projections, noise):
        digits = projections.argmax(dim=1)
        return digits.view(-1, 1, 1, 1, 1).expand(-1, noise.shape[1], 1, 32, 32).float()

    def classify(network, images):
        return {"digit": images[:, 0, 0, 0].long(), "background": torch.arange(len(images)) % 2}
    fakes = {"load_pmsn": lambda *args: model, "train_classifier": lambda *args: None,
             "train_unet": lambda *args, name: (SimpleNamespace(state_dict=dict), float("nan")),
             "project": lambda model, x: model.prototypes[x[:, 0, 0, 0].long()] / 2,
             "draw": draw, "classify": classify}
    for name, fake in fakes.items():
        monkeypatch.setattr(rcdm, name, fake)
    monkeypatch.setattr(rcdm.CornerImages, "batch", batch)
    args = SimpleNamespace(corner=ARGS, models=tmp_path, out=tmp_path, steps=10, samples=8)
    record, pictures = rcdm.experiment(0, 1.0, args)
    results = record["results"]
    for name in "faithfulness digit_of_samples digit_of_images digit_accuracy cosine".split():
        assert results[name] == pytest.approx(1), name
    assert results["background_of_samples"] == pytest.approx(0.5)
    assert "loss" not in results  # NaN is no result, and no JSON.
    assert record["shares"] == pytest.approx([k / 55 for k in range(1, 11)])
    # In the figure the prototype with the largest share comes first.
    assert (np.diff(pictures["shares"]) < 0).all()
    assert (pictures["prototypes"] == np.arange(9, -1, -1).reshape(10, 1, 1, 1, 1)).all()

@pytest.mark.slow
def test_quick_run_end_to_end(models, tmp_path, monkeypatch):
    folder = tmp_path / "quick_models"
    main = Mock(side_effect=lambda arguments: shutil.copytree(models, folder))
    monkeypatch.setattr(mnist_corner, "main", main)
    def run_here(experiment, jobs, args):
        experiment, args = pickle.loads(pickle.dumps((experiment, args)))
        return [experiment(*job, args) for job in jobs]
    monkeypatch.setattr(rcdm, "run_in_processes", run_here)
    monkeypatch.setattr(rcdm.sample, "__defaults__", (2,))  # steps
    monkeypatch.setattr(rcdm, "BATCH_SIZE", 16)
    rcdm.main(["--quick", "--workers", "2", "--out", str(tmp_path)])
    flags = ["--workers", "2", "--quick"]
    main.assert_called_once_with(["--out", str(folder), "--seeds", "0", *flags])
    runs = json.loads((tmp_path / "rcdm.json").read_text())["runs"]
    assert [run["exponent"] for run in runs] == [1, 0]
    assert runs[0]["shares"] != runs[1]["shares"]
    # Both priors get the same classifier and images, of which .34 have the most frequent digit.
    assert runs[0]["results"]["digit_accuracy"] == runs[1]["results"]["digit_accuracy"]
    assert all(run["results"]["digit_of_images"] > 0.32 for run in runs)
    for name in ("rcdm.png", "rcdm_images.png"):
        assert min(Image.open(tmp_path / name).size) > 300

@pytest.mark.slow
@pytest.mark.parametrize("file, content", [
    ("model_digit_0_0.pt", "half"), ("model_digit_0_0.pt", None),
    *[("results.json", text) for text in ("half", "{}", "[]")]])
def test_damaged_models_are_one_clear_line(file, content, models, tmp_path, capsys):
    folder = shutil.copytree(models, tmp_path / "models")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(SystemExit, match="^2$"):
        rcdm.main(["--models", str(folder), "--out", str(tmp_path)])
    _, line = capsys.readouterr().err.split("error: ")
    assert "one run of mnist_corner.py, with --seeds 0" in line and line.count("\n") == 1
