"""The tables of the READMEs, and the figures, from files of results. Nothing in them is typed.

    python results/make.py                      # write all tables into the READMEs again
    python results/make.py corner runs/corner   # first take the results and figures of this run

A file of results is what a script wrote, with the command, the commit and the machine. A table
stands in a README between the comments <!-- table: NAME --> and <!-- end -->. A figure carries the
hash of the file of results that its run wrote. The tests compare all of this.
"""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER.parent / "extras")]
import imbalance
import mnist_corner
import which_feature
import which_prior
from support.results import cell, interval, summarize

READMES = [FOLDER.parent / name
           for name in ("README.md", "extras/README.md", "extras/CONTROLS.md")]
# The figures of each run, and their names in figures/.
FIGURES = {
    "kmeans": {"kmeans.png": "kmeans.png", "hidden_prior.png": "hidden_prior.png"},
    "corner": {"neighbors.png": "neighbors.png", "preference.png": "preference.png"},
    "corner_curve": {"curve.png": "corner_curve.png"},
    "rcdm": {"rcdm.png": "rcdm.png"},
    "photographs": {"which_prior.png": "photographs.png"},
    "settings": {"settings.png": "settings.png"},
    "glyphs": {"which_prior.png": "glyphs.png"},
    "which_feature": {"which_feature.png": "which_feature.png"},
    "imbalance_glyphs": {"imbalance.png": "imbalance_glyphs.png"},
    "imbalance_cifar10": {"imbalance.png": "imbalance_cifar10.png"},
}


# ---- Files of results ----------------------------------------------------------------------------
def path_of(name):
    return FOLDER / f"{name}.json"


def load(name):
    return json.loads(path_of(name).read_text())


def digest(name):
    return hashlib.sha256(path_of(name).read_bytes()).hexdigest()[:16]


def take(name, run):
    """Copy the results of a run, with five decimals, and its figures."""
    file, = run.glob("*.json")
    content = json.loads(file.read_text(), parse_float=lambda text: round(float(text), 5))
    # All figures are read before the first file is written: a figure may be missing.
    images = {target: Image.open(run / source).copy()
              for source, target in FIGURES.get(name, {}).items()}
    path_of(name).write_text(json.dumps(content, separators=(",", ":")).replace("{", "\n{") + "\n")
    info = PngInfo()
    info.add_text("results", digest(name))
    for target, image in images.items():
        image.save(FOLDER.parent / "figures" / target, pnginfo=info, optimize=True)


# ---- Tables --------------------------------------------------------------------------------------
PRIORS = {None: "", 0.0: "uniform", 1.0: "power law", 1.25: "power law"}


def table_of(runs, by, columns, spread="std"):
    """A row per group of runs with the same values of `by`, and a column per result.

    `by` and `columns` are {name in the file: name in the table}. For `spread` see `cell`.
    """
    summary = summarize(runs, key=lambda run: tuple(run[name] for name in by))
    rows = [[*map(str, group), *(cell(row, name, spread) for name in columns)]
            for group, row in summary.items()]
    return markdown([*by.values(), *columns.values()], rows)


def markdown(header, rows):
    lines = (header, ["---"] * len(header), *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_priors_named(runs):
    return [{**run, "exponent": PRIORS[run["exponent"]]} for run in runs]


def kmeans(name):
    """A row per method, and a column per imbalance."""
    runs = [run for run in load(name)["runs"] if "method" in run]
    summary = summarize(runs, key=lambda run: (run["method"], run["imbalance"]))
    methods = dict.fromkeys(method for method, _ in summary)
    imbalances = sorted({imbalance for _, imbalance in summary})
    rows = [[method, *(cell(summary[method, imbalance], "adjusted_rand_index")
                       for imbalance in imbalances)] for method in methods]
    sizes = [f"{imbalance:g}:1" for imbalance in imbalances]
    return markdown(["sizes of the groups", *sizes], rows)


def kmeans_shares(name):
    content = load(name)
    columns = {"share_1": "share of cluster 1", "share_2": "cluster 2", "share_3": "cluster 3"}
    prior = {"loss": "the prior of PMSN", "results": dict(zip(columns, content["config"]["prior"]))}
    runs = [run for run in content["runs"] if "loss" in run]
    return table_of([*runs, prior], {"loss": "loss"}, columns)

# What a winner of the corner knows, by the columns of a table.
WINNER = {"digit": "information on digit (nats)", "background": "... on background"}
CORNER = {"long_tailed": "long-tailed", "exponent": "prior"}


def corner_runs(name):
    """The runs with networks, without the lowest losses that need none."""
    return [run for run in load(name)["runs"] if "seed" in run]


def corner(*names):
    """A row per file and prior: what the winners know, and how the long-tailed feature moves it."""
    titles = {"corner": "heads on one encoder", "corner_any_order": "... prior in any order",
              "corner_joint": "`--joint`", "corner_joint_any_order": "... prior in any order"}
    rows = []
    for name in names:
        runs = corner_runs(name)
        summary = summarize(runs, key=lambda run: (run["long_tailed"], run["exponent"]))
        for exponent in sorted({run["exponent"] for run in runs}):
            arm = [run for run in runs if run["exponent"] == exponent]
            known = [f"{summary[which, exponent]['digit']['mean']:.2f} and "
                     f"{summary[which, exponent]['background']['mean']:.2f}"
                     for which in mnist_corner.LABELS]
            mean, half = interval(mnist_corner.interactions(runs, exponent))
            rows.append([titles.get(name), PRIORS[exponent], *known,
                         f"{mean:+.2f} ± {half:.2f}",
                         f"{sum(map(mnist_corner.fits_prior, arm))} of {len(arm)}",
                         str(sum(mnist_corner.fits_prior(run, 0.5) for run in arm))])
    header = ["run", "prior", "digits long-tailed: nats on digit and background",
              "backgrounds long-tailed", "difference (95% interval)", "winners that fit the prior",
              "by more than .5 nats"]
    if len(names) == 1:  # The column with the name would say nothing.
        header, rows = header[1:], [row[1:] for row in rows]
    return markdown(header, rows)


def corner_heads(name):
    columns = {"loss": "loss of the winner", **WINNER,
               "share_of_digit_heads": "heads that know more of the digit",
               "best_digit_loss": "best loss of these", "best_background_loss": "of the others"}
    return table_of(with_priors_named(corner_runs(name)), CORNER, columns, "interval")


def corner_bounds(name):
    """What the losses could be, without any network."""
    return markdown(
        ["views disagree", "prior", "by the long-tailed feature", "by the balanced feature",
         "by both"],
        [[f"{run['disagree']:.0%}", PRIORS[run["exponent"]],
          *(f"{loss:.3f}" for loss in run["results"].values())]
         for run in load(name)["runs"] if "disagree" in run])


def corner_neighbors(name):
    columns = {f"{whose}_{what}_{feature}": f"{title}, {feature}"
               for whose, what, title in (
                   ("winner", "encoder", "encoder of SimCLR"),
                   ("winner", "prediction", "winner's prediction"),
                   ("student", "encoder", "new network: encoder"),
                   ("student", "projection", "projection"), ("student", "prediction", "prediction"),
                   ("untrained", "encoder", "untrained encoder"))
               for feature in mnist_corner.LABELS}
    return table_of(with_priors_named(corner_runs(name)), CORNER, columns, "interval")


def rcdm(name):
    """A row per measure, and a column per prior."""
    summary = summarize(load(name)["runs"], key=lambda run: run["exponent"])
    measures = {
        "digit_of_samples": "samples with the most frequent digit of their prototype",
        "digit_by_chance": "... by chance",
        "digit_of_images": "... among the real images of the prototype",
        "digit_of_nearest": "... among the 100 of them that are nearest to it",
        "background_of_samples": "samples with the most frequent background of their prototype",
        "background_by_chance": "... by chance",
        "background_of_images": "... among the real images of the prototype",
        "background_of_nearest": "... among the 100 of them that are nearest to it",
        "faithfulness": "samples whose own nearest prototype is theirs"}
    return markdown(["", *(PRIORS[exponent] for exponent in summary)],
                    [[title, *(cell(row, measure) for row in summary.values())]
                     for measure, title in measures.items()])

LOSS_NAMES = {"random": "untrained encoder", "plain": "PMSN", "relative": "relative sharpening",
              "any_order": "any order", "Sinkhorn": "Sinkhorn",
              "both": "relative sharpening, Sinkhorn", "supervised": "supervised",
              "SimCLR": "encoder of SimCLR"}
ACCURACIES = {"balanced_probe": "probe, balanced labels",
              "balanced_knn": "k-NN, balanced labels", "probe": "probe"}
MEASURES = {"balanced_probe_head": "probe, balanced labels: head",
            "balanced_probe_middle": "middle", "balanced_probe_tail": "tail",
            "balanced_knn": "k-NN, balanced labels", "probe": "probe", "knn": "k-NN"}
PREDICTIONS = {"prior_kl": "KL to the prior", "effective_prototypes": "effective prototypes",
               "prototypes_per_view": "prototypes per view"}
WITH_GRATINGS = {"same_background": "same grating", **ACCURACIES, **PREDICTIONS}


def accuracies(name, columns, losses=("random", "plain", "supervised"), contrast=0.0):
    """A row per loss and prior, on long-tailed images."""
    return markdown(["", "prior", *columns.values()], rows_of(name, columns, losses, contrast))


def rows_of(name, columns, losses, contrast=0.0):
    runs, rows = load(name)["runs"], []
    which_prior.add_gains(runs)
    for run in runs:
        results = run["results"]
        if "prior_kl" in results:
            results["loss"] = results["cross_entropy"] + results["prior_kl"]
    for loss in losses:
        for exponent, row in by_exponent(runs, 1.0, contrast, loss):
            prior = prior_name(exponent)
            rows.append([LOSS_NAMES.get(loss, loss), prior,
                         *(cell(row, column) for column in columns)])
    return rows


def from_labels(from_random, name):
    """What is left of a start at the classes, beside the same training from random weights."""
    columns = {"balanced_probe": "probe, balanced labels", "gain_balanced_probe": "gain",
               "purity": "purity", "purity_tail": "its tail", "loss": "loss",
               "prior_kl": "KL to the prior", "effective_prototypes": "effective prototypes"}
    at_random = rows_of(from_random, columns, ("plain",))
    at_classes = rows_of(name, columns, ("supervised", "plain", "relative"))
    at_classes[0][0] = "before"
    return markdown(["start", "", "prior", *columns.values()],
                    [*(["random weights", *row] for row in at_random),
                     *(["labels", *row] for row in at_classes)])


def gains(lines, columns):
    """What priors gain over the uniform one with the same seed.

    A row per line, which has the exponent of the images, the loss, and the files of these runs. The
    files have the same number of prototypes and different seeds. A column is an exponent of the
    prior and what is measured: {(exponent, name in the file): name in the table}.
    """
    rows = []
    for data_exponent, loss, names in lines:
        files = [load(name) for name in names]
        prototypes, = {file["config"]["prototypes"] for file in files}
        runs = [run for file in files for run in file["runs"]]
        which_prior.add_gains(runs)
        of_exponents = dict(by_exponent(runs, data_exponent, 0.0, loss))
        row = ["long-tailed" if data_exponent else "balanced", str(prototypes), LOSS_NAMES[loss]]
        for exponent, name in columns:
            found = of_exponents.get(exponent, {})
            row.append(f"{cell(found, f'gain_{name}')} (n = {found['n']})" if found else "")
        rows.append(row)
    return markdown(["images", "prototypes", "loss", *columns.values()], rows)


def by_exponent(runs, data_exponent, contrast, loss):
    """(exponent of the prior, its row of `summarize`) for these images and this loss, in order.

    The uniform prior is one model for the losses plain, relative and any_order, and belongs to
    "plain" here.
    """
    kind = (data_exponent, contrast, loss)
    chosen = [run for run in runs
              if (run["data_exponent"], run["contrast"], run["loss"]) == kind
              and not (run["prior_exponent"] == 0 and loss in ("relative", "any_order"))]
    return sorted(summarize(chosen, key=lambda run: run["prior_exponent"]).items())

LONG_TAILED, BALANCED = [
    (exponent, "plain", ["photographs", "photographs_more", "photographs_more2"])
    for exponent in (1.0, 0.0)]
GAINS_OF_PHOTOGRAPHS = [
    (1.0, "plain", ["photographs_10"]),
    LONG_TAILED,
    (1.0, "plain", ["photographs_256"]),
    (1.0, "relative", ["photographs_losses"]),
    (1.0, "any_order", ["photographs_losses"]),
    BALANCED]


def glyphs(name):
    """A row per arm: accuracies, the gain over the uniform prior with the plain loss, the prior.

    The last gain is that of k-NN on long-tailed images minus that on balanced images.
    """
    runs, rows = load(name)["runs"], []
    columns = {"balanced_knn": "k-NN, balanced labels", "balanced_probe": "probe, balanced labels"}
    long_tailed, balanced = (
        [run for run in runs if run["data_exponent"] == exponent] for exponent in (1.0, 0.0))
    for title, of_data in (("long-tailed", long_tailed), ("balanced", balanced)):
        for exponent, loss in bounds_and_arms(of_data):
            row = row_of(of_data, exponent, loss)
            cells = [cell(row, column, "interval") for column in columns]
            if exponent is None:
                cells += 5 * [""]
            else:
                cells += [gain(of_data, "default", exponent, loss, column) for column in columns]
                cells.append(interaction(long_tailed, balanced, exponent, loss)
                             if of_data is long_tailed else "")
                cells += [used_prototypes(row), which_prior.met(row)]
            rows.append([title, LOSS_NAMES[loss], prior_name(exponent), *cells])
    return markdown(["images", "", "prior", *columns.values(), "gain of k-NN", "of the probe",
                     "gain of k-NN, minus that on balanced images", "effective prototypes",
                     "prior met"], rows)


def interaction(long_tailed, balanced, exponent, loss):
    """A cell: what an arm gains on long-tailed images minus what it gains on balanced images."""
    if (exponent, loss) == (0, "plain"):
        return ""
    pairs = zip(*(which_prior.gains_over_plain(runs, "default", exponent, loss)
                  for runs in (long_tailed, balanced)))
    return with_interval([a - b for a, b in pairs])


def glyphs_groups(name):
    """The gains of k-NN for head, middle and tail, and what the prototypes tell of the class."""
    runs = [run for run in load(name)["runs"] if run["data_exponent"] == 1]
    names = [f"{kind}_{group}" for kind in ("balanced_knn", "knn")
             for group in ("head", "middle", "tail")]
    rows = [[LOSS_NAMES[loss], prior_name(exponent),
             *(gain(runs, "default", exponent, loss, column) for column in names),
             cell(row_of(runs, exponent, loss), "class_information", "interval")]
            for exponent, loss in which_prior.arms_of(runs)]
    return markdown(["", "prior", "k-NN, balanced labels: head", "middle", "tail", "k-NN: head",
                     "middle", "tail", "information on the class (nats)"], rows)


def glyphs_with_backgrounds(name):
    """What is known of the class and of a second glyph that competes with it."""
    runs = load(name)["runs"]
    columns = {"balanced_knn": "k-NN, class", "balanced_probe": "probe, class",
               "background_knn": "k-NN, second glyph",
               "class_information": "information on the class (nats)",
               "background_information": "on the second glyph"}
    rows = []
    for exponent, loss in bounds_and_arms(runs):
        row = row_of(runs, exponent, loss)
        rows.append([LOSS_NAMES[loss], prior_name(exponent),
                     *(cell(row, column, "interval") for column in columns),
                     "" if exponent is None else gain(runs, "default", exponent, loss,
                                                      "balanced_knn"), which_prior.met(row)])
    return markdown(["", "prior", *columns.values(), "gain of k-NN, class", "prior met"], rows)


def prior_name(exponent):
    return {None: "", 0.0: "uniform"}.get(exponent, f"exponent {exponent}")


def bounds_and_arms(runs):
    """The arms of `which_prior.arms_of`, between the untrained and the supervised encoder."""
    return [(None, "random"), *which_prior.arms_of(runs), (None, "supervised")]


def used_prototypes(row):
    """A cell: the effective prototypes of all images, and those of the prior."""
    return (f"{row['prototypes_of_all_images']['mean']:.1f} of "
            f"{row['prototypes_of_prior']['mean']:.1f}")


def row_of(runs, exponent, loss):
    """The row of `summarize` of one arm."""
    chosen = [run for run in runs if (run["prior_exponent"], run["loss"]) == (exponent, loss)]
    row, = summarize(chosen, key=lambda run: None).values()
    return row


def gain(runs, setting, exponent, loss, name):
    """A cell: the gain over the uniform prior with the plain loss, and its 95% interval."""
    if (exponent, loss) == (0, "plain"):
        return ""
    return with_interval(which_prior.gains_over_plain(runs, setting, exponent, loss, name))


def with_interval(values):
    mean, half = interval(values)
    return f"{mean:+.3f}" + ("" if half != half else f" ± {half:.3f}")  # NaN: one value


def settings(name):
    """A row per setting: accuracies of k-NN, gains of exponent .25, and whether priors are met."""
    everything, rows = load(name)["runs"], []
    for setting in dict.fromkeys(run["setting"] for run in everything):
        runs = [run for run in everything if run["setting"] == setting]
        of_arm = {arm: which_prior.gains_over_plain(runs, setting, 0.25, arm, "balanced_knn")
                  for arm in ("plain", "relative")}
        uniform, *others = (row_of(runs, exponent, loss) for exponent, loss in (
            (0.0, "plain"), (0.25, "plain"), (0.25, "relative")))
        shares = [row["prototypes_of_all_images"]["mean"] / row["prototypes_of_prior"]["mean"]
                  for row in (uniform, *others)]
        rows.append([
            setting, *(cell(row_of(runs, None, loss), "balanced_knn") for loss in (
                "random", "supervised")),
            cell(uniform, "balanced_knn", "interval"), *map(with_interval, of_arm.values()),
            with_interval([b - a for a, b in zip(*of_arm.values())]),
            *(f"{share:.2f}" for share in shares), f"{uniform['prototypes_per_view']['mean']:.1f}"])
    return markdown(["setting", "untrained", "supervised", "uniform prior", "gain of .25, plain",
                     "gain of .25, relative", "relative minus plain",
                     "share of the prior's effective prototypes: uniform", ".25, plain",
                     ".25, relative", "prototypes per view (uniform)"], rows)


def feature_runs(name):
    return [run for run in load(name)["runs"] if "seed" in run]


def features(name):
    """What the winners know, and how far the power law moves them on both kinds of data."""
    runs, rows = feature_runs(name), []
    columns = ("class", "background", "difference", "class_knn", "background_knn")
    for data_exponent, title in which_feature.DATA_EXPONENTS.items():
        of_data = [run for run in runs if run["data_exponent"] == data_exponent]
        for exponent, loss in [(None, "SimCLR"), *which_feature.ARMS]:
            row = row_of(of_data, exponent, loss)
            known = [run["results"] for run in of_data
                     if (run["prior_exponent"], run["loss"]) == (exponent, loss)]
            more = sum(results["class"] > results["background"] for results in known
                       if "class" in results)
            cells = [cell(row, column, "interval") for column in columns]
            cells += ["", ""] if exponent is None else [f"{more} of {len(known)}",
                                                        used_prototypes(row)]
            rows.append([title, LOSS_NAMES[loss], prior_name(exponent), *cells])
    for loss in ("plain", "relative"):
        of_data = {column: which_feature.gains(runs, column, loss) for column in columns}
        gained = [{column: per_seed[data] for column, per_seed in of_data.items()}
                  for data in which_feature.DATA_EXPONENTS]
        for title, kind in zip(("long-tailed", "balanced"), gained):
            rows.append([f"gain of exponent {which_feature.EXPONENT}, {title}",
                         LOSS_NAMES[loss], "",
                         *(with_interval(kind[column]) for column in columns), "", ""])
        rows.append(["difference of these gains", LOSS_NAMES[loss], "",
                     *(with_interval([a - b for a, b in zip(*(kind[column] for kind in gained))])
                       for column in columns), "", ""])
    return markdown(["data", "", "prior", "information on class (nats)", "on background",
                     "difference",
                     "k-NN, class", "k-NN, background", "winners that know more of the class",
                     "effective prototypes"], rows)


def feature_losses(name):
    """The lowest losses without a network, and of the best heads of both kinds."""
    rows = []
    for row in load(name)["runs"]:
        if "seed" not in row:
            kind = row["data_exponent"], row["prior_exponent"]
            heads = row_of([run for run in feature_runs(name)
                            if run["data_exponent"] == kind[0]], kind[1], "plain")
            rows.append([which_feature.DATA_EXPONENTS[kind[0]],
                         prior_name(kind[1]),
                         *(f"{row['results'][feature]:.3f}" for feature in which_feature.FEATURES),
                         *(cell(heads, column, "interval") for column in (
                             "best_class_loss", "best_background_loss", "share_of_class_heads"))])
    return markdown(["data", "prior", "groups by class, no network", "by background, no network",
                     "best head that knows more of the class", "of the background",
                     "heads that know more of the class"], rows)


def files_of(lines):
    return sorted({name for *_, names in lines for name in names})


def imbalanced(names, methods):
    """A row per method: its accuracy with all classes, and what it loses with few, in each arm.

    All but the class is of the first arm with the fewest classes. A loss compares runs of the same
    file, because another file can have other settings. So a method must be in one of them only.
    """
    runs = []
    for name in names:
        found = [run for run in load(name)["runs"] if run["lr_scale"] in (None, 1)]
        imbalance.add_losses(found)
        runs += [run for run in found if run["method"] in methods]
    measured = imbalance.class_measure(runs)
    summary = summarize(runs, key=lambda run: tuple(
        run[key] for key in ("method", "arm", "classes_per_batch")))
    arms = [(arm, count) for arm in imbalance.ARMS for count in sorted(
        {count for _, found, count in summary if found == arm}, reverse=True)]
    fewest = min(count for _, count in arms)
    main = next((arm, count) for arm, count in arms if count == fewest)
    others = list(dict.fromkeys(name for run in runs for name in run["results"]
                                if name.startswith("lost_") and name != f"lost_{measured}"))
    rows = []
    for method in methods:
        row = summary.get((method, "all", None)) or summary[method, None, None]
        rows.append([method, cell(row, measured, "interval"),
                     *(cell(summary.get((method, *arm), {}), f"lost_{measured}", "interval")
                       for arm in arms),
                     *(cell(summary.get((method, *main), {}), name, "interval")
                       for name in others)])
    titles = {"lost_share": "share of what was learned"}
    return markdown(["", "class", *(f"lost, {imbalance.ARMS[arm]}: {count}" for arm, count in arms),
                     *(titles.get(name, name.removeprefix("lost_").replace("_knn", ", k-NN")
                                  .replace("_probe", "")) for name in others)], rows)

FLOORS = ["random convolutions", "random ViT", "raw pixels"]

# Each table is a function of the names of its files, and these names.
TABLES = {
    "kmeans": (kmeans, ["kmeans"]),
    "kmeans_shares": (kmeans_shares, ["kmeans"]),
    "corner": (corner, ["corner"]),
    "corner_variants": (corner, ["corner", "corner_any_order", "corner_joint",
                                 "corner_joint_any_order"]),
    "corner_bounds": (corner_bounds, ["corner"]),
    "corner_heads": (corner_heads, ["corner"]),
    "corner_neighbors": (corner_neighbors, ["corner"]),
    "corner_mnist": (corner, ["corner_mnist"]),
    "rcdm": (rcdm, ["rcdm"]),
    "photographs": (
        lambda name: accuracies(name, {**ACCURACIES, **PREDICTIONS}), ["photographs"]),
    "photographs_gains": (
        lambda *_: gains(GAINS_OF_PHOTOGRAPHS, {(exponent, "balanced_probe"): f"exponent {exponent}"
                                                for exponent in (0.1, 0.25, 0.5, 1.0)}),
        files_of(GAINS_OF_PHOTOGRAPHS)),
    "photographs_quarter": (
        lambda *_: gains([LONG_TAILED, BALANCED],
                         {(0.25, name): title for name, title in MEASURES.items()}),
        files_of([LONG_TAILED, BALANCED])),
    "photographs_from_labels": (from_labels, ["photographs_10", "photographs_from_labels"]),
    "photographs_gratings": (
        lambda name: accuracies(name, WITH_GRATINGS, ("random", "plain", "any_order", "supervised"),
                                contrast=0.3),
        ["photographs_gratings"]),
    "settings": (settings, ["settings"]),
    "glyphs": (glyphs, ["glyphs"]),
    "glyphs_groups": (glyphs_groups, ["glyphs"]),
    "glyphs_two": (glyphs_with_backgrounds, ["glyphs_two"]),
    "which_feature": (features, ["which_feature"]),
    "which_feature_losses": (feature_losses, ["which_feature"]),
    "imbalance_glyphs": (
        lambda *names: imbalanced(names, ["SimCLR", "VICReg", "SwAV", "MSN", FLOORS[0], FLOORS[2]]),
        ["imbalance_glyphs"]),
    "imbalance_cifar10": (
        lambda *names: imbalanced(names, ["SimCLR", "VICReg", "SwAV", "MSN", "MAE", *FLOORS]),
        ["imbalance_cifar10"]),
    "imbalance_more": (
        lambda *names: imbalanced(names, ["SimCLR", "SimCLR-GroupNorm", "MSN", "MSN-5", "PMSN"]),
        ["imbalance_cifar10", "imbalance_more"]),
    "imbalance_accumulated": (
        lambda *names: imbalanced(names, ["SimCLR", "SimCLR-GroupNorm", "VICReg"]),
        ["imbalance_accumulated"]),
}


def about(name):
    """What a file was made with: seeds, command, commit, machine and time."""
    content = load(name)
    maker, runs = content["made_by"][-1], content.get("runs", [])
    commits = ", ".join(dict.fromkeys(maker["commit"] for maker in content["made_by"]))
    seeds = sorted({run["seed"] for run in runs if "seed" in run})
    jobs = {str(run["job"]): run["job_seconds"] for run in runs if "job" in run}
    seconds = sum(jobs.values()) if jobs else content["seconds"]
    time = f"{seconds / 60:.0f} minutes" if jobs and seconds >= 100 else f"{seconds} s"
    time += " of one core" if jobs else ""
    command = re.sub(r" --(out|workers) \S+", "", maker["command"])
    return ((f"n = {len(seeds)} seeds ({', '.join(map(str, seeds))}). " if seeds else "")
            + f"`{command}`, commit {commits}, {maker['machine']}, torch {maker['torch']}, {time}.")


def with_tables(text):
    """The text of a README with all of its tables written again."""
    seen = set()

    def write(match):
        table, names = TABLES[match[1]]
        sources = [about(name) for name in names if name not in seen]
        if seen & set(names):
            sources.append("(With results of a table above.)")
        seen.update(names)
        lines = "\n\n".join([table(*names), *sources])
        return f"<!-- table: {match[1]} -->\n{lines}\n<!-- end -->"

    return re.sub("<!-- table: (\\w+) -->.*?<!-- end -->", write, text, flags=re.DOTALL)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("name", nargs="?", help="of a file of results, without .json")
    parser.add_argument("run", nargs="?", type=Path, help="folder of a run, from which to take it")
    args = parser.parse_args(argv)
    if args.name:
        if args.run is None or len(list(args.run.glob("*.json"))) != 1:
            parser.error(f"{args.name} must be followed by a folder with one file of results")
        take(args.name, args.run)
    for readme in READMES:
        readme.write_text(with_tables(readme.read_text()))


if __name__ == "__main__":
    main()
