"""K-means and the hidden uniform prior with bare eyes: figure 1 of the paper and its propositions 1 to 4.

Two long, narrow groups of points side by side. While both are equally large K-means finds them. When one is much
larger K-means cuts it in two, across its longer side: of all partitions that one has the lowest objective, because
K-means likes clusters of equal size. SimCLR, VICReg, SwAV and MSN have inherited that liking through the term that
keeps their embeddings from collapsing. PMSN names the sizes it wants, and finds the groups again.

    python toy_kmeans.py             # under ten seconds, no data
    python toy_kmeans.py --quick     # fewer data sets

Writes kmeans.png, hidden_prior.png and results.json to --out, and prints the sweep, where the loss of each method has
its minimum, and both sides of every proposition. The paper's statements are known to us in words only (see each
`proposition_*`): what is checked here is what we state and prove there.
"""

import argparse
import itertools
import json
import math
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

import pmsn

POWER_LAW, UNIFORM, KMEANS = "#d1495b", "#30638e", "#5c5c5c"  # colours, the same in every figure
IMBALANCES = (1, 2, 5, 10, 20, 50)  # size of the large group : size of the small one
DISTANCE = 2.2  # between the groups, in standard deviations of their longer side
CURVES = [("K-means", KMEANS, "-", "s"), ("MSN (uniform prior)", UNIFORM, "-", "o"),
          ("PMSN, matched prior", POWER_LAW, "-", "^"), ("PMSN, half the exponent", POWER_LAW, "--", "v"),
          ("PMSN, 1.5 times the exponent", POWER_LAW, ":", "<"), ("K-means, equal sizes", KMEANS, ":", "D")]


class UserError(Exception):
    """Something the user can put right: one line, exit status 2."""


# ---- Data and methods: S data sets at once ---------------------------------------------------------------------------


def two_groups(num_points, imbalance, seed):
    """Points (N, 2) and their groups (N,): normal, four times as long as wide, side by side, sizes imbalance : 1."""
    small = max(1, round(num_points / (1 + imbalance)))
    groups = (torch.arange(num_points) >= num_points - small).long()
    points = torch.randn(num_points, 2, generator=torch.Generator().manual_seed(seed)) * torch.tensor([0.25, 1.0])
    points[:, 0] += DISTANCE * groups
    return points, groups


def kmeans(points, k, generator, *, sizes=None, starts=10, iterations=100):
    """Lloyd's K-means: points (S, N, d) -> clusters (S, N), objective (S,); of several starts the best.

    With `sizes`, a pair, each step takes the cheapest assignment in which the two clusters have these sizes."""
    first = torch.rand(len(points), starts, points.shape[1], generator=generator).topk(k).indices  # (S, R, K)
    centroids = points[torch.arange(len(points))[:, None, None], first]  # (S, R, K, d)
    clusters = None
    for _ in range(iterations):
        distance = (points[:, None, :, None] - centroids[:, :, None]).square().sum(dim=-1)  # (S, R, N, K)
        before, clusters = clusters, distance.argmin(dim=-1)
        if sizes is not None:  # those that lose most in the second cluster go to the first
            rank = (distance[..., 0] - distance[..., 1]).argsort(dim=-1).argsort(dim=-1)
            clusters = (rank >= sizes[0]).long()
        objective = distance.gather(-1, clusters[..., None]).sum(dim=(-1, -2))  # (S, R)
        if before is not None and bool((clusters == before).all()):
            break
        member = F.one_hot(clusters, k).to(points)
        count = member.sum(dim=-2)[..., None]
        centroids = torch.where(count > 0, member.mT @ points[:, None] / count.clamp_min(1), centroids)
    objective, best = objective.min(dim=1)
    return clusters[torch.arange(len(points)), best], objective


def fit_pmsn(points, prior, generator, *, starts=12, steps=30, batch_size=128, noise=0.15, lr=0.1):
    """PMSN with a linear encoder: points (S, N, 2) -> clusters (S, N); of several starts that of lowest loss.

    Each start cuts every data set by a straight line in a direction of its own, into shares of the prior's sizes.
    Views are points with normal noise, the loss is `pmsn.pmsn_loss` as it stands; the uniform prior makes it MSN."""
    num_sets, num_points = points.shape[:2]
    points = points - points.mean(dim=1, keepdim=True)
    angle = 2 * math.pi * torch.arange(starts) / starts
    direction = torch.stack([angle.cos(), angle.sin()])  # (2, R)
    threshold = torch.quantile(points @ direction, prior[0].item(), dim=1)  # (S, R)
    points = points.repeat_interleave(starts, dim=0)  # (S*R, N, 2)
    weights = torch.stack([direction.T, torch.zeros(starts, 2)], dim=-1).repeat(num_sets, 1, 1)  # (S*R, 2, 2)
    bias = torch.stack([-threshold.flatten(), torch.ones(len(points))], dim=-1)[:, None]  # (S*R, 1, 2)
    prototypes = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).repeat(len(points), 1, 1)  # (S*R, 2, 2)
    parameters = [x.requires_grad_() for x in (weights, bias, prototypes)]
    loss = torch.func.vmap(lambda anchors, targets, q: pmsn.pmsn_loss(anchors, targets, q, prior)[0])  # (S*R,)

    def view(x):
        return (x + noise * torch.randn(x.shape, generator=generator)) @ weights + bias

    velocities = [torch.zeros_like(x) for x in parameters]
    for step in range(steps):  # gradient descent with momentum and a cosine learning rate
        batch = points[:, torch.randint(num_points, (batch_size,), generator=generator)]
        gradients = torch.autograd.grad(loss(view(batch), view(batch), prototypes).sum(), parameters)
        rate = lr * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        with torch.no_grad():
            for x, velocity, gradient in zip(parameters, velocities, gradients):
                x -= rate * velocity.mul_(0.8).add_(gradient)
    with torch.no_grad():
        best = loss(view(points), view(points), prototypes).view(num_sets, starts).argmin(dim=1)
        similarity = pmsn.on_sphere(points @ weights + bias) @ pmsn.on_sphere(prototypes).mT
    return similarity.argmax(dim=-1).view(num_sets, starts, -1)[torch.arange(num_sets), best]


def adjusted_rand_index(first, second):
    """Agreement of two partitions, (N,) integers each: 1 for the same one, 0 expected of a random one.

    Hubert and Arabie (1985)."""
    def pairs(counts):
        return (counts * (counts - 1) / 2).sum()

    first, second = np.asarray(first), np.asarray(second)
    table = np.zeros((first.max() + 1, second.max() + 1))
    np.add.at(table, (first, second), 1)
    a, b = pairs(table.sum(axis=1)), pairs(table.sum(axis=0))
    expected, most = a * b / pairs(table.sum()), (a + b) / 2
    return 1.0 if most == expected else (pairs(table) - expected) / (most - expected)


def sweep(num_points, seeds, imbalances):
    """Adjusted Rand index with the true groups: {method: {imbalance: [one a seed]}}, and the clusters themselves."""
    scores, shown = {}, {}
    for imbalance in imbalances:
        data = [two_groups(num_points, imbalance, seed) for seed in seeds]
        points, groups = torch.stack([x for x, _ in data]), data[0][1]
        exponent = math.log2(imbalance)  # of the power law over two prototypes that is imbalance : 1
        half, generator = num_points // 2, torch.Generator().manual_seed(seeds[0])
        found = {"K-means": kmeans(points, 2, generator)[0],
                 "K-means, equal sizes": kmeans(points, 2, generator, sizes=(half, num_points - half))[0]}
        fits = {}
        for name, factor in (("MSN (uniform prior)", 0), ("PMSN, half the exponent", 0.5),
                             ("PMSN, matched prior", 1), ("PMSN, 1.5 times the exponent", 1.5)):
            if exponent * factor not in fits:  # at 1:1 all four are the same
                prior = pmsn.power_law_prior(2, exponent * factor)
                fits[exponent * factor] = fit_pmsn(points, prior, torch.Generator().manual_seed(seeds[0]))
            found[name] = fits[exponent * factor]
        for name, clusters in found.items():
            scores.setdefault(name, {})[imbalance] = [adjusted_rand_index(groups, c) for c in clusters]
        shown[imbalance] = {"points": points[0], **{name: clusters[0] for name, clusters in found.items()}}
    return scores, shown


# ---- The hidden prior: which sizes the collapse-preventing term of each loss likes best ------------------------------


def simplex(k):
    """K unit vectors (K, K-1) with equal angles between them, float64; +-1 for K = 2."""
    _, vectors = torch.linalg.eigh(torch.eye(k, dtype=torch.float64) - 1 / k)
    return vectors[:, 1:] * math.sqrt(k / (k - 1))


def volume_terms(prior):
    """What keeps each loss from collapsing, as a function of cluster sizes: {method: sizes (K,) -> number}.

    All embeddings of a cluster are the same vertex of a simplex, both views agree, and prototypes are the vertices: the
    rest of each loss is constant. For SwAV, whose volume term is the equal sizes of its codes, the term is the loss.
    VICReg's vertices are scaled so that equal sizes give unit variance."""
    k, vertices = len(prior), simplex(len(prior))

    def vicreg(sizes):
        z = vertices.repeat_interleave(sizes, dim=0)
        unit_variance = math.sqrt((k - 1) * (1 - 1e-4) * (len(z) - 1) / len(z))  # 1e-4: in vicreg_loss's root
        _, terms = pmsn.vicreg_loss(z * unit_variance, z * unit_variance)
        return (25 * terms["variance"] + terms["covariance"]).item()

    def on_vertices(loss, pick):
        def term(sizes):
            z = vertices.repeat_interleave(sizes, dim=0)
            return pick(*loss(z, z)).item()
        return term

    def prior_kl(pi):
        return on_vertices(lambda z, _: pmsn.pmsn_loss(z, z, vertices, pi), lambda _, terms: terms["prior_kl"])

    def swav(z, _):  # SwAV's own epsilon of .05 would take Sinkhorn thousands of iterations on such clean clusters
        return pmsn.swav_loss(z, z, vertices, epsilon=0.5, sinkhorn_iterations=25)

    return {"SimCLR": on_vertices(pmsn.simclr_loss, lambda _, terms: terms["uniformity"]),
            "VICReg": vicreg,
            "SwAV": on_vertices(swav, lambda loss, _: loss),
            "MSN": prior_kl(pmsn.uniform_prior(k)),
            "PMSN": prior_kl(prior)}


def minimise_sizes(term, k, generator, num_points=100, starts=8):
    """The sizes (K,), positive, of sum num_points, at which term(sizes) is smallest.

    Local search from random sizes, several times: moves ever fewer points between two clusters."""
    best = math.inf, None
    for _ in range(starts):
        cuts = torch.randperm(num_points - 1, generator=generator)[: k - 1].sort().values + 1
        sizes = torch.cat([cuts, torch.tensor([num_points])]).diff(prepend=torch.tensor([0]))
        value, move = term(sizes), num_points // 4
        while move:
            moved = [sizes + move * (F.one_hot(torch.tensor(i), k) - F.one_hot(torch.tensor(j), k))
                     for i, j in itertools.permutations(range(k), 2) if sizes[j] > move]
            values = [term(other) for other in moved]
            if values and min(values) < value:
                value, sizes = min(values), moved[values.index(min(values))]
            else:
                move //= 2
        best = min(best, (value, sizes), key=lambda found: found[0])
    return best[1]


# ---- Propositions 1 to 4, both sides computed: rows (what, left side, right side, largest difference, instances) -----


def memberships(n, k):
    """Every membership matrix without an empty cluster: (number, N, K), float64."""
    choices = torch.cartesian_prod(*[torch.arange(k)] * n).view(-1, n)
    member = F.one_hot(choices, k).double()
    return member[(member.sum(dim=1) > 0).all(dim=1)]


def explicit_objective(points, member):
    """K-means with centroids: sum_n |x_n - mu_k(n)|^2, mu the means; (N, d), (..., N, K) -> (...)."""
    centroids = (member.mT @ points) / member.sum(dim=-2)[..., None]
    return (points - member @ centroids).square().sum(dim=(-1, -2))


def implicit_objective(points, member):
    """K-means without centroids: |X|^2 - tr((P'P)^-1 P' X X' P); (N, d), (..., N, K) -> (...)."""
    inner = torch.linalg.solve(member.mT @ member, member.mT @ points @ points.T @ member)
    return points.square().sum() - inner.diagonal(dim1=-2, dim2=-1).sum(dim=-1)


def row(what, sides):
    """A row of the table from (left, right) of every instance: the last instance's sides, the largest difference."""
    left, right = sides[-1]
    return what, left, right, max(abs(a - b) for a, b in sides), len(sides)


def normal(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def proposition_1(generator, instances=20):
    """Explicit and implicit K-means have the same optimum (the paper's statement, as we know it).

    Assumption: no cluster is empty. Then their objectives are the same number for every membership matrix P whose
    centroids are the means, because X - P (P'P)^-1 P' X is a projection. Left sides: Lloyd's algorithm with 50 starts;
    the sum of squares. Right sides: the smallest trace objective of all memberships; the trace objective."""
    optimum, identity = [], []
    for i in range(instances):
        points, k = normal(7, 2, generator=generator), 2 + i % 2
        found = kmeans(points[None], k, generator, starts=50)[1].item()
        optimum.append((found, implicit_objective(points, memberships(7, k)).min().item()))
        points = normal(50, 3, generator=generator)
        member = F.one_hot(torch.cat([torch.arange(5), torch.randint(5, (45,), generator=generator)])).double()
        identity.append((explicit_objective(points, member).item(), implicit_objective(points, member).item()))
    return [row("1  best explicit = best implicit K-means, all memberships", optimum),
            row("1  sum |x - mu|^2 = |X|^2 - tr((P'P)^-1 P'XX'P)", identity)]


def proposition_2(generator, instances=20):
    """VICReg on membership matrices: its volume terms ask for equal sizes, its invariance term is then K-means.

    The paper's exact statement is not known to us. Ours: let image n's embedding be vertex k(n) of a regular simplex
    (K, K-1), scaled so that equal sizes give unit variances. (a) Variance and covariance terms are both 0 if and only
    if all clusters are equally large: the K-1 variances sum to K (1 - sum_k s_k^2) <= K - 1, so all reach 1 only at
    s_k = 1/K, where the covariance is the identity. (b) Let positive pairs (i, j) be drawn with probability
    proportional to x_i . x_j (assumed >= 0). For equal sizes the invariance term is an increasing affine function of
    the K-means objective of X."""
    vanishing, equal, n = 0, 0, 12
    for k in (2, 3, 4):
        term = volume_terms(pmsn.uniform_prior(k))["VICReg"]
        for sizes in compositions(n, k):
            vanishing += term(sizes) < 1e-6
            equal += bool((sizes == n // k).all())
    invariance = []
    for i in range(instances):
        n, k = 6, 2 + i % 2
        points = torch.randint(0, 4, (n, 2), generator=generator).double()
        points[0] += 1  # not all 0
        pairs = (points @ points.T).long()  # how often (i, j) is a positive pair
        first, second = torch.cartesian_prod(torch.arange(n), torch.arange(n)).repeat_interleave(
            pairs.flatten(), dim=0).T
        for member in memberships(n, k):
            if (member.sum(dim=0) == n // k).all():
                z = member @ simplex(k) * math.sqrt(k - 1)
                term = pmsn.vicreg_loss(z[first], z[second])[1]["invariance"].item()
                within, total = explicit_objective(points, member), pairs.sum()
                right = (2 * k * total - 2 * n * (points.square().sum() - within)) / (total * (k - 1))
                invariance.append((term, right.item()))
    return [("2  sizes with VICReg's volume term 0 = equal sizes (count)", vanishing, equal, abs(vanishing - equal),
             sum(math.comb(11, k - 1) for k in (2, 3, 4))),
            row("2  VICReg's invariance = affine in the K-means objective", invariance)]


def compositions(n, k):
    """All ways to write n as k positive sizes, (K,) each."""
    for cuts in itertools.combinations(range(1, n), k - 1):
        yield torch.tensor([b - a for a, b in zip((0, *cuts), (*cuts, n))])


def proposition_3(generator, instances=20, temperature=0.1):
    """MSN's loss and the likelihood of a Gaussian mixture with uniform weights; PMSN's with the weights pi.

    The paper's exact statement is not known to us. Ours: let z and the means q be of unit length, the covariance
    temperature * I. (a) MSN's prediction is the mixture's posterior under uniform weights, and its cross-entropy is the
    expected negative log posterior of the targets' assignments. (b) For any weights pi the negative log-likelihood is

        min over assignments r of   distortion + information + KL(r_bar || pi)   (+ d/2 log(2 pi temperature))

    with distortion = mean sum_k r_k |z - q_k|^2 / (2 temperature), information = H(r_bar) - mean H(r); the minimum is
    at the posterior, the excess elsewhere is mean KL(r || posterior). Its last term is PMSN's, verbatim, and MSN's for
    uniform pi, where the posterior is MSN's prediction itself. (c) As the temperature vanishes, 2 temperature times
    the negative log-likelihood becomes the K-means objective."""
    rows = {name: [] for name in (
        "3  MSN's cross-entropy = expected -log posterior", "3  -log likelihood, uniform = dist. + inf. + MSN's KL",
        "3  -log likelihood, pi = dist. + inf. + PMSN's KL", "3  excess of other assignments = KL(r || posterior)",
        "3  2T (-log likelihood), T = 1e-4 -> K-means objective")}
    for i in range(instances):
        k, d = 2 + i % 4, 3
        z, targets, q = (pmsn.on_sphere(normal(n, d, generator=generator)) for n in (40, 40, k))
        uniform, prior = (pmsn.power_law_prior(k, exponent).double() for exponent in (0.0, 1.0))

        def log_density(z, temperature):
            squares = (z[:, None] - q).square().sum(dim=-1)
            return -squares / (2 * temperature) - d / 2 * math.log(2 * math.pi * temperature)

        def log_posterior(z, pi):
            return (log_density(z, temperature) + pi.log()).log_softmax(dim=-1)

        def nll(pi, temperature):
            return -(log_density(z, temperature) + pi.log()).logsumexp(dim=-1).mean().item()

        def free_energy(r, prior_kl):
            information = (r * (r / r.mean(dim=0)).log()).sum(dim=-1).mean()
            return (-(r * log_density(z, temperature)).sum(dim=-1).mean() + information + prior_kl).item()

        _, msn = pmsn.pmsn_loss(z, targets, q, uniform, temperature=temperature)
        assigned = pmsn.sharpen(log_posterior(targets, uniform).exp(), 0.25)
        posterior = log_posterior(z, prior).exp()
        other = normal(40, k, generator=generator).softmax(dim=-1)
        values = [
            (msn["cross_entropy"].item(), -(assigned * log_posterior(z, uniform)).sum(dim=-1).mean().item()),
            (nll(uniform, temperature), free_energy(log_posterior(z, uniform).exp(), msn["prior_kl"])),
            (nll(prior, temperature), free_energy(posterior, prior_term(posterior, prior))),
            (free_energy(other, prior_term(other, prior)) - nll(prior, temperature),
             (other * (other / posterior).log()).sum(dim=-1).mean().item()),
            (2e-4 * (nll(prior, 1e-4) - d / 2 * math.log(2 * math.pi * 1e-4)),
             (z[:, None] - q).square().sum(dim=-1).amin(dim=-1).mean().item())]
        for sides, value in zip(rows.values(), values):
            sides.append(value)
    return [row(name, sides) for name, sides in rows.items()]


def prior_term(assignments, prior):
    """PMSN's KL(p_bar || pi) of any predictions (N, K), through `pmsn_loss`: unit vectors that give just these.

    Logits c + a are unit / temperature when their mean part a makes up for the length that the centred c lacks."""
    k, logits = len(prior), assignments.log()
    logits = logits - logits.mean(dim=-1, keepdim=True)
    length = logits.norm(dim=-1, keepdim=True)
    temperature = 1 / length.max().item()
    z = logits + ((length.max().square() - length.square()) / k).clamp_min(0).sqrt()
    return pmsn.pmsn_loss(z, z, torch.eye(k, dtype=z.dtype), prior, temperature=temperature)[1]["prior_kl"]


def proposition_4(generator, instances=20, epsilon=0.02):
    """SwAV's codes are an assignment of fixed sizes, and SimCLR asks for the same through its two terms.

    The paper's exact statements are not known to us. Ours: (a) with vanishing epsilon Sinkhorn onto pi, of
    softmax(z . q / epsilon), becomes the assignment of largest sum z . q among those with sizes N pi; for
    unit vectors that is the smallest sum of squared distances. It falls short by at most epsilon log K a row.
    (b) Let positives be drawn uniformly within a cluster. Then temperature * alignment + 1 is the K-means objective a
    point, for embeddings of unit length. (c) For clusters that are points of a regular simplex SimCLR's uniformity term
    is the mean over k, weighted by size, of log((2 n_k - 1) e^(1/T) + 2 (N - n_k) e^(-1/((K-1) T))); over all sizes it
    is smallest where they are equal."""
    codes = {"uniform": [], "pi": []}
    for name, k, sizes in (("uniform", 3, (2, 2, 2)), ("pi", 3, (3, 2, 1))):
        allowed = memberships(6, k)
        allowed = allowed[(allowed.sum(dim=1) == torch.tensor(sizes)).all(dim=1)]
        for _ in range(instances):
            score = (pmsn.on_sphere(normal(6, 2, generator=generator))
                     @ pmsn.on_sphere(normal(k, 2, generator=generator)).T)
            code = pmsn.sinkhorn((score / epsilon).softmax(dim=-1), torch.tensor(sizes).double() / 6, 500)
            codes[name].append(((code * score).sum().item() / 6, (allowed * score).sum(dim=(1, 2)).max().item() / 6))
    alignment, uniformity = [], []
    for i in range(instances):
        sizes = torch.tensor([(6, 6), (2, 4, 6), (3, 3, 6), (4, 4, 4)][i % 4])
        z = pmsn.on_sphere(normal(12, 3, generator=generator))
        clusters = torch.arange(len(sizes)).repeat_interleave(sizes)
        times = torch.where(clusters[:, None] == clusters, 12 // sizes[clusters], 0)  # a point has 12 positives
        first, second = torch.cartesian_prod(torch.arange(12), torch.arange(12)).repeat_interleave(
            times.flatten(), dim=0).T
        alignment.append((0.1 * pmsn.simclr_loss(z[first], z[second])[1]["alignment"].item() + 1,
                          explicit_objective(z, F.one_hot(clusters).double()).item() / 12))
    best = []
    for k in (2, 3, 4):
        term = volume_terms(pmsn.uniform_prior(k))["SimCLR"]
        near, far = math.exp(1 / 0.1), math.exp(-1 / (k - 1) / 0.1)
        values = {tuple(sizes.tolist()): term(sizes) for sizes in compositions(12, k)}
        for sizes, value in values.items():
            uniformity.append((value, sum(s * math.log((2 * s - 1) * near + 2 * (12 - s) * far) for s in sizes) / 12))
        best.append((max(min(values, key=values.get)), 12 // k))
    return [row("4  Sinkhorn, epsilon = .02 -> best equal-size assignment", codes["uniform"]),
            row("4  Sinkhorn onto pi -> best assignment of sizes N pi", codes["pi"]),
            row("4  SimCLR: T alignment + 1 = K-means objective / N", alignment),
            row("4  SimCLR's uniformity on a simplex = closed form", uniformity),
            row("4  largest cluster where that is smallest = N / K", best)]


# ---- Figures ---------------------------------------------------------------------------------------------------------


def write_whole(path, write):
    """Call write(temporary path) and move the result to `path`, so that `path` is never half-written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def save(figure, path):
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
    plt.close(figure)


def plot_kmeans(shown, scores, imbalance, path):
    """Fig. 1 with two more columns, and agreement with the true groups over imbalance."""
    figure = plt.figure(figsize=(14, 7), layout="constrained")
    grid = figure.add_gridspec(2, 4, width_ratios=[2.1, 2.1, 2.1, 6])
    methods = {"K-means": KMEANS, "MSN\n(uniform prior)": UNIFORM, "PMSN\n(matched prior)": POWER_LAW}
    for line, ratio in enumerate((1, imbalance)):
        for column, (title, colour) in enumerate(methods.items()):
            name, axes = CURVES[column][0], figure.add_subplot(grid[line, column])
            points, found = shown[ratio]["points"], shown[ratio][name]
            right = max((0, 1), key=lambda cluster: points[found == cluster, 0].mean().nan_to_num(-9))
            for inside, face, marker in ((found != right, "white", "o"), (found == right, colour, "^")):
                axes.scatter(*points[inside].T, s=14, marker=marker, facecolor=face, edgecolor=colour, linewidth=0.7)
            axes.axvline(DISTANCE / 2, color="black", linestyle=":", linewidth=1.5)
            axes.set(xlim=(-1.1, 3.3), ylim=(-3.8, 3.8), xticks=[], yticks=[], aspect="equal")
            axes.set_xlabel(f"adj. Rand {scores[name][ratio][0] + 0.0:.2f}".replace("-0.00", "0.00"))
            if line == 0:
                axes.set_title(title, color=colour)
            if column == 0:
                axes.set_ylabel(f"groups {ratio:g} : 1", fontsize=12)
    axes = figure.add_subplot(grid[:, 3])
    for number, (name, colour, line, marker) in enumerate(CURVES):
        ratios, values = np.array(list(scores[name])), np.array(list(scores[name].values()))
        mean, std = values.mean(axis=1), values.std(axis=1, ddof=1)
        axes.errorbar(ratios * 1.025 ** (number - 2.5), mean, [std, np.minimum(std, 1 - mean)], color=colour,
                      linestyle=line, marker=marker, label=name, capsize=2, elinewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks(ratios, [f"{ratio:g}:1" for ratio in ratios])
    axes.minorticks_off()
    axes.set(xlabel="imbalance of the groups", ylim=(-0.25, 1.28), yticks=np.arange(0, 1.1, 0.2),
             title="agreement with the groups: adjusted Rand index,\n"
             f"mean ± std (up to 1) over {values.shape[1]} data sets")
    axes.legend(frameon=False, fontsize=9.5, ncols=2, loc="upper center")
    figure.suptitle("When one group is much larger, K-means and MSN cut it in two; a matched prior finds the groups",
                    fontsize=14)
    figure.supxlabel("dotted: the true border; filled and open: the two clusters found, of several starts the best",
                     fontsize=10, color="0.35")
    save(figure, path)


def plot_hidden_prior(path, share=0.8, num_points=200):
    """The volume term of each loss against the share of cluster 1."""
    terms = volume_terms(torch.tensor([share, 1 - share]))
    colours = {"SimCLR": "#b8a1d9", "VICReg": "#3c9d4e", "SwAV": "#e08e2b", "MSN": UNIFORM, "PMSN": POWER_LAW}
    shares = np.unique(np.round(np.linspace(0.02, 0.98, 97) * num_points).astype(int))
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    for name, term in terms.items():
        values = np.array([term(torch.tensor([n, num_points - n])) for n in shares])
        values = (values - values.min()) / (values.max() - values.min())
        where = shares[values.argmin()] / num_points
        axes.plot(shares / num_points, values, color=colours[name], linewidth=6 if name == "SimCLR" else 2,
                  label=f"{name}: smallest at {where:.2f}")  # SimCLR's and MSN's curves are the same, to the eye
        axes.plot(where, 0, "o", color=colours[name], clip_on=False, zorder=5)
    for x in (0.5, share):
        axes.axvline(x, color="0.6", linestyle=":", linewidth=1)
    axes.set(xlabel="share of the images in cluster 1, of two", ylabel="collapse-preventing term, scaled to 0..1",
             ylim=(0, 1.02), xlim=(0, 1))
    axes.legend(frameon=False, loc="upper center")
    axes.set_title("Four losses want two clusters of equal size;\n"
                   f"PMSN wants the sizes it is given (here {share:g} and {1 - share:g})")
    save(figure, path)


# ---- Command line ----------------------------------------------------------------------------------------------------


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--seed", type=int, default=0, help="first data seed (default: 0)")
    add("--out", default="runs/kmeans", type=Path, help="folder for results and figures (default: runs/kmeans)")
    add("--points", type=int, default=400, help="points in a data set (default: 400)")
    add("--imbalance", type=float, default=10, help="of the groups in the figure's second row (default: 10)")
    add("--clusters", type=int, default=4, help="K of the table of minima (default: 4)")
    add("--quick", action="store_true", help="5 data sets instead of 20, and three imbalances")
    return parser.parse_args(argv)


def check(args):
    """UserError for what is wrong with the arguments."""
    if not 1 <= args.imbalance <= 1000:
        raise UserError(f"--imbalance must be in 1..1000, large group : small group, got {args.imbalance:g}")
    if args.points < 10:
        raise UserError(f"--points must be at least 10, got {args.points}")
    if not 2 <= args.clusters <= 10:
        raise UserError(f"--clusters must be in 2..10, got {args.clusters}")
    if args.seed < 0:
        raise UserError(f"--seed must not be negative, got {args.seed}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        raise UserError(f"cannot write to --out {args.out}: {error.strerror}") from None


def main(argv=None):
    args = parse(argv)
    check(args)
    torch.set_num_threads(1)  # many small tensors: more threads wait for each other
    began = time.time()
    generator = torch.Generator().manual_seed(args.seed)
    seeds = list(range(args.seed, args.seed + (5 if args.quick else 20)))
    imbalances = sorted({*((1, 10, 50) if args.quick else IMBALANCES), args.imbalance})

    scores, shown = sweep(args.points, seeds, imbalances)
    print(f"adjusted Rand index with the true groups, mean ± std over {len(seeds)} data sets of {args.points} points")
    print(f"{'groups':<29}" + "".join(f"{f'{ratio:g}:1':>13}" for ratio in imbalances))
    summary = {}
    for name, by_ratio in scores.items():
        summary[name] = {f"{r:g}": {"mean": np.mean(v), "std": np.std(v, ddof=1), "values": v}
                         for r, v in by_ratio.items()}
        cells = [f"{cell['mean']:.2f} ± {cell['std']:.2f}" for cell in summary[name].values()]
        print(f"{name:<29}" + "".join(f"{cell:>13}" for cell in cells))

    prior = pmsn.power_law_prior(args.clusters, 1.0)
    sizes = {name: minimise_sizes(term, args.clusters, generator) for name, term in volume_terms(prior).items()}
    found = {name: n / n.sum() for name, n in sizes.items()}
    print(f"\nshares of {args.clusters} clusters at which each method's collapse-preventing term is smallest")
    print(f"{'method':<8} {'shares':<{6 * args.clusters}} {'from uniform':>13} {'from pi':>9}")
    for name, shares in {**found, "pi": prior}.items():
        distance = [f"{(shares - other).abs().max().item():.2f}" for other in (torch.tensor(1 / args.clusters), prior)]
        print(f"{name:<8} " + f"{' '.join(f'{s:.3f}' for s in shares.tolist()):<{6 * args.clusters}} "
              f"{distance[0]:>13} {distance[1]:>9}")

    rows = [r for proposition in (proposition_1, proposition_2, proposition_3, proposition_4)
            for r in proposition(generator)]
    print(f"\n{'proposition':<58} {'left':>9} {'right':>9} {'largest |l - r|':>16} {'instances':>10}")
    for what, left, right, difference, count in rows:
        print(f"{what:<58} {left:>9.4g} {right:>9.4g} {difference:>16.1e} {count:>10}")

    config = {**vars(args), "out": str(args.out), "seeds": seeds, "torch": torch.__version__,
              "python": platform.python_version()}
    results = {"config": config, "sweep": summary, "prior": prior.tolist(),
               "minima": {name: shares.tolist() for name, shares in found.items()},
               "propositions": [dict(zip(("what", "left", "right", "largest_difference", "instances"), r))
                                for r in rows]}
    write_whole(args.out / "results.json", lambda temporary: temporary.write_text(json.dumps(results, indent=1)))
    plot_kmeans(shown, scores, args.imbalance, args.out / "kmeans.png")
    plot_hidden_prior(args.out / "hidden_prior.png")
    print(f"\n{args.out}: results.json kmeans.png hidden_prior.png ({time.time() - began:.1f} s)")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"toy_kmeans.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ntoy_kmeans.py: stopped", file=sys.stderr)
        sys.exit(130)
