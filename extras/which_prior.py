"""Which prior for long-tailed data? Section 5.2 of the paper, small enough for a laptop.

The paper finds that a power-law prior helps on long-tailed iNat18 and hurts on balanced ImageNet.
iNat18 has eight times as many classes as prototypes, so rare classes must share prototypes. Here
the classes are 512 glyphs that we draw, for 64 prototypes. They are long-tailed or balanced.
(--data takes photographs, too. CIFAR-10 is the opposite case, with more prototypes than classes.)

With --contrasts above 0, each image also has a background that competes with the class: one of 16
other glyphs, or of 10 gratings, all equally frequent. A network could group images by it, and the
paper expects that the uniform prior prefers this. (which_feature.py asks which of the two each
prior prefers where its loss is lowest. The nine fonts of a glyph are equally frequent, too.)

We train PMSN with priors from uniform to steep, and with these losses:

    plain        as in the paper
    relative     targets are sharpened relative to the prior (pmsn.sharpen_relative)
    Sinkhorn     targets are moved to the prior (pmsn.sinkhorn)
    both         both of these
    any_order    the prior in any order (pmsn.in_order_of)

All models of one seed and one kind of data start from the same weights, see the same views and have
the same learning rate. Then two classifiers (k-NN, linear probe) learn from frozen features, and
are tested on balanced images: `knn` and `probe` learn from the training images, which are
long-tailed as in the paper, `balanced_knn` and `balanced_probe` from balanced images. (With more
than 100 classes `probe` is left out, and with several --settings `balanced_probe` too, because they
would take as long as the training.) Glyphs are tested in bold slanted fonts that no training image
has. A supervised model and an untrained encoder show how much there is to learn.

A prior is met if the mean prediction over all training images has a number of effective prototypes
within 10% of the prior's. Otherwise a run says little about its prior. (In a mini-batch there are
fewer by chance: of 64 equally frequent prototypes about 88% with 256 certain predictions.)

Under which conditions does the paper's loss cost accuracy? --settings changes one thing at a time
(see SETTINGS): how hard the classes are to see, mini-batches, sharpening, prototypes. The number of
epochs stays, and so does the learning rate, which was chosen for another encoder and no arm.

Perhaps training does not find the classes, although the loss would prefer them. With --from_labels
it starts there: first labels train a network with one prototype per class, and then each prior
continues from it without labels. Does the prior of the classes keep them?

    python extras/which_prior.py                   # glyphs, three priors, two losses, 4 minutes
    python extras/which_prior.py --data CIFAR10    # photographs, 10 minutes
    python extras/which_prior.py --quick           # every step, with too little data, ten seconds

--out gets which_prior.json and figures. The models of one seed and one kind of data are in
which_prior.json as soon as they are done, and the same command continues from there.

Not in the paper: these images, 5% of whose views show another class (see GlyphImages; also for the
supervised model), the small encoders, a head with one layer and BatchNorm, no masking, one anchor
per image, schedules for sharpening and target network (for glyphs), and all losses but the plain
one.
"""

import argparse
import functools
import itertools
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

# The other scripts are in the folder above, and are not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pmsn
from support.drawings import (SIZE, background_view, draw_gratings, make_encoder, make_pmsn,
                              schedule)
from support.evaluation import agreement, effective_prototypes, knn_predictions, linear_probe
from support.figures import Figure, write_figure
from support.glyphs import TEST_FONTS, TRAIN_FONTS, GlyphImages
from support.heads import information
from support.images import normalize_images
from support.photographs import (load_splits, make_resnet, random_crops, read_images,
                                 warmup_cosine)
from support.results import cell, interval, number_of_seeds, run_or_continue, summarize
from support.runs import Distinct, Parser, UserError, available_cores, command, folder, number, say

LOSSES = {  # options of the loss
    "plain": {},
    "relative": {"relative_sharpening": True},
    "Sinkhorn": {"sinkhorn_iterations": 3},
    "both": {"relative_sharpening": True, "sinkhorn_iterations": 3},
    "any_order": {"any_order": True},
}
# What can be changed about the glyphs and their training, one thing at a time
DEFAULT = {
    "fonts": 9, "deform": 0.5,  # how hard a class is to see: fonts per class, and deformations
    "batch_size": 256,
    "sharpening": 0.25, "first_sharpening": 0.6,  # at the end, and at the start of the training
}
SETTINGS = {
    "default": {},
    "harder to see": {"deform": 0.75},
    "one font": {"fonts": 1},  # also for the test images
    "batches of 128": {"batch_size": 128},
    "batches of 512": {"batch_size": 512},
    "sharpening .5": {"sharpening": 0.5},
    "constant sharpening": {"first_sharpening": 0.25},
    "16 prototypes": {"prototypes": 16},
    "256 prototypes": {"prototypes": 256},
}
COLORS = dict(zip(LOSSES, ("#d1495b", "#edae49", "#66a182", "#00798c", "#8d96a3")))
# What two runs have in common that differ in their seed only: the kind of data, and the model
KIND = ("setting", "data_exponent", "contrast", "prior_exponent", "loss")
# Accuracies that are compared with the one of the uniform prior, for head, middle and tail too
GAINS = ("knn", "probe", "balanced_knn", "balanced_probe")


# ---- Data ----------------------------------------------------------------------------------------
class Photographs:
    """`count` photographs, or all of them, and gratings.

    `images` is uint8 (N, 3, 32, 32) and cycles through the C classes: image i has class i % C.
    `order` lists the classes from frequent to rare. The label of an image is the rank of its class
    in `order`: label k has the frequency (k + 1)^-exponent.
    """
    def __init__(self, images, order, exponent, contrast, count=None):
        prior = pmsn.power_law_prior(len(order), exponent)
        per_class = (prior * (count or len(images))).round().long()
        index, of_each_class = [], len(images) // len(order)
        for c, wanted in zip(order, per_class):
            chosen = torch.randperm(of_each_class)[:wanted]
            index.append(chosen * len(order) + c)
        index, labels = torch.cat(index), torch.arange(len(order)).repeat_interleave(per_class)
        # Mixed, because BatchNorm takes its statistics from parts of these images.
        mixed = torch.randperm(len(index))
        self.images, self.labels = images[index[mixed]], labels[mixed]
        self.gratings, self.contrast = draw_gratings(), contrast
        self.backgrounds = torch.randint(len(self.gratings), self.labels.shape)

    def views(self, index):
        """Random crops of these images in random colors, (B, 3, 32, 32)."""
        crops = random_crops(self.images[index])
        return pmsn.make_views([self.blend(crops, index)[:, None]], blur_p=0.0)[0]

    def all_views(self):
        """Every image as it is, with a grating, (count, 3, 32, 32)."""
        parts = torch.arange(len(self.labels)).split(1000)
        return torch.cat([normalize_images(self.blend(self.images[part] / 255, part))
                          for part in parts])

    def blend(self, images, index):
        """Blend the gratings of the images with these indices into images in [0, 1]."""
        if not self.contrast:
            return images
        gratings = background_view(self.gratings[self.backgrounds[index]])
        return torch.lerp(images, gratings.expand_as(images), self.contrast).clamp(0, 1)


@functools.cache  # A process loads the images once, for all of its runs.
def load_photographs(data, root):
    """Images for training and for tests, uint8 (N, 3, 32, 32) each, and the number of classes."""
    splits = load_splits(data, root)
    return *(read_images(split) for split in splits), len(splits[0].classes)


def make_data(exponent, contrast, args):
    """Images to train on, test images, and images for the classifiers with balanced labels.

    The last two are balanced. The last ones are half as many glyphs as there are to train on, or
    all photographs of the training set.
    """
    if args.data == "glyphs":
        fonts = TRAIN_FONTS[:args.fonts]
        # Nobody knows an unseen font from a single one.
        test_fonts = TEST_FONTS if args.fonts > 1 else fonts
        return tuple(GlyphImages(fonts, args.classes, exponent, contrast, count, deform=args.deform)
                     for fonts, exponent, count in ((fonts, exponent, args.images),
                                                    (test_fonts, 0.0, args.images // 4),
                                                    (fonts, 0.0, args.images // 2)))
    images, test_images, num_classes = load_photographs(args.data, args.root)
    order = torch.randperm(num_classes).tolist()  # Each seed has other rare classes.
    return (Photographs(images, order, exponent, contrast, args.images),
            Photographs(test_images, order, 0.0, contrast),
            Photographs(images, order, 0.0, contrast))


# ---- Networks and training -----------------------------------------------------------------------
@dataclass
class Model:
    network: nn.Module  # PMSN, or a supervised classifier
    tested_encoder: nn.Module
    exponent: float | None  # of the prior, or None without PMSN
    losses: list  # names in LOSSES for which this is the model, or "supervised" or "random"
    options: dict = field(default_factory=dict)  # of the loss
    history: list = field(default_factory=list)  # terms of the loss, means over each epoch

    def __post_init__(self):
        self.network.to(memory_format=torch.channels_last)  # faster on CPUs
        self.optimizer = torch.optim.AdamW(self.network.parameters(), weight_decay=0.05)


def make_models(seed, args):
    """PMSN for each prior and loss. All encoders start equal."""
    models = {}
    for exponent, loss in itertools.product(args.prior_exponents, args.losses):
        options = options_of(exponent, loss)
        key = (exponent, tuple(options))
        if key in models:
            models[key].losses.append(loss)
            continue
        network = make_network(seed, exponent, args)
        # The target network is tested, as in MSN.
        models[key] = Model(network, network.target_encoder, exponent, [loss], options)
    return list(models.values())


def options_of(exponent, loss):
    """Options of the loss {name: value}, without those that change nothing.

    With the uniform prior, relative sharpening and any order change nothing. So plain, relative and
    any_order are one model, which we train once, and so are Sinkhorn and both.
    """
    options = dict(LOSSES[loss])
    if exponent == 0:
        options.pop("relative_sharpening", None)
        options.pop("any_order", None)
    return options


def make_network(seed, exponent, args):
    return make_pmsn(make_encoder_for(seed, args), args.prototypes, exponent, dim=64)


def make_encoder_for(seed, args):
    torch.manual_seed(seed)
    return make_encoder(SIZE) if args.data == "glyphs" else make_resnet()


def make_supervised(seed, args):
    """A classifier, which shows how much there is to learn. Its encoder starts like all others."""
    if args.from_labels:
        network = ClassPrototypes(make_network(seed, 0.0, args))
        return Model(network, network.pmsn.encoder, None, ["supervised"])
    encoder = make_encoder_for(seed, args)
    network = nn.Sequential(encoder, nn.GELU(), nn.Linear(128, args.classes))
    return Model(network, encoder, None, ["supervised"])


class ClassPrototypes(nn.Module):
    """A classifier: PMSN, whose prototype k stands for class k.

    Class 0 is the most frequent one, and prototype 0 has the largest share of a power law.
    """
    def __init__(self, network):
        super().__init__()
        self.pmsn = network

    def forward(self, view):
        """(B, K), log-probabilities of the classes"""
        embeddings = self.pmsn.head(self.pmsn.encoder(view))
        return pmsn.log_predictions(embeddings, self.pmsn.prototypes, temperature=0.1)


def start_from(network, models):
    """Let all models start from the anchor network and the prototypes of this PMSN."""
    network.update_target(0.0)  # Now its target network is equal to its anchor network.
    for model in models:
        model.network.load_state_dict({**network.state_dict(), "prior": model.network.prior})


def train(models, data, args, title):
    """Train all models on the same batches and views."""
    count = len(data.labels)
    steps_per_epoch = count // args.batch_size
    if steps_per_epoch == 0:
        raise UserError(f"{count} images are less than one mini-batch of {args.batch_size}")
    steps, began = args.epochs * steps_per_epoch, time.monotonic()
    for epoch in range(args.epochs):
        for model in models:
            model.history.append({})
        batches = torch.randperm(count).split(args.batch_size)
        for step, batch in enumerate(batches[:steps_per_epoch], start=epoch * steps_per_epoch):
            if args.data == "glyphs":
                lr, _, ema_momentum = schedule(step / steps)
                sharpening = sharpening_at(step / steps, args)
            else:  # constant sharpening, as in the paper
                lr, sharpening, ema_momentum = 2e-3 * warmup_cosine(step, steps), 0.25, 0.99
            views = [data.views(batch) for _ in range(2)]  # the target and one anchor
            for model in models:
                is_pmsn = model.exponent is not None
                if is_pmsn:
                    loss, terms = model.network(views, sharpening=sharpening, **model.options)
                else:
                    loss, terms = F.cross_entropy(model.network(views[1]), data.labels[batch]), {}
                model.optimizer.param_groups[0]["lr"] = lr
                model.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.network.parameters(), 3.0)
                model.optimizer.step()
                if is_pmsn:
                    model.network.update_target(ema_momentum)
                for name, value in terms.items():
                    if value.ndim == 0:  # all but the mean prediction
                        means = model.history[-1]
                        means[name] = means.get(name, 0.0) + value.item() / steps_per_epoch
        for model in models:
            if not all(map(math.isfinite, model.history[-1].values())):
                raise UserError(f"the loss is not finite in epoch {epoch + 1}: prior exponent "
                                f"{model.exponent}, {', '.join(model.losses)}")
        left = (time.monotonic() - began) * (args.epochs / (epoch + 1) - 1)
        say(f"{title}{epoch + 1:>6}{left:>7.0f}s")


def sharpening_at(done, args):
    """Soft targets let the first clusters still change. For the last 30% it is constant."""
    return args.sharpening + (args.first_sharpening - args.sharpening) * max(0.0, 1 - done / 0.7)


# ---- Measures ------------------------------------------------------------------------------------
@torch.no_grad()
def measure(model, sets, views, args):
    """Accuracy on test images, and how the training images use the prototypes.

    `sets` are those of `make_data`, and `views` is one view of each of their images.
    """
    data, test, balanced = sets
    # In training, the statistics of BatchNorm (of the ResNet for photographs) followed an encoder
    # that was still changing. We take them again from the training images.
    encoder = model.tested_encoder
    update_bn(views[0].split(250), encoder)
    encoder.eval()
    features, test_features, balanced_features = [
        torch.cat([encoder(part) for part in x.split(1000)]) for x in views]
    found = {"same_background": agreement(test_features, test.backgrounds)}
    predicted = knn_predictions(balanced_features, balanced.backgrounds, test_features)
    found["background_knn"] = (predicted == test.backgrounds).double().mean().item()
    long_tailed, with_balanced = (features, data.labels), (balanced_features, balanced.labels)
    classifiers = {"knn": (knn_predictions, long_tailed),
                   "balanced_knn": (knn_predictions, with_balanced)}
    # With hundreds of classes, probes take about as long as the training of the network.
    if args.probe:  # with one setting only
        classifiers["balanced_probe"] = linear_probe, with_balanced
    if args.classes <= 100:
        classifiers["probe"] = linear_probe, long_tailed
    for name, (predict, known) in classifiers.items():
        correct = predict(*known, test_features) == test.labels
        found.update(by_group(name, correct, test.labels, args.classes))
    network = getattr(model.network, "pmsn", model.network)  # of ClassPrototypes
    if isinstance(network, pmsn.PMSN):
        # The head is still in training mode, so its BatchNorm takes the statistics of this batch,
        # which has all training images.
        log_p = pmsn.log_predictions(network.target_head(features), network.prototypes,
                                     temperature=0.1)
        prototype = log_p.argmax(dim=1)
        # Is the class of an image the most frequent one of its prototype? (prototypes, classes)
        table = F.one_hot(prototype).T.double() @ F.one_hot(data.labels, args.classes).double()
        pure = table.argmax(dim=1)[prototype] == data.labels
        found.update(by_group("purity", pure, data.labels, args.classes))
        for name, labels in (("class", data.labels), ("background", data.backgrounds)):
            # Of a limited number of images, shuffled labels have some information, too.
            shuffled = labels[torch.randperm(len(labels))]
            found[f"{name}_information"] = (information(prototype, labels)
                                            - information(prototype, shuffled))  # in nats
        mean_prediction = log_p.exp().mean(dim=0)
        found["prototypes_of_all_images"] = effective_prototypes(mean_prediction)
        found["prototypes_of_prior"] = effective_prototypes(network.prior)
    return found


def by_group(name, values, labels, num_classes):
    """Means of all values, and those of head, middle and tail: thirds of the classes by rank.

    Label 0 is the most frequent class. On balanced data the thirds are only random ones.
    """
    groups = labels * 3 // num_classes
    means = {f"{name}_{group}": values[groups == i].double().mean().item()
             for i, group in enumerate(("head", "middle", "tail"))}
    return {name: values.double().mean().item(), **means}


def experiment(setting, seed, data_exponent, contrast, args):
    """All models for one kind of data. Returns their entries in which_prior.json."""
    torch.set_num_threads(1)  # faster here, and the same bits for any number of cores
    args = argparse.Namespace(**DEFAULT | vars(args) | SETTINGS[setting])
    torch.manual_seed(seed)
    sets = make_data(data_exponent, contrast, args)
    views = [data.all_views() for data in sets]
    untrained = make_encoder_for(seed, args)
    random = Model(untrained, untrained, None, ["random"])
    models, supervised = make_models(seed, args), make_supervised(seed, args)
    torch.manual_seed(seed)  # The views do not depend on which models there are.
    title = f"{setting:20}{seed:>4}{data_exponent:>9.2f}{contrast:>10.2f}"
    if args.from_labels:
        train([supervised], sets[0], args, title)
        start_from(supervised.network.pmsn, models)
        train(models, sets[0], args, title)
    else:
        train([*models, supervised], sets[0], args, title)
    found = []
    for model in [random, *models, supervised]:
        last_epoch = model.history[-1] if model.history else {}
        results = {**last_epoch, **measure(model, sets, views, args)}
        found += [{"setting": setting, "seed": seed, "data_exponent": data_exponent,
                   "contrast": contrast, "prior_exponent": model.exponent, "loss": loss,
                   "results": results, "history": model.history} for loss in model.losses]
    return found


def add_gains(runs):
    """Add what a prior gains over the uniform one with the same seed, data and loss.

    Seeds differ more than priors, so this difference is more precise than the accuracies.
    """
    def key(run):
        return (run.get("setting"), run["seed"], run["data_exponent"], run["contrast"],
                run["loss"])

    uniform = {key(run): run["results"] for run in runs if run["prior_exponent"] == 0}
    for run in runs:
        if key(run) in uniform:
            before, results = uniform[key(run)], run["results"]
            for name in before.keys() & results.keys():
                if name.startswith(GAINS):
                    results[f"gain_{name}"] = results[name] - before[name]


# ---- Figures -------------------------------------------------------------------------------------
def plot(runs):
    """Balanced probe over the exponent of the prior: a panel per kind of data, a line per loss."""
    kinds = list(dict.fromkeys((run["data_exponent"], run["contrast"]) for run in runs))
    figure = Figure(figsize=(1 + 4 * len(kinds), 5), layout="constrained")
    for ax, kind in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds):
        probes = {}
        for run in runs:
            if (run["data_exponent"], run["contrast"]) == kind:
                key = run["loss"], run["prior_exponent"]
                probes.setdefault(key, []).append(run["results"]["balanced_probe"])
        losses = [loss for loss in LOSSES if loss in {name for name, _ in probes}]
        for i, loss in enumerate(losses):
            # Moved a little, so that the error bars do not hide one another
            shift = 0.02 * (i - (len(losses) - 1) / 2)
            exponents = sorted(exponent for name, exponent in probes if name == loss)
            means, halves = zip(*(interval(probes[loss, exponent]) for exponent in exponents))
            ax.errorbar([exponent + shift for exponent in exponents], means, halves, marker="o",
                        capsize=3, color=COLORS[loss], label=loss)
        for loss, label, style in (("supervised", "supervised", "--"),
                                   ("random", "untrained", ":")):
            ax.axhline(np.mean(probes[loss, None]), color="gray", linestyle=style, label=label)
        data_exponent, contrast = kind
        ax.axvline(data_exponent, color="gray", alpha=0.3)
        ax.set_title((f"classes k^-{data_exponent:g}" if data_exponent else "balanced classes")
                     + (f", background {contrast:g}" if contrast else ""))
    figure.axes[0].legend(fontsize="small")
    figure.suptitle("Which prior gives the best features? Vertical line: the exponent of the "
                    f"classes\n(means and 95% intervals, n = {count_seeds(runs)} seeds)")
    figure.supxlabel("exponent of the prior (0: uniform)")
    figure.supylabel("linear probe, balanced labels")
    return figure


def plot_settings(runs):
    """What each arm gains over the uniform prior, how far the priors are met, and when not."""
    figure = Figure(figsize=(14, 6.5), layout="constrained")
    left, right, over_epochs = figure.subplots(1, 3, width_ratios=(2, 2, 1.5))
    settings = list(dict.fromkeys(run["setting"] for run in runs))
    arms = arms_of(runs)
    for i, (exponent, loss) in enumerate(arms):
        name = f"exponent {exponent:g}, {loss}" if exponent else f"uniform, {loss}"
        style = {"color": COLORS[loss], "label": name, "capsize": 3,
                 "marker": "o" if exponent else "s", "linestyle": "",
                 "markerfacecolor": COLORS[loss] if exponent else "white"}
        rows = [row + 0.12 * ((len(arms) - 1) / 2 - i) for row in range(len(settings))]
        if (exponent, loss) != (0, "plain"):
            gains = [interval(gains_over_plain(runs, setting, exponent, loss))
                     for setting in settings]
            means, halves = zip(*gains)
            left.errorbar(means, rows, xerr=halves, **style)
        shares = [interval([run["results"]["prototypes_of_all_images"]
                            / run["results"]["prototypes_of_prior"] for run in runs
                            if (run["setting"], run["prior_exponent"], run["loss"])
                            == (setting, exponent, loss)]) for setting in settings]
        means, halves = zip(*shares)
        right.errorbar(means, rows, xerr=halves, **style)
        histories = [[means["effective_prototypes"] for means in run["history"]] for run in runs
                     if (run["setting"], run["prior_exponent"], run["loss"])
                     == (settings[0], exponent, loss)]
        over_epochs.plot(range(1, len(histories[0]) + 1), np.mean(histories, axis=0),
                         color=COLORS[loss], marker=style["marker"],
                         markerfacecolor=style["markerfacecolor"])
    left.axvline(0, color="gray", linewidth=0.8)
    left.set(yticks=range(len(settings)), yticklabels=settings,
             xlabel="k-NN with balanced labels: gain over the uniform prior, plain loss")
    right.set(yticks=range(len(settings)), yticklabels=[""] * len(settings))
    for ax in (left, right):
        ax.set_ylim(len(settings) - 0.5, -0.5)
    over_epochs.set(xlabel=f"epoch ({settings[0]})", ylim=(0, None),
                    ylabel="effective prototypes in a mini-batch")
    right.axvspan(0.9, 1.1, color="gray", alpha=0.15)
    right.set(xlabel="effective prototypes, as a share of those of the prior\n"
                     "(gray: the prior is met within 10%)")
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    steep = [arm for arm in arms if arm[0]]
    claims = []
    for exponent, loss in steep:
        mean, half = interval(gains_over_plain(runs, settings[0], exponent, loss))
        claims.append(f"exponent {exponent:g}, {loss}: {100 * mean:+.1f} ± {100 * half:.1f}")
    figure.suptitle("Points of k-NN that are gained over the uniform prior with the plain loss "
                    f"({settings[0]}): {'; '.join(claims)}\n"
                    "(means and 95% intervals of paired differences, "
                    f"n = {count_seeds(runs)} seeds)")
    return figure


def arms_of(runs):
    """The arms (exponent of the prior, loss) of these runs. Of equal ones only the first."""
    arms = {}
    for run in runs:
        exponent, loss = run["prior_exponent"], run["loss"]
        if exponent is not None:
            arms.setdefault((exponent, tuple(options_of(exponent, loss))), (exponent, loss))
    return list(arms.values())


def gains_over_plain(runs, setting, exponent, loss, name="balanced_knn"):
    """An accuracy minus the one of the uniform prior with the plain loss, per seed."""
    values = {(run["prior_exponent"], run["loss"], run["seed"]): run["results"][name]
              for run in runs if run["setting"] == setting}
    seeds = sorted({seed for *_, seed in values})
    return [values[exponent, loss, seed] - values[0, "plain", seed] for seed in seeds]


def count_seeds(runs):
    return len({run["seed"] for run in runs})


# ---- Command line --------------------------------------------------------------------------------
@command
def main(argv=None):
    parser = Parser("Which prior for long-tailed data? Section 5.2 of the paper on a laptop")
    add, power = parser.add_argument, number(float, 0, 4)
    several = {"nargs": "+", "action": Distinct}
    add("--data", default="glyphs", help="glyphs, CIFAR10, or a folder with train and test")
    add("--root", default="data", help="where torchvision keeps CIFAR10")
    add("--data_exponents", type=power, **several, default=[1.0],
        help="the classes have the frequencies k^-exponent")
    add("--contrasts", type=number(float, 0, 1), **several, default=[0.0],
        help="of the backgrounds that compete with the classes: 1 is as bright as the class (of "
             "photographs: the image disappears)")
    add("--prior_exponents", type=power, **several, default=[0.0, 0.25, 1.0],
        help="exponents of the priors, 0 is uniform")
    add("--losses", choices=LOSSES, **several, default=["plain", "relative"],
        help="options of the loss")
    add("--settings", choices=SETTINGS, **several, default=["default"],
        help="of the glyphs and their training")
    add("--classes", type=number(int, 3, 512), default=512, help="how many letters and signs")
    add("--prototypes", type=number(int, 2), default=64, help="number of prototypes")
    add("--out", type=folder, help="folder for results and figure, if not a new one in runs")
    add("--seeds", type=number(int, 0, 2_000_000_000), **several, default=[0], help="one run each")
    add("--images", type=number(int, 256), help="to train on (glyphs: 16,000, photographs: 5,800)")
    add("--epochs", type=number(int, 1), help="of training (glyphs: 12, photographs: 20)")
    add("--workers", type=number(int, 1, 1000), default=available_cores(), help="processes")
    add("--from_labels", action="store_true", help="start where labels lead")
    add("--quick", action="store_true", help="few images and models, in ten seconds")
    args = parser.parse_args(argv)
    if args.quick:
        args.data_exponents, args.prior_exponents = [1.0], [0.0, 1.0]
        args.images, args.epochs = 512, 1
    glyphs = args.data == "glyphs"
    name = "quick" if args.quick else Path(args.data).name
    args.out = args.out or Path("runs", f"which_prior_{name}")
    # 2,000 images of the most frequent of ten classes give 5,858 images with frequencies k^-1.
    args.images = args.images or (16_000 if glyphs else 5800)
    args.epochs = args.epochs or (12 if glyphs else 20)
    args.probe = len(args.settings) == 1
    if args.settings != ["default"] and (not glyphs or args.from_labels):
        parser.error("--settings is for glyphs, and not for --from_labels")
    if len(args.settings) > 1 and len(args.data_exponents) + len(args.contrasts) > 2:
        parser.error("several --settings need one of --data_exponents and one of --contrasts")
    if len(args.settings) > 1 and not (0 in args.prior_exponents and "plain" in args.losses):
        parser.error("several --settings are compared with --prior_exponents 0 --losses plain")
    try:
        if not glyphs:
            images, _, args.classes = load_photographs(args.data, args.root)
            if args.classes < 3:
                raise ValueError("there must be three classes or more: frequent, middle and rare")
            most = max(args.images * pmsn.power_law_prior(args.classes, exponent)[0].item()
                       for exponent in args.data_exponents)
            if round(most) > len(images) // args.classes:
                raise ValueError(f"--images {args.images} needs {most:.0f} images of the most "
                                 f"frequent class, and there are {len(images) // args.classes}")
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot load --data: {error}") from error
    if args.from_labels and args.prototypes != args.classes:
        parser.error(f"--from_labels needs one prototype per class: --prototypes {args.classes}")

    say("Images of a mini-batch that the rarest and the most frequent prototype expect "
        "(B * pi_k),\nand the KL to the prior if no class is split (greedy), in nats\n"
        "setting               prior    rarest   largest"
        + "".join(f"   classes k^-{exponent:g}" for exponent in args.data_exponents))
    for setting, exponent in itertools.product(args.settings, args.prior_exponents):
        options = {**DEFAULT, "prototypes": args.prototypes, **SETTINGS[setting]}
        prior = pmsn.power_law_prior(options["prototypes"], exponent)
        expected = options["batch_size"] * prior
        costs = [cost_of_whole_classes(pmsn.power_law_prior(args.classes, of_data), prior)
                 for of_data in args.data_exponents]
        say(f"{setting:20}{exponent:>7.2f}{expected.min():>10.2f}{expected.max():>10.1f}"
            + "".join(f"{cost:>15.3f}" for cost in costs))
    say("\nsetting             seed     data  contrast epoch    left")
    jobs = list(itertools.product(args.settings, args.seeds, args.data_exponents, args.contrasts))
    config = {name: value for name, value in vars(args).items() if name not in (
        "settings", "probe", "data_exponents", "contrasts", "out", "root", "seeds", "workers")}
    runs = run_or_continue(experiment, jobs, args, config, args.out / "which_prior.json")
    add_gains(runs)
    summary = summarize(runs, key=lambda run: tuple(run[name] for name in KIND))
    say(f"\nmean ± 95% interval over n = {number_of_seeds(summary)} seeds")
    columns = ["knn", "probe", "balanced_knn", "balanced_probe", "background_knn",
               *(f"gain_{name}" for name in GAINS)]
    columns = [name for name in columns if any(name in row for row in summary.values())]
    say("data contrast prior       loss" + "".join(f"{column:>20}" for column in columns)
        + "  prior met")
    for (setting, data_exponent, contrast, exponent, loss), row in summary.items():
        exponent = "" if exponent is None else f"{exponent:.2f}"
        say(f"{data_exponent:>4.2f}{contrast:>9.2f}{exponent:>6}{loss:>11}"
            + "".join(f"{cell(row, column, 'interval'):>20}" for column in columns)
            + f"  {met(row)}" + (f"  {setting}" if setting != "default" else ""))
    if len(args.settings) > 1:
        write_figure(args.out / "settings.png", plot_settings, runs)
    else:
        write_figure(args.out / "which_prior.png", plot, runs)
    say(f"which_prior.json and the figure are in {args.out}")


def cost_of_whole_classes(shares, prior):
    """KL(filled || prior) in nats if prototypes are filled with whole classes: (C,), (K,).

    The most frequent class comes first, and each goes to the prototype that lacks most. So the KL
    is an upper bound of the lowest one.
    """
    filled = torch.zeros_like(prior)
    for share in shares.sort(descending=True).values:
        filled[(prior - filled).argmax()] += share
    return (torch.xlogy(filled, filled) - filled * prior.log()).sum().item()


def met(row):
    """Whether the number of effective prototypes is within 10% of that of the prior."""
    if "prototypes_of_prior" not in row:
        return ""
    share = row["prototypes_of_all_images"]["mean"] / row["prototypes_of_prior"]["mean"]
    return "yes" if abs(share - 1) <= 0.1 else "no"


if __name__ == "__main__":
    main()
