"""Which feature does each prior prefer, with more classes than prototypes? Section 5.2.

On long-tailed iNat18 the paper finds better features with a power-law prior than with the uniform
one, and on balanced ImageNet worse ones. Its reason: the uniform prior prefers a balanced feature
to long-tailed classes. Here an image shows two glyphs. The first one is its class, of 64 that are
long-tailed (frequencies 1/k) or balanced. The second one competes: 8 backgrounds, always balanced.
There are 8 prototypes. So either the backgrounds have one each, or 64 classes share them. (iNat18
has eight classes per prototype, too.)

    python extras/which_feature.py              # four priors, four minutes
    python extras/which_feature.py --quick      # every step with too little training, ten seconds

One training from random weights often misses the minimum of its loss (mnist_corner.py --joint). To
see what a loss prefers, we search as in the corner experiment (support/heads.py):

1. An encoder learns from the images by SimCLR, without labels, until it holds both glyphs.
2. For each prior, 64 heads with prototypes of their own learn on this encoder by the loss of PMSN.
   The head with the lowest loss wins. What do its prototypes tell about class and background? And
   which of the two do nearest neighbors of its embeddings share?

The power law of the classes also gets relative sharpening (pmsn.sharpen_relative), because with a
steep prior the paper's sharpening favors the largest shares. Before all this, a search without a
network gives the lowest losses of groups by one of the two features. Settings were chosen with
seeds from 100 on. --out gets which_feature.json and which_feature.png.
"""

import itertools
import math
import sys
from pathlib import Path

import torch

# The other scripts are in the folder above, and are not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pmsn
from support.evaluation import knn_predictions
from support.figures import Figure, write_figure
from support.glyphs import DISAGREE, GlyphImages
from support.heads import (Heads, cache_views, find_grouping, judge, train_encoder, train_heads,
                           two_cached_views, two_views_of)
from support.results import cell, interval, number_of_seeds, run_or_continue, summarize
from support.runs import Distinct, Parser, available_cores, command, folder, number, say

CLASSES, BACKGROUNDS, PROTOTYPES = 64, 8, 8
DATA_EXPONENTS = {1.0: "long-tailed classes", 0.0: "balanced classes"}
PRIOR_EXPONENTS = (0.0, 0.25, 0.5, 1.0)
LOSSES = {"plain": {}, "relative": {"relative_sharpening": True}}
ARMS = [*((exponent, "plain") for exponent in PRIOR_EXPONENTS), (1.0, "relative")]
FEATURES = {"class": "#3d9e4d", "background": "#3063bf"}  # and their colors in the figure
DIM = 8  # of the embeddings
# The epochs are those of the two steps.
SETTINGS = {"deform": 0.15, "images": 15360, "epochs": (4, 36), "heads": 64}
QUICK = {"deform": 0.15, "images": 2560, "epochs": (2, 3), "heads": 8}
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
    """One seed, with all priors."""
    torch.manual_seed(seed)
    settings = QUICK if args.quick else SETTINGS
    count, (encoder_epochs, head_epochs) = settings["images"], settings["epochs"]
    data, test, balanced = [
        GlyphImages(["DejaVuSans"], CLASSES, exponent, 1.0, images, BACKGROUNDS, settings["deform"])
        for exponent, images in ((data_exponent, count), (0.0, 4000), (0.0, count))]
    title = f"{seed:>4}{data_exponent:>6.1f}"

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
    sets = data, test, balanced
    with torch.no_grad():
        features, *others = [torch.cat([encoder.eval()(part) for part in x.all_views().split(1000)])
                             for x in sets]
    labels = {"class": data.labels, "background": data.backgrounds}
    runs = [{"prior_exponent": None, "loss": "SimCLR", "results": neighbors(*others, *sets[1:])}]
    for model, losses_of_heads, (exponent, loss) in zip(models, losses, ARMS):
        heads = judge(model, losses_of_heads, features, labels)
        best = int(losses_of_heads.argmin())
        head, prototypes = model.head(best), model.prototypes[best].detach()
        p = pmsn.log_predictions(head(features), prototypes, temperature=0.1).exp()
        results = {**sum_up(heads), **neighbors(*map(head, others), *sets[1:]),
                   "effective_prototypes": effective(p.mean(dim=0)),
                   "prior_prototypes": effective(model.prior)}
        runs.append({"prior_exponent": exponent, "loss": loss, "results": results})
    return [{"seed": seed, "data_exponent": data_exponent, **run} for run in runs]


def effective(shares):
    """The number of effective prototypes: exp of the entropy of these shares, (K,)."""
    return torch.special.entr(shares).sum().exp().item()


def neighbors(test_features, features, test, data):
    """Accuracies of k-NN on features of test images, which knows the labels of the other images."""
    pairs = {"class": (data.labels, test.labels),
             "background": (data.backgrounds, test.backgrounds)}
    return {f"{name}_knn": (knn_predictions(features, known, test_features) == wanted)
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
    """What exponent 1 gains over the uniform prior, per seed: {exponent of the data: [gains]}."""
    values = {(run["data_exponent"], run["prior_exponent"], run["loss"], run["seed"]):
              run["results"][name] for run in runs if run["prior_exponent"] is not None}
    seeds = sorted({run["seed"] for run in runs})
    return {data: [values[data, 1.0, loss, seed] - values[data, 0.0, "plain", seed]
                   for seed in seeds] for data in DATA_EXPONENTS}


# ---- Figure --------------------------------------------------------------------------------------
def plot(runs, references):
    """Above, what the prototypes of the winners know. Below, the lowest losses of both sides."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for (above, below), (data_exponent, title) in zip(axes.T, DATA_EXPONENTS.items()):
        for feature, color in FEATURES.items():
            def values(name, loss="plain"):
                return zip(*(interval([run["results"][name] for run in runs if tuple(
                    run[part] for part in KIND) == (data_exponent, exponent, loss)])
                    for exponent in PRIOR_EXPONENTS if (exponent, loss) in ARMS))

            means, halves = values(feature)
            above.errorbar(PRIOR_EXPONENTS, means, halves, fmt="o-", color=color, capsize=4,
                           label=feature)
            means, halves = values(feature, "relative")
            above.errorbar([1.03], means, halves, fmt="D", color=color, capsize=4,
                           markerfacecolor="white", label=f"{feature}, relative sharpening")
            means, halves = values(f"best_{feature}_loss")
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
    axes[0, 1].legend(fontsize="small")
    axes[1, 0].legend(fontsize="small")
    gain = gains(runs, "class")
    changes = ["more" if sum(gain[data]) > 0 else "less" for data in DATA_EXPONENTS]
    figure.suptitle(f"The power law knows {changes[0]} of long-tailed classes than the uniform "
                    f"prior, and {changes[1]} of balanced ones\n"
                    "(the winner of 64 heads for each prior, means and 95% intervals, "
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
    add("--quick", action="store_true", help="fewer images, epochs and heads, in ten seconds")
    args = parser.parse_args(argv)
    config = {"quick": args.quick, **(QUICK if args.quick else SETTINGS)}
    jobs = [("networks", *job) for job in itertools.product(args.seeds, DATA_EXPONENTS)]
    jobs += [("lowest_losses", data_exponent) for data_exponent in DATA_EXPONENTS]
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
