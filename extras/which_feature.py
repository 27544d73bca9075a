"""Which feature does each prior prefer, with more classes than prototypes? Section 5.2.

On long-tailed iNat18 the paper finds better features with a power-law prior than with the uniform
one, and on balanced ImageNet worse ones. Its reason: the uniform prior prefers a balanced feature
to long-tailed classes. Here an image shows two glyphs. The first one is its class, of 64 that are
long-tailed (frequencies k^-1.25, as in mnist_corner.py) or balanced. The second one competes: 8
backgrounds, always balanced.
There are 8 prototypes. So either the backgrounds have one each, or 64 classes share them. (iNat18
has eight classes per prototype, too.)

What should happen? With long-tailed classes, groups of classes have the shares of a power law, and
the head class alone is too large for an equal share, so the prior should decide. With balanced
classes the uniform prior is met by both features. The power law still fits groups of classes
better, because 64 small classes can form groups of any sizes, and 8 backgrounds cannot. But then it
has nothing to gain. A search without a network gives the lowest losses of groups by one feature.

    python extras/which_feature.py              # four priors, four minutes
    python extras/which_feature.py --quick      # every step with too little training, ten seconds

One training from random weights often misses the minimum of its loss (mnist_corner.py --joint). To
see what a loss prefers, we search as in the corner experiment (support/heads.py):

1. An encoder learns from the images by SimCLR, without labels. (Its k-NN accuracy shows that it
   holds both glyphs. SimCLR has a hidden uniform prior, too.)
2. For each prior, 64 heads with prototypes of their own learn on this encoder by the loss of PMSN.
   The head with the lowest loss wins. What do its prototypes tell about class and background? And
   which of the two does k-NN find in its embeddings, with balanced labels?

Information is at most the entropy of the prototypes, which is 2.08 nats under the uniform prior and
1.67 under exponent 1.25, if they are met. So the difference between class and background tells more
than one of them. The exponent 1.25 also gets relative sharpening (pmsn.sharpen_relative), because
with a steep prior the paper's sharpening favors the largest shares. Settings were chosen with other
seeds, but for the exponent of the classes (extras/README.md).

--out gets which_feature.json and which_feature.png.
"""

import itertools
import math
import sys
from pathlib import Path

import torch

# The other scripts are in the folder above, and are not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pmsn
from support.evaluation import effective_prototypes, knn_predictions
from support.figures import Figure, write_figure
from support.glyphs import DISAGREE, GlyphImages
from support.heads import (Heads, cache_views, find_grouping, judge, train_encoder, train_heads,
                           two_cached_views, two_views_of)
from support.results import cell, interval, number_of_seeds, run_or_continue, summarize
from support.runs import Distinct, Parser, available_cores, command, folder, number, say

CLASSES, BACKGROUNDS, PROTOTYPES = 64, 8, 8
EXPONENT = 1.25  # of the long-tailed classes, and of the steepest prior
DATA_EXPONENTS = {EXPONENT: "long-tailed classes", 0.0: "balanced classes"}
PRIOR_EXPONENTS = (0.0, 0.25, 0.5, EXPONENT)
LOSSES = {"plain": {}, "relative": {"relative_sharpening": True}}
ARMS = [*((exponent, "plain") for exponent in PRIOR_EXPONENTS), (EXPONENT, "relative")]
FEATURES = {"class": "#3d9e4d", "background": "#3063bf"}  # and their colors in the figure
DIM = 8  # of the embeddings
# The epochs are those of the two steps.
SETTINGS = {"deform": 0.15, "images": 15360, "epochs": (4, 36), "heads": 64}
QUICK = {"deform": 0.15, "images": 2560, "epochs": (2, 3), "heads": 8}
KIND = ("data_exponent", "prior_exponent", "loss")  # what runs of different seeds have in common
COLUMNS = {"loss": "loss", "class": "on class (nats)", "background": "on background",
           "prototypes_of_all_images": "eff. prototypes", "share_of_class_heads": "class heads",
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
    """One seed, with all priors."""
    torch.manual_seed(seed)
    settings = QUICK if args.quick else SETTINGS
    count, (encoder_epochs, head_epochs) = settings["images"], settings["epochs"]
    data, test, balanced = [
        GlyphImages(["DejaVuSans"], CLASSES, exponent, 1.0, images, BACKGROUNDS, settings["deform"])
        for exponent, images in ((data_exponent, count), (0.0, 4000), (0.0, count))]
    title = f"{seed:>4}{data_exponent:>6.2f}"

    # Steps 1 and 2: an encoder, and many heads for each prior.
    encoder = train_encoder(data.views, count, encoder_epochs, f"{title}  encoder")
    views = cache_views(encoder, data.views, count)
    models = []
    for exponent, loss in ARMS:
        torch.manual_seed(seed)  # All arms get the same weights.
        prior = pmsn.power_law_prior(PROTOTYPES, exponent)
        models.append(Heads(torch.nn.Identity(), prior, settings["heads"], DIM, **LOSSES[loss]))
    losses = train_heads(models, two_cached_views(views), head_epochs, count, f"{title}    heads")

    # What the heads know of new views of these images, which show their own glyphs.
    torch.manual_seed(seed)
    encoder.eval()
    features, test_features, balanced_features = (
        torch.cat([encoder(part) for part in images.all_views().split(1000)])
        for images in (data, test, balanced))
    labels = {"class": data.labels, "background": data.backgrounds}
    known = neighbors(test_features, balanced_features, test, balanced)
    runs = [{"prior_exponent": None, "loss": "SimCLR", "results": known}]
    for model, losses_of_heads, (exponent, loss) in zip(models, losses, ARMS):
        heads = judge(model, losses_of_heads, features, labels)
        best = int(losses_of_heads.argmin())
        head, prototypes = model.head(best), model.prototypes[best].detach()
        p = pmsn.log_predictions(head(features), prototypes, temperature=0.1).exp()
        known = neighbors(head(test_features), head(balanced_features), test, balanced)
        results = {**sum_up(heads), **known,
                   "prototypes_of_all_images": effective_prototypes(p.mean(dim=0)),
                   "prototypes_of_prior": effective_prototypes(model.prior)}
        runs.append({"prior_exponent": exponent, "loss": loss, "results": results})
    return [{"seed": seed, "data_exponent": data_exponent, **run} for run in runs]


def neighbors(test_features, bank_features, test, bank):
    """Accuracies of k-NN on features of test images, which knows the labels of the bank."""
    pairs = {"class": (bank.labels, test.labels),
             "background": (bank.backgrounds, test.backgrounds)}
    return {f"{name}_knn": (knn_predictions(bank_features, known, test_features) == wanted)
            .double().mean().item() for name, (known, wanted) in pairs.items()}


def sum_up(heads):
    """What the winner knows, and how many heads know more of the class, and their best loss."""
    winner = min(heads, key=lambda head: head["loss"])
    class_heads = [head["loss"] for head in heads if head["class"] > head["background"]]
    others = [head["loss"] for head in heads if head["class"] <= head["background"]]
    return {**winner, "difference": winner["class"] - winner["background"],
            "share_of_class_heads": len(class_heads) / len(heads),
            "best_class_loss": min(class_heads, default=math.nan),
            "best_background_loss": min(others, default=math.nan)}


def gains(runs, name, loss="plain"):
    """What the power law gains over the uniform prior, per seed: {exponent of the data: [gains]}.

    It is the one with the exponent 1.25.
    """
    values = {(run["data_exponent"], run["prior_exponent"], run["loss"], run["seed"]):
              run["results"][name] for run in runs if run["prior_exponent"] is not None}
    seeds = sorted({run["seed"] for run in runs})
    return {data: [values[data, EXPONENT, loss, seed] - values[data, 0.0, "plain", seed]
                   for seed in seeds] for data in DATA_EXPONENTS}


# ---- Figure --------------------------------------------------------------------------------------
def plot(runs, references):
    """Above, what the prototypes of the winners know, small for each seed and large on average.

    Below, the lowest losses of heads that know more of the class and of the others.
    """
    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for (above, below), (data_exponent, title) in zip(axes.T, DATA_EXPONENTS.items()):
        for feature, color in FEATURES.items():
            for loss, mark, fill, shift in (("plain", "o", color, 0.0),
                                            ("relative", "D", "white", 0.04)):
                arms = [exponent + shift for exponent, name in ARMS if name == loss]
                for seed in sorted({run["seed"] for run in runs}):
                    values, _ = series([run for run in runs if run["seed"] == seed],
                                       data_exponent, loss, feature)
                    above.plot(arms, values, mark, color=color, markerfacecolor=fill, alpha=0.4,
                               markersize=4)
                means, _ = series(runs, data_exponent, loss, feature)
                above.plot(arms, means, mark + "-", color=color, markerfacecolor=fill,
                           markersize=9,
                           label=feature + (", relative sharpening" if loss == "relative" else ""))
            means, halves = series(runs, data_exponent, "plain", f"best_{feature}_loss")
            below.errorbar(PRIOR_EXPONENTS, means, halves, fmt="o-", color=color, capsize=4,
                           label=f"best head that knows more of the {feature}")
            lowest = [row["results"][feature] for row in references
                      if row["data_exponent"] == data_exponent]
            below.plot(PRIOR_EXPONENTS, lowest, ":", color=color,
                       label=f"groups by the {feature} alone, without a network")
        above.set_title(title)
        below.set_xlabel("exponent of the prior (0: uniform)")
    axes[0, 0].set_ylabel("information of the winner's\nprototypes (nats)")
    axes[1, 0].set_ylabel("loss (nats)")
    axes[0, 0].set_ylim(-0.1, 2.8)  # room for the legend
    axes[0, 1].legend(fontsize="small", loc="upper center", ncols=2)
    axes[1, 0].legend(fontsize="small")
    moves = [interval(values) for values in gains(runs, "difference").values()]
    moves = ", ".join(f"{mean:+.1f} ± {half:.1f} nats with {title}"
                      for (mean, half), title in zip(moves, DATA_EXPONENTS.values()))
    figure.suptitle(
        f"Exponent {EXPONENT:g} moves the winner from the background to the class by\n{moves}\n"
        "(information on the class minus on the background, against the uniform prior; "
        f"n = {len({run['seed'] for run in runs})} seeds, 95% intervals)")
    return figure


def series(runs, data_exponent, loss, name):
    """Means of a result and halves of their intervals, for the priors of the arms with this loss.

    A seed without this result, for example without a head that knows more of the class, is left
    out.
    """
    found = []
    for kind in [(data_exponent, *arm) for arm in ARMS if arm[1] == loss]:
        of_kind = [run["results"] for run in runs if tuple(run[key] for key in KIND) == kind]
        values = [results[name] for results in of_kind if name in results]
        found.append(interval(values) if values else (math.nan, math.nan))
    return zip(*found)


# ---- Command line --------------------------------------------------------------------------------
@command
def main(argv=None):
    parser = Parser("Which feature does each prior prefer, with more classes than prototypes?")
    add = parser.add_argument
    add("--out", type=folder, default="runs/which_feature", help="folder for results and figure")
    add("--seeds", type=number(int, 0, 2_000_000_000), nargs="+", action=Distinct, default=[0],
        help="one run each")
    add("--workers", type=number(int, 1, 1000), default=available_cores(), help="processes")
    add("--quick", action="store_true", help="fewer images, epochs and heads, in ten seconds")
    args = parser.parse_args(argv)
    config = {"quick": args.quick, **(QUICK if args.quick else SETTINGS)}
    jobs = [("lowest_losses", data_exponent) for data_exponent in DATA_EXPONENTS]
    jobs += [("networks", *job) for job in itertools.product(args.seeds, DATA_EXPONENTS)]
    say("Lowest loss in an epoch. Heads: " + ", ".join(
        f"exponent {exponent:g} {loss}" for exponent, loss in ARMS) + "\n"
        "seed  data     part epoch   left   losses")
    found = run_or_continue(experiment, jobs, args, config, args.out / "which_feature.json")
    runs = [run for run in found if "seed" in run]
    references = [run for run in found if "seed" not in run]

    say("\nThe lowest losses that we find without a network\n data prior     class  background")
    for row in references:
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
    write_figure(args.out / "which_feature.png", plot, runs, references)
    say(f"which_feature.json and which_feature.png are in {args.out}")


if __name__ == "__main__":
    main()
