"""Evaluation of frozen features (N, d) with labels (N,), tested on features (Q, d).

Features are those of a whole data set on all processes. The classifiers are k-NN and logistic
regression, which is the linear probe. Large matrices are computed in blocks.
"""

import functools
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset

import pmsn
from support.images import Images, center_crop, name_unreadable, normalize_images
from support.runs import UserError, from_first_process, rank, world_size


# ---- Features ------------------------------------------------------------------------------------
@torch.no_grad()
def extract(encoder, images, workers, watch=iter):
    """Features (n, d) and indices (n,) of all readable images, for the first process.

    Every process computes a share of them. The others return None. Features are on the device of
    the encoder, indices on the CPU. `watch` takes the loader and returns its batches: it can print
    progress. Raises UserError if more than 1% of the images are unreadable.
    """
    device = next(encoder.parameters()).device
    share = range(rank(), len(images), world_size())
    loader = DataLoader(Subset(images, share), batch_size=256, num_workers=workers)
    unreadable, is_readable = set(), torch.zeros(len(share), dtype=torch.bool)
    features, start = None, 0
    was_training = encoder.training
    encoder.eval()
    for crops, index, readable in watch(loader):
        name_unreadable(images, index[~readable], unreadable)
        crops = normalize_images(crops.to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            # This goes around torch.compile, which would compile again for these shapes.
            found = encoder.forward(crops)
        # One tensor for all batches. Thousands of small ones would leave holes in the memory.
        if features is None:
            features = torch.empty(len(share), found.shape[1])
        end = start + len(index)
        features[start:end], is_readable[start:end] = found.float().cpu(), readable
        start = end
    encoder.train(was_training)
    indices = torch.tensor(share)[is_readable]
    if features is not None:
        features = features[is_readable]
    if world_size() > 1:
        shares = [None] * world_size() if rank() == 0 else None
        dist.gather_object((features, indices), shares)
        if rank() > 0:
            return None
        # With fewer images than processes, some processes have none.
        features, indices = [torch.cat(parts) for parts in
                             zip(*[share for share in shares if share[0] is not None])]
    if len(indices) == 0 or len(images) - len(indices) > max(1, len(images) // 100):
        raise UserError(f"{len(images) - len(indices)} of {len(images)} images cannot be read, "
                        "which is more than 1%")
    indices, order = indices.sort()  # the same order for any number of processes
    return features[order].to(device), indices


def evaluate(encoder, training, validation, image_size, workers):
    """Accuracies {name: number} of k-NN and of the linear probe, the same on all processes.

    `training` and `validation` are (paths, labels (N,)). Images are cropped to their middle.
    """
    crop = functools.partial(center_crop, size=image_size)
    found = extract(encoder, Images(training[0], crop), workers)
    test_found = extract(encoder, Images(validation[0], crop), workers)
    results = None
    if rank() == 0:
        features, indices = found
        labels = training[1][indices].to(features.device)
        test_features, test_indices = test_found
        test_labels = validation[1][test_indices].to(features.device)
        predictions = {
            "knn": knn_predictions(features, labels, test_features),
            "linear": linear_probe(features, labels, test_features),
        }
        results = {f"{name}_{group}": accuracy for name, predicted in predictions.items()
                   for group, accuracy in accuracies(predicted, test_labels, labels).items()}
    return from_first_process(results)


def accuracies(predicted, test_labels, labels):
    """Accuracy on all classes, and on those with many, medium and few training images.

    predicted (Q,), test_labels (Q,), labels (N,) of the training images -> {group: accuracy}. Many
    are more than 100, and few are fewer than 20. A group without test images is left out.
    """
    counts = torch.bincount(labels, minlength=int(test_labels.max()) + 1)[test_labels]
    groups = {"all": counts >= 0, "many": counts > 100, "few": counts < 20}
    groups["medium"] = ~(groups["many"] | groups["few"])
    return {group: (predicted == test_labels)[chosen].double().mean().item()
            for group, chosen in groups.items() if chosen.any()}


# ---- Nearest neighbors ---------------------------------------------------------------------------
@torch.no_grad()
def nearest_neighbors(queries, bank, k):
    """Cosines and indices (Q, k) of the k most similar rows of the bank (N, d), best first."""
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must be from 1 to the {len(bank)} rows of the bank, got {k}")
    found = []
    with torch.autocast(bank.device.type, enabled=False):
        bank = F.normalize(pmsn.at_least_float32(bank), dim=-1)
        for block in queries.split(rows_per_block(len(bank))):
            block = F.normalize(pmsn.at_least_float32(block), dim=-1)
            found.append((block @ bank.T).topk(k))
    cosines, indices = zip(*found)
    return torch.cat(cosines), torch.cat(indices)


def rows_per_block(columns):
    """How many rows of a matrix with this number of columns have 64 MiB in float32."""
    return max(1, 2**24 // columns)


def knn_predictions(features, labels, test_features, k=20, temperature=0.07):
    """Classes (Q,) by weighted k-NN (Wu et al., 2018): votes weigh exp(cosine / temperature).

    With fewer than k features, all of them vote. Raises ValueError as `check_features` does.
    """
    check_features(features, labels, test_features)
    pmsn.check_temperature(temperature)
    classes, labels = labels.unique(return_inverse=True)  # Numbers of classes can have gaps.
    cosines, index = nearest_neighbors(test_features, features, min(k, len(features)))
    # Only ratios of votes count. So the most similar image has the weight 1, and at a low
    # temperature not all weights are rounded to 0.
    weights = ((cosines - cosines[:, :1]) / temperature).exp()
    predicted, rows = [], rows_per_block(len(classes))
    for weight, neighbors in zip(weights.split(rows), index.split(rows)):
        votes = weight.new_zeros(len(weight), len(classes))
        votes.scatter_add_(1, labels[neighbors], weight)
        predicted.append(classes[votes.argmax(dim=1)])
    return torch.cat(predicted)


def agreement(features, labels):
    """The share of the 10 nearest neighbors of each image, without itself, that have its label.

    With fewer images, all others are neighbors. There must be at least two.
    """
    everyone = torch.arange(len(features), device=features.device)
    nearest = other_neighbors(features, everyone, min(10, len(features) - 1))
    return (labels[nearest] == labels[:, None]).float().mean().item()


def other_neighbors(features, rows, k):
    """Indices (Q, k) of the rows of features (N, d) that are most similar to the Q given `rows`.

    A row is no neighbor of itself, also among rows that are equal to it.
    """
    _, nearest = nearest_neighbors(features[rows], features, k + 1)
    itself = nearest == rows[:, None]
    itself[~itself.any(dim=1), -1] = True  # More than k other rows are as similar.
    return nearest[~itself].view(len(rows), k)


# ---- Logistic regression -------------------------------------------------------------------------
def linear_probe(features, labels, test_features, penalty=1.0):
    """Classes (Q,) by logistic regression on standardized features: the linear probe.

    The default penalty is that of scikit-learn. It matters if there are few images per dimension,
    and hardly if there are many. Raises ValueError as `check_features` does.
    """
    check_features(features, labels, test_features)
    classes, labels = labels.unique(return_inverse=True)  # Numbers of classes can have gaps.
    x, test_x = (pmsn.at_least_float32(x.detach()) for x in (features, test_features))
    std, mean = torch.std_mean(x, dim=0, correction=0)
    # A feature that is constant, up to rounding, says nothing. Divided by infinity, it becomes 0.
    rounding = 100 * torch.finfo(x.dtype).eps * x.abs().amax(dim=0)
    std = std.masked_fill(std <= rounding, math.inf)
    weight, bias = logistic_regression((x - mean) / std, labels, penalty)
    blocks = ((test_x - mean) / std).split(rows_per_block(len(bias)))
    with torch.autocast(x.device.type, enabled=False):
        return torch.cat([classes[(block @ weight + bias).argmax(dim=1)] for block in blocks])


@torch.inference_mode(False)  # The caller may have called us under inference_mode or no_grad.
@torch.enable_grad()
def logistic_regression(features, labels, penalty, with_bias=True):
    """Weights (d, C) and biases (C,) of the classes 0 to C - 1, by L-BFGS.

    They minimize  sum(cross-entropy) + penalty / 2 * sum(weights^2),  which scikit-learn writes as
    LogisticRegression(C=1 / penalty). The biases have no penalty. Features (N, d), labels (N,).
    After 500 iterations it stops. With a penalty far below .1 and few images it may stop before the
    minimum. Raises ValueError as `check_features` does, and for a negative penalty.
    """
    check_features(features, labels)
    if not 0 <= penalty < math.inf:
        raise ValueError(f"penalty must be at least 0, got {penalty}")
    # Clones can take part in a gradient, even if the originals are from torch.inference_mode.
    x, labels = pmsn.at_least_float32(features.detach()).clone(), labels.long().clone()
    num_classes = int(labels.max()) + 1
    weight = x.new_zeros(x.shape[1], num_classes, requires_grad=True)
    bias = x.new_zeros(num_classes, requires_grad=with_bias)
    parameters = [weight, bias] if with_bias else [weight]
    optimizer = torch.optim.LBFGS(parameters, max_iter=500, tolerance_grad=1e-5,
                                  tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        # The objective divided by N, which has the same minimum.
        optimizer.zero_grad()
        objective = penalty / 2 / len(x) * weight.square().sum()
        objective.backward()
        total = objective.item()
        # The logits of all images at once can be too large for the memory: (N, C).
        rows = rows_per_block(num_classes)
        for block, classes in zip(x.split(rows), labels.split(rows)):
            loss = F.cross_entropy(block @ weight + bias, classes, reduction="sum") / len(x)
            loss.backward()
            total += loss.item()
        return total

    with torch.autocast(x.device.type, enabled=False):
        optimizer.step(closure)
    return weight.detach(), bias.detach()


# ---- Groups --------------------------------------------------------------------------------------
def purity(groups, labels, weights=None):
    """The share of images that have the most frequent label of their group.

    Groups (N,) and labels (N,) are integers. This is a weighted mean over the groups, with their
    sizes as weights if there are no `weights` (groups,). With these it is at least the share of the
    most frequent label: .34 for ten classes with the frequencies 1/k.
    """
    if weights is None:
        weights = groups.bincount() / len(groups)
    counts = torch.zeros(len(weights), int(labels.max()) + 1)
    counts.index_put_((groups, labels), torch.ones(()), accumulate=True)
    most_frequent = counts.amax(dim=1) / counts.sum(dim=1).clamp_min(1)
    return (weights @ most_frequent).item()


def effective_prototypes(shares):
    """exp of the entropy of shares (K,): K if all are equal, and 1 if there is only one."""
    return torch.special.entr(shares).sum().exp().item()


# ---- Checks --------------------------------------------------------------------------------------
def check_features(features, labels, test_features=None):
    """Raise ValueError unless the classifiers above can use these features and labels.

    Features (N, d) and (Q, d) must be finite and of one dtype, labels (N,) integers from 0. N must
    be at least 1.
    """
    test_features = features if test_features is None else test_features
    for name, x in (("features", features), ("test features", test_features)):
        if x.ndim != 2 or x.shape[1] != features.shape[1] or x.dtype != features.dtype:
            raise ValueError(
                "features (N, d) and test features (Q, d) must be matrices with the same d and "
                f"dtype, got {tuple(features.shape)} {features.dtype}, {tuple(x.shape)} {x.dtype}")
        # One image with a feature that is not a number would decide the class of all test images.
        if not x.isfinite().all():
            raise ValueError(f"{int((~x.isfinite()).any(dim=1).sum())} of {len(x)} rows of the "
                             f"{name} are not finite")
    if labels.shape != features.shape[:1] or labels.is_floating_point() or len(labels) == 0:
        raise ValueError(f"labels must be integers, one for each of {len(features)} features, got "
                         f"{labels.dtype} of shape {tuple(labels.shape)}")
    if labels.long().min() < 0:  # PyTorch has no minimum of uint16, uint32 and uint64.
        raise ValueError(f"labels must be at least 0, got {labels.min()}. Leave unlabeled images "
                         "out")
