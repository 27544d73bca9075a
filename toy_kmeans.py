"""K-means and the hidden uniform prior: figure 1 of the paper, and four other losses.

The data are two long, narrow groups of points side by side. K-means finds the groups while they are
equally large. When one of them is much larger, K-means cuts it in two: this has a lower objective,
because K-means prefers clusters of equal size. SimCLR, VICReg, SwAV and MSN prefer them as well.
VICReg does so because our clusters lie at the corners of a regular simplex: if their embeddings are
whitened one-hot vectors, its variance and covariance terms are 0 for clusters of any sizes.
PMSN prefers the sizes of its prior. With the right prior, it finds the groups.

    python toy_kmeans.py             # one to three minutes on one core, no data needed
    python toy_kmeans.py --quick     # a few seconds: 3 data sets instead of 20

The script prints the cluster sizes that each loss prefers, and then how well six methods find the
groups. It writes hidden_prior.png, kmeans.png and results.json to the folder --out. The paper's
propositions 1 to 4 say the same in formulas. They are in tests/test_propositions.py.
"""

import argparse
import itertools
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import pmsn
from experiments import Figure, made_by, number, print_any_text, save

NUM_POINTS = 400
DISTANCE = 2.2  # between the groups, whose standard deviations are 0.25 across and 1 along
IMBALANCES = (1, 2, 5, 10, 20, 50)  # size of the large group : size of the small group
POWER_LAW, UNIFORM, KMEANS = "#d1495b", "#30638e", "#5c5c5c"  # one color per prior in all figures
METHODS = {  # column of the table: label, color, line and marker in the figure
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
    best_objective, best_clusters = math.inf, None
    for _ in range(starts):
        centroids = points[torch.randperm(len(points))[:k]]  # (K, d)
        objective = math.inf
        while True:
            distances = (points[:, None] - centroids).square().sum(dim=2)  # (N, K)
            clusters = distances.argmin(dim=1)
            if equal_sizes:
                # For k = 2: the half that would lose most in cluster 1 goes to cluster 0.
                preference = distances[:, 0] - distances[:, 1]
                clusters = (preference > preference.median()).long()
            previous, objective = objective, distances.gather(1, clusters[:, None]).sum().item()
            if objective >= previous:
                break
            # A cluster without points keeps its centroid.
            for cluster in clusters.unique():
                centroids[cluster] = points[clusters == cluster].mean(dim=0)
        if objective < best_objective:
            best_objective, best_clusters = objective, clusters
    return best_clusters, best_objective

def fit_pmsn(points, prior, *, starts=8, steps=15, noise=0.15):
    """PMSN with a linear encoder: points (N, 2), prior (2,) -> clusters (N,)."""
    points = points - points.mean(dim=0)
    best_loss, best_clusters = math.inf, None
    first_angle = 2 * math.pi * torch.rand(())
    for start in range(starts):
        # Each start cuts the points along a line in a new direction, into the prior's sizes.
        # The embedding of a point is (its signed distance to the line, 1).
        angle = first_angle + 2 * math.pi * start / starts
        direction = torch.stack([angle.cos(), angle.sin()])
        threshold = torch.quantile(points @ direction, prior[0])
        encoder = nn.Linear(2, 2)
        encoder.weight.data = torch.stack([direction, torch.zeros(2)])
        encoder.bias.data = torch.stack([-threshold, torch.ones(())])
        prototypes = nn.Parameter(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
        optimizer = torch.optim.SGD([*encoder.parameters(), prototypes], lr=0.3, momentum=0.8)

        for _ in range(steps):
            # Two views of a point are the point plus two different noises.
            anchors = encoder(points + noise * torch.randn_like(points))
            targets = encoder(points + noise * torch.randn_like(points))
            loss, _ = pmsn.pmsn_loss(anchors, targets, prototypes, prior)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        # The start whose last loss is lowest gives the clusters.
        if loss < best_loss:
            best_loss = loss.item()
            best_clusters = pmsn.cosine(encoder(points), prototypes).argmax(dim=1)
    return best_clusters

# ---- Agreement with the true groups --------------------------------------------------------------
def adjusted_rand_index(first, second):
    """Agreement of two partitions (N,): 1 if they are the same, 0 on average if they are random."""
    # Which pairs of points does each partition put together? (Hubert and Arabie, 1985)
    i, j = torch.triu_indices(len(first), len(first), offset=1)
    first = (first[i] == first[j]).double()
    second = (second[i] == second[j]).double()
    both = (first * second).mean()
    expected = first.mean() * second.mean()
    largest = (first.mean() + second.mean()) / 2
    return 1.0 if largest == expected else ((both - expected) / (largest - expected)).item()

def sweep(imbalances, seeds):
    """Cluster data sets with all methods, and print the agreement with the true groups.

    Returns scores {method: {imbalance: [...]}} and examples {imbalance: (points, clusters)}.
    """
    scores = {method: {ratio: [] for ratio in imbalances} for method in METHODS}
    examples = {}
    began = time.time()
    print(f"\nAdjusted Rand index with the true groups: mean ± std over {len(seeds)} data sets")
    print(f"{'groups':<7}" + "".join(f"{method:>14}" for method in METHODS))
    for done, ratio in enumerate(imbalances, 1):
        # Over two prototypes, the power law with this exponent has the shares ratio : 1.
        exponent = math.log2(ratio)
        for seed in seeds:
            torch.manual_seed(seed)
            points, groups = two_groups(ratio)
            found = {
                "K-means": kmeans(points, 2)[0],
                "equal K-means": kmeans(points, 2, equal_sizes=True)[0],
                "MSN": fit_pmsn(points, pmsn.power_law_prior(2, 0.0)),
                "PMSN matched": fit_pmsn(points, pmsn.power_law_prior(2, exponent)),
                "PMSN half": fit_pmsn(points, pmsn.power_law_prior(2, 0.5 * exponent)),
                "PMSN 1.5x": fit_pmsn(points, pmsn.power_law_prior(2, 1.5 * exponent)),
            }
            examples.setdefault(ratio, (points, found))
            for method, clusters in found.items():
                scores[method][ratio].append(adjusted_rand_index(groups, clusters))

        row = [scores[method][ratio] for method in METHODS]
        cells = [f"{np.mean(x):>7.2f} ± {np.std(x, ddof=1):.2f}" for x in row]
        left = (time.time() - began) / done * (len(imbalances) - done)
        print(f"{f'{ratio:g}:1':<7}" + "".join(cells) + f"  {left:3.0f} s left", flush=True)
    return scores, examples

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

# ---- Figures -------------------------------------------------------------------------------------
def plot_kmeans(scores, examples, imbalance, path):
    """Figure 1 of the paper with two more columns, and the scores over all imbalances."""
    figure = Figure(figsize=(12, 6.8), layout="constrained")
    grid = figure.add_gridspec(2, 4, width_ratios=[1, 1, 1, 3.2])
    for row, ratio in enumerate((1, imbalance)):
        points, found = examples[ratio]
        for column, method in enumerate(("K-means", "MSN", "PMSN matched")):
            label, color, _, _ = METHODS[method]
            axes = figure.add_subplot(grid[row, column])
            # The cluster of the rightmost point is filled.
            filled = found[method] == found[method][points[:, 0].argmax()]
            axes.scatter(*points[~filled].T, s=14, facecolor="white", edgecolor=color, lw=0.7)
            axes.scatter(*points[filled].T, s=18, color=color, marker="^", lw=0)
            axes.axvline(DISTANCE / 2, color="black", linestyle=":")
            axes.set(xlim=(-1.4, 3.6), ylim=(-3.6, 3.6), xticks=[], yticks=[], aspect="equal")
            axes.set_title(label.replace(" (", "\n("), color=color)
            score = f"{scores[method][ratio][0]:.2f}".replace("-0.00", "0.00")
            axes.set_xlabel(f"groups {ratio:g} : 1\nadjusted Rand {score}")

    axes = figure.add_subplot(grid[:, 3])
    for method, (label, color, line, marker) in METHODS.items():
        ratios = list(scores[method])
        values = np.array(list(scores[method].values()))  # (imbalances, seeds)
        error = values.std(axis=1, ddof=1) / math.sqrt(values.shape[1])
        axes.errorbar(ratios, values.mean(axis=1), error, color=color, linestyle=line,
                      marker=marker, label=label, capsize=2)
    axes.set(xscale="log", ylim=(-0.05, 1.28), yticks=np.arange(0, 1.1, 0.2),
             xlabel="size of the large group : size of the small group",
             title="Agreement with the true groups: adjusted Rand index,\n"
             f"mean ± standard error over {values.shape[1]} data sets")
    axes.set_xticks(ratios, [f"{ratio:g}:1" for ratio in ratios])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="upper center", ncols=2)
    figure.suptitle("When one group is much larger, K-means and MSN cut it in two. "
                    "PMSN with a matched prior finds the groups.", fontsize=14)
    figure.supxlabel("The dotted line is the true border. Filled and open points are the clusters.")
    figure.savefig(path, dpi=130)

def plot_hidden_prior(path):
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
    figure.savefig(path, dpi=130)

# ---- Command line --------------------------------------------------------------------------------
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0,
                        help="seed of the first data set (default: %(default)s)")
    parser.add_argument("--imbalance", type=number(float, 1, 100), default=10,
                        help="imbalance in the figure's second row (default: %(default)s)")
    parser.add_argument("--out", type=Path, default="runs/kmeans",
                        help="folder for results and figures (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="use 3 data sets, 2 imbalances")
    args = parser.parse_args(argv)
    began, maker = time.time(), made_by()
    torch.set_num_threads(1)  # The tensors are small, and threads would wait for each other.
    seeds = list(range(args.seed, args.seed + (3 if args.quick else 20)))
    imbalances = sorted({*((1, 10) if args.quick else IMBALANCES), args.imbalance})
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        # If we cannot write here, the user should know it before the sweep.
        tempfile.TemporaryFile(dir=args.out).close()

        # Two cuts divide 33 points into three clusters. We try all of them. The uniform sizes
        # (11, 11, 11) and the prior's sizes (18, 9, 6) are among them.
        prior = pmsn.power_law_prior(3, 1.0)
        cuts = itertools.combinations(range(1, 33), 2)
        sizes = [torch.tensor([0, *cut, 33]).diff() for cut in cuts]
        terms = [volume_terms(n, prior) for n in sizes]
        print("Shares of three clusters at which the term that prevents collapse is smallest")
        preferred = {}
        for method in terms[0]:
            best = np.argmin([row[method] for row in terms])
            preferred[method] = (sizes[best] / 33).tolist()
            print(f"{method:<7}", *[f"{share:.3f}" for share in preferred[method]])

        scores, examples = sweep(imbalances, seeds)
        results = {"config": vars(args), "made_by": [maker],
                   "seconds": round(time.time() - began), "adjusted_rand_index": scores,
                   "preferred_shares": preferred, "prior": prior.tolist()}
        save(results, args.out / "results.json")
        plot_hidden_prior(args.out / "hidden_prior.png")
        plot_kmeans(scores, examples, args.imbalance, args.out / "kmeans.png")
    except OSError as error:
        parser.error(f"cannot write to --out {args.out} ({error}). Choose another folder")
    print(f"\n{args.out}: hidden_prior.png kmeans.png results.json")

if __name__ == "__main__":
    print_any_text()
    main()
