"""extras/imbalance.py against NumPy and by hand, whole runs of it, and extras/benchmark.py."""

import json
import math
import re
from types import SimpleNamespace
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from PIL import Image

import benchmark
import imbalance
import pmsn

# ---- Data ----------------------------------------------------------------------------------------
def test_synthetic_classes_do_not_tell_the_low_level():
    images, classes = imbalance.synthetic_images(2000, 0), torch.arange(2000) % 10
    assert images.shape == (2000, 3, 32, 32) and images.dtype == torch.uint8
    for task, values in imbalance.low_level(images).items():
        between = torch.stack([values[classes == c].mean() for c in range(10)]).std()
        assert between < 0.2 * values.std(), task
    # The center of a ring (classes 5 to 9) looks like the background in the corner.
    gray = images.float().mean(dim=1)
    contrast = (gray[:, 16, 16] - gray[:, 0, 0]).abs()
    assert contrast[classes >= 5].mean() < 0.5 * contrast[classes < 5].mean()

def test_low_level_measures_of_known_images():
    x = torch.arange(32.0)
    stripes = torch.sin(x).expand(32, 32)  # vertical
    tilted = torch.sin(0.5 * (x * math.cos(0.4) + x[:, None] * math.sin(0.4)))
    images = torch.stack([stripes, stripes.T, tilted, tilted.flip(1), tilted])
    images = (128 + 100 * images)[:, None].repeat(1, 3, 1, 1).to(torch.uint8)
    images[4] = torch.tensor([255, 0, 0]).view(3, 1, 1)  # red
    found = imbalance.low_level(images)
    assert found["luminance"][[0, 4]].tolist() == pytest.approx([0.5, 1 / 3], abs=0.02)
    assert found["color"].tolist() == pytest.approx([0, 0, 0, 0, 1], abs=1e-6)
    assert found["orientation"][:4].tolist() == pytest.approx([0, math.pi / 2, 0.4, 0.4], abs=0.05)

def test_folders_give_equally_many_images_per_class_and_bins_of_training(tmp_path):
    for folder, count in (("train/a", 10), ("train/b", 15), ("test/a", 5), ("test/b", 5)):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(count):
            color = (10 * i, 90 * ("test" in folder), 200 * ("b" in folder))
            Image.new("RGB", (40, 30), color).save(tmp_path / folder / f"{i}.png")
    args = SimpleNamespace(data=str(tmp_path), images=60, tasks=imbalance.TASKS)
    images, labels, test_images, test_labels = imbalance.load_data(args)
    assert images.shape == (20, 3, 32, 32) and len(images.flatten(1).unique(dim=0)) == 20
    assert (images[:, 1] == 0).all() and (test_images[:, 1] > 0).all()
    assert (images[:, 2, 0, 0] > 0).tolist() == labels["class"].tolist() == [0, 1] * 10
    values, test_values = (imbalance.low_level(x)["color"].numpy() for x in (images, test_images))
    edges = np.quantile(values, (0.2, 0.4, 0.6, 0.8))
    assert test_labels["color"].tolist() == np.searchsorted(edges, test_values).tolist()

# ---- Methods -------------------------------------------------------------------------------------
def standardize(x, ddof=0):
    return (x - x.mean(-1, keepdims=True)) / x.std(-1, ddof=ddof, keepdims=True)

def test_mae_loss_is_a_numpy_formula():
    predictions, images = torch.randn(2, 16, 192), torch.randn(2, 3, 32, 32)
    hidden = torch.rand(2, 16) < 0.5
    patches = images.numpy().reshape(2, 3, 4, 8, 4, 8).transpose(0, 2, 4, 1, 3, 5)
    target = standardize(patches.reshape(2, 16, 192), ddof=1)
    errors = ((predictions.numpy() - target) ** 2)[hidden.numpy()]
    loss = imbalance.mae_loss(predictions, images, hidden)
    assert loss.item() == pytest.approx(errors.mean(), rel=1e-4)

def test_data2vec_loss_is_a_numpy_formula():
    predictions, *outputs = torch.randn(4, 2, 4, 6)
    hidden = torch.tensor([[True, False, True, False], [False, False, True, True]])
    target = standardize(standardize(torch.stack(outputs).numpy()).mean(0))
    errors = ((predictions.numpy() - target) ** 2)[hidden.numpy()]
    loss = imbalance.data2vec_loss(predictions, outputs, hidden)
    assert loss.item() == pytest.approx(errors.mean(), rel=1e-3)

def test_run_blocks_is_the_encoder():
    encoder, images, seen = imbalance.make_encoder(), torch.randn(2, 3, 32, 32), []
    for module in (*encoder.blocks, encoder.norm):
        module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    encoder(images)
    found = imbalance.run_blocks(encoder, encoder.embed_patches(images))
    torch.testing.assert_close(found, seen[:4])

@pytest.mark.parametrize("name", imbalance.METHODS)
def test_every_method_trains_its_encoder_and_no_target(name):
    method = imbalance.METHODS[name]()
    loss, _ = method(list(torch.randn(2, 20, 3, 32, 32)))
    loss.backward()
    for parameter_name, parameter in method.named_parameters():
        if "target" in parameter_name:
            assert parameter.grad is None and not parameter.requires_grad
        else:
            assert parameter.grad.abs().sum() > 0, parameter_name
    assert hasattr(method, "update_target") == (name in ("MSN", "data2vec"))
    if name == "data2vec":
        method.encoder.norm.bias.data += 1
        method.update_target(ema_momentum=0.9)
        torch.testing.assert_close(method.target_encoder.norm.bias, torch.full((96,), 0.1))

@pytest.mark.parametrize("name, count", [("MAE", 12), ("data2vec", 10)])
def test_predictions_come_from_visible_patches_alone(name, count, monkeypatch):
    method, images, seen = imbalance.METHODS[name](), torch.rand(6, 3, 32, 32), []
    monkeypatch.setattr(imbalance, f"{name.lower()}_loss", lambda *x: seen.append(x))

    def predict(repainted):  # with other colors where `repainted` (6, 16) is true
        mask = repainted.view(6, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
        torch.manual_seed(1)  # hides the same patches every time
        method([torch.where(mask, 1 - images, images)])
        return seen[-1][0]
    predictions, hidden = predict(torch.zeros(6, 16, dtype=torch.bool)), seen[-1][2]
    assert (hidden.sum(dim=1) == count).all() and not torch.equal(hidden[0], hidden[1])
    torch.testing.assert_close(predict(hidden), predictions)
    assert ((predict(~hidden) - predictions).abs().amax(dim=2)[hidden] > 1e-4).all()

# ---- Training and measuring ----------------------------------------------------------------------
def test_training_has_the_classes_and_the_schedule_that_it_should(monkeypatch, capsys):
    recorder, steps = torch.nn.Module(), []
    recorder.encoder, recorder.update_target = torch.nn.Linear(1, 1), Mock()
    def forward(views):
        steps.append((views[0].unique().tolist(), recorder.encoder.weight.item()))
        return recorder.encoder.weight.sum(), {}
    recorder.forward = forward
    monkeypatch.setitem(imbalance.METHODS, "SimCLR", lambda: recorder)
    monkeypatch.setattr(pmsn, "make_views", lambda crops, blur_p: crops)
    classes = torch.arange(200) % 10
    images = classes.to(torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    args, sampler = SimpleNamespace(epochs=4, lr=0.1), pmsn.ClassBatchSampler(classes, 20, 2)
    assert imbalance.train(None, args, "SimCLR", images, sampler, seed=3) is recorder.encoder
    batches, weights = zip(*steps)
    assert [len(classes) for classes in batches] == [2] * 40
    assert recorder.update_target.mock_calls == [call(ema_momentum=0.99)] * 40
    assert sampler.seed == 3 and batches[:10] != batches[10:20]  # another order in every epoch
    # AdamW moves a weight whose gradient keeps its sign by the rate: up to .1, then down to 0.
    moves = -np.diff(weights)[[0, 3, 20, 38]]
    assert moves.tolist() == pytest.approx([0.025, 0.1, 0.05, 0], rel=0.2, abs=0.001)
    assert re.findall(r"\d/\d", capsys.readouterr().out) == ["1/4", "2/4", "3/4", "4/4"]

def test_summary_by_hand():
    """Two seeds. SimCLR loses 30 and 10 points of the class, MAE 0 and 10. MSN learns nothing."""
    scores = {
        "SimCLR": [[[80, 50], [50, 60]], [[60, 50], [50, 40]]],
        "MSN": [[[20, 50], [0, 50]], [[20, 50], [0, 50]]],
        "MAE": [[[50, 50], [50, 50]], [[50, 50], [40, 50]]],
    }
    table = imbalance.summarize(scores, untrained=18.0)
    for row in ("SimCLR", "with a volume term"):
        assert table[row].tolist() == [[80, 50, 30, -10], [60, 50, 10, 10]]
    assert table["difference"][:, 2:].tolist() == [[30, -10], [0, 10]]
    assert imbalance.text(table["SimCLR"][:, 2]) == f"20.0 ± {math.sqrt(200):.1f}"
    assert "difference" not in imbalance.summarize(scores, untrained=48.0)

# ---- Whole runs ----------------------------------------------------------------------------------
@pytest.mark.slow
def test_quick_run_writes_everything(tmp_path):
    imbalance.main(["--quick", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "imbalance.png"}
    results = json.loads((tmp_path / "results.json").read_text())
    assert {np.shape(x) for x in results["scores"].values()} == {(1, 2, 2)}

def test_the_benchmark_prints_its_table(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    benchmark.main(["--quick"])
    rows = re.findall(r"^(.+?) {2,}([\d.]+) +[\d.]+$", capsys.readouterr().out, re.MULTILINE)
    usual, ours, decoding, colors, total = [float(milliseconds) for _, milliseconds in rows]
    assert 0 < decoding < ours < 0.5 * usual and total == pytest.approx(ours + colors, abs=0.02)
