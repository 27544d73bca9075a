"""imbalance.py: its data and low-level measures, losses against NumPy loops, the probe, the summary, the whole path."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import imbalance
import pmsn

REPOSITORY = Path(__file__).parents[1]


def parse(*options):
    return imbalance.parse([str(option) for option in options])


# ---- Data ------------------------------------------------------------------------------------------------------------


def test_drawn_classes_are_balanced_and_know_nothing_of_the_low_level():
    images, classes = imbalance.drawn_images(2000, 0)
    assert images.shape == (2000, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.bincount(classes).tolist() == [200] * 10
    assert torch.equal(images, imbalance.drawn_images(2000, 0)[0])
    assert not torch.equal(images, imbalance.drawn_images(2000, 1)[0])
    assert len(classes[::5].unique()) == 10  # shuffled: every fifth image is a fair sample
    for name, values in imbalance.low_level(images).items():
        between = torch.stack([values[classes == c].mean() for c in range(10)]).std()
        assert between < 0.2 * values.std(), name
    x = torch.arange(32.0) + 0.5 - 16  # a disc is not wider than the lobes of the others reach
    radius = (x[:, None] ** 2 + x**2).sqrt()
    grey = images.float().mean(dim=1)
    ring = grey[:, (radius > 14.5) & (radius < 15.5)].std(dim=1)
    edge = torch.stack([ring[classes == c].mean() for c in range(10)])
    assert edge[0] < 1.1 * edge[4] and edge[5] < 1.1 * edge[9]


def test_low_level_measures_of_known_images():
    x = torch.arange(32.0)
    stripes = (128 + 100 * torch.sin(x))[None, :].expand(32, 32)  # vertical stripes: the gradient lies along x
    tilted = 128 + 100 * torch.sin(0.5 * (x[None, :] * math.cos(0.4) + x[:, None] * math.sin(0.4)))
    grey = torch.stack([stripes, stripes.T, tilted, tilted.flip(1)])[:, None].expand(-1, 3, -1, -1)
    red = torch.zeros(1, 3, 32, 32)
    red[:, 0] = 255
    found = imbalance.low_level(torch.cat([grey, red]).to(torch.uint8))
    assert found["luminance"][0] == pytest.approx(0.5, abs=0.02) and found["luminance"][4] == pytest.approx(1 / 3)
    assert found["colour"][0] == pytest.approx(0, abs=1e-6) and found["colour"][4] == pytest.approx(1)
    assert found["orientation"][:4].tolist() == pytest.approx([0, math.pi / 2, 0.4, 0.4], abs=0.05)


def test_bins_are_equally_full_and_those_of_training():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert (torch.bincount(imbalance.in_bins(values, values)) - 200).abs().max() <= 1
    assert imbalance.in_bins(torch.tensor([-9.0, 9.0]), values).tolist() == [0, 4]


def test_folders_with_and_without_splits(tmp_path):
    for folder in ("plain/a", "plain/b", "split/train/a", "split/train/b", "split/test/a", "split/test/b"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (40, 30), (i * 40, 0, 200 * (folder[-1] == "b"))).save(tmp_path / folder / f"{i}.png")
    for name, counts in (("plain", (8, 2)), ("split", (10, 10))):
        found = []
        for train, count in zip((True, False), counts):
            images, classes = imbalance.load_images(parse("--data", tmp_path / name), train)
            assert images.shape == (count, 3, 32, 32) and torch.bincount(classes).tolist() == [count // 2] * 2
            assert torch.equal(images[:, 2, 0, 0] > 0, classes == 1)  # b is blue
            found.append(set(zip(images[:, 0, 0, 0].tolist(), classes.tolist())))
        assert len(found[0] | found[1]) == 10 and (name == "split" or not found[0] & found[1])
    assert len(imbalance.load_images(parse("--data", tmp_path / "split", "--images", 200), True)[0]) == 10


def test_folders_that_do_not_fit_are_named(tmp_path):
    def folder(*names):
        root = tmp_path / "-".join(names).replace("/", "_")
        for name in names:
            (root / name).mkdir(parents=True)
            for i in range(10):
                Image.new("RGB", (8, 8), (i, i, i)).save(root / name / f"{i}.png")
        return root

    for root, message in ((folder("train/a", "train/b"), "there is train without its other half"),
                          (folder("train/a", "train/b", "test/b"), "train and test hold different classes"),
                          (folder("a", "b", "c"), "all images are alike in colour"),
                          (tmp_path, "Found no valid file for the classes")):
        with pytest.raises(imbalance.UserError, match=message):
            imbalance.main(["--data", str(root), "--out", str(tmp_path / "out")])
    root = folder("d", "e", "f")
    (root / "e" / "3.png").write_bytes(b"no image")
    with pytest.raises(imbalance.UserError, match=f"cannot read {root / 'e' / '3.png'}"):
        imbalance.main(["--data", str(root), "--out", str(tmp_path / "out")])


def test_marginals_are_equal_and_batches_hold_the_classes_asked_for():
    classes = torch.arange(1000) % 10
    for count in (10, 2):
        share, present = imbalance.marginals(classes, count, 50)
        assert present == [count]
        torch.testing.assert_close(share, torch.full((10,), 0.1), atol=0.011, rtol=0)
    with pytest.raises(ValueError, match="one would hold an image twice"):
        imbalance.marginals(classes[:200], 2, 50)


# ---- Losses ----------------------------------------------------------------------------------------------------------


def test_mae_loss_is_a_loop_over_hidden_patches():
    generator = torch.Generator().manual_seed(0)
    predictions, pixels = (torch.randn(2, 6, 12, generator=generator) for _ in range(2))
    kept = torch.tensor([[0, 3], [5, 1]])
    errors = []
    for image in range(2):
        for patch in set(range(6)) - set(kept[image].tolist()):
            target = pixels[image, patch].double().numpy()
            target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
            errors.append(((predictions[image, patch].double().numpy() - target) ** 2).mean())
    assert imbalance.mae_loss(predictions, pixels, kept).item() == pytest.approx(np.mean(errors), rel=1e-5)


def test_patches_are_in_the_order_of_tokens():
    """A convolution with a one-hot kernel picks a pixel of each patch: the encoder's own order."""
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found, n = imbalance.patches(images), imbalance.PATCH
    for row, column in ((0, 0), (0, 3), (2, 1)):
        block = images[:, :, row * n : (row + 1) * n, column * n : (column + 1) * n]
        assert torch.equal(found[:, row * (32 // n) + column], block.flatten(1))
    encoder = imbalance.make_encoder()
    by_hand = found @ encoder.patch_embed.proj.weight.flatten(1).T + encoder.patch_embed.proj.bias
    torch.testing.assert_close(encoder.embed_patches(images), by_hand + encoder.pos_embed[:, 1:], atol=1e-5, rtol=1e-5)


def test_data2vec_loss_is_a_loop_over_hidden_patches():
    generator = torch.Generator().manual_seed(0)
    predictions, *outputs = (torch.randn(2, 4, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    hidden = torch.tensor([[True, False, True, False], [False, False, True, True]])

    def normalise(x):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5)

    errors = []
    for image, patch in hidden.nonzero().tolist():
        target = normalise(np.mean([normalise(x[image, patch].numpy()) for x in outputs], axis=0))
        errors.append(((predictions[image, patch].numpy() - target) ** 2).mean())
    assert imbalance.data2vec_loss(predictions, outputs, hidden).item() == pytest.approx(np.mean(errors), rel=1e-9)


def test_run_blocks_is_the_encoder():
    encoder, images = imbalance.make_encoder(), torch.randn(2, 3, 32, 32)
    seen = []
    encoder.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    encoder(images)
    *blocks, last = imbalance.run_blocks(encoder, encoder.embed_patches(images))
    torch.testing.assert_close(last, seen[0])
    assert len(blocks) == len(encoder.blocks)


@pytest.mark.parametrize("name", imbalance.METHODS)
def test_every_method_trains_its_encoder_and_nothing_that_is_a_target(name):
    torch.manual_seed(0)
    method = imbalance.make_method(name, 0.2)
    loss = method(imbalance.drawn_images(20, 0)[0])
    loss.backward()
    assert loss.ndim == 0 and loss.isfinite()
    assert method.encoder.patch_embed.proj.weight.grad.abs().sum() > 0
    for parameter_name, parameter in method.named_parameters():
        if "target" in parameter_name:
            assert parameter.grad is None and not parameter.requires_grad
    before = [p.clone() for p in method.parameters() if not p.requires_grad]
    with torch.no_grad():
        for p in method.encoder.parameters():
            p += 1
    assert bool(before) == hasattr(method, "target_encoder") == (name in ("MSN", "PMSN", "data2vec"))
    if before:
        method.update_target(0.9)
    after = [p for p in method.parameters() if not p.requires_grad]
    assert all((a - b).abs().max() == pytest.approx(0.1, abs=1e-4) for a, b in zip(after[:5], before[:5]))


def repaint(images, patches):
    """The images with other colours in the patches (B, N) that are True."""
    size = imbalance.PATCH
    mask = patches.unflatten(1, (images.shape[2] // size, -1)).repeat_interleave(size, 1).repeat_interleave(size, 2)
    return torch.where(mask[:, None], 1 - images, images)


@pytest.mark.parametrize("name, loss", [("MAE", "mae_loss"), ("data2vec", "data2vec_loss")])
def test_predictions_come_from_visible_patches_alone(name, loss, monkeypatch):
    torch.manual_seed(0)
    method, images, seen = imbalance.make_method(name, 1.0), torch.rand(6, 3, 32, 32), []
    monkeypatch.setattr(imbalance, loss, lambda *arguments: seen.append(arguments))

    def run(images):
        """Predictions, and the patches that are hidden, (B, N), the same at every call."""
        monkeypatch.setattr(imbalance, "two_views", lambda _: [images, images])
        torch.manual_seed(1)
        method(images)
        predictions, _, mask = seen[-1]
        return predictions, mask if name == "data2vec" else torch.ones(6, 16).scatter(1, mask, 0) > 0

    predictions, hidden = run(images)
    assert (hidden.sum(dim=1) == (12 if name == "MAE" else 10)).all()  # of 16: .75; .6, rounded up
    assert not torch.equal(hidden[0], hidden[1])
    torch.testing.assert_close(run(repaint(images, hidden))[0], predictions)
    assert ((run(repaint(images, ~hidden))[0] - predictions).abs().amax(dim=2)[hidden] > 1e-4).all()


def test_data2vec_regresses_the_target_network_on_whole_images(monkeypatch):
    torch.manual_seed(0)
    method, seen = imbalance.Data2Vec(), []
    monkeypatch.setattr(imbalance, "data2vec_loss", lambda *arguments: seen.append(arguments[1]))
    for block in method.target_encoder.blocks:  # each adds 1 to every feature of what enters it
        block.register_forward_hook(lambda module, inputs, output: inputs[0] + 1)
    images = imbalance.two_views(imbalance.drawn_images(4, 0)[0])[0]
    monkeypatch.setattr(imbalance, "two_views", lambda _: [images, images])
    method(images)
    tokens = method.target_encoder.embed_patches(images)
    for count, output in enumerate(seen[0], start=1):
        torch.testing.assert_close(output, tokens + count)
    assert len(seen[0]) == 3


def test_the_mae_decoder_sees_each_patch_at_its_place():
    torch.manual_seed(0)
    method, seen = imbalance.MAE(), []
    method.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0] - method.decoder_pos_embed))
    method.decoder_embed.register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.manual_seed(1)
    method(imbalance.drawn_images(5, 0)[0])
    encoded, decoded = seen
    torch.manual_seed(1)
    images = imbalance.two_views(imbalance.drawn_images(5, 0)[0])[0]
    kept = pmsn.drop_patches(method.encoder.embed_patches(images), 0.75)[1]
    for image in range(5):
        for place in range(16):
            where = (kept[image] == place).nonzero().flatten().tolist()
            wanted = encoded[image, where[0]] if where else method.mask_token
            torch.testing.assert_close(decoded[image, place], wanted, atol=1e-6, rtol=0)


def test_training_is_the_same_loop_for_all(monkeypatch):
    """Batches of the classes asked for, a rate that rises and falls to zero, the target moved after every step."""
    class Method(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = self.target_encoder = torch.nn.Linear(1, 1)
            self.batches, self.rates, self.moved = [], [], []

        def forward(self, images):
            self.batches.append(images)
            self.before = self.encoder.weight.item()
            return self.encoder(images[:, None].float()).mean()

        def update_target(self, momentum):
            self.moved.append((momentum, len(self.batches)))
            self.rates.append(abs(self.encoder.weight.item() - self.before))

    method = Method()
    monkeypatch.setattr(imbalance, "make_method", lambda name, present: method)
    classes = torch.arange(400) % 10 + 1
    args = parse("--epochs", 4, "--batch_size", 40, "--lr", 0.1)
    reports = []
    encoder = imbalance.train("SimCLR", classes.clone(), classes, 2, args, 0, lambda *x: reports.append(x[:2]))
    assert encoder is method.encoder and len(method.batches) == 40 and reports == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert {len(batch.unique()) for batch in method.batches} == {2}
    assert method.moved == [(0.99, step) for step in range(1, 41)]
    # AdamW on a gradient of one sign moves by about the rate, but for the weight decay of 5% of it
    assert method.rates[3] == pytest.approx(0.1, abs=0.03) and method.rates[0] < 0.03 and method.rates[-1] < 0.001


def test_a_loss_that_is_not_finite_ends_the_run():
    images, classes = imbalance.drawn_images(200, 0)
    args = parse("--epochs", 1, "--batch_size", 20, "--lr", 1e30)
    with pytest.raises(imbalance.UserError, match="MAE: the loss of epoch 1 is not finite; a lower --lr may help"):
        imbalance.train("MAE", images, classes, 10, args, 0, lambda *report: None)


def test_the_batch_prior_gives_the_present_classes_their_share():
    prior = imbalance.batch_prior(50, 0.2)
    assert prior[:10].sum().item() == pytest.approx(0.95) and prior[10:].std() < 1e-7 and len(prior) == 50
    assert prior.sum().item() == pytest.approx(1)
    torch.testing.assert_close(imbalance.batch_prior(50, 1.0), pmsn.uniform_prior(50))


def test_pmsns_prior_is_sorted_as_the_batch_is(monkeypatch):
    torch.manual_seed(0)
    method = imbalance.MSN(prototypes=10, present=0.2)
    images = imbalance.drawn_images(40, 0)[0]
    views = imbalance.two_views(images)
    monkeypatch.setattr(imbalance, "two_views", lambda _: views)
    method(images)
    with torch.no_grad():
        z = torch.nn.functional.normalize(method.target_head(method.target_encoder(views[0])), dim=-1)
        used = (z @ torch.nn.functional.normalize(method.prototypes, dim=-1).T / 0.1).softmax(dim=-1).mean(dim=0)
    most = set(used.topk(2).indices.tolist())
    assert set(method.prior.topk(2).indices.tolist()) == most and method.prior.sum().item() == pytest.approx(1)
    plain = imbalance.MSN(prototypes=10)
    plain(images)
    torch.testing.assert_close(plain.prior, torch.full((10,), 0.1))


# ---- Measuring -------------------------------------------------------------------------------------------------------


def test_features_are_cls_and_the_mean_over_patches():
    encoder, seen = imbalance.make_encoder(), []
    encoder.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = imbalance.drawn_images(6, 0)[0]
    found = imbalance.features(encoder, images)
    torch.testing.assert_close(found, torch.cat([seen[0][:, 0], seen[0][:, 1:].mean(dim=1)], dim=1))
    expected = (images[2, 1, 4:6, 8:10].float().mean() / 255 - 0.456) / 0.224
    assert imbalance.features(None, images)[2, 256 + 2 * 16 + 4].item() == pytest.approx(expected.item(), abs=1e-5)


def test_linear_probe_against_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is the oracle here")
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 20, generator=generator)
    labels, test_labels = (torch.randint(5, (n,), generator=generator) for n in (600, 400))
    x, y = (centres[z] + 1.5 * torch.randn(len(z), 20, generator=generator) for z in (labels, test_labels))
    oracle = linear_model.RidgeClassifier(alpha=6.0).fit(x.numpy(), labels.numpy()).score(y.numpy(),
                                                                                           test_labels.numpy())
    assert imbalance.linear_probe(x, labels, y, test_labels) == pytest.approx(oracle, abs=0.03)
    assert imbalance.linear_probe(x, labels, x, (labels + 1) % 5) < 0.1


def test_summary_by_hand(capsys):
    """Two seeds; SimCLR loses .3 and .1 of the class, MAE .0 and .1, MSN never beat the random encoder."""
    def run(semantic, low):
        return {"class": semantic, "luminance": low, "colour": low, "orientation": low}

    scores = {"SimCLR": {"balanced": [run(0.8, 0.5), run(0.6, 0.5)], "imbalanced": [run(0.5, 0.6), run(0.5, 0.4)]},
              "MSN": {"balanced": [run(0.2, 0.5), run(0.2, 0.5)], "imbalanced": [run(0.1, 0.5), run(0.1, 0.5)]},
              "MAE": {"balanced": [run(0.5, 0.5), run(0.5, 0.5)], "imbalanced": [run(0.5, 0.5), run(0.4, 0.5)]},
              "random encoder": {"balanced": [run(0.2, 0.3), run(0.2, 0.3)]},
              "raw pixels": {"balanced": [run(0.3, 0.9), run(0.3, 0.9)]}}
    summary = imbalance.summarise(scores)
    rows, claim = summary["methods"], summary["claim"]
    assert [rows[m]["learned"] for m in ("SimCLR", "MSN", "MAE")] == [True, False, True]
    assert rows["SimCLR"]["drop"]["semantic"]["mean"] == pytest.approx(0.2)
    assert rows["SimCLR"]["drop"]["semantic"]["std"] == pytest.approx(math.sqrt(0.02))
    assert rows["SimCLR"]["drop"]["low-level"]["mean"] == pytest.approx(0)
    assert claim["volume"] == ["SimCLR"] and claim["no_volume"] == ["MAE"]
    assert claim["semantic"]["difference"]["mean"] == pytest.approx(0.15)  # .3 - 0 and .1 - .1
    assert claim["semantic"]["difference"]["std"] == pytest.approx(0.3 / math.sqrt(2))
    assert claim["low-level"]["volume"]["std"] == pytest.approx(0.2 / math.sqrt(2))  # -.1 and .1
    imbalance.print_results(summary, 2)
    printed = capsys.readouterr().out.splitlines()
    assert next(line for line in printed if line.startswith("SimCLR")).split() == (
        "SimCLR 70.0 ± 14.1 50.0 ± 0.0 20.0 ± 14.1".split())
    assert sum(line.startswith("MSN") and line.endswith("did not learn here") for line in printed) == 4
    assert [line for line in printed if "did not learn" in line and line[:3] not in ("MSN", "did")] == []
    assert next(line for line in printed if line.startswith("semantic")).split() == (
        "semantic 20.0 ± 14.1 5.0 ± 7.1 15.0 ± 21.2".split())
    del scores["MAE"]
    assert imbalance.summarise(scores)["claim"] is None


# ---- Command line ----------------------------------------------------------------------------------------------------


def test_quick_run_writes_everything(tmp_path):
    result = subprocess.run([sys.executable, "imbalance.py", "--quick", "--images", "250", "--out", str(tmp_path)],
                            cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "imbalance.png"}
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["scores"]) == {*imbalance.METHODS, *imbalance.BASELINES}
    for name in imbalance.METHODS:
        for sampling in ("balanced", "imbalanced"):
            (scores,) = results["scores"][name][sampling]
            assert set(scores) == set(imbalance.TASKS) and all(0 <= value <= 1 for value in scores.values())
    assert results["scores"]["MSN"]["balanced"] == results["scores"]["PMSN"]["balanced"]  # the same method there
    assert "the two shares of a class differ by 0.000 at most" in result.stdout
    assert "[2] of 10 classes each" in result.stdout and "[10] of 10 classes each" in result.stdout


@pytest.mark.parametrize("arguments, message", [
    (["--data", "/nowhere"], "--data /nowhere: neither drawn, CIFAR10 nor a folder that exists"),
    (["--classes_per_batch", "0"], "--classes_per_batch must be at least 1, got 0"),
    (["--classes_per_batch", "11"], "--classes_per_batch must be less than the 10 classes of --data drawn, got 11"),
    (["--images", "10"], "--images must be at least 200, got 10"),
    (["--images", "300", "--batch_size", "400"], "--batch_size 400 is larger than the data set of 300 images"),
    (["--images", "200", "--batch_size", "50"], "imbalanced mini-batches, 50 images of 2 classes: one would hold an "
     "image twice; a smaller --batch_size or more images may help"),
    (["--lr", "0"], "--lr must be positive, got 0.0"),
    (["--out", "/proc/x"], "cannot write to --out /proc/x: No such file or directory"),
])
def test_bad_input_is_named(arguments, message, tmp_path):
    with pytest.raises(imbalance.UserError) as error:
        imbalance.main([*(["--out", str(tmp_path)] if "--out" not in arguments else []), *arguments])
    assert str(error.value) == message


def test_bad_input_is_one_line_and_status_2(tmp_path):
    result = subprocess.run([sys.executable, "imbalance.py", "--epochs", "0", "--out", str(tmp_path)], cwd=REPOSITORY,
                            capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr == "imbalance.py: --epochs must be at least 1, got 0\n"
