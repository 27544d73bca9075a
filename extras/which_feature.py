"""Which feature does each prior prefer, with more classes than prototypes? Section 5.2.

On long-tailed iNat18 the paper finds better features with a power-law prior than with the uniform
one, and on balanced ImageNet worse ones. Its reason: the uniform prior prefers a balanced feature
to long-tailed classes. Here an image shows two glyphs. The first one is its class, of 64 that are
long-tailed (frequencies 1/k) or balanced. The second one competes: 16 backgrounds, always balanced.
There are 16 prototypes, so either the backgrounds have one each, or classes share them.

    python extras/which_feature.py              # four priors, two losses, five minutes
    python extras/which_feature.py --quick      # every step with too little training, 20 seconds

One training from random weights often misses the minimum of its loss (mnist_corner.py --joint). To
see what a loss prefers, we search as in the corner experiment (support/heads.py):

1. An encoder learns from the images by SimCLR, without labels, until it holds both glyphs.
2. For each prior and loss, 96 heads with prototypes of their own learn on this encoder. The one
   with the lowest loss wins. What do its prototypes tell about the class and about the background?
3. The winner teaches a new network from random weights, by the same loss. k-NN on its features
   finds the class of test images, and the background.

Before this, a search without a network gives the lowest losses of groups by one of the two.
Settings were chosen with seeds from 100 on. --out gets which_feature.json and which_feature.png.
"""

import itertools
import math
import sys
from pathlib import Path

import torch

# The other scripts are in the folder above, and are not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pmsn
from support.drawings import SIZE, make_encoder
from support.evaluation import knn_predictions
from support.figures import Figure, write_figure
from support.glyphs import DISAGREE, GlyphImages
from support.heads import (Heads, cache_views, find_grouping, judge, make_student, teach,
                           train_encoder, train_heads, two_cached_views, two_views_of)
from support.results import cell, interval, number_of_seeds, run_or_continue, summarize
from support.runs import Distinct, Parser, available_cores, command, folder, number, say

CLASSES, BACKGROUNDS, PROTOTYPES = 64, 16, 16
DATA_EXPONENTS = {1.0: "long-tailed classes", 0.0: "balanced classes"}
PRIOR_EXPONENTS = (0.0, 0.25, 0.5, 1.0)
LOSSES = {"plain": {}, "relative": {"relative_sharpening": True}}
FEATURES = {"class": "#3d9e4d", "background": "#3063bf"}  # and their colors in the figure
DIM = 16  # of the embeddings
SETTINGS = {"deform": 0.15, "images": 15360, "epochs": (4, 12, 4), "heads": 96}
QUICK = {"deform": 0.15, "images": 2560, "epochs": (1, 2, 1), "heads": 8}
KIND = ("data_exponent", "prior_exponent", "loss")  # what runs of different seeds have in common
COLUMNS = {"loss": "loss", "class": "on class (nats)", "background": "on background",
           "effective_prototypes": "eff. prototypes", "share_of_class_heads": "class heads",
           "best_class_loss": "loss, class heads", "best_background_loss": "loss, others",
           "class_knn": "k-NN, class", "background_knn": "k-NN, background"}


# ---- One experiment ------------------------------------------------------------------------------
def experiment(part, *arguments):
    """One job: ("networks", seed, data_exponent) or ("lowest_losses", data_exponent)."""
    torch.set_num_threads(1)  # faster here, and the same bits for any number of processes
    return {"networks": networks, "lowest_losses": lowest_losses}[part](*arguments)


def lowest_losses(data_exponent, args):
    """The lowest losses that we find without a network, for groups by one of the two features."""
    shares = {"class": pmsn.power_law_prior(CLASSES, data_exponent),
              "background": pmsn.power_law_prior(BACKGROUNDS, 0.0)}
    return [{"data_exponent": data_exponent, "prior_exponent": exponent, "results": {
                 name: find_grouping(two_views_of(share, DISAGREE),
                                     pmsn.power_law_prior(PROTOTYPES, exponent))
                 for name, share in shares.items()}}
            for exponent in PRIOR_EXPONENTS]


def networks(seed, data_exponent, args):
    """One seed, with all priors and losses."""
    torch.manual_seed(seed)
    settings = QUICK if args.quick else SETTINGS
    count, (encoder_epochs, head_epochs, student_epochs) = settings["images"], settings["epochs"]
    data, test, balanced = [
        GlyphImages(["DejaVuSans"], CLASSES, exponent, 1.0, images, BACKGROUNDS, settings["deform"])
        for exponent, images in ((data_exponent, count), (0.0, 4000), (0.0, count))]
    title = f"{seed:>4}{data_exponent:>6.1f}"

    # Steps 1 and 2: an encoder, and many heads for each prior and loss.
    encoder = train_encoder(data.views, count, encoder_epochs, f"{title}  encoder")
    views = cache_views(encoder, data.views, count)
    kinds = [(exponent, loss) for exponent, loss in itertools.product(PRIOR_EXPONENTS, LOSSES)
             if exponent or loss == "plain"]  # Under the uniform prior both losses are the same.
    priors = {exponent: pmsn.power_law_prior(PROTOTYPES, exponent) for exponent in PRIOR_EXPONENTS}
    models = []
    for exponent, loss in kinds:
        torch.manual_seed(seed)  # All priors and losses get the same weights.
        models.append(Heads(torch.nn.Identity(), priors[exponent], settings["heads"], DIM,
                            **LOSSES[loss]))
    losses = train_heads(models, two_cached_views(views), head_epochs, count, f"{title}    heads")

    # What the heads know of new images of the same kind, which show their own glyphs.
    torch.manual_seed(seed)
    images = [images.all_views() for images in (data, test, balanced)]
    labels = {"class": data.labels, "background": data.backgrounds}
    runs, students = [], []
    for model, losses_of_heads, (exponent, loss) in zip(models, losses, kinds):
        model.target[0] = encoder  # From here on, the target network takes images.
        heads = judge(model, losses_of_heads, images[0], labels)
        best = int(losses_of_heads.argmin())
        winner = encoder, model.head(best), model.prototypes[best].detach()
        runs.append({"seed": seed, "data_exponent": data_exponent, "prior_exponent": exponent,
                     "loss": loss, "results": sum_up(heads) | {
                         "effective_prototypes": effective_prototypes(winner, images[0])}})
        torch.manual_seed(seed)
        students.append(make_student(*winner, priors[exponent]))

    # Step 3: each winner teaches a new network by its own loss.
    for wanted, options in LOSSES.items():
        torch.manual_seed(seed)  # the same views for both losses
        teach([student for student, (_, loss) in zip(students, kinds) if loss == wanted],
              data.views, count, student_epochs, f"{title}  student", **options)
    sets = data, test, balanced
    for student, run in zip(students, runs):
        run["results"] |= neighbors(student.encoder, sets, images)
    torch.manual_seed(seed)
    for name, network in (("untrained", make_encoder(SIZE)), ("SimCLR", encoder)):
        runs.append({"seed": seed, "data_exponent": data_exponent, "prior_exponent": None,
                     "loss": name, "results": neighbors(network, sets, images)})
    return runs


def sum_up(heads):
    """What the winner knows, and how many heads know more of the class, and their best loss."""
    winner = min(heads, key=lambda head: head["loss"])
    class_heads = [head["loss"] for head in heads if head["class"] > head["background"]]
    others = [head["loss"] for head in heads if head["class"] <= head["background"]]
    return {**winner, "difference": winner["class"] - winner["background"],
            "share_of_class_heads": len(class_heads) / len(heads),
            "best_class_loss": min(class_heads, default=math.nan),
            "best_background_loss": min(others, default=math.nan)}


@torch.no_grad()
def effective_prototypes(winner, images):
    """exp of the entropy of the mean prediction. It should be near that of the prior."""
    encoder, head, prototypes = winner
    p = pmsn.log_predictions(head(encoder(images)), prototypes, temperature=0.1).exp()
    return torch.special.entr(p.mean(dim=0)).sum().exp().item()


@torch.no_grad()
def neighbors(encoder, sets, images):
    """Accuracies of k-NN on features, which knows long-tailed labels ("knn") or balanced ones."""
    data, test, balanced = sets
    features, test_features, balanced_features = (
        torch.cat([encoder.eval()(part) for part in x.split(1000)]) for x in images)

    def accuracy(bank, labels, test_labels):
        return (knn_predictions(bank, labels, test_features) == test_labels).double().mean().item()

    return {"class_knn": accuracy(balanced_features, balanced.labels, test.labels),
            "class_knn_long_tailed": accuracy(features, data.labels, test.labels),
            "background_knn": accuracy(balanced_features, balanced.backgrounds, test.backgrounds)}


def gains(runs, name, loss="plain"):
    """What exponent 1 gains over the uniform prior, per seed: {exponent of the data: [gains]}."""
    values = {(run["data_exponent"], run["prior_exponent"], run["loss"], run["seed"]):
              run["results"][name] for run in runs if run["prior_exponent"] is not None}
    seeds = sorted({run["seed"] for run in runs})
    return {data: [values[data, 1.0, loss, seed] - values[data, 0.0, "plain", seed]
                   for seed in seeds] for data in DATA_EXPONENTS}


# ---- Figure --------------------------------------------------------------------------------------
def plot(runs):
    """Information of the winners above, k-NN on the new networks below, over the prior."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for column, (data_exponent, title) in zip(axes.T, DATA_EXPONENTS.items()):
        for ax, ending in zip(column, ("", "_knn")):
            for feature, color in FEATURES.items():
                for loss, style in (("plain", "o-"), ("relative", "s--")):
                    # Under the uniform prior both losses are the same.
                    kinds = [(data_exponent, exponent, loss if exponent else "plain")
                             for exponent in PRIOR_EXPONENTS]
                    means, halves = zip(*(interval([
                        run["results"][feature + ending] for run in runs
                        if tuple(run[name] for name in KIND) == kind]) for kind in kinds))
                    sharpening = "" if loss == "plain" else ", relative sharpening"
                    ax.errorbar(PRIOR_EXPONENTS, means, halves, fmt=style, color=color, capsize=4,
                                alpha=1 if loss == "plain" else 0.5, label=feature + sharpening)
        column[0].set_title(title)
        column[1].set_xlabel("exponent of the prior (0: uniform)")
    axes[0, 0].set_ylabel("information of the winner's\nprototypes (nats)")
    axes[1, 0].set_ylabel("k-NN on features of the\nnetwork that the winner taught")
    axes[0, 1].legend(fontsize="small")
    gain = gains(runs, "class")
    changes = ["more" if sum(gain[data]) > 0 else "less" for data in DATA_EXPONENTS]
    figure.suptitle(f"The power law knows {changes[0]} of long-tailed classes than the uniform "
                    f"prior, and {changes[1]} of balanced ones\n"
                    "(the winner of 96 heads for each prior, means and 95% intervals, "
                    f"n = {len({run['seed'] for run in runs})} seeds)")
    return figure


# ---- Command line --------------------------------------------------------------------------------
@command
def main(argv=None):
    parser = Parser("Which feature does each prior prefer, with more classes than prototypes?")
    add = parser.add_argument
    add("--out", type=folder, default="runs/which_feature", help="folder for results and figure")
    add("--seeds", type=number(int, 0, 2_000_000_000), nargs="+", action=Distinct, default=[0],
        help="one run each")
    add("--workers", type=number(int, 1, 1000), default=available_cores(), help="processes")
    add("--quick", action="store_true", help="fewer images, epochs and heads, in 20 seconds")
    args = parser.parse_args(argv)
    config = {"quick": args.quick, **(QUICK if args.quick else SETTINGS)}
    jobs = [("networks", *job) for job in itertools.product(args.seeds, DATA_EXPONENTS)]
    jobs += [("lowest_losses", data_exponent) for data_exponent in DATA_EXPONENTS]
    say("Lowest loss in an epoch. Heads: one number for each prior and loss\n"
        "seed  data     part epoch   left   losses")
    found = run_or_continue(experiment, jobs, args, config, args.out / "which_feature.json")
    runs = [run for run in found if "seed" in run]

    say("\nThe lowest losses that we find without a network\n data prior     class  background")
    for row in found:
        if "seed" not in row:
            losses = row["results"]
            say(f"{row['data_exponent']:>5.2f}{row['prior_exponent']:>6.2f}{losses['class']:>10.3f}"
                f"{losses['background']:>12.3f}")
    summary = summarize(runs, key=lambda run: tuple(run[name] for name in KIND))
    say(f"\nThe winners: mean ± 95% interval over n = {number_of_seeds(summary)} seeds\n"
        " data prior      loss" + "".join(f"{title:>18}" for title in COLUMNS.values()))
    for (data_exponent, exponent, loss), row in summary.items():
        exponent = "" if exponent is None else f"{exponent:.2f}"
        say(f"{data_exponent:>5.2f}{exponent:>6}{loss:>10}"
            + "".join(f"{cell(row, name, 'interval'):>18}" for name in COLUMNS))
    write_figure(args.out / "which_feature.png", plot, runs)
    say(f"which_feature.json and which_feature.png are in {args.out}")


if __name__ == "__main__":
    main()
