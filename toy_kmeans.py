"""K-means and the hidden uniform prior: figure 1 of the paper, and four other losses.

The data are two long, narrow groups of points side by side. K-means finds the groups while they are
equally large. When one of them is much larger, K-means cuts it in two: this has a lower objective,
because K-means prefers clusters of equal size. SimCLR, VICReg, SwAV and MSN prefer them as well.
VICReg does so because our clusters lie at the corners of a regular simplex: if their embeddings are
whitened one-hot vectors, its variance and covariance terms are 0 for clusters of any sizes.
PMSN prefers the sizes of its prior. With the right prior, it finds the groups.

    python toy_kmeans.py             # half a minute on two cores, no data needed
    python toy_kmeans.py --quick     # a few seconds: 3 data sets instead of 20

The script prints the cluster sizes that each loss prefers, and then how well six methods find the
groups. It writes hidden_prior.png, kmeans.png and results.json to the folder --out. The same
command continues from there after a kill. The paper's propositions 1 to 4 say the same in formulas.
They are in tests/test_propositions.py.
"""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

import pmsn
from support.figures import POWER_LAW, UNIFORM, Figure, write_figure
from support.results import cell, number_of_seeds, run_or_continue, summarize
from support.runs import Parser, available_cores, command, folder, number, say

NUM_POINTS = 400
DISTANCE = 2.2  # between the groups, whose standard deviations are 0.25 across and 1 along
IMBALANCES = (1, 2, 5, 10, 20, 50)  # size of the large group : size of the small group
THREE_SHARES = pmsn.power_law_prior(3, 1.0)  # PMSN's prior for the hidden prior of three clusters
KMEANS = "#5c5c5c"  # the color of methods without a prior
METHODS = {  # name in the tables: label, color, line and marker in the figure
    "K-means": ("K-means", KMEANS, "-", "s"),
    "equal K-means": ("K-means, equal sizes", KMEANS, ":", "D"),
    "MSN": ("MSN (uniform prior)", UNIFORM, "-", "o"),
    "PMSN matched": ("PMSN (matched prior)", POWER_LAW, "-", "^"),
    "PMSN half": ("PMSN, half the exponent", POWER_LAW, "--", "v"),
    "PMSN 1.5x": ("PMSN, 1.5 times the exponent", POWER_LAW, ":", "<"),
}


# ---- Data ----------------------------------------------------------------------------------------
def two_groups(imbalance):
    """Points (N, 2) and their groups (N,): 0 is the large group, 1 the small group."""
    small = round(NUM_POINTS / (1 + imbalance))
    groups = (torch.arange(NUM_POINTS) >= NUM_POINTS - small).long()
    points = torch.randn(NUM_POINTS, 2) * torch.tensor([0.25, 1.0])
    points[:, 0] += DISTANCE * groups
    return points, groups


# ---- K-means and PMSN: the best of several starts ------------------------------------------------
def kmeans(points, k, *, starts=20, equal_sizes=False):
    """Lloyd's algorithm: points (N, d) -> clusters (N,) and their objective."""
    # All starts run side by side. The first centroids of a start are k different points.
    chosen = torch.rand(starts, len(points)).argsort(dim=1)[:, :k]
    centroids = points[chosen]  # (starts, K, d)
    lowest = torch.full((starts,), math.inf)
    while True:
        distances = (points[:, None] - centroids[:, None]).square().sum(dim=3)  # (starts, N, K)
        clusters = distances.argmin(dim=2)  # (starts, N)
        if equal_sizes:
            # For k = 2: the half that would lose most in cluster 1 goes to cluster 0.
            preference = distances[:, :, 0] - distances[:, :, 1]
            clusters = (preference > preference.median(dim=1, keepdim=True).values).long()
        objective = distances.gather(2, clusters[:, :, None]).sum(dim=(1, 2))  # (starts,)
        if not (objective < lowest).any():
            break
        lowest = objective.minimum(lowest)
        member = F.one_hot(clusters, k).to(points.dtype)  # (starts, N, K)
        sizes = member.sum(dim=1)[:, :, None]  # (starts, K, 1)
        # A cluster without points keeps its centroid.
        centroids = torch.where(sizes > 0, member.mT @ points / sizes, centroids)
    best = objective.argmin()
    return clusters[best], objective[best].item()


def fit_pmsn(points, prior, *, starts=8, steps=15, noise=0.15):
    """PMSN with a linear encoder on D data sets: points (D, N, 2), prior (2,) -> clusters (D, N).

    A run is one start on one data set. All R = D * starts runs train side by side, because one
    large tensor is much faster than many small ones. Their results are those of a loop over runs.
    """
    points = points - points.mean(dim=1, keepdim=True)
    # Each start cuts the points along a line in a new direction, into the prior's sizes.
    # The embedding of a point is (its signed distance to the line, 1).
    angles = 2 * math.pi * (torch.rand(len(points), 1) + torch.arange(starts) / starts)
    directions = torch.stack([angles.cos(), angles.sin()], dim=2)  # (D, starts, 2)
    thresholds = torch.quantile(points @ directions.mT, prior[0], dim=1)  # (D, starts)
    weights = torch.stack([directions, torch.zeros_like(directions)], dim=2).flatten(0, 1)
    biases = torch.stack([-thresholds, torch.ones_like(thresholds)], dim=2).flatten(0, 1)
    prototypes = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).repeat(len(weights), 1, 1)
    parameters = [weights, biases, prototypes]  # (R, 2, 2), (R, 2), (R, 2, 2)
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.SGD(parameters, lr=0.3, momentum=0.8)

    points = points.repeat_interleave(starts, dim=0)  # (R, N, 2)
    losses_of = torch.vmap(pmsn.pmsn_loss, in_dims=(0, 0, 0, None))  # All runs share the prior.
    for _ in range(steps):
        # Two views of a point are the point plus two different noises.
        anchors = encode(points + noise * torch.randn_like(points), weights, biases)
        targets = encode(points + noise * torch.randn_like(points), weights, biases)
        losses, _ = losses_of(anchors, targets, prototypes, prior)  # (R,)
        optimizer.zero_grad()
        # A run's parameters are in its own loss only. So the gradient of the sum has the gradients
        # of all runs, and no run changes another one.
        losses.sum().backward()
        optimizer.step()

    # The start whose last loss is lowest gives the clusters of a data set.
    cosines = torch.vmap(pmsn.cosine)(encode(points, weights, biases), prototypes)  # (R, N, 2)
    clusters = cosines.argmax(dim=2).unflatten(0, (-1, starts))  # (D, starts, N)
    best = losses.unflatten(0, (-1, starts)).argmin(dim=1)  # (D,)
    return clusters[torch.arange(len(best)), best]


def encode(points, weights, biases):
    """A linear encoder per run: (R, N, 2), (R, 2, 2), (R, 2) -> (R, N, 2)."""
    return points @ weights.mT + biases[:, None]


def find_clusters(imbalance, seeds):
    """Data sets, one per seed, and their clusters by all methods.

    Returns points (D, N, 2), groups (N,), which are the same for all of them, and
    {method: clusters (D, N)}.
    """
    data_sets, of_kmeans, of_equal_kmeans = [], [], []
    for seed in seeds:
        torch.manual_seed(seed)
        points, groups = two_groups(imbalance)
        data_sets.append(points)
        of_kmeans.append(kmeans(points, 2)[0])
        of_equal_kmeans.append(kmeans(points, 2, equal_sizes=True)[0])
    points = torch.stack(data_sets)
    # Over two prototypes, the power law with this exponent has the shares imbalance : 1.
    exponent = math.log2(imbalance)
    return points, groups, {
        "K-means": torch.stack(of_kmeans),
        "equal K-means": torch.stack(of_equal_kmeans),
        "MSN": fit_pmsn(points, pmsn.power_law_prior(2, 0.0)),
        "PMSN matched": fit_pmsn(points, pmsn.power_law_prior(2, exponent)),
        "PMSN half": fit_pmsn(points, pmsn.power_law_prior(2, 0.5 * exponent)),
        "PMSN 1.5x": fit_pmsn(points, pmsn.power_law_prior(2, 1.5 * exponent)),
    }


# ---- Agreement with the true groups --------------------------------------------------------------
def adjusted_rand_index(first, second):
    """Agreement of two partitions (N,): 1 if they are the same, 0 on average if they are random."""
    # How many pairs of points are together in both partitions, and in each? (Hubert and Arabie,
    # 1985.) The table has the number of points in cluster k of the first and l of the second.
    table = (F.one_hot(first).T @ F.one_hot(second)).double()  # (K, L)
    counts = (table, table.sum(dim=1), table.sum(dim=0))
    both, in_first, in_second = [(n * (n - 1) / 2).sum().item() for n in counts]
    expected = in_first * in_second / math.comb(len(first), 2)
    largest = (in_first + in_second) / 2
    return 1.0 if largest == expected else (both - expected) / (largest - expected)


# ---- The hidden prior: the cluster sizes that each loss prefers ----------------------------------
def simplex(k):
    """The corners of a regular simplex: k unit vectors (K, K - 1) with equal angles, float64."""
    _, vectors = torch.linalg.eigh(torch.eye(k, dtype=torch.float64) - 1 / k)
    return vectors[:, 1:] * math.sqrt(k / (k - 1))


def volume_terms(sizes, prior):
    """The term of each loss that prevents collapse, for clusters of these sizes: {loss: number}."""
    k = len(prior)
    # All images of a cluster have the same embedding in both views. It is a corner of a simplex.
    # The prototypes are the corners too.
    corners = simplex(k)
    z = corners.repeat_interleave(sizes, dim=0)  # (N, K - 1)
    _, simclr = pmsn.simclr_loss(z, z)
    # VICReg asks for unit variance. With this scale, clusters of equal size have it. Variances
    # are divided by N - 1, and vicreg_loss adds 1e-4.
    # It prefers equal sizes only because the corners are fixed: whitened one-hot vectors have unit
    # variances and no covariances for clusters of any sizes.
    scale = math.sqrt((k - 1) * (1 - 1e-4) * (len(z) - 1) / len(z))
    _, vicreg = pmsn.vicreg_loss(scale * z, scale * z)
    # SwAV has no such term. Its codes have equal sizes, so we take the whole loss. Clusters as
    # clear as these need a large epsilon, or Sinkhorn takes thousands of iterations.
    swav, _ = pmsn.swav_loss(z, z, corners, epsilon=0.5, sinkhorn_iterations=25)
    _, uniform = pmsn.pmsn_loss(z, z, corners, pmsn.power_law_prior(k, 0.0))
    _, matched = pmsn.pmsn_loss(z, z, corners, prior)
    return {
        "SimCLR": simclr["uniformity"].item(),
        "VICReg": (25 * vicreg["variance"] + vicreg["covariance"]).item(),
        "SwAV": swav.item(),
        "MSN": uniform["prior_kl"].item(),
        "PMSN": matched["prior_kl"].item(),
    }


def preferred_shares(prior):
    """The shares of three clusters at which the term of each loss is smallest: {loss: [...]}."""
    # Two cuts divide 33 points into three clusters. We try all of them. The uniform sizes
    # (11, 11, 11) and the sizes of a prior with exponent 1, (18, 9, 6), are among them.
    cuts = itertools.combinations(range(1, 33), 2)
    sizes = [torch.tensor([0, *cut, 33]).diff() for cut in cuts]
    terms = [volume_terms(n, prior) for n in sizes]
    best = {loss: np.argmin([row[loss] for row in terms]) for loss in terms[0]}
    return {loss: (sizes[place] / 33).tolist() for loss, place in best.items()}


# ---- The runs of a job ---------------------------------------------------------------------------
def experiment(imbalance, args):
    """A run per method and data set with this imbalance.

    The imbalance None stands for the hidden prior: a run per loss.
    """
    torch.set_num_threads(1)  # The tensors are small, and the jobs are side by side.
    if imbalance is None:
        names = ("share_1", "share_2", "share_3")
        return [{"loss": loss, "results": dict(zip(names, shares))}
                for loss, shares in preferred_shares(THREE_SHARES).items()]
    _, groups, found = find_clusters(imbalance, args.seeds)
    return [{"seed": seed, "method": method, "imbalance": imbalance,
             "results": {"adjusted_rand_index": adjusted_rand_index(groups, clusters)}}
            for method, of_data_sets in found.items()
            for seed, clusters in zip(args.seeds, of_data_sets)]


# ---- Figures -------------------------------------------------------------------------------------
def plot_kmeans(summary, imbalance, seed):
    """Figure 1 of the paper with two more columns, and the mean scores over all imbalances.

    The clusters of the data set `seed` are not in the file of results. They are found once more
    here, and the noise of MSN and PMSN is another one.
    """
    figure = Figure(figsize=(12, 6.8), layout="constrained")
    grid = figure.add_gridspec(2, 4, width_ratios=[1, 1, 1, 3.2])
    for row, ratio in enumerate((1, imbalance)):
        data_sets, groups, found = find_clusters(ratio, [seed])
        points = data_sets[0]
        for column, method in enumerate(("K-means", "MSN", "PMSN matched")):
            label, color, _, _ = METHODS[method]
            clusters = found[method][0]
            axes = figure.add_subplot(grid[row, column])
            # The cluster of the rightmost point is filled.
            filled = clusters == clusters[points[:, 0].argmax()]
            axes.scatter(*points[~filled].T, s=14, facecolor="white", edgecolor=color, lw=0.7)
            axes.scatter(*points[filled].T, s=18, color=color, marker="^", lw=0)
            axes.axvline(DISTANCE / 2, color="black", linestyle=":")
            axes.set(xlim=(-1.4, 3.6), ylim=(-3.6, 3.6), xticks=[], yticks=[], aspect="equal")
            axes.set_title(label.replace(" (", "\n("), color=color)
            score = f"{adjusted_rand_index(groups, clusters):.2f}".replace("-0.00", "0.00")
            axes.set_xlabel(f"groups {ratio:g} : 1\nadjusted Rand {score}")

    axes = figure.add_subplot(grid[:, 3])
    ratios = sorted({ratio for _, ratio in summary})
    seeds = number_of_seeds(summary)
    for method, (label, color, line, marker) in METHODS.items():
        scores = [summary[method, ratio]["adjusted_rand_index"] for ratio in ratios]
        errors = [score["std"] / math.sqrt(seeds) for score in scores]
        axes.errorbar(ratios, [score["mean"] for score in scores], errors, color=color,
                      linestyle=line, marker=marker, label=label, capsize=2)
    axes.set(xscale="log", ylim=(-0.05, 1.28), yticks=np.arange(0, 1.1, 0.2),
             xlabel="size of the large group : size of the small group",
             title="Agreement with the true groups: adjusted Rand index,\n"
             f"mean ± standard error over {seeds} data sets")
    axes.set_xticks(ratios, [f"{ratio:g}:1" for ratio in ratios])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="upper center", ncols=2)
    figure.suptitle("When one group is much larger, K-means and MSN cut it in two. "
                    "PMSN with a matched prior finds the groups.", fontsize=14)
    figure.supxlabel("The dotted line is the true border. Filled and open points are the clusters.")
    return figure


def plot_hidden_prior():
    """The term that prevents collapse, over the share of the first of two clusters."""
    percent = np.arange(2, 99)
    prior = torch.tensor([0.8, 0.2])
    rows = [volume_terms(torch.tensor([n, 100 - n]), prior) for n in percent]
    # The curves of SimCLR and MSN are nearly the same, so SimCLR's is wide.
    styles = {"SimCLR": ("#b8a1d9", 7), "VICReg": ("#3c9d4e", 2), "SwAV": ("#e08e2b", 2),
              "MSN": (UNIFORM, 2), "PMSN": (POWER_LAW, 3)}
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for method, (color, width) in styles.items():
        values = np.array([row[method] for row in rows])
        values = (values - values.min()) / (values.max() - values.min())
        best = percent[values.argmin()] / 100
        axes.plot(percent / 100, values, color=color, linewidth=width,
                  label=f"{method}: smallest at {best:.2f}")
        axes.plot(best, 0, "o", color=color, markersize=9, clip_on=False, zorder=5)
    axes.set(xlabel="share of the images in the first of two clusters\n(embeddings are +1 and -1; "
             "VICReg has no preference if they are whitened)", xlim=(0, 1),
             ylabel="term that prevents collapse, scaled to 0..1", ylim=(0, 1.02))
    axes.legend(frameon=False, loc="upper center")
    axes.set_title("Four losses prefer two clusters of equal size.\n"
                   "PMSN prefers the shares of its prior, here 0.8 and 0.2.")
    return figure


# ---- Command line --------------------------------------------------------------------------------
@command
def main(argv=None):
    parser = Parser("K-means and the hidden uniform prior of five losses: figure 1 of the paper")
    add = parser.add_argument
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of the first data set")
    add("--imbalance", type=number(float, 1, 100), default=10,
        help="imbalance in the second row of the figure")
    add("--out", type=folder, default="runs/kmeans", help="folder for results and figures")
    add("--workers", type=number(int, 1, 1000), default=available_cores(), help="processes")
    add("--quick", action="store_true", help="use 3 data sets, 2 imbalances")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # For the figures: threads would wait for each other.
    args.seeds = list(range(args.seed, args.seed + (3 if args.quick else 20)))
    imbalances = sorted({*((1, 10) if args.quick else IMBALANCES), args.imbalance})
    config = {"seed": args.seed, "quick": args.quick, "prior": THREE_SHARES.tolist()}
    jobs = [(imbalance,) for imbalance in (None, *imbalances)]
    runs = run_or_continue(experiment, jobs, args, config, args.out / "results.json")

    say("\nShares of three clusters at which the term that prevents collapse is smallest")
    for run in runs:
        if "loss" in run:
            say(f"{run['loss']:<7}", *[f"{share:.3f}" for share in run["results"].values()])
    summary = summarize([run for run in runs if "method" in run],
                        key=lambda run: (run["method"], run["imbalance"]))
    say("\nAdjusted Rand index with the true groups: mean ± std over "
        f"{number_of_seeds(summary)} data sets")
    say(f"{'groups':<7}" + "".join(f"{method:>16}" for method in METHODS))
    for ratio in imbalances:
        cells = [cell(summary[method, ratio], "adjusted_rand_index") for method in METHODS]
        say(f"{f'{ratio:g}:1':<7}" + "".join(f"{text:>16}" for text in cells))

    write_figure(args.out / "hidden_prior.png", plot_hidden_prior)
    write_figure(args.out / "kmeans.png", plot_kmeans, summary, args.imbalance, args.seed)
    say(f"\nresults.json, hidden_prior.png and kmeans.png are in {args.out}")


if __name__ == "__main__":
    main()
