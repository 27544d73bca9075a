"""extras/which_feature.py: measures by hand, and a whole run."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import which_feature


def test_the_winner_is_the_head_with_the_lowest_loss():
    heads = [{"loss": loss, "class": of_class, "background": background}
             for loss, of_class, background in ((0.5, 1.2, 0.1), (0.4, 0.3, 1.1), (0.6, 0.2, 0.2),
                                                (0.7, 1.5, 0.0))]
    found = which_feature.sum_up(heads)
    assert found == {"loss": 0.4, "class": 0.3, "background": 1.1,
                     "difference": pytest.approx(-0.8), "share_of_class_heads": 0.5,
                     "best_class_loss": 0.5, "best_background_loss": 0.4}
    alone = which_feature.sum_up(heads[:1])
    assert math.isnan(alone["best_background_loss"]) and alone["share_of_class_heads"] == 1


def test_neighbors_know_what_the_features_show():
    """Features show the background, and classes are at random."""
    backgrounds = torch.arange(400) % 4
    data = SimpleNamespace(labels=torch.randint(5, (400,)), backgrounds=backgrounds)
    test = SimpleNamespace(labels=torch.randint(5, (400,)), backgrounds=backgrounds)
    features, test_features = (torch.eye(4)[backgrounds] + 0.01 * torch.randn(400, 4)
                               for _ in range(2))
    found = which_feature.neighbors(test_features, features, test, data)
    assert found == {"background_knn": 1.0, "class_knn": pytest.approx(0.2, abs=0.08)}


def test_lowest_losses_cross_over_where_theory_says():
    """Under the uniform prior long-tailed classes cost more than balanced backgrounds.

    The head class has a share of .31 and fills more than one of 8 prototypes. Under the
    power law it is the other way round. Balanced classes, eight per prototype, cost the same.
    """
    rows = [row for exponent in (1.25, 0.0) for row in which_feature.lowest_losses(exponent, None)]
    loss = {(row["data_exponent"], row["prior_exponent"]): row["results"] for row in rows}
    assert loss[1.25, 0]["background"] + 0.05 < loss[1.25, 0]["class"]
    assert loss[1.25, 1.25]["class"] + 0.05 < loss[1.25, 1.25]["background"]
    assert abs(loss[0, 0]["class"] - loss[0, 0]["background"]) < 0.005
    # One background per prototype, and the KL is 0. A share r of pairs shows the same background
    # and is certain of it, but for the targets of the others. So p of the own one is about r.
    same = 0.95 ** 2 + (1 - 0.95 ** 2) / 8
    p = torch.tensor([same] + 7 * [(1 - same) / 7])
    target = p ** 4 / (p ** 4).sum()
    # Cross-entropy of the mean target of the other view, which is at most that of certain targets.
    mean_target = same * target + (1 - same) / 7 * (1 - target)
    assert loss[1.25, 0]["background"] == pytest.approx(
        -(mean_target * mean_target.log()).sum().item(), abs=0.01)


def test_a_seed_without_a_head_of_a_kind_is_left_out():
    runs = [{"data_exponent": 1.0, "prior_exponent": exponent, "loss": "plain", "results": results}
            for exponent, results in ((0.0, {"loss": 0.5}), (0.0, {"loss": 0.7}), (0.25, {}),
                                      (0.5, {"loss": 0.4}), (0.5, {}), (1.25, {"loss": 0.2}))]
    means, halves = which_feature.series(runs, 1.0, "plain", "loss")
    assert means == pytest.approx((0.6, math.nan, 0.4, 0.2), nan_ok=True)
    assert halves[0] == pytest.approx(12.706 * 0.1) and all(map(math.isnan, halves[1:]))


def test_gains_are_paired():
    runs = [{"data_exponent": data, "prior_exponent": exponent, "loss": loss, "seed": seed,
             "results": {"class": value}} for data, exponent, loss, seed, value in (
        (1.25, 0.0, "plain", 3, 0.5), (1.25, 1.25, "plain", 3, 0.7),
        (1.25, 1.25, "relative", 3, 0.1),
        (0.0, 1.25, "plain", 3, 0.2), (0.0, 0.0, "plain", 3, 0.6),
        (0.0, 1.25, "plain", 5, 0.2), (0.0, 0.0, "plain", 5, 0.9),
        (1.25, 1.25, "plain", 5, 0.8), (1.25, 0.0, "plain", 5, 0.5))]
    runs.append({"data_exponent": 1.25, "prior_exponent": None, "loss": "SimCLR", "seed": 3,
                 "results": {}})
    found = which_feature.gains(runs, "class")
    assert found == {1.25: pytest.approx([0.2, 0.3]), 0.0: pytest.approx([-0.4, -0.7])}


def test_quick_run_end_to_end(tmp_path, jobs_here, coarse_figures, monkeypatch, capsys):
    monkeypatch.setattr(which_feature, "find_grouping", lambda two_views, prior: 0.25)
    monkeypatch.setattr(which_feature, "QUICK",
                        {"deform": 0.15, "images": 512, "epochs": (1, 2), "heads": 3})
    which_feature.main(["--quick", "--out", str(tmp_path), "--seeds", "7", "--workers", "1"])
    found = json.loads((tmp_path / "which_feature.json").read_text())["runs"]
    runs = [run for run in found if "seed" in run]
    assert [(run["data_exponent"], run["prior_exponent"], run["loss"]) for run in runs] == [
        (data, exponent, loss) for data in (1.25, 0.0)
        for exponent, loss in ((None, "SimCLR"), *which_feature.ARMS)]
    for run in runs:
        results = run["results"]
        assert 0 <= results["class_knn"] <= 1 and 0 <= results["background_knn"] <= 1
        if run["prior_exponent"] is not None:
            shares = [k ** -run["prior_exponent"] for k in range(1, 9)]
            entropy = -sum(s / sum(shares) * math.log(s / sum(shares)) for s in shares)
            assert results["prototypes_of_prior"] == pytest.approx(math.exp(entropy), abs=1e-4)
            assert 1 <= results["prototypes_of_all_images"] <= 8.001
    same = [run["results"] for run in runs if run["data_exponent"] == 1.25]
    assert same[4]["loss"] != same[5]["loss"]  # plain and relative sharpening
    table = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert len(table) == 2 + 12 + 1 and len(set(map(len, table[1:-1]))) == 1  # aligned
    assert min(Image.open(tmp_path / "which_feature.png").size) > 300
