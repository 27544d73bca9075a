"""extras/which_prior.py: its data, its measures by hand, and a whole run."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import which_prior

def test_classes_follow_the_exponent_and_nothing_else_does():
    torch.manual_seed(0)
    data = which_prior.Data(which_prior.TRAIN_FONTS, 4, 1.0, 0.5, 24_000)
    assert torch.bincount(data.labels) / 960 == pytest.approx([12, 6, 4, 3], abs=0.5)  # k^-1
    head = data.labels == 0
    for values, kinds in ((data.fonts, 12), (data.backgrounds, 10)):
        shares = torch.bincount(values[head]) / 11_520
        assert shares == pytest.approx([1 / kinds] * kinds, abs=0.015)

def test_test_images_are_in_other_fonts():
    train, test = (which_prior.Data(fonts, 64, 0.0, 0.0, 10) for fonts in (
        which_prior.TRAIN_FONTS, which_prior.TEST_FONTS))
    letters = torch.cat([train.letters, test.letters]).flatten(1)
    assert len(letters) == 16 * 64 == len(letters.unique(dim=0))

def test_views_show_the_class_and_the_grating():
    """Without contrast the background is black. The average view looks like its letter."""
    torch.manual_seed(0)
    for contrast, gray in ((0.0, -1.0), (0.8, -0.2)):  # Gratings are gray on average.
        data = which_prior.Data(["DejaVuSans"], 8, 0.0, contrast, 4000)
        views = data.all_views()
        assert views.shape == (4000, 1, 32, 32)
        assert views[..., 0, 0].mean().item() == pytest.approx(gray, abs=0.1)
        means = torch.stack([views[data.labels == c].mean(dim=0).flatten() for c in range(8)])
        letters = F.interpolate(data.letters, 32, mode="bilinear").flatten(1)
        correlations = torch.cat([letters, means]).corrcoef()[:8, 8:]
        assert correlations.argmax(dim=1).tolist() == list(range(8))

def test_measures_by_hand():
    values = torch.tensor([1, 0, 1, 1, 0, 0, 1]) > 0
    found = which_prior.by_group("knn", values, torch.tensor([0, 0, 1, 2, 3, 4, 5]), 6)
    assert found == pytest.approx(
        {"knn": 4 / 7, "knn_head": 2 / 3, "knn_middle": 1 / 2, "knn_tail": 1 / 2})
    # Prototype 0 has classes 0, 0, 1, prototype 1 has class 0, and prototype 3 has class 2.
    pure, spread = which_prior.prototype_use(torch.tensor([0, 0, 0, 1, 3]),
                                             torch.tensor([0, 0, 1, 0, 2]), 4)
    assert pure.tolist() == [True, True, False, True, True]
    assert spread[:3].tolist() == pytest.approx([3 / 2 ** (2 / 3), 1, 1])  # log 3 - 2/3 log 2
    assert spread[3].isnan()  # There is no image of class 3.

def test_a_measure_without_a_value_is_left_out(monkeypatch):
    """The rarest classes can be without a training image, and then nothing can be measured."""
    monkeypatch.setattr(which_prior, "train", lambda *args: None)
    monkeypatch.setattr(which_prior, "make_runs", lambda seed, args: [])
    monkeypatch.setattr(which_prior, "measure", lambda *args: {"knn": 0.5, "spread_tail": math.nan})
    args = SimpleNamespace(classes=3, images=1024, epochs=1)
    (untrained,) = which_prior.experiment(0, 1.0, 0.0, args)
    assert untrained["results"] == {"knn": 0.5}

@pytest.mark.slow
def test_quick_run_end_to_end(tmp_path, capsys):
    which_prior.main(["--quick", "--methods", "plain", "relative", "--contrasts", "0.7",
                      "--classes", "8", "--out", str(tmp_path), "--workers", "1"])
    runs = json.loads((tmp_path / "which_prior.json").read_text())["runs"]
    names = [(run["prior_exponent"], run["method"]) for run in runs]
    results = [run["results"] for run in runs]
    assert names == [(None, "random"), (0, "plain"), (0, "relative"), (1, "plain"),
                     (1, "relative"), (None, "supervised")]
    assert results[1] == results[2]  # With the uniform prior, both ways are the same.
    assert all(results[i] != results[j] for i, j in ((1, 3), (3, 4), (2, 4)))
    assert results[3]["gain"] == results[3]["knn"] - results[1]["knn"] != 0
    assert all(0 < result[name] < 1 for result in results for name in ("knn", "probe"))
    table = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert len(table) == 2 + 6 + 1 and len(set(map(len, table[1:-1]))) == 1  # aligned
    assert min(Image.open(tmp_path / "which_prior.png").size) > 300
