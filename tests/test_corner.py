"""mnist_corner.py: its data, starts and tries, measures, and its fairness between the priors."""

import copy
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

import mnist_corner
import pmsn
from support import drawings, results

SHARED = Path(__file__).parents[2] / "shared" / "data"
ARGS = dict(mnist=False, root="data", backgrounds=None, exponents=(1.0, 0.0), ordinary=False,
            tries=3, fixed_order=False, quick=False, seeds=[0])
WINDOWS = [mnist_corner.DIGIT, mnist_corner.BACKGROUND, (0, 16, 16), (8, 0, 16)]
FEATURES = ("digit", "background")


def short_experiment(seed, long_tailed, args):
    """Two steps on windows and two on whole images."""
    with patch.dict(mnist_corner.SYNTHETIC, images=512, epochs=1):
        return mnist_corner.experiment(seed, long_tailed, args)


@pytest.fixture
def run(tmp_path):
    def run(long_tailed, **changes):
        return short_experiment(0, long_tailed, SimpleNamespace(
            **{**ARGS, "out": tmp_path, **changes}))
    return run


def spy(monkeypatch):
    """A list of (exponent, window, weights, views) of every step of every network."""
    steps, forward = [], mnist_corner.WindowPMSN.forward

    def watched(start, views, **options):
        weights = torch.nn.utils.parameters_to_vector(start.parameters()).detach()
        steps.append((start.exponent, start.window, weights, torch.stack(views)))
        return forward(start, views, **options)
    monkeypatch.setattr(mnist_corner.WindowPMSN, "forward", watched)
    return steps


def power_law(exponent):
    shares = np.arange(1, 11.0) ** -exponent
    return shares / shares.sum()


# ---- Data ----------------------------------------------------------------------------------------
def test_one_feature_is_long_tailed_and_the_other_one_balanced(tmp_path, monkeypatch):
    """In the training images. In the test images both are balanced."""
    data = []

    def no_training(models, schedule, epochs, images, settings, title):
        data.append([index.bincount(minlength=10) for _, index in images])
        return [torch.zeros(len(model.prototypes)) for model in models]

    def no_measure(final, test, seen, queries):
        data.append([part[what].bincount(minlength=10) for part in (test, seen)
                     for what in FEATURES])
        return {}, torch.randn(2000, 4)
    monkeypatch.setattr(mnist_corner, "train", no_training)
    monkeypatch.setattr(mnist_corner, "measure", no_measure)
    expected = {"long": 15360 * power_law(1.0), "flat": [1536] * 10}
    for long_tailed in FEATURES:
        data.clear()
        mnist_corner.experiment(0, long_tailed, SimpleNamespace(**ARGS, out=tmp_path))
        names = ["long" if feature == long_tailed else "flat" for feature in FEATURES]
        for counts, name in zip(data[0], names):
            np.testing.assert_allclose(counts, expected[name], atol=5 * 60)
        test_digits, test_backgrounds, *seen = data[-1]
        assert max(test_digits.max(), test_backgrounds.max()) < 270  # of 2,000, at five sigma
        for counts, name in zip(seen, names):
            np.testing.assert_allclose(counts, np.array(expected[name]) / 7.68, atol=110)


@pytest.mark.parametrize("deform, low, high", [(0.0, 0.02, 0.15), (1.0, 0.15, 1.0)])
def test_views_change_digit_and_background(deform, low, high):
    digits, gratings = drawings.draw_digits("DejaVuSans")[0], drawings.draw_gratings()
    settings = {"contrast": 1.0, "deform": deform}
    views = [mnist_corner.make_view(digits, gratings, settings) for _ in range(2)]
    change = (views[0] - views[1]).abs()
    assert low < change[..., :16, :16].mean() < high  # at deform 0 there is only noise
    assert change[..., 16:, 16:].mean() > 0.2  # the grating has moved


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


# ---- Windows and tries ---------------------------------------------------------------------------
@pytest.mark.parametrize("window", WINDOWS)
def test_a_network_sees_its_window_only(window):
    start = mnist_corner.WindowPMSN(window, 1.0, tries=2)
    views = torch.randn(2, 8, 1, 32, 32)
    row, column, size = window
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[row : row + size, column : column + size] = True
    elsewhere = torch.where(inside, views, torch.randn(2, 8, 1, 32, 32))
    assert torch.equal(start(views), start(elsewhere))
    here = torch.where(inside, torch.randn(2, 8, 1, 32, 32), views)
    assert (start(views) - start(here)).abs().min() > 1e-3


def test_each_try_has_the_loss_of_its_own_head_and_prototypes():
    """The loss of each try is the loss of pmsn.py for its 32 entries, and so is its gradient."""
    start = mnist_corner.WindowPMSN(mnist_corner.DIGIT, 1.0, tries=3)
    views = torch.randn(2, 40, 1, 32, 32)
    options = {"sharpening": 0.4, "any_order": True}
    losses = start(views, **options)
    losses.sum().backward()
    encoder, (linear, norm) = start.network
    windows = views[..., :16, :16]
    features, target_features = encoder(windows[1]), start.target[0](windows[0])
    for i, loss in enumerate(losses):
        entries = slice(32 * i, 32 * i + 32)
        weight, bias, q = (x.detach().clone().requires_grad_() for x in (
            linear.weight[entries], linear.bias[entries], start.prototypes[i]))
        z, z_target = (x.detach() @ weight.T + bias for x in (features, target_features))
        z, z_target = ((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
                       for x in (z, z_target))
        expected, _ = pmsn.pmsn_loss(z, z_target, q, pmsn.power_law_prior(10, 1.0), **options)
        torch.testing.assert_close(loss, expected)
        expected.backward()
        torch.testing.assert_close(start.prototypes.grad[i], q.grad, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(linear.weight.grad[entries], weight.grad, atol=1e-6, rtol=1e-4)
    assert all(p.grad is None for p in start.target.parameters())


@pytest.mark.parametrize("window", [*WINDOWS, mnist_corner.WHOLE])
@pytest.mark.parametrize("training", [True, False])
def test_a_widened_network_computes_the_same_and_can_learn_the_rest(window, training):
    start = mnist_corner.WindowPMSN(window, 1.0, tries=3)
    images = torch.randn(16, 1, 32, 32)
    with torch.no_grad():
        for parameter in start.target.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    start(images.expand(2, -1, -1, -1, -1))  # statistics of BatchNorm
    whole = mnist_corner.widen(start, 1)
    start.train(training), whole.train(training)
    for old, new in ((start.network, whole.network), (start.target, whole.target)):
        expected = old(mnist_corner.crop(images, window))[:, 32:64]
        torch.testing.assert_close(new(images), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(whole.prototypes[0], start.prototypes[1])
    assert not any(p.requires_grad for p in whole.target.parameters())
    whole.network[0](images).sum().backward()
    assert whole.network[0][-1].weight.grad.ne(0).all()


def test_the_model_file_has_the_network_of_the_winner():
    whole = mnist_corner.widen(mnist_corner.WindowPMSN(mnist_corner.DIGIT, 1.0, tries=3), 2)
    state = mnist_corner.as_pmsn(whole).state_dict()
    model = drawings.make_pmsn(drawings.make_encoder(32), 10, 1.0, dim=32)
    model.load_state_dict(state)
    images = torch.randn(16, 1, 32, 32)
    for network, (encoder, head) in ((whole.network, (model.encoder, model.head)),
                                     (whole.target, (model.target_encoder, model.target_head))):
        assert torch.equal(network(images), head(encoder(images)))
    assert torch.equal(model.prototypes, whole.prototypes[0])


def test_the_try_with_the_lowest_loss_goes_on(run, monkeypatch):
    """Of two windows with three tries each, the background's second try under both priors."""
    widen, forward = Mock(wraps=mnist_corner.widen), mnist_corner.WindowPMSN.forward

    def fixed(start, views, **options):
        losses = forward(start, views, **options)
        found = {mnist_corner.DIGIT: [2.0, 3.0, 1.5], mnist_corner.BACKGROUND: [4.0, 1.0, 5.0]}
        return losses + (torch.tensor(found.get(start.window, [9.0])) - losses).detach()
    monkeypatch.setattr(mnist_corner.WindowPMSN, "forward", fixed)
    monkeypatch.setattr(mnist_corner, "widen", widen)
    records = run("digit")
    assert [(call.args[0].window, call.args[1]) for call in widen.call_args_list] == 2 * [
        (mnist_corner.BACKGROUND, 1)]
    for record in records:
        assert record["chosen"] == "background"
        assert record["tries"] == {"digit": [2.0, 3.0, 1.5], "background": [4.0, 1.0, 5.0]}
        assert record["results"]["digit_loss"] == 1.5
        assert record["results"]["background_loss"] == 1.0


def test_training_equals_a_plain_loop(monkeypatch):
    """Six steps of two epochs: weights, target and prototypes, with all options of the loss."""
    digits, gratings = drawings.draw_digits("DejaVuSans")[0], drawings.draw_gratings()
    data = [(digits, torch.randint(10, (768,))), (gratings, torch.randint(10, (768,)))]
    options = {"prior_weight": 3.0, "sinkhorn_iterations": 2, "any_order": True}
    settings = {"deform": 0.3, "contrast": 0.8, "images": 768, "loss_options": options}
    # In float64, because Adam turns the rounding of gradients that are 0 into steps.
    model = mnist_corner.WindowPMSN(mnist_corner.BACKGROUND, 1.0, tries=2)
    make_view = mnist_corner.make_view
    monkeypatch.setattr(mnist_corner, "make_view", lambda *args: make_view(*args).double())
    model.double()
    network, target, prototypes = (copy.deepcopy(x) for x in (
        model.network, model.target, model.prototypes))
    steps = spy(monkeypatch)
    losses, = mnist_corner.train([model], mnist_corner.schedule, 2, data, settings, "")
    optimizer = torch.optim.AdamW([prototypes, *network.parameters()], weight_decay=0.05)
    last_epoch = []
    for step, (*_, views) in enumerate(steps):
        done = step / 6
        optimizer.param_groups[0]["lr"] = (2e-3 * min(1, 0.02 + 20 * done)
                                           * (0.55 + 0.45 * math.cos(math.pi * done)))
        momentum = 0.9 + 0.09 * min(1, 1.5 * done)
        anchors, targets = network(views[1][..., 16:, 16:]), target(views[0][..., 16:, 16:])
        found = [pmsn.pmsn_loss(anchors[:, part], targets[:, part], q,
                                pmsn.power_law_prior(10, 1.0), **options,
                                sharpening=max(0.25, 0.6 - 0.5 * done))[0]
                 for q, part in zip(prototypes, (slice(0, 32), slice(32, 64)))]
        optimizer.zero_grad()
        sum(found).backward()
        torch.nn.utils.clip_grad_norm_([prototypes, *network.parameters()], 3.0)
        optimizer.step()
        for slow, fast in zip(target.parameters(), network.parameters()):
            slow.data = momentum * slow + (1 - momentum) * fast.data
        last_epoch.append(torch.stack(found).detach())
    assert len(steps) == 6
    torch.testing.assert_close(losses, torch.stack(last_epoch[3:]).mean(dim=0).float())
    for trained, expected in ((model.network, network), (model.target, target)):
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(trained.state_dict()[name], value, atol=1e-7, rtol=0)
    torch.testing.assert_close(model.prototypes, prototypes, atol=1e-7, rtol=0)


# ---- Fairness ------------------------------------------------------------------------------------
def test_both_windows_and_all_priors_get_the_same_weights_and_views(run, monkeypatch):
    steps = spy(monkeypatch)
    run("digit")
    # Two steps of four networks, then two steps of two networks on whole images.
    assert [step[:2] for step in steps[:4]] == [
        (exponent, window) for exponent in (1.0, 0.0) for window in WINDOWS[:2]]
    for step in steps[1:4]:
        assert torch.equal(step[2], steps[0][2])
    for i in (0, 4):
        assert all(torch.equal(step[3], steps[i][3]) for step in steps[i : i + 4])
    assert torch.equal(steps[8][3], steps[9][3]) and steps[8][1] == mnist_corner.WHOLE
    assert not torch.equal(steps[4][2], steps[6][2])  # after a step the prior has acted
    assert not torch.equal(steps[8][2], steps[10][2])  # whole images train too


def test_no_label_trains(run, monkeypatch):
    """Here the digits are balanced, so that their labels do not matter for the choice of images."""
    steps, load_digits = spy(monkeypatch), mnist_corner.load_digits
    first = run("background")

    def other_labels(args):
        return [(images, 9 - labels) for images, labels in load_digits(args)]
    monkeypatch.setattr(mnist_corner, "load_digits", other_labels)
    second = run("background")
    assert len(steps) == 24
    for one, other in zip(steps[:12], steps[12:]):
        assert all(torch.equal(x, y) for x, y in zip(one[2:], other[2:]))
    assert [record["tries"] for record in first] == [record["tries"] for record in second]


def test_an_ordinary_run_has_one_network_on_whole_images(run, monkeypatch):
    steps = spy(monkeypatch)
    records = run("background", ordinary=True, tries=1)
    assert [window for _, window, _, _ in steps] == [mnist_corner.WHOLE] * 8
    assert [record["chosen"] for record in records] == ["whole", "whole"]
    # The second part continues with the weights of the first one, which is no new initialization.
    assert not torch.equal(steps[4][2], steps[0][2])


# ---- Measures ------------------------------------------------------------------------------------
@pytest.mark.parametrize("of_classes, of_prior", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_reference_losses_against_numpy(of_classes, of_prior, monkeypatch):
    """In the exact grouping only the KL counts, in batches of 256 images."""
    search, tables = mnist_corner.find_grouping, []

    def search_once(*shares_and_prior):  # which are the same for both orders
        tables[:] = tables or [search(*shares_and_prior)]
        return tables[0]
    monkeypatch.setattr(mnist_corner, "find_grouping", search_once)
    monkeypatch.setattr(search, "__defaults__", (25, 400))  # fewer tries
    for any_order in (False, True):
        rng, prior, expected = np.random.default_rng(0), power_law(of_prior), []
        for _ in range(1000):
            shares = rng.multinomial(256, power_law(of_classes)) / 256
            if any_order:
                shares, prior = np.sort(shares), np.sort(prior)
            expected.append(np.sum(shares[shares > 0] * np.log((shares / prior)[shares > 0])))
        losses = mnist_corner.reference_losses(of_classes, of_prior, any_order)
        assert losses["exact"] == pytest.approx(np.mean(expected), abs=0.006)
        # The exact grouping is one of all groupings, and the best one if it fits the prior.
        assert losses["lowest"] <= losses["exact"]
        assert (losses["lowest"] > losses["exact"] - 0.03) == (of_classes == of_prior)


def partitions(total, largest):
    """All ways to write `total` as a sum of numbers, the largest first."""
    if total == 0:
        yield []
    for first in range(min(total, largest), 0, -1):
        for rest in partitions(total - first, first):
            yield [first, *rest]


def test_a_better_grouping_than_all_that_put_whole_classes_together():
    """Merging balanced classes gives the sizes of a partition of 10, and costs only its KL."""
    prior, balanced = pmsn.power_law_prior(10, 1.0), pmsn.power_law_prior(10, 0.0)
    merged = min(sum(x / 10 * math.log(x / 10 / prior[i]) for i, x in enumerate(sizes))
                 for sizes in partitions(10, 10))
    table = mnist_corner.find_grouping(balanced, prior).double()
    p = table.softmax(dim=1).numpy()
    sharp = p**4 / (p**4).sum(axis=1, keepdims=True)
    p_bar = p.mean(axis=0)
    loss = np.mean(-np.sum(sharp * np.log(p), axis=1))
    loss += np.sum(p_bar * np.log(p_bar / prior.numpy()))
    assert 0.5 * merged < loss < merged
    for any_order in (False, True):  # in exact batches the order is already the best one
        found = mnist_corner.loss_of_grouping(table, balanced[None].double(), prior.double(),
                                              any_order)
        assert found.item() == pytest.approx(loss, abs=1e-6)


# ---- Figures and whole runs ----------------------------------------------------------------------
def test_the_titles_count_what_the_figures_show(monkeypatch):
    suptitle = Mock()
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", suptitle)
    tiles = {"images": torch.zeros(5, 9, 1, 32, 32), "digit": torch.zeros(5, 9),
             "background": torch.zeros(5, 9)}
    records, pictures = [], {}
    for long_tailed in ("digit", "background"):
        for exponent in (0.0, 1.0):
            pictures[long_tailed, exponent] = tiles
            # The power law always encodes the digit, which is wrong once. Uniform is always right.
            encoded = "digit" if exponent or long_tailed == "background" else "background"
            found = {"same_digit": 0.2, "same_background": 0.2, f"same_{encoded}": 0.9,
                     "digit_loss": 0.2, "background_loss": 0.3}
            records.append({"long_tailed": long_tailed, "exponent": exponent, "seed": 0,
                            "chosen": encoded, "results": found,
                            "tries": {"digit": [0.2, 0.3], "background": [0.3, 0.4]}})
    summary = results.summarize(records, key=lambda x: (x["long_tailed"], x["exponent"]))
    mnist_corner.plot_neighbors(pictures, summary)
    assert suptitle.call_args.args[0].startswith("In 3 of 4 panels")
    mnist_corner.plot_preference(records, {})
    assert suptitle.call_args.args[0].startswith("3 of 4 times (n = 1 seeds)")


def test_two_processes_have_the_bits_of_one(run, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "CONTEXT", multiprocessing.get_context("fork"))
    monkeypatch.setitem(ARGS, "exponents", (1.0,))
    args, found = SimpleNamespace(**ARGS, out=tmp_path, workers=2), {}
    results.run_in_processes(short_experiment, [(0, "digit"), (0, "background")], args,
                             lambda job, runs, seconds: found.update({job[1]: runs}))
    for long_tailed in FEATURES:
        assert found[long_tailed] == run(long_tailed) and len(found[long_tailed]) == 1


def test_a_killed_run_continues_and_draws_its_figures_from_files(
        tmp_path, jobs_here, coarse_figures, monkeypatch, capsys):
    """A whole run of two steps per part. It is killed in its second job, and started again."""
    monkeypatch.setitem(mnist_corner.SYNTHETIC, "images", 512)
    monkeypatch.setitem(mnist_corner.SYNTHETIC, "epochs", 1)
    monkeypatch.setattr(mnist_corner.find_grouping, "__defaults__", (5, 20))
    options = ["--tries", "3", "--out", str(tmp_path)]
    train, jobs = mnist_corner.train, []

    def spied_train(*arguments):
        seed, long_tailed, _ = arguments[-1].split()
        jobs.append((seed, long_tailed))
        if len(jobs) == 3:
            raise KeyboardInterrupt
        return train(*arguments)
    monkeypatch.setattr(mnist_corner, "train", spied_train)
    with pytest.raises(SystemExit, match="^130$"):
        mnist_corner.main(options)
    assert jobs == 2 * [("0", "digit")] + [("0", "background")]
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [run["long_tailed"] for run in runs] == ["digit", "digit"]
    assert not list(tmp_path.glob("*.png"))

    capsys.readouterr()
    mnist_corner.main(options)
    assert jobs[3:] == 2 * [("0", "background")]
    progress, table, references = (part.splitlines()
                                   for part in capsys.readouterr().out.split("\n\n"))
    rows = [line.split() for line in progress[4:]]
    assert [len(row) for row in rows if row[2] == "first"] == [5 + 4]
    assert [len(row) for row in rows if row[2] == "second"] == [5 + 2]
    assert len(table) == 2 + 4 and len({len(line) for line in table[1:]}) == 1  # aligned
    assert len(references) == 2 + 4 + 1
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["runs"][:2] == runs
    assert [(run["long_tailed"], run["exponent"]) for run in content["runs"]] == [
        (long_tailed, exponent) for long_tailed in FEATURES for exponent in (0, 1)]
    assert content["config"]["loss_options"] == {"any_order": True}
    for run in content["runs"]:
        # The lower loss goes on, and what its window shows is what the neighbors share.
        losses = {name: run["results"][f"{name}_loss"] for name in FEATURES}
        assert run["chosen"] == min(losses, key=losses.get)
        other = FEATURES[1 - FEATURES.index(run["chosen"])]
        assert run["results"][f"same_{run['chosen']}"] > 0.9 > 0.5 > run["results"][f"same_{other}"]
        assert (run["results"]["other_font"] > 0.6) == (run["chosen"] == "digit")
        model = drawings.make_pmsn(drawings.make_encoder(32), 10, run["exponent"], dim=32)
        model.load_state_dict(torch.load(tmp_path / "model_{long_tailed}_{exponent:g}_0.pt".format(
            **run), weights_only=True))
    figures = {name: (tmp_path / name).read_bytes() for name in ("neighbors.png", "preference.png")}
    for name in figures:
        assert min(Image.open(tmp_path / name).size) > 300
        (tmp_path / name).unlink()

    mnist_corner.main(options)  # Nothing is left to do, and the figures come from the files.
    assert len(jobs) == 5
    assert {name: (tmp_path / name).read_bytes() for name in figures} == figures
    assert json.loads((tmp_path / "results.json").read_text())["runs"] == content["runs"]

    # Without the images there is no figure 3. This costs nothing else.
    (tmp_path / "preference.png").unlink()
    (tmp_path / "pictures_digit_0.pt").unlink()
    mnist_corner.main(options)
    assert "warning: cannot draw neighbors.png" in capsys.readouterr().err
    assert (tmp_path / "preference.png").read_bytes() == figures["preference.png"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="MNIST and CIFAR-10 are not in ../shared/data")
def test_real_images_end_to_end(run):
    real = {"mnist": True, "root": str(SHARED), "backgrounds": str(SHARED / "cifar10" / "test")}
    images_end_to_end(run, real)


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
    images_end_to_end(run, {"mnist": True, "root": str(tmp_path),
                            "backgrounds": str(tmp_path / "backgrounds")})


def images_end_to_end(run, options):
    args = SimpleNamespace(**{**ARGS, **options})
    for images, labels in mnist_corner.load_digits(args):
        assert images.shape == (len(labels), 1, 20, 20) and images.min() == 0 < images.max() <= 1
    assert mnist_corner.load_backgrounds(args).shape == (10, 1, 32, 32)
    with patch.dict(mnist_corner.MNIST, images=512, epochs=1):
        records = run("digit", **options)
    assert len(records) == 2
    for record in records:
        encoded, other = sorted(FEATURES, key=lambda x: x != record["chosen"])
        found = record["results"]
        assert found[f"same_{encoded}"] > 0.4 > 0.2 > found[f"same_{other}"]
        assert "other_font" not in found
