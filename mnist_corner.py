"""The corner experiment (paper, section 5.1 and figure 3): the prior decides what is encoded.

Each image has a digit in one corner and a background, so images can be grouped in two ways. One of
the two features is long-tailed, and the other one is balanced. PMSN with a power-law prior should
group images by the long-tailed feature, and with the uniform prior (MSN) by the balanced one.

    python mnist_corner.py              # synthetic data, no download, a minute on two cores
    python mnist_corner.py --quick      # every step with too little training, in 15 seconds
    python mnist_corner.py --curve --seeds 0 1 2     # five contrasts of the background
    python mnist_corner.py --joint      # the encoder learns from the loss of PMSN alone
    python mnist_corner.py --mnist      # MNIST over images of CIFAR-10 (torchvision loads them)

1. An encoder learns from whole images by SimCLR, without labels, until it holds both features.
2. For each prior, 96 heads learn on this encoder by the loss of PMSN. A head is a linear layer to
   eight numbers, with five prototypes of its own. The loss has local minima, as the objective of
   K-means has, so there are many starts, and the head with the lowest loss wins. Its groups of
   images are the result: what do they tell about digit and background?
3. The winner teaches a new network from random weights, by the same loss: it gives the targets.
   Figure 3 shows the neighbors by the new network's predictions.

`networks` takes these steps, with the functions of support/heads.py.

Two things make it possible to ask. The two views of an image sometimes disagree
(`CornerImages.view`): otherwise groups by a mixture of both features would have any sizes at no
cost, and no prior would prefer a feature. `lowest_losses` computes this without a network. And the
long-tailed feature has twice as many classes as there are prototypes, so rare classes share some.
With ten classes and ten prototypes the power law has a similar minimum, but the heads did not find
it (extras/NOTEBOOK.md). These settings were chosen with seeds from 100 on.

No label reaches the training. Ours, and not the paper's: the heads, SimCLR (which has a hidden
uniform prior, too: --joint does without it), a small encoder without masking, and sharpening that
starts at 1. Prototype k has the share k of the prior, as in the paper (any share with --any_order).
--out gets results.json, preference.png (all heads), neighbors.png (figure 3) and the models of
step 3, and with --curve curve.png.
"""

import itertools
import math

import numpy as np
import torch
import torchvision
from torch import nn
from torchvision.transforms import v2

import pmsn
from support.drawings import (SIZE, background_view, digit_view, draw_digits, draw_gratings,
                              make_encoder, sample, shrink)
from support.evaluation import agreement, other_neighbors
from support.figures import POWER_LAW, UNIFORM, Figure, write_figure
from support.heads import (Heads, cache_views, find_grouping, judge, make_student, teach,
                           train_encoder, train_heads, two_cached_views, two_views_of)
from support.images import IMAGE_ENDINGS, open_image
from support.results import cell, interval, number_of_seeds, run_or_continue, summarize
from support.runs import (Distinct, Parser, UserError, available_cores, command, folder, load_file,
                          number, save_file, say)

LABELS = ("digit", "background")
OTHER = {"digit": "background", "background": "digit"}
EXPONENT = 1.25  # of the long-tailed feature, and of the power-law prior
PRIORS = {0.0: ("uniform prior", UNIFORM), EXPONENT: ("power-law prior", POWER_LAW)}
CLASSES = 10  # of the long-tailed feature
NUM_PROTOTYPES = 5  # The balanced feature has as many classes.
DISAGREE = 0.05  # how often a view redraws its digit, and how often its background
CURVE = (0.25, 0.35, 0.45, 0.6, 0.8)  # the contrasts of --curve
DIM = 8  # dimension of the embeddings
COLUMNS = {"loss": "loss", "digit": "on digit (nats)", "background": "on background",
           "share_of_digit_heads": "digit heads", "best_digit_loss": "loss, digit heads",
           "best_background_loss": "loss, other heads"}
# `deform` is how much a digit is deformed in each view, and `contrast` is the contrast of the
# backgrounds, both from 0 to 1. The epochs are those of the three steps.
SYNTHETIC = {"deform": 0.15, "contrast": 0.4, "images": 15360, "epochs": (3, 12, 3), "heads": 96}
MNIST = {**SYNTHETIC, "contrast": 0.6}


# ---- Data: gray images (N, 1, h, w) and labels (N,) ----------------------------------------------
def load_digits(args):
    """Digits for training and for the test. The synthetic ones are the same, deformed anew."""
    if args.mnist:
        splits = [torchvision.datasets.MNIST(args.root, train, download=True)
                  for train in (True, False)]
        return [(shrink(split.data[:, None] / 255), split.targets) for split in splits]
    # Only one font: groups of digits in different fonts would have sizes that fit any prior.
    return [draw_digits("DejaVuSans")] * 2


def load_backgrounds(args):
    """Ten backgrounds (10, 1, h, w): gratings, or the first image of each class of CIFAR-10."""
    if args.mnist:
        gray = v2.Compose([v2.Grayscale(), v2.Resize(SIZE), v2.CenterCrop(SIZE), v2.PILToTensor()])
        if args.backgrounds:
            data = torchvision.datasets.DatasetFolder(args.backgrounds, open_image, IMAGE_ENDINGS,
                                                      transform=gray)
        else:
            data = torchvision.datasets.CIFAR10(args.root, transform=gray, download=True)
        labels, first = np.unique(data.targets, return_index=True)
        if len(labels) != CLASSES:
            raise RuntimeError(f"--backgrounds needs ten folders of images, got {len(labels)}")
        images = torch.stack([data[i][0] for i in first]).float()
        std, mean = torch.std_mean(images, dim=(2, 3), keepdim=True)
        return 0.5 + 0.35 * (images - mean) / std.clamp_min(1)  # the contrast of the gratings
    return draw_gratings()


def load_images(args, long_tailed, settings):
    """The images for training and for the test."""
    backgrounds = load_backgrounds(args)
    return [CornerImages(*digits, backgrounds, long_tailed, settings)
            for digits in load_digits(args)]


class CornerImages:
    """Random images. Each is a pair of indices, of its digit and of its background: (N, 2)."""
    def __init__(self, digits, digit_labels, backgrounds, long_tailed, settings):
        self.images = digits, backgrounds
        self.labels = digit_labels, torch.arange(CLASSES)
        self.exponents = [EXPONENT if feature == long_tailed else 0.0 for feature in LABELS]
        self.settings = settings

    def draw(self, count, balanced=False):
        """Random pairs. Class k of the long-tailed feature has a share proportional to k^-1.25.

        The other feature has only the first five classes, with equal frequencies.
        """
        columns = []
        for labels, exponent in zip(self.labels, self.exponents):
            known, = torch.where(labels < (CLASSES if exponent else NUM_PROTOTYPES))
            index = sample(labels[known], 0.0 if balanced else exponent, count)
            columns.append(known[index])
        return torch.stack(columns, dim=1)

    def view(self, pairs):
        """A random view of each image, (N, 2) -> (N, 1, 32, 32) in about [-1, 1].

        With a probability of 5% a view has a random digit of the data in place of its own, and
        with 5% a random background, as crops of photographs sometimes miss the object and show
        something else. So a network that groups images by both features pays for the disagreements
        of both.
        """
        replaced = torch.rand(pairs.shape) < DISAGREE
        return self.render(torch.where(replaced, self.draw(len(pairs)), pairs))

    def render(self, pairs):
        """Digits in a black square over backgrounds, randomly deformed. The square is opaque."""
        digits, backgrounds = (images[index] for images, index in zip(self.images, pairs.T))
        images = 0.5 + self.settings["contrast"] * (background_view(backgrounds) - 0.5)
        images[:, :, :16, :16] = digit_view(digits, self.settings["deform"])
        return 2 * (images + 0.05 * torch.randn_like(images)) - 1

    def labels_of(self, pairs):
        return dict(zip(LABELS, (labels[index] for labels, index in zip(self.labels, pairs.T))))


# ---- One experiment ------------------------------------------------------------------------------
def experiment(part, *arguments):
    """One job: ("networks", seed, long_tailed, contrast) or ("lowest_losses", disagree)."""
    torch.set_num_threads(1)  # faster here, and the same bits for any number of processes
    return {"networks": networks, "lowest_losses": lowest_losses}[part](*arguments)


def networks(seed, long_tailed, contrast, args):
    """One seed, with both priors: its runs. The images of figure 3 go to a file."""
    torch.manual_seed(seed)
    settings = {**make_settings(args), "contrast": contrast}
    encoder_epochs, head_epochs, student_epochs = settings["epochs"]
    source, test = load_images(args, long_tailed, settings)
    pairs = source.draw(settings["images"])
    title = f"{seed:>4}{long_tailed:>12}{contrast:>10.2f}"

    def views_of(index):
        return source.view(pairs[index])

    # Step 1: an encoder for both priors. With --joint each prior trains its own, in step 2.
    if args.joint:
        def two_views(batch):
            return [views_of(batch) for _ in range(2)]
    else:
        encoder = train_encoder(views_of, len(pairs), encoder_epochs, f"{title}  encoder")
        two_views = two_cached_views(cache_views(encoder, views_of, len(pairs)))

    # Step 2: many heads for each prior.
    models = []
    for exponent in PRIORS:
        torch.manual_seed(seed)  # Both priors get the same weights.
        first = make_encoder(SIZE) if args.joint else nn.Identity()
        prior = pmsn.power_law_prior(NUM_PROTOTYPES, exponent)
        models.append(Heads(first, prior, settings["heads"], DIM, any_order=args.any_order))
    losses = train_heads(models, two_views, head_epochs, len(pairs), f"{title}    heads")

    # What the heads know of images that are rendered anew, all with their own digit and background.
    # Prototypes were trained for long-tailed shares, so they are judged on images with these. For
    # neighbors, all classes are equally frequent.
    torch.manual_seed(seed)
    seen, balanced = test.draw(4000), test.draw(2000, balanced=True)
    seen, balanced = [(test.render(index), test.labels_of(index)) for index in (seen, balanced)]
    runs, winners = [], []
    for model, exponent, loss in zip(models, PRIORS, losses):
        if not args.joint:
            model.target[0] = encoder  # From here on, the target network takes images.
        heads, best = judge(model, loss, *seen), int(loss.argmin())
        winner = model.target[0], model.head(best), model.prototypes[best].detach()
        results = sum_up(heads) | neighbors("winner", represent(*winner, balanced[0]), balanced[1])
        runs.append({"seed": seed, "long_tailed": long_tailed, "contrast": contrast,
                     "exponent": exponent, "results": results,
                     "heads": [] if args.curve else heads})
        winners.append(winner)
    if args.joint or args.curve:
        return runs

    # Step 3 and figure 3.
    students = []
    for winner, model in zip(winners, models):
        torch.manual_seed(seed)  # Both priors get the same weights.
        students.append(make_student(*winner, model.prior))
    teach(students, views_of, len(pairs), student_epochs, f"{title}  student",
          any_order=args.any_order)
    torch.manual_seed(seed)
    with torch.no_grad():
        untrained = {"encoder": make_encoder(SIZE)(balanced[0])}
    untrained = neighbors("untrained", untrained, balanced[1])
    _, queries = np.unique(balanced[1]["digit"], return_index=True)
    queries = torch.as_tensor(queries[:: len(queries) // 5])  # of five of five or ten digits
    pictures = {}
    for student, run in zip(students, runs):
        found = represent(student.encoder, student.head, student.prototypes, balanced[0])
        run["results"] |= neighbors("student", found, balanced[1]) | untrained
        nearest = other_neighbors(found["prediction"], queries, 8)
        shown = torch.cat([queries[:, None], nearest], dim=1)  # (5, 9)
        pictures[run["exponent"]] = {"images": balanced[0][shown], **{
            what: labels[shown] for what, labels in balanced[1].items()}}
        save_file(student.state_dict(), model_path(args.out, long_tailed, run["exponent"], seed))
    save_file(pictures, pictures_path(args.out, long_tailed, seed))
    return runs


def make_settings(args):
    settings = dict(MNIST if args.mnist else SYNTHETIC)
    if args.quick:
        settings |= {"images": 2560, "epochs": (2, 3, 2), "heads": 16}
    return settings


def model_path(folder, long_tailed, exponent, seed):
    return folder / f"model_{long_tailed}_{exponent:g}_{seed}.pt"


def pictures_path(folder, long_tailed, seed):
    return folder / f"pictures_{long_tailed}_{seed}.pt"


def load_pictures(folder, seed):
    return {(long_tailed, exponent): picture for long_tailed in LABELS
            for exponent, picture in load_file(pictures_path(folder, long_tailed, seed)).items()}


# ---- Measures ------------------------------------------------------------------------------------
def sum_up(heads):
    """What the winner knows, and how many heads know more of each feature, and their best loss."""
    winner = min(heads, key=lambda head: head["loss"])
    digit_heads = [head["loss"] for head in heads if head["digit"] > head["background"]]
    background_heads = [head["loss"] for head in heads if head["digit"] <= head["background"]]
    return {"loss": winner["loss"], "digit": winner["digit"], "background": winner["background"],
            "difference": winner["digit"] - winner["background"],
            "share_of_digit_heads": len(digit_heads) / len(heads),
            "best_digit_loss": min(digit_heads, default=math.nan),
            "best_background_loss": min(background_heads, default=math.nan)}


@torch.no_grad()
def represent(encoder, head, prototypes, images):
    """Features (N, 128), projections (N, 8) and predictions (N, 5) of images."""
    features = encoder.eval()(images)
    projections = head.eval()(features)
    return {"encoder": features, "projection": projections,
            "prediction": pmsn.log_predictions(projections, prototypes, temperature=0.1).exp()}


def neighbors(whose, representations, labels):
    """The shares of the 10 nearest neighbors with the same digit, and the same background."""
    return {f"{whose}_{name}_{what}": agreement(representation, labels[what])
            for name, representation in representations.items() for what in LABELS}


# ---- What a loss could be at best ----------------------------------------------------------------
def lowest_losses(disagree, args):
    """The lowest losses that we find for groupings by one feature or both, without a network.

    We search by gradient descent over tables that give each class, or each pair of classes, any
    logits. Nothing is learned here. `disagree` is the probability that a view shows another class.
    A table of pairs can also ignore a feature, so the lowest loss of "both" cannot be above the
    others. From random tables the search does not find this, and ends in mixtures.
    """
    long_tailed = two_views_of(pmsn.power_law_prior(CLASSES, EXPONENT), disagree)  # (10, 10)
    balanced = two_views_of(pmsn.power_law_prior(NUM_PROTOTYPES, 0.0), disagree)  # (5, 5)
    groupings = {"long_tailed": long_tailed, "balanced": balanced,
                 "both": torch.kron(long_tailed, balanced)}  # (50, 50)
    return [{"disagree": disagree, "exponent": exponent, "results": {
                 name: find_grouping(two_views, pmsn.power_law_prior(NUM_PROTOTYPES, exponent))
                 for name, two_views in groupings.items()}}
            for exponent in PRIORS]


# ---- Figures -------------------------------------------------------------------------------------
def plot_neighbors(pictures, runs):
    """Figure 3, two by two: which feature is long-tailed, and which prior."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    summary = summarize(runs, key=lambda run: (run["long_tailed"], run["exponent"]))
    matches = 0
    for row, long_tailed in zip(figure.subplots(2, 2), LABELS):
        for ax, (exponent, (name, _)) in zip(row, PRIORS.items()):
            shown, found = pictures[long_tailed, exponent], summary[long_tailed, exponent]
            same = {what: (shown[what] == shown[what][:, :1]).numpy() for what in LABELS}  # (5, 9)
            # Frames of 3 pixels: above in green for the same digit, below in blue for the same
            # background, and black for the image itself, which comes first.
            tiles = np.ones((5, 9, 38, 38, 3))
            tiles[same["digit"], :19] = 0.24, 0.62, 0.3
            tiles[same["background"], 19:] = 0.19, 0.39, 0.75
            tiles[:, 0] = 0
            tiles[..., 3:-3, 3:-3, :] = shown["images"][:, :, 0, :, :, None].clamp(-1, 1) / 2 + 0.5
            ax.imshow(tiles.transpose(0, 2, 1, 3, 4).reshape(190, 342, 3))
            ax.set_axis_off()
            shares = {what: found[f"student_prediction_{what}"]["mean"] for what in LABELS}
            matches += max(shares, key=shares.get) == should_win(long_tailed, exponent)
            ax.set_title(f"long-tailed {long_tailed}s, {name}\nneighbors: same digit "
                         f"{shares['digit']:.2f}, same background {shares['background']:.2f}")
    figure.suptitle(f"In {matches} of 4 panels, neighbors share the feature that fits the prior "
                    "more often than the other one")
    figure.supxlabel("Each row: an image (black frame) and its nearest neighbors by the prediction "
                     "of the new network, last seed\n(green above: same digit, blue below: same "
                     f"background). Numbers: means over n = {number_of_seeds(summary)} seeds.\n"
                     "Balanced feature: 0.2 by chance, 1 at best. Long-tailed feature: 0.1 by "
                     "chance, about 0.5 if the predictions only name one of the five prototypes")
    return figure


def plot_preference(runs, references):
    """The loss of every head against what its prototypes tell, and the winners."""
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    for ax, long_tailed in zip(figure.subplots(1, 2, sharey=True), LABELS):
        for exponent, (name, color) in PRIORS.items():
            heads = [head for run in select(runs, long_tailed, exponent) for head in run["heads"]]
            winners = [run["results"] for run in select(runs, long_tailed, exponent)]
            ax.plot([head["digit"] - head["background"] for head in heads],
                    [head["loss"] for head in heads], ".", color=color, alpha=0.25, markersize=4)
            ax.plot([winner["difference"] for winner in winners],
                    [winner["loss"] for winner in winners], "*", color=color, markersize=15,
                    markeredgecolor="black", label=f"{name}: the winner of each seed")
            for row in references:
                if row["disagree"] and row["exponent"] == exponent:
                    # Groupings by the digit alone are at the right, by the background at the left.
                    left, right = row["results"]["balanced"], row["results"]["long_tailed"]
                    if long_tailed == "background":
                        left, right = right, left
                    ax.hlines(left, -1.7, -0.9, color, ":")
                    ax.hlines(right, 0.9, 1.7, color, ":",
                              label=f"{name}: the lowest that a search without a network finds")
        ax.axvline(0, color="gray", linewidth=0.8)
        ax.set(title=f"long-tailed {long_tailed}s, balanced {OTHER[long_tailed]}s",
               xlabel="information of the prototypes on the digit minus on the background (nats)")
    figure.axes[0].set_ylabel("loss of a head (nats)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    fitting, seeds = sum(map(fits_prior, runs)), len({run["seed"] for run in runs})
    figure.suptitle("The head with the lowest loss knows more of the feature that fits the prior: "
                    f"{fitting} of {len(runs)} cases (n = {seeds} seeds)\n"
                    "One dot per head. Left: groups by the background, right: groups by the digit")
    return figure


def plot_curve(runs):
    """What the winner groups by, for several contrasts of the background."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    contrasts = sorted({run["contrast"] for run in runs})
    for ax, long_tailed in zip(figure.subplots(1, 2, sharey=True), LABELS):
        for exponent, (name, color) in PRIORS.items():
            values = [[run["results"]["difference"] for run in select(runs, long_tailed, exponent)
                       if run["contrast"] == contrast] for contrast in contrasts]
            means, halves = zip(*map(interval, values))
            ax.errorbar(contrasts, means, halves, fmt="o-", capsize=4, color=color, label=name)
        ax.axhline(0, color="gray", linewidth=0.8)
        ax.set(title=f"long-tailed {long_tailed}s, balanced {OTHER[long_tailed]}s",
               xlabel="contrast of the background", ylim=(-1.9, 1.9))
    figure.axes[0].set_ylabel("information of the winner on digit\nminus on background (nats)")
    figure.axes[0].legend()
    figure.suptitle("What the winner groups by, under both priors and for five contrasts of the "
                    "background\n(means and 95% intervals, "
                    f"n = {len({run['seed'] for run in runs})} seeds)")
    return figure


def select(runs, long_tailed, exponent):
    return [run for run in runs
            if (run["long_tailed"], run["exponent"]) == (long_tailed, exponent)]


def should_win(long_tailed, exponent):
    """The feature that fits the prior."""
    return long_tailed if exponent else OTHER[long_tailed]


def fits_prior(run, margin=0.0):
    """Whether the winner knows more of the feature that fits the prior, by a margin in nats."""
    sign = 1 if should_win(run["long_tailed"], run["exponent"]) == "digit" else -1
    return sign * run["results"]["difference"] > margin


def interactions(runs, exponent):
    """How far the winner moves to the digit when it becomes the long-tailed feature, per seed.

    In nats. Without any preference for frequencies it is 0.
    """
    digit, background = (
        {run["seed"]: run["results"]["difference"] for run in select(runs, long_tailed, exponent)}
        for long_tailed in LABELS)
    return [digit[seed] - background[seed] for seed in digit]


# ---- Command line --------------------------------------------------------------------------------
@command
def main(argv=None):
    parser = Parser("The corner experiment: the prior decides what is encoded (figure 3)")
    add = parser.add_argument
    add("--mnist", action="store_true", help="MNIST and CIFAR-10 in place of drawn images")
    add("--root", default="data", help="where torchvision finds data sets, or downloads them")
    add("--backgrounds", help="with --mnist: a folder with ten folders of images, for CIFAR-10")
    add("--out", type=folder, default="runs/corner", help="folder for results and figures")
    add("--seeds", type=number(int, 0, 2_000_000_000), nargs="+", action=Distinct, default=[0],
        help="one run each")
    add("--curve", action="store_true", help="five contrasts of the background, without figure 3")
    add("--joint", action="store_true",
        help="no SimCLR: each prior trains its encoder and heads together, without figure 3")
    add("--any_order", action="store_true", help="share k can go to any prototype: not the paper's")
    add("--workers", type=number(int, 1, 1000), default=available_cores(), help="processes")
    add("--quick", action="store_true", help="fewer images, epochs and heads, in 15 seconds")
    args = parser.parse_args(argv)
    if args.backgrounds and not args.mnist:
        parser.error("--backgrounds is for --mnist")
    try:
        load_digits(args)  # Data sets are loaded from the network here, and once.
        load_backgrounds(args)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot load the data: {error}") from error

    settings = make_settings(args)
    contrast = settings.pop("contrast")  # Each job has its own.
    contrasts = CURVE if args.curve else (contrast,)
    config = {name: value for name, value in vars(args).items()
              if name not in ("out", "seeds", "workers")} | settings
    jobs = [("networks", *job) for job in itertools.product(args.seeds, LABELS, contrasts)]
    jobs += [("lowest_losses", disagree) for disagree in (0.0, DISAGREE)]
    say("Lowest loss in an epoch. Encoder: one network for both priors. Heads and student: "
        + ", ".join(name for name, _ in PRIORS.values())
        + "\nseed long-tailed  contrast     part epoch   left   losses")
    found = run_or_continue(experiment, jobs, args, config, args.out / "results.json")
    references = [run for run in found if "disagree" in run]
    runs = [run for run in found if "seed" in run]

    say("\nThe lowest losses that we find without a network, for groups by one feature or both\n"
        "views disagree prior  long-tailed  balanced      both")
    for row in references:
        say(f"{row['disagree']:>14.0%}{row['exponent']:>6.2f}"
            + "".join(f"{loss:>11.3f}" for loss in row["results"].values()))
    summary = summarize(runs, lambda run: (run["long_tailed"], run["exponent"], run["contrast"]))
    say(f"\nThe winners: mean ± 95% interval over n = {len(args.seeds)} seeds\n"
        "long-tailed prior contrast" + "".join(f"{title:>19}" for title in COLUMNS.values()))
    for (long_tailed, exponent, contrast), row in summary.items():
        say(f"{long_tailed:>11}{exponent:>6.2f}{contrast:>9.2f}"
            + "".join(f"{cell(row, name, 'interval'):>19}" for name in COLUMNS))
    say(f"Winners that know more of the feature that fits the prior: {sum(map(fits_prior, runs))} "
        f"of {len(runs)}")

    if args.curve:
        write_figure(args.out / "curve.png", plot_curve, runs)
    else:
        for exponent, (name, _) in PRIORS.items():
            mean, half = interval(interactions(runs, exponent))
            spread = "" if math.isnan(half) else f" ± {half:.2f}"
            say(f"{name}: when the digit is the long-tailed feature, and not the background, the "
                f"winner moves {mean:+.2f}{spread} nats to the digit")
        write_figure(args.out / "preference.png", plot_preference, runs, references)
    if not args.curve and not args.joint:
        write_figure(args.out / "neighbors.png", lambda: plot_neighbors(
            load_pictures(args.out, args.seeds[-1]), runs))
    say(f"results.json and the figures are in {args.out}")


if __name__ == "__main__":
    main()
