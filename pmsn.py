"""PMSN: Prior Matching for Siamese Networks, the whole method in one file.

    Assran, Balestriero, Duval, Bordes, Misra, Bojanowski, Vincent, Rabbat, Ballas:
    The Hidden Uniform Cluster Prior in Self-Supervised Learning. ICLR 2023, arXiv 2210.07277.
    Built on Masked Siamese Networks (MSN): Assran et al., ECCV 2022, arXiv 2204.07141.

Joint-embedding methods keep their embeddings from collapsing by spreading every mini-batch evenly: a hidden
*uniform* prior over clusters. On long-tailed data that prior is wrong, and the network groups images by
whatever does split them evenly (pose, texture, background) rather than by what they show. PMSN replaces the
uniform prior by one that matches the data:

    loss  =  mean H(p+, p)  +  weight * KL(p_bar || pi)                                        (pmsn_loss)

    symbol   in the code          what                                                         shape
    B, M     -                    images in a batch, anchor views of each image
    K, d     -                    number of prototypes, embedding dimension
    z, z+    anchors, targets     embeddings of the anchor views and of the target view        (M*B, d), (B, d)
    q        prototypes           trained by gradient; like z and z+ used on the unit sphere   (K, d)
    p        prediction           softmax(z . q / temperature)                                 (M*B, K)
    p+       target prediction    the same for z+, sharpened, without gradient                 (B, K)
    p_bar    mean_prediction      mean of p over every anchor of every image of every rank     (K,)
    pi       prior                the prior: which share of the images each prototype gets     (K,)

With a uniform pi, KL(p_bar || pi) = log K - H(p_bar), MSN's mean-entropy maximisation: MSN is a special case.

Two options are ours, off by default: sharpening relative to the prior (`sharpen`) and Sinkhorn onto any prior
(`sinkhorn`; MSN's is onto the uniform one). Unlike MSN's code, patches are dropped per image and not per batch,
prototypes live inside the module that DDP wraps, and everything runs on a CPU too.

Read on in this order: priors, loss, the same idea in three other losses, vision transformer, PMSN, views,
samplers, evaluation. The file trains nothing and touches no files; the scripts beside it do.
"""

import copy
import functools
import itertools
import math
from collections import OrderedDict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# ---- Priors: (K,) tensors, all entries positive, sum 1 ---------------------------------------------------------------


def uniform_prior(num_prototypes):
    """Every prototype gets the same share, (K,): the prior hidden in MSN. ValueError if K < 2."""
    return power_law_prior(num_prototypes, 0.0)


def power_law_prior(num_prototypes, exponent):
    """pi_k proportional to k^-exponent, k = 1..K, (K,): the paper's prior for long-tailed data.

    ValueError if K < 2, or if the exponent is negative or so steep that the last share is 0 in float32. Exponent 0
    is the uniform prior."""
    if num_prototypes < 2:
        raise ValueError(f"num_prototypes must be at least 2, got {num_prototypes}")
    if not 0 <= exponent < math.inf:
        raise ValueError(f"exponent must be finite and not negative, got {exponent}")
    if num_prototypes**-exponent < 1e-37:
        raise ValueError(f"exponent {exponent} is too steep: the last of {num_prototypes} shares is 0 in float32")
    return class_prior(torch.arange(1, num_prototypes + 1, dtype=torch.float64) ** -exponent)


def class_prior(counts):
    """Shares of any histogram, largest first: (K,) positive counts -> (K,) prior. ValueError for an empty class."""
    counts = torch.as_tensor(counts).cpu().double()
    if counts.ndim != 1 or len(counts) < 2 or not bool(((counts > 0) & counts.isfinite()).all()):
        raise ValueError("counts must be a list of at least two positive numbers; leave out classes without images")
    counts = counts.sort(descending=True).values
    return (counts / counts.sum()).float()


def check_prior(prior, num_prototypes):
    """ValueError unless `prior` is (K,), sums to 1 and has no zero: KL(p_bar || pi) is infinite at a zero of pi."""
    if prior.shape != (num_prototypes,):
        raise ValueError(f"prior must have shape ({num_prototypes},), one entry a prototype, got {tuple(prior.shape)}")
    if not bool((prior > 0).all()):
        raise ValueError(f"prior must be positive everywhere, its smallest entry is {prior.min().item():g}")
    if abs(prior.sum().item() - 1) > 1e-4:
        raise ValueError(f"prior must sum to 1, it sums to {prior.sum().item():g}")


# ---- The loss --------------------------------------------------------------------------------------------------------


def full_precision(x):
    """x in float32, or float64 if it is: a loss in bfloat16 is too coarse."""
    return x if x.dtype == torch.float64 else x.float()


def on_sphere(embeddings):
    """Embeddings scaled to unit length, in full precision."""
    return F.normalize(full_precision(embeddings), dim=-1)


def log_predictions(embeddings, prototypes, temperature):
    """log softmax(z . q / temperature): (N, d), (K, d) -> (N, K), float32 also under autocast."""
    with torch.autocast(embeddings.device.type, enabled=False):
        return F.log_softmax(on_sphere(embeddings) @ on_sphere(prototypes).T / temperature, dim=-1)


def sharpen(probabilities, sharpening, reference=None):
    """p^(1/T) / sum, T = `sharpening` in (0, 1]: (N, K) -> (N, K); 1 changes nothing. From MSN.

    With a `reference` pi (K,) sharpening is relative to it: pi (p/pi)^(1/T) / sum. Plain sharpening moves mass to
    the head of a steep prior even where the network knows nothing, so that the constant answer p = pi costs only
    -sum_k sharpen(pi)_k log pi_k: a collapse the network can fall into. Relative sharpening leaves p = pi as it is.
    Both are the same under the uniform prior. Ours; not in the paper."""
    if not 0 < sharpening <= 1:
        raise ValueError(f"sharpening must lie in (0, 1], got {sharpening}")
    log_p = probabilities.log()
    log_reference = 0.0 if reference is None else reference.log()
    return torch.softmax(log_reference + (log_p - log_reference) / sharpening, dim=-1)


def sinkhorn(probabilities, prior, iterations=3):
    """Scale (N, K) predictions until their mean is `prior` (K,), while every row sums to 1 (rows last: exactly).

    With the uniform prior this is MSN's Sinkhorn, and SwAV's once it has converged. Column means run over all ranks,
    which hold equally many rows."""
    q = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny)
    for _ in range(iterations):
        q = q * (prior / mean_over_ranks(q.mean(dim=0)))
        q = q / q.sum(dim=1, keepdim=True)
    return q


def pmsn_loss(anchors, targets, prototypes, prior, *, temperature=0.1, sharpening=0.25, weight=1.0,
              sinkhorn_iterations=0, relative_sharpening=False, mean_prediction=None):
    """mean H(p+, p) + weight * KL(p_bar || pi), in nats: the paper's loss.

    anchors (M*B, d) in view-major order (all images of the first view, then of the second, ...), targets (B, d),
    prototypes (K, d), prior (K,). p_bar is the mean over all ranks, in the graph: average the gradients over
    ranks, as DistributedDataParallel does, and they are those of one process on the joined batch. Gradients
    reach `anchors` and `prototypes`, never `targets`. For a batch taken in equal parts give the p_bar of all of it as
    `mean_prediction` (K,): each part's KL is then linear in its own p, and the mean of the parts' losses has the value
    and the gradient of the whole.

    Returns (loss, terms); terms, detached: cross_entropy (of this rank), prior_kl, mean_prediction (K,), and
    effective_prototypes = exp H(p_bar), between 1 and K. All ranks hold equally many images. ValueError for a wrong
    number of anchors, a prior that is not a distribution, or an option out of its range; the prior's values are
    checked where that does not stall an accelerator (CPU tensors): elsewhere a zero gives inf."""
    if len(targets) == 0 or len(anchors) == 0 or len(anchors) % len(targets):
        raise ValueError(f"anchors must hold a whole number of views of the {len(targets)} targets, got {len(anchors)}")
    if not temperature > 0 or not weight >= 0 or sinkhorn_iterations < 0:
        raise ValueError(f"temperature must be positive, weight and sinkhorn_iterations not negative, "
                         f"got {temperature}, {weight} and {sinkhorn_iterations}")
    if prior.device.type == "cpu" or prior.shape != (len(prototypes),):
        check_prior(prior, len(prototypes))

    log_p = log_predictions(anchors, prototypes, temperature)  # (M*B, K)
    prior = prior.to(log_p)
    with torch.no_grad():
        p_target = log_predictions(targets, prototypes, temperature).exp()  # (B, K)
        p_target = sharpen(p_target, sharpening, prior if relative_sharpening else None)
        p_target = sinkhorn(p_target, prior, sinkhorn_iterations)
    cross_entropy = -(p_target * log_p.view(-1, *p_target.shape)).sum(dim=-1).mean()

    p_bar = mean_over_ranks(log_p.exp().mean(dim=0))  # (K,)
    whole = p_bar if mean_prediction is None else mean_prediction.to(p_bar)
    log_whole = whole.clamp_min(torch.finfo(whole.dtype).tiny).log()  # an entry may underflow; 0 log 0 = 0
    prior_kl = (p_bar * (log_whole - prior.log())).sum()

    loss = cross_entropy + weight * prior_kl
    return loss, {
        "cross_entropy": cross_entropy.detach(),
        "prior_kl": prior_kl.detach(),
        "mean_prediction": p_bar.detach(),
        "effective_prototypes": (-(whole * log_whole).sum()).exp().detach(),
    }


class _MeanOverRanks(torch.autograd.Function):
    """The mean over ranks, which is its own adjoint: backward averages the ranks' gradients in the same way."""

    @staticmethod
    def forward(ctx, x):
        mean = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(mean)
        return mean / dist.get_world_size()

    @staticmethod
    def backward(ctx, gradient):
        return _MeanOverRanks.forward(ctx, gradient)


def world_size():
    """The number of processes that share a batch: 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(x):
    """The mean of x over all processes, differentiable; x itself in a single process."""
    return _MeanOverRanks.apply(x) if world_size() > 1 else x


# ---- The same idea in three other losses: each has a term that wants the batch spread evenly ------------------------


def simclr_loss(first, second, *, temperature=0.1):
    """SimCLR (Chen et al., 2020), (B, d) twice -> (loss, terms). Negatives are those of this process.

    terms: alignment (positives attract) and uniformity (log-sum-exp over all other embeddings: the volume term)."""
    with torch.autocast(first.device.type, enabled=False):
        z = on_sphere(torch.cat([first, second]))
        similarity = z @ z.T / temperature  # (2B, 2B)
    positive = similarity.diagonal(offset=len(first)).repeat(2)
    self_pairs = torch.eye(len(z), dtype=torch.bool, device=z.device)
    uniformity = similarity.masked_fill(self_pairs, -math.inf).logsumexp(dim=-1).mean()
    alignment = -positive.mean()
    return alignment + uniformity, {"alignment": alignment.detach(), "uniformity": uniformity.detach()}


def vicreg_loss(first, second, *, invariance=25.0, variance=25.0, covariance=1.0):
    """VICReg (Bardes et al., 2022), (B, d) twice -> (loss, terms). The arguments weight the terms.

    terms: invariance, and the volume terms variance (hinge on each dimension's standard deviation) and covariance."""
    with torch.autocast(first.device.type, enabled=False):
        spread, correlation = [], []
        for z in (full_precision(first), full_precision(second)):
            z = z - z.mean(dim=0)
            cov = z.T @ z / (len(z) - 1)  # (d, d)
            spread.append(F.relu(1 - (cov.diagonal() + 1e-4).sqrt()).mean())
            correlation.append((cov.square().sum() - cov.diagonal().square().sum()) / z.shape[1])
        agreement = F.mse_loss(full_precision(first), full_precision(second))
    terms = {"invariance": agreement, "variance": sum(spread) / 2, "covariance": sum(correlation)}
    loss = invariance * terms["invariance"] + variance * terms["variance"] + covariance * terms["covariance"]
    return loss, {name: term.detach() for name, term in terms.items()}


def swav_loss(first, second, prototypes, *, temperature=0.1, epsilon=0.05, sinkhorn_iterations=3):
    """SwAV (Caron et al., 2020), (B, d) twice and (K, d) -> (loss, terms): each view predicts the other's code.

    Codes are Sinkhorn assignments with uniform marginals, the volume constraint; they start from a softmax over
    prototypes, half an iteration ahead of SwAV's code. terms: cross_entropy, mean_prediction (K,)."""
    prior = uniform_prior(len(prototypes)).to(first.device)
    log_p = [log_predictions(z, prototypes, temperature) for z in (first, second)]
    with torch.no_grad():
        codes = [sinkhorn(log_predictions(z, prototypes, epsilon).exp(), prior, sinkhorn_iterations)
                 for z in (first, second)]
    loss = -sum((code * lp).sum(dim=-1).mean() for code, lp in zip(codes, reversed(log_p))) / 2
    mean_prediction = torch.cat(log_p).exp().mean(dim=0).detach()
    return loss, {"cross_entropy": loss.detach(), "mean_prediction": mean_prediction}


# ---- Vision transformer (Dosovitskiy et al., 2021), parameters named as in timm and DeiT -----------------------------


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):  # (B, N, dim)
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, dim/heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT encoder: images (B, C, H, W) -> CLS features (B, embed_dim). H and W: multiples of the patch size.

    Loads timm's ViTs and MSN's checkpoints, whose keys begin with "module." and include MSN's head ("fc."):
    `vit.load_state_dict({k.removeprefix("module."): v for k, v in file["target_encoder"].items()}, strict=False)`."""

    def __init__(self, image_size=224, patch_size=16, in_channels=3, embed_dim=384, depth=12, num_heads=6):
        super().__init__()
        if image_size % patch_size or embed_dim % num_heads:
            raise ValueError(f"image_size {image_size} must be a multiple of patch_size {patch_size} and "
                             f"embed_dim {embed_dim} of num_heads {num_heads}")
        self.embed_dim = embed_dim
        self.grid = (image_size // patch_size, image_size // patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(in_channels, embed_dim, patch_size, patch_size)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], embed_dim))
        self.blocks = nn.Sequential(*[Block(embed_dim, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images, patch_drop=0.0):
        """`patch_drop` in [0, 1) is the share of its patches that each image loses, other ones for every image."""
        tokens = self.embed_patches(images)  # (B, N, embed_dim)
        if patch_drop:
            tokens = drop_patches(tokens, patch_drop)[0]
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        return self.norm(self.blocks(torch.cat([cls, tokens], dim=1)))[:, 0]

    def embed_patches(self, images):
        """Patch embeddings plus position embeddings, (B, N, embed_dim), interpolated for another resolution."""
        tokens = self.patch_embed(images)  # (B, embed_dim, h, w)
        position = self.pos_embed[:, 1:]
        if tokens.shape[2:] != self.grid:
            position = full_precision(position).unflatten(1, self.grid).permute(0, 3, 1, 2)
            position = F.interpolate(position, size=tokens.shape[2:], mode="bicubic", antialias=True)
            position = position.flatten(2).transpose(1, 2)
        return tokens.flatten(2).transpose(1, 2) + position


def drop_patches(tokens, patch_drop):
    """Keep floor((1 - patch_drop) N) of each image's N tokens, at least 1: (B, N, dim) -> (B, kept, dim), (B, kept)."""
    if not 0 <= patch_drop < 1:
        raise ValueError(f"patch_drop must lie in [0, 1), got {patch_drop}")
    batch, count, dim = tokens.shape
    kept = max(1, int((1 - patch_drop) * count + 1e-6))  # 1e-6: (1 - .9) * 20 is 2, not 1.9999
    indices = torch.rand(batch, count, device=tokens.device).argsort(dim=1)[:, :kept]
    return tokens.gather(1, indices[:, :, None].expand(-1, -1, dim)), indices


def vit_tiny(**options):
    """ViT-Ti: 192 wide, 12 deep, 3 heads; options as for VisionTransformer."""
    return VisionTransformer(**{"embed_dim": 192, "num_heads": 3, **options})


def vit_small(**options):
    """ViT-S: 384 wide, 12 deep, 6 heads; options as for VisionTransformer."""
    return VisionTransformer(**{"embed_dim": 384, "num_heads": 6, **options})


def vit_base(**options):
    """ViT-B: 768 wide, 12 deep, 12 heads; options as for VisionTransformer."""
    return VisionTransformer(**{"embed_dim": 768, "num_heads": 12, **options})


# ---- PMSN: two branches, one of them trained -------------------------------------------------------------------------


class GlobalBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the joined batch of all ranks, (B, dim). Like nn.SyncBatchNorm, which exists on GPUs only."""

    def forward(self, x):
        if not self.training or world_size() == 1:
            return super().forward(x)
        full = full_precision(x)
        mean = mean_over_ranks(full.mean(dim=0))
        variance = mean_over_ranks((full - mean).square().mean(dim=0))
        count = len(x) * world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        return ((full - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)


def projection_head(input_dim, hidden_dim=2048, output_dim=256):
    """MSN's head: three linear layers, BatchNorm and GELU after the first two. (B, input_dim) -> (B, output_dim)."""
    return nn.Sequential(OrderedDict(
        fc1=nn.Linear(input_dim, hidden_dim), bn1=GlobalBatchNorm(hidden_dim), gelu1=nn.GELU(),
        fc2=nn.Linear(hidden_dim, hidden_dim), bn2=GlobalBatchNorm(hidden_dim), gelu2=nn.GELU(),
        fc3=nn.Linear(hidden_dim, output_dim)))


class PMSN(nn.Module):
    """Anchor branch (encoder, head), target branch (their moving average) and prototypes, in one module for DDP.

    encoder: images -> (B, encoder.embed_dim); it takes `patch_drop` if that is not 0. prior: (K,), see above.
    head: embed_dim -> output_dim, MSN's by default. `loss_options` are keyword arguments of `pmsn_loss`; they stay in
    `self.loss_options`, so that a schedule can change them. ValueError for a prior that is not a distribution."""

    def __init__(self, encoder, prior, *, head=None, output_dim=256, patch_drop=0.15, **loss_options):
        super().__init__()
        check_prior(prior, len(prior))
        self.encoder = encoder
        self.head = projection_head(encoder.embed_dim, output_dim=output_dim) if head is None else head
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_head = copy.deepcopy(self.head).requires_grad_(False)
        for module in [*self.target_encoder.modules(), *self.target_head.modules()]:
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 0.0  # running statistics move by update_target alone
        self.prototypes = nn.Parameter(torch.empty(len(prior), output_dim).uniform_(-1, 1) * output_dim**-0.5)
        self.register_buffer("prior", prior.clone())
        self.patch_drop = patch_drop
        self.loss_options = loss_options

    def forward(self, views, **loss_options):
        """views, as from `multi_crop`: [target view, masked anchors, unmasked anchors ...] -> (loss, terms).

        Target view (B, C, H, W), anchors (M*B, C, H, W) in view-major order; each entry is one forward pass.
        `loss_options` here add to the module's."""
        target_view, masked, *unmasked = views
        masking = {"patch_drop": self.patch_drop} if self.patch_drop else {}
        anchors = [self.head(self.encoder(masked, **masking)), *(self.head(self.encoder(view)) for view in unmasked)]
        with torch.no_grad():
            targets = self.target_head(self.target_encoder(target_view))
        return pmsn_loss(torch.cat(anchors), targets, self.prototypes, self.prior, **self.loss_options,
                         **loss_options)

    @torch.no_grad()
    def update_target(self, momentum):
        """target <- momentum * target + (1 - momentum) * anchor, parameters and BatchNorm statistics alike."""
        for target, anchor in ((self.target_encoder, self.encoder), (self.target_head, self.head)):
            for old, new in zip(target.state_dict().values(), anchor.state_dict().values()):
                old.lerp_(new, 1 - momentum) if old.is_floating_point() else old.copy_(new)


# ---- Views: the augmentations of MSN, batched on the images' device --------------------------------------------------


def multi_crop(images, sizes=None, *, rand_views=1, focal_views=10, rand_size=224, focal_size=96,
               rand_scale=(0.3, 1.0), focal_scale=(0.05, 0.3), jitter=0.5, jitter_p=0.8, grey_p=0.2, blur_p=0.5,
               flip_p=0.5, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    """The views of a batch (B, 3, H, W), uint8 or floats in [0, 1], on the images' device; defaults are MSN's.

    Returns [target view (B, 3, S, S), rand views (rand_views*B, 3, S, S), focal views (focal_views*B, 3, s, s)],
    normalised by mean and std, view-major; without focal views the last is left out. Every view of every image
    draws its own crop, flip, colour jitter, greyscale and blur, distributed as torchvision's RandomResizedCrop,
    RandomHorizontalFlip, ColorJitter (one order of its four steps for several images), RandomGrayscale and
    GaussianBlur. If the images were stretched to one size, `sizes` (B, 2) are their original heights and widths in
    pixels: crops are then drawn in the originals, area and aspect ratio (see `random_boxes`)."""
    if images.ndim != 4 or images.shape[1] != 3 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ValueError(f"images must be (B, 3, H, W), uint8 or floats, got {tuple(images.shape)}, {images.dtype}")
    if rand_views < 1 or focal_views < 0:
        raise ValueError(f"rand_views must be at least 1, focal_views at least 0, got {rand_views} and {focal_views}")
    mean, std = (constant(tuple(x), images.device).view(3, 1, 1) for x in (mean, std))
    several = 8 if images.device.type == "cpu" else max(len(images), 1)  # eight at once stay in a CPU's cache
    parts = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in images.split(several)]  # in memory (B, H, 3, W)
    parts = [x.float().div_(255) if x.dtype == torch.uint8 else x for x in parts]

    def augment(x, boxes, size):
        def uniform(low, high):  # one number an image
            return torch.empty(len(x), 1, 1, 1, device=x.device).uniform_(low, high)

        x = resized_crop(x, boxes, size)
        x = torch.where(uniform(0, 1) < flip_p, x.flip(-1), x)
        x = colour_jitter(x, jitter, uniform(0, 1) < jitter_p)
        x = blend(x, grey(x), (uniform(0, 1) >= grey_p).to(x.dtype))
        x = gaussian_blur(x, uniform(0.1, 2.0) * (uniform(0, 1) < blur_p))
        return (x - mean) / std

    def views(count, size, scale):
        boxes = [random_boxes(images, scale, sizes).split(several) for _ in range(count)]
        return torch.cat([augment(x, box, size) for view in boxes for x, box in zip(parts, view)])

    rand = views(1, rand_size, rand_scale), views(rand_views, rand_size, rand_scale)
    return [*rand, views(focal_views, focal_size, focal_scale)] if focal_views else [*rand]


@functools.cache
def constant(values, device):
    """A tuple of numbers as a float32 tensor, copied to the device once: copying stalls an accelerator."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def random_boxes(images, scale, sizes=None, ratio=(3 / 4, 4 / 3), attempts=10):
    """Boxes (B, 4) = top, left, height, width in pixels, drawn as torchvision's RandomResizedCrop draws them.

    Area share uniform in `scale`, aspect ratio log-uniform in `ratio`; the first of `attempts` draws that fits
    counts. Where none fits: the largest centred box whose ratio is allowed. With `sizes` (B, 2), the heights and
    widths before images were stretched to one size, boxes are drawn in the originals and stretched like these."""
    stored = constant(tuple(images.shape[2:]), images.device)
    sizes = stored.expand(len(images), 2) if sizes is None else sizes.to(stored)
    height, width = sizes[:, :1], sizes[:, 1:]
    draw = torch.rand(4, len(images), attempts, device=images.device)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draw[0])
    aspect = (math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * draw[1]).exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    top, left = (draw[2] * (height - h + 1)).floor(), (draw[3] * (width - w + 1)).floor()
    boxes = torch.stack([top, left, h, w], dim=-1)  # (B, attempts, 4)
    boxes = boxes[torch.arange(len(images), device=images.device), fits.int().argmax(dim=1)]
    h, w = torch.minimum(height, (width / ratio[0]).round()), torch.minimum(width, (height * ratio[1]).round())
    centred = torch.cat([((height - h) / 2).floor(), ((width - w) / 2).floor(), h, w], dim=1)
    return torch.where(fits.any(dim=1, keepdim=True), boxes, centred) * (stored / sizes).repeat(1, 2)


def mix(images, dim, index, weight):
    """Weighted sums of T rows (dim 2) or columns (dim 3) of images (B, C, H, W), S of them: `dim` becomes S long.

    index and weight (B, S, T). Resizing and blur are this along one dimension, then along the other; as only few rows
    count, an embedding bag, which adds up just these, is several times faster than a matrix product. It wants the
    images in memory as (B, H, C, W) or (B, W, C, H), and copies them if they are not."""
    images = images.movedim(dim, 1)
    index = index + images.shape[1] * torch.arange(len(images), device=images.device)[:, None, None]
    mixed = F.embedding_bag(index.flatten(0, 1), images.flatten(2).flatten(0, 1), mode="sum",
                            per_sample_weights=weight.flatten(0, 1).to(images.dtype))
    return mixed.view(*index.shape[:2], *images.shape[2:]).movedim(1, dim)


def resized_crop(images, boxes, size):
    """Antialiased bilinear crop-and-resize, each image by its own box: (B, C, H, W), (B, 4) -> (B, C, size, size)."""

    def taps(start, length, full):  # triangle filter as wide as an output pixel: index and weight, (B, size, T)
        start, scale, end = (x[:, None, None] for x in (start, length / size, start + length))
        centre, reach = start + scale * (torch.arange(size, device=images.device)[:, None] + 0.5), scale.clamp_min(1)
        most = math.ceil(2 * max(1, full / size))  # T, if the box is the image
        pixel = (centre - reach + 0.5).floor() + torch.arange(most, device=images.device)
        weight = (1 - (pixel + 0.5 - centre).abs() / reach).clamp_min(0) * ((pixel + 1 > start) & (pixel < end))
        return pixel.long().clamp(0, full - 1), weight / weight.sum(dim=2, keepdim=True)

    top, left, height, width = boxes.unbind(dim=1)
    images = mix(images, 2, *taps(top, height, images.shape[2]))
    return mix(images, 3, *taps(left, width, images.shape[3]))


def grey(images):
    """Luma of RGB images in [0, 1], (B, 3, H, W) -> (B, 1, H, W)."""
    r, g, b = images.split(1, dim=1)
    return 0.2989 * r + 0.587 * g + 0.114 * b


def blend(x, y, share):
    """`share` of x and the rest of y, clamped to [0, 1]."""
    return (share * x).add_((1 - share) * y).clamp_(0, 1)


def colour_jitter(images, strength, apply):
    """ColorJitter(.8 s, .8 s, .8 s, .2 s) for strength s in [0, 1], where `apply` (B, 1, 1, 1), in a random order."""

    def factor(reach, neutral):
        reach = reach * strength
        draw = torch.empty_like(apply, dtype=images.dtype).uniform_(neutral - reach, neutral + reach)
        return torch.where(apply, draw, neutral)

    brightness, contrast, saturation, hue = factor(0.8, 1.0), factor(0.8, 1.0), factor(0.8, 1.0), factor(0.2, 0.0)
    steps = [lambda x: (brightness * x).clamp_(0, 1),
             lambda x: blend(x, grey(x.mean(dim=(2, 3), keepdim=True)), contrast),
             lambda x: blend(x, grey(x), saturation),
             lambda x: turn_hue(x, hue)]
    for i in torch.randperm(4).tolist():
        images = steps[i](images)
    return images


def turn_hue(images, turn):
    """Turn the hue of RGB images in [0, 1] by `turn` (B, 1, 1, 1) in [-.5, .5], a share of the colour circle (HSV)."""
    r, g, b = images.split(1, dim=1)
    high, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = high - low
    from_red = (high + g + b - r - 2 * low) / (6 * chroma).clamp_min(1e-8)  # along the circle, 0 to 1/2
    hue = torch.copysign(from_red, g - b) + turn
    away = hue - constant((0, 1 / 3, 2 / 3), images.device).to(images.dtype).view(3, 1, 1)
    away = away.sub_(away.round()).abs_().clamp_(1 / 6, 1 / 3)  # a channel is high near its own hue, low far from it
    return torch.addcmul(low + 2 * chroma, chroma, away, value=-6)


def gaussian_blur(images, sigma):
    """Blur with an own sigma (B, 1, 1, 1), 0 to 2 pixels, for every image, reflecting at the border."""
    offset = torch.arange(-8, 9, device=images.device)  # up to 4 sigma
    weight = (-0.5 * (offset / sigma[..., 0].clamp_min(1e-3)).square()).exp()  # (B, 1, 17)
    weight = weight / weight.sum(dim=-1, keepdim=True)
    for dim in (3, 2):
        size = images.shape[dim]
        index = (torch.arange(size, device=images.device)[:, None] + offset) % (2 * max(size - 1, 1))
        index = torch.minimum(index, 2 * (size - 1) - index)
        images = mix(images, dim, index.expand(len(images), -1, -1), weight.expand(-1, size, -1))
    return images


# ---- Samplers: which images exist, and which share a mini-batch ------------------------------------------------------


def long_tail_indices(labels, prior, *, num_images=None, seed=0):
    """Indices of a subset whose class frequencies follow `prior`: labels (N,) in 0..C-1, prior (C,) -> (n,), shuffled.

    Class c gets the share prior[c] (rounded down, at least one image) of num_images, by default of as many as the
    labels allow. ValueError if a class has too few images."""
    labels = torch.as_tensor(labels).cpu()
    counts = torch.bincount(labels, minlength=len(prior))
    check_prior(prior, len(counts))
    prior = prior.cpu().double()
    most = int((counts / prior).min() * (1 + 1e-6))  # 1e-6: the prior is rounded, its classes are not
    num_images = most if num_images is None else num_images
    if not 0 < num_images <= most:
        raise ValueError(f"num_images must lie in 1..{most}, what the labels and the prior allow, got {num_images}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    wanted = [max(1, int(num_images * share * (1 + 1e-6))) for share in prior.tolist()]
    shuffled = labels[order]
    chosen = torch.cat([order[shuffled == c][:n] for c, n in enumerate(wanted)])
    return chosen[torch.randperm(len(chosen), generator=generator)]


class ClassBatchSampler(torch.utils.data.Sampler):
    """Mini-batches of exactly `classes_per_batch` classes, the marginal class frequencies those of the labels.

    The paper's class-imbalanced mini-batches (Table 1: 8 of ImageNet's 1000 classes a batch, against 960). Use as
    `DataLoader(..., batch_sampler=...)` and call `set_epoch` before every epoch. batch_size counts all ranks; the
    ranks' shares of a batch are disjoint and make it up. An epoch is N // batch_size batches, a function of seed and
    epoch. Each class is dealt from its own shuffled stack, reshuffled when it runs out.

    A class that is included with probability i and then fills the share s of the batch has the frequency i*s. The
    classes too frequent for equal shares are in every batch, with s their frequency; the others share the rest.
    ValueError if that cannot be done."""

    def __init__(self, labels, batch_size, classes_per_batch, *, rank=0, world_size=1, seed=0):
        labels = torch.as_tensor(labels)
        classes, counts = labels.unique(return_counts=True)
        most = min(len(classes), batch_size)
        if not 1 <= classes_per_batch <= most:
            raise ValueError(f"classes_per_batch must lie in 1..{most}, got {classes_per_batch}")
        if not batch_size <= len(labels) or batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError(f"batch_size {batch_size} must be a multiple of world_size {world_size}, at most the "
                             f"{len(labels)} labels, and rank {rank} below world_size")
        self.stacks = [(labels == c).nonzero().flatten() for c in classes]
        self.batch_size, self.num_batches = batch_size, len(labels) // batch_size
        self.classes_per_batch = classes_per_batch
        self.rank, self.world_size, self.seed, self.epoch = rank, world_size, seed, 0

        frequency = counts.double() / len(labels)
        self.inclusion, self.share = torch.ones(len(classes), dtype=torch.float64), frequency.clone()
        places, mass = classes_per_batch, 1.0
        order = frequency.argsort(descending=True).tolist()
        while order and frequency[order[0]] * places > mass * (1 + 1e-9):  # too frequent: in every batch
            places, mass = places - 1, mass - frequency[order.pop(0)].item()
        self.inclusion[order] = (frequency[order] * places / mass).clamp_max(1)
        self.share[order] = mass / places
        if self.share.min() * batch_size < 1 - 1e-9:
            raise ValueError(f"batch_size {batch_size} is too small for {classes_per_batch} classes a batch at these "
                             f"frequencies: the rarest would get {self.share.min() * batch_size:.2f} images")

    def __len__(self):
        return self.num_batches

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        dealt = [iter(()) for _ in self.stacks]

        def deal(c, count):
            images = []
            while len(images) < count:
                images += itertools.islice(dealt[c], count - len(images))
                if len(images) < count:  # a fresh stack, what the batch holds already at its bottom
                    fresh = self.stacks[c][torch.randperm(len(self.stacks[c]), generator=generator)].tolist()
                    dealt[c] = iter(sorted(fresh, key=set(images).__contains__))
            return images

        batches_with = round_randomly(self.inclusion * self.num_batches, generator)  # of each class, still to come
        for left in range(self.num_batches, 0, -1):
            key = torch.rand(len(batches_with), generator=generator).log() / batches_with  # weighted, no class twice
            key[batches_with == 0], key[batches_with == left] = -math.inf, math.inf  # must be in all that are left
            classes = key.topk(self.classes_per_batch).indices
            batches_with[classes] -= 1
            counts = round_randomly(self.share[classes] * self.batch_size, generator)
            batch = torch.tensor([i for c, n in zip(classes.tolist(), counts.tolist()) for i in deal(c, n)])
            batch = batch[torch.randperm(len(batch), generator=generator)]
            yield batch[self.rank :: self.world_size].tolist()


def round_randomly(quotas, generator):
    """Round (C,) numbers of integer sum up or down so that sum and expectations are kept (systematic sampling)."""
    order = torch.randperm(len(quotas), generator=generator)
    edges = quotas[order].double().cumsum(dim=0)
    edges[-1] = edges[-1].round()
    edges = (edges + torch.rand((), dtype=torch.float64, generator=generator)).floor()
    rounded = torch.empty_like(order)
    rounded[order] = edges.diff(prepend=edges.new_zeros(1)).long()
    return rounded


# ---- Evaluation on frozen features, in blocks ------------------------------------------------------------------------


@torch.no_grad()
def neighbours(queries, bank, k, *, block=4096):
    """The k nearest rows of `bank` (N, d) to each of `queries` (Q, d) by cosine: (similarities, indices), (Q, k) each.

    Nearest first. Never holds more than block * (block + 2k) similarities. A query that is in the bank finds itself."""
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must lie in 1..{len(bank)}, the size of the bank, got {k}")
    similarities, indices = [], []
    for query in queries.split(block):
        query = on_sphere(query)
        best = query.new_empty(len(query), 0)
        where = torch.empty(len(query), 0, dtype=torch.long, device=query.device)
        for start in range(0, len(bank), block):
            new = query @ on_sphere(bank[start : start + block].to(query)).T  # (block, block)
            new, place = new.topk(min(k, new.shape[1]), dim=1)
            best, order = torch.cat([best, new], dim=1).topk(min(k, best.shape[1] + new.shape[1]), dim=1)
            where = torch.cat([where, place + start], dim=1).gather(1, order)
        similarities.append(best)
        indices.append(where)
    return torch.cat(similarities), torch.cat(indices)


@torch.no_grad()
def knn_accuracy(train_features, train_labels, test_features, test_labels, *, k=20, temperature=0.07, block=4096):
    """Accuracy in [0, 1] of `knn_predictions`: features (N, d), labels (N,), twice."""
    predictions = knn_predictions(train_features, train_labels, test_features, k=k, temperature=temperature,
                                  block=block)
    return (predictions == torch.as_tensor(test_labels, device=predictions.device)).cpu().double().mean().item()


@torch.no_grad()
def knn_predictions(train_features, train_labels, test_features, *, k=20, temperature=0.07, block=4096):
    """Classes (Q,) by a weighted k-NN classifier (Wu et al., 2018): features (N, d), labels (N,), features (Q, d).

    The k nearest training images vote with weight exp(cosine / temperature)."""
    train_labels = torch.as_tensor(train_labels, device=test_features.device)
    similarity, index = neighbours(test_features, train_features, k, block=block)
    votes = similarity.new_zeros(len(index), int(train_labels.max()) + 1)
    votes.scatter_add_(1, train_labels[index], ((similarity - similarity[:, :1]) / temperature).exp())
    return votes.argmax(dim=1)
