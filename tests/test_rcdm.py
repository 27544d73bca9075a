"""extras/rcdm.py: the sampler and the loss in closed form, what the condition does, a whole run."""

import json
import math
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
from test_corner import ARGS, short_networks


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with two models of mnist_corner.py after a few steps each."""
    folder = tmp_path_factory.mktemp("models")
    short_networks(0, "digit", 0.8, SimpleNamespace(**ARGS, out=folder))
    (folder / "results.json").write_text(json.dumps({"config": ARGS}))
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


def test_a_model_trained_on_two_projections_draws_the_right_image():
    images = torch.full((2, 1, 16, 16), -0.8)
    images[0, :, :8], images[1, :, :, 8:] = 0.8, 0.8  # the upper half, the right half
    projections = F.normalize(torch.randn(2, rcdm.DIM), dim=1)
    unet = rcdm.UNet()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3, fused=True)
    for _ in range(100):
        index = torch.randint(2, (16,))
        loss = rcdm.flow_loss(unet, images[index], projections[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = rcdm.draw(unet, projections, torch.randn(1, 3, 1, 16, 16))
    distance = (drawn[:, :, None] - images).abs().mean(dim=(3, 4, 5))  # (2, 3, 2)
    for row in (0, 1):
        assert (distance[row, :, row] < 0.5 * distance[row, :, 1 - row]).all()


def test_projections_are_those_of_the_new_network(models):
    """Of encoder and head with their running statistics, and not of the target network."""
    path = models / "model_digit_1.25_0.pt"
    model, state = rcdm.load_pmsn(path, 1.25), torch.load(path, weights_only=True)
    images = torch.rand(1100, 1, 32, 32)  # in two parts
    mean, var = state["head.1.running_mean"], state["head.1.running_var"]
    for name, equal in (("", True), ("target_", False)):
        encoder = getattr(model, f"{name}encoder")
        z = encoder(images) @ state[f"{name}head.0.weight"].T + state[f"{name}head.0.bias"]
        z = (z - mean) / (var + 1e-5).sqrt()
        z = z / z.norm(dim=1, keepdim=True)
        found = rcdm.project(model, images)
        assert found.shape == (1100, rcdm.DIM)
        assert torch.allclose(found, z, atol=1e-5) == equal
    assert not any(module.training for module in model.modules())


def test_images_show_what_their_labels_say(models):
    """No image shows another digit than its own. In training digits are long-tailed."""
    train, test = rcdm.load_images(ARGS)
    rendered = []
    for source in (train, test):
        source.render = lambda pairs, render=source.render: rendered.append(pairs) or render(pairs)
    for source, balanced in ((train, False), (test, True)):
        images, labels = rcdm.draw_images(source, 5000, balanced)
        digits, backgrounds = rendered.pop().T  # The images of the ten digits are in their order.
        assert torch.equal(labels["digit"], digits) and images.shape == (5000, 1, 32, 32)
        assert torch.equal(labels["background"], backgrounds)
        shares = np.ones(10) if balanced else np.arange(1, 11) ** -1.25
        np.testing.assert_allclose(digits.bincount() / 5000, shares / shares.sum(), atol=0.03)
        np.testing.assert_allclose(backgrounds.bincount() / 5000, 5 * [0.2], atol=0.03)


def test_measures_of_perfect_samples(tmp_path, monkeypatch):
    """Every pixel of an image is its digit here, and prototype k stands for the digit k.

    Images with the background 1 are nearer to their prototype. They are a quarter of its images.
    """
    model = SimpleNamespace(prototypes=2 * torch.eye(5, rcdm.DIM))

    def draw_images(source, count, balanced=False):
        draws.append((source.test, balanced))
        digits = torch.arange(5).repeat_interleave(count // 60 * 4 * torch.arange(1, 6))
        background = torch.where(torch.arange(len(digits)) % 4 == 1, 1, 2)
        order = torch.randperm(len(digits))
        images = torch.stack([digits, background], dim=1)[order].float()
        return (images.view(-1, 2, 1, 1, 1)[:, 0].expand(-1, 1, 32, 32) + background[order].view(
            -1, 1, 1, 1) / 10, {"digit": digits[order], "background": background[order]})

    def project(model, images):
        """Images of the background 2 are a bit nearer to the other prototypes."""
        values = images[:, 0, 0, 0]
        digits, background = values.floor().long(), values.frac() * 10
        z = torch.eye(5, rcdm.DIM)[digits] + 0.1 * (background[:, None] > 1.5)
        return F.normalize(z, dim=1)

    def draw(unet, projections, noise):
        digits = projections.argmax(dim=1)
        return digits.view(-1, 1, 1, 1, 1).expand(-1, noise.shape[1], 1, 32, 32) + 0.1

    def classify(network, images):
        return {"digit": images[:, 0, 0, 0].long(), "background": torch.arange(len(images)) % 2}
    draws = []
    fakes = {"load_images": lambda corner: [SimpleNamespace(test=x) for x in (False, True)],
             "load_pmsn": lambda *args: model, "train_classifier": lambda *args: None,
             "train_unet": lambda *args, name: (SimpleNamespace(state_dict=dict), 0.25),
             "project": project, "draw": draw, "draw_images": draw_images, "classify": classify}
    for name, fake in fakes.items():
        monkeypatch.setattr(rcdm, name, fake)
    args = SimpleNamespace(corner=ARGS, models=tmp_path, out=tmp_path, steps=10, samples=8)
    record, = rcdm.experiment(0, 1.25, args)
    pictures = torch.load(tmp_path / "pictures_1.25_0.pt", weights_only=True)
    results = record["results"]
    assert draws == [(False, False), (True, True)]  # The test images are balanced.
    assert (record["seed"], record["exponent"], results["loss"]) == (0, 1.25, 0.25)
    for name in ("faithfulness", "digit_of_samples", "digit_of_images", "digit_of_nearest",
                 "digit_accuracy", "background_of_nearest"):
        assert results[name] == pytest.approx(1), name
    far = 1.1 / math.sqrt(1.1**2 + 7 * 0.1**2)
    assert results["cosine"] == pytest.approx(0.25 + 0.75 * far)
    assert results["background_of_samples"] == pytest.approx(0.5)
    assert results["background_of_images"] == pytest.approx(0.75)
    assert record["shares"] == pytest.approx([k / 15 for k in range(1, 6)])
    # In the figure the prototype with the largest share comes first.
    assert (np.diff(pictures["shares"]) < 0).all()
    assert (pictures["prototypes"][:, :, 0, 0, 0].floor() == torch.arange(4, -1, -1)[:, None]).all()


def test_a_killed_run_continues_and_draws_its_figures_from_files(
        models, tmp_path, jobs_here, coarse_figures, monkeypatch, capsys):
    """A whole --quick run with fewer images. It is killed in its second job, and started again."""
    folder = tmp_path / "quick_models"
    corner = Mock(side_effect=lambda arguments: shutil.copytree(models, folder, dirs_exist_ok=True))
    monkeypatch.setattr(mnist_corner, "main", corner)
    monkeypatch.setattr(rcdm.sample, "__defaults__", (1,))  # steps
    monkeypatch.setattr(rcdm, "BATCH_SIZE", 40)
    draw_images, draws = rcdm.draw_images, set()

    def fewer_images(source, count, balanced=False):
        draws.add((count, balanced))
        return draw_images(source, count // 5, balanced)
    monkeypatch.setattr(rcdm, "draw_images", fewer_images)
    options = ["--quick", "--workers", "2", "--out", str(tmp_path)]
    train_unet, jobs = rcdm.train_unet, []

    def spied_train(*arguments, name):
        jobs.append(tuple(map(float, name.split())))
        if len(jobs) == 2:
            raise KeyboardInterrupt
        return train_unet(*arguments, name=name)
    monkeypatch.setattr(rcdm, "train_unet", spied_train)
    with pytest.raises(SystemExit, match="^130$"):
        rcdm.main(options)
    assert jobs == [(0, 1.25), (0, 0)] and not list(tmp_path.glob("*.png"))
    flags = ["--workers", "2", "--quick"]
    corner.assert_called_once_with(["--out", str(folder), "--seeds", "0", *flags])
    first, = json.loads((tmp_path / "rcdm.json").read_text())["runs"]

    rcdm.main(options)
    assert jobs[2:] == [(0, 0)]
    # Of the classifier, of the diffusion model, and for the measures.
    assert draws == {(256, True), (40, False), (10_000, False), (2000, True)}
    content = json.loads((tmp_path / "rcdm.json").read_text())
    runs = content["runs"]
    assert runs[0] == first and [run["exponent"] for run in runs] == [1.25, 0]
    corner_content = json.loads((folder / "results.json").read_text())
    assert content["config"]["corner"] == corner_content["config"]
    assert runs[0]["shares"] != runs[1]["shares"]
    # Both priors get the same classifier and images.
    assert runs[0]["results"]["digit_accuracy"] == runs[1]["results"]["digit_accuracy"]
    for run in runs:
        assert purity_of_images(folder, run) == pytest.approx(
            [run["results"][f"{what}_of_{images}"] for images in ("images", "nearest")
             for what in ("digit", "background")])
    figure = tmp_path / "rcdm.png"
    content = figure.read_bytes()
    assert min(Image.open(figure).size) > 200
    figure.unlink()

    rcdm.main(options)  # Nothing is left to do, and the figure comes from the files.
    assert len(jobs) == 3 and figure.read_bytes() == content
    assert json.loads((tmp_path / "rcdm.json").read_text())["runs"] == runs

    capsys.readouterr()
    (tmp_path / "pictures_0_0.pt").write_bytes(b"half")
    rcdm.main(options)  # This costs the figure, and nothing else.
    output = capsys.readouterr()
    assert "warning: cannot draw rcdm.png" in output.err
    assert "faithfulness" in output.out


def purity_of_images(folder, run):
    """Of all and of the most similar images: counted for the images that the run has drawn."""
    config = json.loads((folder / "results.json").read_text())["config"]
    model = rcdm.load_pmsn(folder / f"model_digit_{run['exponent']:g}_0.pt", run["exponent"])
    torch.manual_seed(0)
    images, labels = rcdm.draw_images(rcdm.load_images(config)[0], 10_000)
    cosines = (rcdm.project(model, images) @ F.normalize(model.prototypes).T).numpy()
    groups = [np.flatnonzero(cosines.argmax(axis=1) == k) for k in range(5)]
    assert [len(group) / len(images) for group in groups] == pytest.approx(run["shares"])
    nearest = [np.argsort(-column)[:100] for column in cosines.T]
    return [sum(share * np.bincount(labels[what].numpy()[group]).max(initial=0) / max(1, len(group))
                for group, share in zip(parts, run["shares"]))
            for parts in (groups, nearest) for what in ("digit", "background")]


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
