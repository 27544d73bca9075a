"""mnist_corner.py: its data, its measures, its fairness between the priors, its errors and its whole path."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mnist_corner
import pmsn

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared" / "data"
SMALL = ["--images", "512", "--epochs", "1", "--starts", "1", "--batch_size", "128"]


def make_data(*options, count=512, seed=0):
    args = mnist_corner.parse([*SMALL, *options])
    return args, mnist_corner.CornerImages(args, pmsn.power_law_prior(10, 1.0), count, True, seed, "cpu")


def make_folder(folder, kinds=2, images=10):
    """An ImageFolder whose kinds are bright or dark stripes, `images` a kind."""
    for kind in range(kinds):
        (folder / f"kind{kind}").mkdir(parents=True)
        for i in range(images):
            pixels = np.random.default_rng(kind * 100 + i).integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"kind{kind}" / f"{i}.png")
    return folder


def run(*arguments, **options):
    return subprocess.run([sys.executable, "mnist_corner.py", *map(str, arguments)], cwd=REPOSITORY,
                          capture_output=True, text=True, timeout=240, **options)


def test_digits_follow_the_power_law_and_backgrounds_are_balanced():
    _, data = make_data(count=5000)
    share = torch.bincount(data.digit_labels).double() / len(data)
    harmonic = sum(1 / k for k in range(1, 11))
    expected = torch.tensor([1 / k / harmonic for k in range(1, 11)], dtype=torch.float64)
    torch.testing.assert_close(share, expected, atol=2e-3, rtol=0)
    kinds = torch.bincount(data.kinds).double() / len(data)
    torch.testing.assert_close(kinds, torch.full((10,), 0.1, dtype=torch.float64), atol=2e-3, rtol=0)
    joint = torch.histogramdd(torch.stack([data.digit_labels, data.kinds], 1).double(), bins=10).hist / len(data)
    assert (joint - share[:, None] * kinds).abs().max() < 0.01  # digit and background know nothing of each other


def test_views_change_digit_and_background_but_not_what_they_show():
    torch.manual_seed(0)
    args, data = make_data("--contrast", "1", "--deform", "0")
    one, two = data.view(torch.arange(8)), data.view(torch.arange(8))
    corner = (..., slice(0, 16), slice(0, 16))
    assert (one[corner] - two[corner]).abs().mean() < 0.15  # deform 0: noise alone
    assert (one[..., 16:, 16:] - two[..., 16:, 16:]).abs().mean() > 0.3  # another phase of the grating
    _, data = make_data("--deform", "1")
    assert (data.view(torch.arange(8))[corner] - data.view(torch.arange(8))[corner]).abs().mean() > 0.15


def test_drawn_digits_are_ten_different_shapes_in_every_font():
    images, labels = mnist_corner.drawn_digits()
    assert images.shape[1:] == (1, 40, 40) and torch.bincount(labels).tolist() == [len(images) // 10] * 10
    for font in images.split(10):
        assert (font.flatten(1) > 0.5).sum(dim=1).min() > 30
        distance = torch.cdist(font.flatten(1), font.flatten(1)) + 100 * torch.eye(10)
        assert distance.min() > 3


def test_agreement_and_linear_probe_against_brute_force():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(60, 5)), rng.integers(0, 3, 60)
    features[:, :3] += 2 * np.eye(3)[labels]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = 0
    for i in range(60):
        order = [j for j in np.argsort(-(unit @ unit[i])) if j != i][:10]
        expected += sum(labels[j] == labels[i] for j in order) / 10 / 60
    assert mnist_corner.agreement(torch.tensor(features), torch.tensor(labels)) == pytest.approx(expected)
    x, y = torch.tensor(features).float(), torch.tensor(labels)
    assert mnist_corner.linear_accuracy(x[:40], y[:40], x[40:], y[40:]) > 0.7
    shuffled = y[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    assert mnist_corner.linear_accuracy(x[:40], shuffled[:40], x[40:], shuffled[40:]) < 0.7


def test_both_priors_start_from_the_same_weights_and_see_the_same_batches(monkeypatch):
    seen = {"power_law": [], "uniform": []}
    args, data = make_data()
    test = {"images": data.view(torch.arange(64)), "digits": data.digit_labels[:64], "kinds": data.kinds[:64]}
    for name, prior in (("power_law", pmsn.power_law_prior(10, 1.0)), ("uniform", pmsn.uniform_prior(10))):
        forward = pmsn.PMSN.forward
        record = seen[name]
        first = []

        def spy(model, views):
            if not first:
                first.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
            record.append(torch.stack(views))
            return forward(model, views)

        monkeypatch.setattr(pmsn.PMSN, "forward", spy)
        mnist_corner.train(prior, data, test, args, 3, lambda *_: None)
        monkeypatch.setattr(pmsn.PMSN, "forward", forward)
        seen[name] = first + record
    assert len(seen["uniform"]) == 1 + 2 * (len(data) // 128)
    assert all(torch.equal(a, b) for a, b in zip(seen["power_law"], seen["uniform"], strict=True))


def test_no_label_reaches_training():
    """Other labels for the same images: the same weights, bit for bit."""
    weights = []
    for shift in (0, 1):
        args, data = make_data()
        test = {"images": data.view(torch.arange(64)), "digits": data.digit_labels[:64], "kinds": data.kinds[:64]}
        data.digit_labels, data.kinds = (data.digit_labels + shift) % 10, (data.kinds + shift) % 10
        model, _, losses = mnist_corner.train(pmsn.power_law_prior(10, 1.0), data, test, args, 0, lambda *_: None)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_starts_see_one_quarter_and_the_lowest_loss_goes_on(monkeypatch):
    """A stand-in for `fit` whose losses are 3, 1, 2, 4: the second quarter must go on, on whole images."""
    calls = []

    def fit(model, data, test, args, quarter, whole, history, report):
        calls.append((quarter, whole))
        return history + [{"loss": {(0, 0): 3.0, (0, 16): 1.0, (16, 0): 2.0, (16, 16): 4.0}[quarter]}]

    monkeypatch.setattr(mnist_corner, "fit", fit)
    args, data = make_data("--starts", "4")
    _, history, losses = mnist_corner.train(pmsn.uniform_prior(10), data, None, args, 0, print)
    assert losses == [3.0, 1.0, 2.0, 4.0] and len(history) == 2
    assert calls[-1] == ((0, 16), True) and [whole for _, whole in calls] == [False] * 4 + [True]


def test_what_a_start_sees(monkeypatch):
    """Start 2 sees the top right quarter and grey elsewhere, then everything; --starts 0 sees everything at once."""
    inputs, forward = [], pmsn.PMSN.forward
    monkeypatch.setattr(pmsn.PMSN, "forward", lambda model, views: inputs.append(views[1]) or forward(model, views))
    args, data = make_data("--starts", "0")
    test = {"images": data.view(torch.arange(64)), "digits": data.digit_labels[:64], "kinds": data.kinds[:64]}
    monkeypatch.setattr(mnist_corner, "QUARTERS", [(0, 16)])
    args.starts = 1
    mnist_corner.train(pmsn.uniform_prior(10), data, test, args, 0, lambda *_: None)
    first, last = inputs[0], inputs[-1]
    assert first[..., :16, 16:].std() > 0.1 and last[..., 16:, :16].std() > 0.1
    assert first[..., 16:, :].abs().max() == 0 and first[..., :16, :16].abs().max() == 0
    inputs.clear()
    args.starts = 0
    mnist_corner.train(pmsn.uniform_prior(10), data, test, args, 0, lambda *_: None)
    assert len(inputs) == 2 * (len(data) // 128) and min(x[..., 16:, :16].std() for x in inputs) > 0.1


def test_folder_backgrounds_hold_out_every_fifth_image_unless_scenes_are_few(tmp_path):
    folder = str(make_folder(tmp_path / "textures", kinds=3, images=10))
    training, kinds, _ = mnist_corner.load_backgrounds(folder, None, True, None)
    held_out, _, _ = mnist_corner.load_backgrounds(folder, None, False, None)
    assert len(training) == 24 and len(held_out) == 6 and kinds.unique().tolist() == [0, 1, 2]
    assert torch.cdist(training.flatten(1), held_out.flatten(1)).min() > 1  # none in both
    scenes, kinds, _ = mnist_corner.load_backgrounds(folder, None, True, 2)
    assert kinds.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(scenes, mnist_corner.load_backgrounds(folder, None, False, 2)[0])


def test_cifar_and_mnist_as_torchvision_gives_them(monkeypatch):
    """Stand-ins with torchvision's fields: CIFAR10.data is (N, 32, 32, 3) uint8, MNIST.data (N, 28, 28) uint8."""
    class Cifar:
        data, targets = np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3), dtype=np.uint8), [0, 1] * 20

    class Mnist:
        data, targets = torch.full((20, 28, 28), 255, dtype=torch.uint8), torch.arange(20) % 10

    calls = []
    monkeypatch.setattr("torchvision.datasets.CIFAR10", lambda *a, **k: calls.append(k["train"]) or Cifar)
    monkeypatch.setattr("torchvision.datasets.MNIST", lambda *a, **k: Mnist)
    images, kinds, _ = mnist_corner.load_backgrounds("CIFAR10", "data", False, None)
    assert images.shape == (40, 1, 32, 32) and kinds.tolist() == Cifar.targets and calls == [False]
    luma = Cifar.data[7] @ np.array([0.2989, 0.587, 0.114])
    expected = 0.5 + 0.35 * (luma - luma.mean()) / luma.std(ddof=1)
    np.testing.assert_allclose(images[7, 0], expected, atol=0.02)  # torchvision rounds grey to integers
    scenes, kinds, _ = mnist_corner.load_backgrounds("CIFAR10", "data", False, 3)
    assert kinds.tolist() == [0, 0, 0, 1, 1, 1] and calls[-1] is True  # the same scenes as in training
    digits, labels = mnist_corner.load_digits("MNIST", "data", True)
    assert digits.shape == (20, 1, 28, 28) and digits.max() == 1 and labels.tolist() == (list(range(10)) * 2)


@pytest.mark.parametrize("options, words", [
    (["--digits", "SVHN"], ["--digits SVHN", "drawn"]),
    (["--backgrounds", "no/such/folder"], ["no/such/folder"]),
    (["--prototypes", "1"], ["num_prototypes", "2"]),
    (["--exponent", "-1"], ["exponent", "-1"]),
    (["--prior", "0.5", "0.5"], ["prior", "10"]),
    (["--prototypes", "2", "--prior", "0.5", "0.6"], ["prior", "sum to 1"]),
    (["--prototypes", "2", "--prior", "0", "1"], ["prior", "positive"]),
    (["--images", "600", "--batch_size", "601"], ["--batch_size 601", "600"]),
    (["--images", "600", "--batch_size", "600"], ["--batch_size 600", "59"]),  # 595 after rounding to the prior
    (["--exponent", "50"], ["exponent 50", "steep"]),
    (["--epochs", "0"], ["--epochs", "1"]),
    (["--starts", "5"], ["--starts", "0..4"]),
    (["--contrast", "nan"], ["--contrast"]),
    (["--lr", "-1"], ["--lr"]),
    (["--out", "/proc/nowhere"], ["--out", "/proc/nowhere"]),
])
def test_bad_options_are_one_clear_line(options, words, tmp_path):
    with pytest.raises(mnist_corner.UserError) as error:
        mnist_corner.main(["--out", str(tmp_path), *SMALL, *options])
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words)


def test_an_error_is_one_line_on_stderr_and_status_2(tmp_path):
    result = run("--digits", "SVHN", "--out", tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("mnist_corner.py: --digits SVHN")


def test_bad_folders_are_named(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    hollow = make_folder(tmp_path / "hollow", kinds=2, images=0)
    single = make_folder(tmp_path / "single", kinds=1)
    broken = make_folder(tmp_path / "broken")
    (broken / "kind1" / "3.png").write_bytes(b"not a picture")
    lone = make_folder(tmp_path / "lone", kinds=2, images=1)
    for folder, word in ((lone, "--scenes"), (empty, "empty"), (hollow, "kind0"), (single, "at least two"),
                         (broken, "3.png")):
        with pytest.raises(mnist_corner.UserError, match=word) as error:
            mnist_corner.load_backgrounds(str(folder), None, True, None)
        assert "\n" not in str(error.value)


def test_a_failed_download_says_what_needs_none(monkeypatch):
    def unreachable(*_, **__):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nno route")

    monkeypatch.setattr("torchvision.datasets.MNIST", unreachable)
    with pytest.raises(mnist_corner.UserError, match="MNIST.*downloading.*--digits drawn"):
        mnist_corner.load_digits("MNIST", "data", True)


def check_outputs(folder):
    results = json.loads((folder / "results.json").read_text())
    assert [run["prior"] for run in results["runs"]] == ["power_law", "uniform"]
    for run_ in results["runs"]:
        for measure in ("digit_agreement", "background_agreement", "digit_linear_accuracy"):
            assert 0 <= run_[measure] <= 1
        assert run_["prior_kl"] >= 0 and run_["seconds"] > 0
    assert results["summary"]["uniform"]["n"] == 1 and results["config"]["exponent"] == 1
    for figure in ("neighbours", "prototypes", "training"):
        with Image.open(folder / f"{figure}.png") as image:
            assert min(image.size) > 300
    assert len(list(folder.iterdir())) == 4  # and nothing else, no temporary file


def test_quick_run_end_to_end(tmp_path):
    result = run("--quick", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("seed"))):][:13]
    assert len({len(line) for line in table}) == 1  # aligned
    check_outputs(tmp_path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="real MNIST and CIFAR-10 are not in ../shared/data")
def test_real_images_end_to_end(tmp_path):
    result = run("--quick", "--digits", "MNIST", "--root", SHARED, "--backgrounds", SHARED / "cifar10" / "test",
                 "--scenes", "2", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    check_outputs(tmp_path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "results.json"
    target.write_text("old")

    def write(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(mnist_corner.UserError, match="No space left"):
        mnist_corner.write_whole(target, write)
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["results.json"]


def test_ctrl_c_leaves_nothing_behind(tmp_path):
    process = subprocess.Popen([sys.executable, "-u", "mnist_corner.py", "--out", str(tmp_path)], cwd=REPOSITORY,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        assert any(line.lstrip().startswith("0 power_law") for line in process.stdout)  # stops after the first epoch
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "stopped" in errors and "Traceback" not in errors
    assert os.listdir(tmp_path) == []
