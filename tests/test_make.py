"""results/make.py: the tables of the READMEs and the figures are those of the files of results."""

import itertools
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "results"))
import make


@pytest.mark.parametrize("readme", make.READMES, ids=lambda path: "/".join(path.parts[-2:]))
def test_tables_are_those_of_the_files(readme):
    text = readme.read_text()
    assert make.with_tables(text) == text, "run: python results/make.py"
    assert text.count("<!-- table: ") == text.count("<!-- end -->")


@pytest.mark.parametrize("name", make.FIGURES)
def test_figures_come_with_their_file(name):
    assert {"command", "commit", "machine", "torch"} <= make.load(name)["made_by"][0].keys()
    for figure in make.FIGURES[name].values():
        with Image.open(make.FOLDER.parent / "figures" / figure) as image:
            assert image.text["results"] == make.digest(name), figure


def test_a_run_is_taken_and_written_as_a_table(tmp_path, monkeypatch):
    """Two seeds and two groups, by hand: 1.5 ± .7, and a dash where a seed has no value."""
    monkeypatch.setattr(make, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(make, "FIGURES", {"example": {"plot.png": "example.png"}})

    def table(name):
        runs = make.load(name)["runs"]
        return make.table_of(runs, {"kind": "kind"}, {"x": "value", "y": "other"})
    monkeypatch.setattr(make, "TABLES", {"example": (table, ["example"])})
    for folder in ("results", "figures", "run"):
        (tmp_path / folder).mkdir()
    runs = [{"kind": kind, "seed": seed, "job": [kind, seed], "job_seconds": 90, "results": results}
            for kind, seed, results in (("a", 0, {"x": 1, "y": 1 / 3}), ("a", 1, {"x": 2}),
                                        ("b", 0, {"x": 0.5, "y": 4}))]
    made_by = [{"command": "python a.py", "commit": commit, "machine": "a machine", "torch": "2"}
               for commit in ("abc", "def")]
    content = {"config": {}, "made_by": made_by, "runs": runs}
    (tmp_path / "run" / "results.json").write_text(json.dumps(content))
    Image.new("RGB", (30, 20), "red").save(tmp_path / "run" / "plot.png")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- table: example -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(make, "READMES", [readme])
    with pytest.raises(SystemExit, match="^2$"):
        make.main(["example", str(tmp_path)])  # no results
    make.main(["example", str(tmp_path / "run")])
    assert readme.read_text() == """before
<!-- table: example -->
| kind | value | other |
| --- | --- | --- |
| a | 1.500 ± 0.707 | - |
| b | 0.500 | 4.000 |

n = 2 seeds (0, 1). `python a.py`, commit abc, def, a machine, torch 2, 4 minutes of one core.
<!-- end -->
after
"""
    assert make.load("example")["runs"][0]["results"]["y"] == 0.33333
    with Image.open(tmp_path / "figures" / "example.png") as image:
        assert image.text["results"] == make.digest("example") and image.size == (30, 20)


def test_tables_of_kmeans(monkeypatch):
    """Jobs end in any order. Two seeds by hand: .9 ± .14 and 0."""
    scores = {10: {"K-means": (0.0, 0.0), "MSN": (0.5, 0.5)},
              2: {"K-means": (0.8, 1.0), "MSN": (1.0, 1.0)}}
    runs = [{"seed": seed, "method": method, "imbalance": imbalance,
             "results": {"adjusted_rand_index": score}}
            for imbalance, of_methods in scores.items()
            for method, of_seeds in of_methods.items() for seed, score in enumerate(of_seeds)]
    shares = {"share_1": 0.25, "share_2": 0.25, "share_3": 0.5}
    runs.insert(4, {"loss": "SimCLR", "results": shares})
    content = {"config": {"prior": [0.5, 0.3, 0.2]}, "runs": runs}
    monkeypatch.setattr(make, "load", lambda name: content)
    assert make.kmeans("any").splitlines() == [
        "| sizes of the groups | 2:1 | 10:1 |", "| --- | --- | --- |",
        "| K-means | 0.900 ± 0.141 | 0.000 ± 0.000 |",
        "| MSN | 1.000 ± 0.000 | 0.500 ± 0.000 |"]
    assert make.kmeans_shares("any").splitlines()[2:] == [
        "| SimCLR | 0.250 | 0.250 | 0.500 |", "| the prior of PMSN | 0.500 | 0.300 | 0.200 |"]


def test_tables_of_which_prior(tmp_path, monkeypatch):
    """Gains are paired by seed, by hand. One line has runs from two files."""
    monkeypatch.setattr(make, "FOLDER", tmp_path)

    def run(seed, exponent, loss, probe, data_exponent=1.0):
        return {"seed": seed, "data_exponent": data_exponent, "contrast": 0.0,
                "prior_exponent": exponent, "loss": loss,
                "results": {"probe": probe, "balanced_probe": probe,
                            "effective_prototypes": 100 * probe}}
    first = [run(0, 0.0, "plain", 0.5), run(0, 0.25, "plain", 0.6), run(0, 1.0, "plain", 0.1),
             run(0, None, "random", 0.2), run(0, 0.0, "relative", 0.5),
             run(0, 0.25, "relative", 0.7), run(0, 0.25, "plain", 0.9, data_exponent=0.0),
             run(0, 0.0, "plain", 0.4, data_exponent=0.0)]
    second = [run(1, 0.0, "plain", 0.4), run(1, 0.25, "plain", 0.35)]
    for name, runs in (("first", first), ("second", second)):
        content = {"config": {"prototypes": 64}, "runs": runs}
        make.path_of(name).write_text(json.dumps(content))
    columns = {"probe": "accuracy", "effective_prototypes": "prototypes"}
    table = make.accuracies("first", columns, ("random", "plain", "relative"))
    assert table.splitlines()[2:] == [
        "| untrained encoder |  | 0.200 | 20.0 |",
        "| PMSN | uniform | 0.500 | 50.0 |",
        "| PMSN | exponent 0.25 | 0.600 | 60.0 |",
        "| PMSN | exponent 1.0 | 0.100 | 10.0 |",
        "| relative sharpening | exponent 0.25 | 0.700 | 70.0 |"]
    lines = [(1.0, "plain", ["first", "second"]), (0.0, "plain", ["first"]),
             (1.0, "relative", ["first"])]
    columns = {(0.25, "balanced_probe"): "mild", (1.0, "balanced_probe"): "steep"}
    assert make.gains(lines, columns).splitlines()[2:] == [
        "| long-tailed | 64 | PMSN | 0.025 ± 0.106 (n = 2) | -0.400 (n = 1) |",
        "| balanced | 64 | PMSN | 0.500 (n = 1) |  |",
        "| long-tailed | 64 | relative sharpening | 0.200 (n = 1) |  |"]
    start = run(0, None, "supervised", 0.9)
    make.path_of("labels").write_text(json.dumps({"runs": [start, *second]}))
    table = make.from_labels("first", "labels")
    rows = [line.strip("| ").split(" | ")[:5] for line in table.splitlines()[2:]]
    assert rows == [["random weights", "PMSN", "uniform", "0.500", "0.000"],
                    ["random weights", "PMSN", "exponent 0.25", "0.600", "0.100"],
                    ["random weights", "PMSN", "exponent 1.0", "0.100", "-0.400"],
                    ["labels", "before", "", "0.900", "-"],
                    ["labels", "PMSN", "uniform", "0.400", "0.000"],
                    ["labels", "PMSN", "exponent 0.25", "0.350", "-0.050"]]


def glyph_run(seed, exponent, loss, value, setting="default", data_exponent=1.0):
    accuracies = {f"{kind}{group}": value for kind in ("balanced_knn", "knn", "balanced_probe")
                  for group in ("", "_head", "_middle", "_tail")}
    prior = {} if exponent is None else {
        "prototypes_of_all_images": 100 * value, "prototypes_of_prior": 64.0,
        "class_information": value, "prototypes_per_view": 2 * value}
    return {"setting": setting, "seed": seed, "data_exponent": data_exponent,
            "prior_exponent": exponent, "loss": loss, "results": accuracies | prior}


def test_tables_of_glyphs(monkeypatch):
    """Gains are over the uniform prior with the plain loss, seed by seed, with 95% intervals.

    The gains -.1 and .1 have the standard error .1, and t is 12.706 for two values. On balanced
    images nothing is gained.
    """
    runs = [glyph_run(seed, exponent, loss, value) for seed, exponent, loss, value in (
        (0, None, "random", 0.1), (0, 0.0, "plain", 0.6), (0, 0.0, "relative", 0.6),
        (0, 0.0, "both", 0.7), (0, 0.5, "plain", 0.5), (0, None, "supervised", 0.9),
        (1, None, "random", 0.1), (1, 0.0, "plain", 0.6), (1, 0.0, "relative", 0.6),
        (1, 0.0, "both", 0.7), (1, 0.5, "plain", 0.7), (1, None, "supervised", 0.9))]
    runs += [glyph_run(run["seed"], run["prior_exponent"], run["loss"], 0.5, data_exponent=0.0)
             for run in runs]
    monkeypatch.setattr(make, "load", lambda name: {"runs": runs})
    rows = make.glyphs("any").splitlines()[2:]
    assert rows[:5] == [
        "| long-tailed | untrained encoder |  |" + 2 * " 0.100 ± 0.000 |" + 5 * "  |",
        "| long-tailed | PMSN | uniform |" + 2 * " 0.600 ± 0.000 |" + 3 * "  |"
        + " 60.0 of 64.0 | yes |",
        "| long-tailed | relative sharpening, Sinkhorn | uniform |" + 2 * " 0.700 ± 0.000 |"
        + 3 * " +0.100 ± 0.000 |" + " 70.0 of 64.0 | yes |",
        "| long-tailed | PMSN | exponent 0.5 |" + 2 * " 0.600 ± 1.271 |"
        + 3 * " +0.000 ± 1.271 |" + " 60.0 of 64.0 | yes |",
        "| long-tailed | supervised |  |" + 2 * " 0.900 ± 0.000 |" + 5 * "  |"]
    assert rows[8] == ("| balanced | PMSN | exponent 0.5 |" + 2 * " 0.500 ± 0.000 |"
                       + 2 * " +0.000 ± 0.000 |" + "  | 50.0 of 64.0 | no |")
    assert make.glyphs_groups("any").splitlines()[3] == (
        "| relative sharpening, Sinkhorn | uniform |" + 6 * " +0.100 ± 0.000 |"
        + " 0.700 ± 0.000 |")


def test_table_of_settings(monkeypatch):
    runs = [glyph_run(0, exponent, loss, value, setting)
            for setting, shift in (("a", 0), ("b", 0.1))
            for exponent, loss, value in ((None, "random", 0.1), (0.0, "plain", 0.5 + shift),
                                          (0.0, "relative", 0.5 + shift), (0.25, "plain", 0.4),
                                          (0.25, "relative", 0.45), (None, "supervised", 0.9))]
    monkeypatch.setattr(make, "load", lambda name: {"runs": runs})
    assert make.settings("any").splitlines()[2:] == [
        "| a | 0.100 | 0.900 | 0.500 | -0.100 | -0.050 | +0.050 | 0.78 | 0.62 | 0.70 | 1.0 |",
        "| b | 0.100 | 0.900 | 0.600 | -0.200 | -0.150 | +0.050 | 0.94 | 0.62 | 0.70 | 1.2 |"]


def test_tables_of_which_feature(monkeypatch):
    """Two seeds. Exponent 1.25 gains 1 and 2 nats on long-tailed data, and loses 1 on balanced."""
    def run(seed, data_exponent, exponent, loss, known):
        results = {"class": known, "background": 1.5 - known, "difference": 2 * known - 1.5,
                   "prototypes_of_all_images": 4.0, "prototypes_of_prior": 8.0,
                   "best_class_loss": known, "best_background_loss": 0.5,
                   "share_of_class_heads": 0.25} if exponent is not None else {}
        return {"seed": seed, "data_exponent": data_exponent, "prior_exponent": exponent,
                "loss": loss, "results": {**results, "class_knn": 0.5, "background_knn": 0.5}}
    runs = []
    for seed, data_exponent in itertools.product((0, 1), (1.25, 0.0)):
        runs.append(run(seed, data_exponent, None, "SimCLR", 0))
        for exponent, loss in make.which_feature.ARMS:
            steep = 1.0 + seed if data_exponent else -1.0
            runs.append(run(seed, data_exponent, exponent, loss,
                            0.1 + (steep if exponent == 1.25 else 0)))
        runs.append({"data_exponent": data_exponent, "prior_exponent": 0.0,
                     "results": {"class": 0.25, "background": 0.125}})
    monkeypatch.setattr(make, "load", lambda name: {"runs": runs})
    rows = [line.strip("| ").split(" | ") for line in make.features("any").splitlines()[2:]]
    assert rows[1] == ["long-tailed classes", "PMSN", "uniform", "0.100 ± 0.000", "1.400 ± 0.000",
                       "-1.300 ± 0.000", "0.500 ± 0.000", "0.500 ± 0.000", "0 of 2", "4.0 of 8.0"]
    assert rows[4][3:9:5] == ["1.600 ± 6.353", "2 of 2"]  # t * .5
    gained = {row[0]: row[3:5] for row in rows if "gain" in row[0] and row[1] == "PMSN"}
    assert gained == {
        "gain of exponent 1.25, long-tailed": ["+1.500 ± 6.353", "-1.500 ± 6.353"],
        "gain of exponent 1.25, balanced": ["-1.000 ± 0.000", "+1.000 ± 0.000"],
        "difference of these gains": ["+2.500 ± 6.353", "-2.500 ± 6.353"]}
    assert make.feature_losses("any").splitlines()[2] == (
        "| long-tailed classes | uniform | 0.250 | 0.125 | 0.100 ± 0.000 | 0.500 ± 0.000 | "
        "0.250 ± 0.000 |")


def test_losses_of_class_imbalanced_mini_batches_are_in_one_row_per_method(monkeypatch):
    """One seed, by hand: SimCLR loses .1, .3 and .2 of .4, MAE nothing, nothing and .1 of .2."""
    accuracies = {"SimCLR": {("all", None): 0.6, ("batch", 2): 0.5, ("batch", 1): 0.3,
                             ("step", 1): 0.4},
                  "MAE": {("all", None): 0.4, ("batch", 2): 0.4, ("batch", 1): 0.4,
                          ("step", 1): 0.3},
                  "random convolutions": {(None, None): 0.2}, "random ViT": {(None, None): 0.2}}
    runs = [{"seed": 0, "method": name, "arm": arm, "classes_per_batch": count,
             "lr_scale": None if arm is None else scale,
             "results": {"class_knn": value + (0 if scale == 1 else 0.1), "class_probe": value,
                         "color_probe": 1 - value}}
            for name, of_arms in accuracies.items() for (arm, count), value in of_arms.items()
            for scale in ((1, 2) if arm else (1,))]
    monkeypatch.setattr(make, "load", lambda name: {"runs": runs})
    head, _, *rows = [line.strip("| ").split(" | ") for line in
                      make.imbalanced(["any"], [*accuracies]).splitlines()]
    assert head == ["class", "lost, few in batch: 2", "lost, few in batch: 1",
                    "lost, few in step: 1", "class, k-NN", "color", "share of what was learned"]
    assert rows == [
        ["SimCLR", "0.600", "0.100", "0.300", "0.200", "0.300", "-0.300", "0.750"],
        ["MAE", "0.400", "0.000", "0.000", "0.100", "0.000", "0.000", "0.000"],
        ["random convolutions", "0.200", "-", "-", "-", "-", "-", "-"],
        ["random ViT", "0.200", "-", "-", "-", "-", "-", "-"]]
