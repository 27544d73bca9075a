"""PMSN: Prior Matching for Siamese Networks. The whole method in one file, to be read in order.

    Assran et al.: The Hidden Uniform Cluster Prior in Self-Supervised Learning. ICLR 2023.

Many self-supervised methods spread every mini-batch evenly over clusters to avoid collapse. On
long-tailed data this hidden uniform prior is wrong: the network groups images by whatever splits
them evenly (pose, background). PMSN is MSN (Assran et al., ECCV 2022) with a prior of your choice:

    loss  =  mean cross-entropy H(p+, p)  +  prior_weight * KL(p_bar || pi)

    symbol   name in the code    meaning                                            shape
    B                            images per mini-batch on this GPU
    M                            anchor views per image (in MSN 11: 1 rand and 10 focal)
    K        num_prototypes      number of prototypes
    d        output_dim          dimension of the embeddings
    z        anchors             embeddings of anchor views by the trained network  (M*B, d)
    z+       targets             embeddings of target views by the target network   (B, d)
    q        prototypes          one trained vector per cluster                     (K, d)
    p        exp(log_p)          softmax(cosine(z, q) / temperature)                (M*B, K)
    p+       p_target            the same for z+, then sharpened, without gradient  (B, K)
    p_bar    p_bar               mean of p over the mini-batches of all GPUs        (K,)
    pi       prior               share of the images that each prototype should get (K,)

An image gives three kinds of views. The target view is a large crop with all of its patches. Rand
views are large crops that lose some patches (they are masked). Focal views are small crops with all
patches. Rand and focal views are the M anchor views.

    anchor view -> patches (rand: some)   -> encoder        -> head        -> z  \
                                                                                  prototypes -> loss
    target view -> patches, all of them   -> target encoder -> target head -> z+ /

The target network is a moving average of the trained network. Its features are the result. This is
all of it (`python pmsn.py` runs it on noise):

    model = PMSN(VisionTransformer(), prior=power_law_prior(1024, exponent=0.25))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for crops in loader:                        # multi_crop of every image of a mini-batch
        loss, terms = model(make_views(crops))  # terms are for logging
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target(ema_momentum=0.996)
    features = model.target_encoder(images)     # images normalized as make_views does it

The cross-entropy alone is nearly 0 if every prediction names the same prototype with certainty.
Against this collapse there is the KL, which is then log(1 / pi_k) for this prototype k.

With a uniform pi, KL = log K - H(p_bar), where H of one distribution is its entropy. MSN maximizes
this H, so its loss is the same up to the constant prior_weight * log K. MSN's published code also
rescales p+ by Sinkhorn iterations, so that all clusters get equal shares. `sinkhorn_iterations`
turns this on.

The file has this order: priors, loss, options of the loss that are not in the paper (skip them at
first), network, PMSN. This is the method. Views, samplers, the same hidden prior in three other
losses, and checks of arguments can wait for a second reading.
"""

import copy
import math
from collections import OrderedDict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2


# ---- Priors: tensors (K,), positive, with sum 1 --------------------------------------------------
def power_law_prior(num_prototypes, exponent):
    """pi_k proportional to k^-exponent for k = 1..K. Exponent 0 is the uniform prior of MSN.

    Prototype 1 should get the largest share of the images, prototype 2 the second largest one, and
    so on. Before training, prototypes are interchangeable, so their numbers are arbitrary. Raises
    ValueError for a negative exponent, and for one so large that a share becomes 0.
    """
    check_at_least_0("exponent", exponent)
    return to_prior(torch.arange(1, num_prototypes + 1).double() ** -exponent)


def class_prior(counts):
    """The shares of a histogram, (K,) -> (K,): prototype c gets the share of class c.

    The loss does not know which image is of which class. Only the sizes of the classes matter.
    Raises ValueError for a class without images.
    """
    return to_prior(torch.as_tensor(counts).double())


def to_prior(shares):
    prior = (shares / shares.sum()).float()
    check_prior(prior)
    return prior


# ---- Loss ----------------------------------------------------------------------------------------
def pmsn_loss(anchors, targets, prototypes, prior, *, temperature=0.1, sharpening=0.25,
              prior_weight=1.0,
              # Not in the paper and off: see the next section of this file.
              relative_sharpening=False, sinkhorn_iterations=0, any_order=False):
    """The loss of the paper, in nats, and its terms. With one anchor view per image it is

        p        = softmax(cosine(anchors, prototypes) / 0.1)
        p_target = softmax(cosine(targets, prototypes) / 0.1 / 0.25)      without gradient
        p_bar    = mean of p over the images
        loss     = mean of -sum(p_target * log(p))  +  sum(p_bar * log(p_bar / prior))

    The table at the top gives the shapes. With several views per image, anchors are ordered by
    views: first the first view of all images, then their second view, and so on. Gradients reach
    anchors and prototypes. With several GPUs, DistributedDataParallel must average the gradients,
    as it does by default (see `mean_over_ranks`). Raises ValueError for shapes that do not fit, for
    options out of their range, and for an invalid prior (see `check_prior`).
    """
    check_prior(prior)
    check_embeddings(anchors, targets, prototypes, prior)
    check_at_least_0("prior_weight", prior_weight)
    log_p = log_predictions(anchors, prototypes, temperature)  # (M*B, K)
    p = log_p.exp()
    # The prior is about the whole batch, so p_bar is the mean over all GPUs, with gradient.
    p_bar = mean_over_ranks(p.mean(dim=0))  # (K,)
    log_prior = prior.to(log_p).log()  # (K,)
    if any_order:  # not in the paper
        log_prior = in_order_of(p_bar, log_prior)
    with torch.no_grad():
        log_target = log_predictions(targets, prototypes, temperature)  # (B, K)
        if relative_sharpening:  # not in the paper
            log_target = sharpen_relative(log_target, sharpening, log_prior)
        else:
            log_target = sharpen(log_target, sharpening)
        if sinkhorn_iterations:  # not in the paper
            log_target = sinkhorn(log_target, log_prior, sinkhorn_iterations)
        p_target = log_target.exp()

    # Every anchor view of an image predicts the same target: (M, B, K) against (B, K).
    log_p_views = log_p.unflatten(0, (-1, len(targets)))
    cross_entropy = -(p_target * log_p_views).sum(dim=-1).mean()

    # At a low temperature, the share of a prototype that no image comes near is rounded to 0, and
    # 0 * log 0 would be NaN. So in the logarithm 0 is replaced by the smallest positive number.
    log_p_bar = p_bar.clamp_min(torch.finfo(p_bar.dtype).tiny).log()
    prior_kl = (p_bar * (log_p_bar - log_prior)).sum()

    loss = cross_entropy + prior_weight * prior_kl
    return loss, {
        "cross_entropy": cross_entropy.detach(),
        "prior_kl": prior_kl.detach(),
        "mean_prediction": p_bar.detach(),  # (K,)
        # exp(H(p_bar)), where entr(x) = -x log x: 1 if one prototype takes all images
        "effective_prototypes": torch.special.entr(p_bar.detach()).sum().exp(),
        # exp(mean H(p)) on this GPU: 1 if all predictions are certain. The entropy of a mean is at
        # least the mean of the entropies, and equal only if all predictions are the same. So a
        # number as large as effective_prototypes also means a collapse.
        "prototypes_per_view": torch.special.entr(p.detach()).sum(dim=-1).mean().exp(),
    }


def log_predictions(embeddings, prototypes, temperature):
    """log softmax(cosine(z, q) / temperature): (N, d), (K, d) -> (N, K)."""
    check_temperature(temperature)
    return F.log_softmax(cosine(embeddings, prototypes) / temperature, dim=-1)


def cosine(x, y):
    """The cosines of all pairs: (N, d), (n, d) -> (N, n), at least in float32."""
    # Under autocast this product would be in bfloat16, which is too coarse for a loss.
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(at_least_float32(x), dim=-1)
        y = F.normalize(at_least_float32(y), dim=-1)
        return x @ y.T


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sharpen(log_p, sharpening):
    """p^(1/T) / sum with T = `sharpening` in (0, 1], on logarithms: (N, K) -> (N, K). From MSN.

    With the default T = 0.25 this is p^4, divided by its sum. A target is more certain than the
    prediction that it came from, so training makes predictions certain.
    """
    check_sharpening(sharpening)
    return F.log_softmax(log_p / sharpening, dim=-1)


def mean_over_ranks(x):
    """Forward: the mean of x over all W processes (ranks). Backward: as if it were the local x.

    This is right, because DistributedDataParallel averages the gradients of all processes later:
    for a function f of the mean, the average of f'(mean) * dx over the processes is f'(mean) * the
    average of dx, which is the gradient.
    """
    total = x.detach().clone()
    if num_ranks() > 1:
        dist.all_reduce(total)  # the sum over W processes
    return total / num_ranks() + (x - x.detach())  # The last term is 0, and has the gradient of x.


def num_ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


# ---- Options of the loss that are not in the paper -----------------------------------------------
def sharpen_relative(log_p, sharpening, log_prior):
    """`relative_sharpening`: pi * (p / pi)^(1/T) / sum, on logarithms: (N, K), (K,) -> (N, K).

    With a steep prior, training with `sharpen` can collapse to the prediction p = pi for every
    image. The KL is then 0. The target is pi^4 / sum, which has its mass at the largest shares, and
    for K = 10 and exponent 1 the cross-entropy is only 1.14 nats. Relative sharpening leaves p = pi
    as it is, and the cross-entropy is H(pi) = 1.99 nats. (Without a collapse it can be near 0.)
    This makes a collapse more expensive, but not impossible. With a mild prior training does not
    collapse. But while predictions are uncertain, `sharpen` still gives the largest shares more
    than the prior (extras/README.md has what this costs). With the uniform prior both ways of
    sharpening are the same.
    """
    check_sharpening(sharpening)
    return F.log_softmax(log_prior + (log_p - log_prior) / sharpening, dim=-1)


def sinkhorn(log_p, log_prior, iterations):
    """`sinkhorn_iterations`: rescale predictions until their mean is nearly pi: -> (N, K).

    The mean is taken over all GPUs. The published MSN and SwAV do this with the uniform prior,
    which would undo any other prior in the loss. The rows of `log_p` (N, K) need not be normalized,
    and `log_prior` is (K,) or one number for all prototypes.
    """
    check_at_least_0("sinkhorn_iterations", iterations)
    for _ in range(iterations):
        # Scale each column so that its mean is pi_k. We subtract its largest entry before exp, as
        # logsumexp does: otherwise exp could round a whole column to 0.
        largest = log_p.amax(dim=0)  # (K,)
        if num_ranks() > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        mean = mean_over_ranks((log_p - largest).exp().mean(dim=0))
        log_p = log_p - largest - mean.log() + log_prior
        # Scale each row to the sum 1 again, which moves the columns a little.
        log_p = F.log_softmax(log_p, dim=-1)
    return log_p


def in_order_of(p_bar, log_prior):
    """`any_order`: the shares of the prior in the order of p_bar. Both are (K,).

    The largest share goes to the prototype that is used most, and so on. Without this option, a
    cluster of the right size can be stuck at a prototype with another share. Of all orders of the
    prior, this one has the smallest KL. It has a disadvantage with few images per prototype: in a
    mini-batch even balanced clusters have unequal sizes by chance. Sorted, they look like a mild
    power law, and the KL does not push any more.
    """
    place = p_bar.argsort().argsort()  # how many entries of p_bar are smaller: (K,)
    return log_prior.sort().values[place]


# ---- Vision transformer (Dosovitskiy et al., 2021), with the parameter names of timm -------------
class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):  # (B, N, dim)
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, N, 3, heads, dim / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, dim / heads) each
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        fc1, fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT encoder: images (B, 3, H, W) -> features of the CLS token (B, embed_dim).

    Weights from timm can be loaded as they are. load_encoder in extras/transfer.py reads
    checkpoints of MSN and others.
    """
    def __init__(self, image_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6):
        super().__init__()
        self.embed_dim, self.patch_size = embed_dim, patch_size
        self.grid = (image_size // patch_size,) * 2
        proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=proj))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + math.prod(self.grid), embed_dim))
        self.blocks = nn.Sequential(*[Block(embed_dim, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_weights)

    def forward(self, images, patch_drop=0.0):
        """`patch_drop` in [0, 1) is the share of its patches that each image loses."""
        tokens = self.embed_patches(images)  # (B, N, embed_dim)
        if patch_drop:
            kept = random_patches(tokens, patch_drop)  # (B, kept)
            tokens = tokens.gather(1, kept[:, :, None].expand(-1, -1, self.embed_dim))
        cls = self.cls_token + self.pos_embed[:, :1]
        cls = cls.expand(tokens.shape[0], -1, -1)  # torch.export does not understand len(tokens).
        tokens = self.blocks(torch.cat([cls, tokens], dim=1))
        return self.norm(tokens)[:, 0]

    def embed_patches(self, images):
        """Patch embeddings plus position embeddings, (B, N, embed_dim)."""
        if any(side % self.patch_size for side in images.shape[2:]):
            raise ValueError(f"the sides of images of shape {tuple(images.shape)} must be "
                             f"multiples of the patch size {self.patch_size}")
        tokens = self.patch_embed(images)  # (B, embed_dim, h, w)
        position = self.pos_embed[:, 1:]
        if tokens.shape[2:] != self.grid:
            # Small crops have fewer patches. Position embeddings are interpolated, as in timm.
            position = at_least_float32(position).unflatten(1, self.grid).permute(0, 3, 1, 2)
            position = F.interpolate(position, tokens.shape[2:], mode="bicubic", antialias=True)
            position = position.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)
        return tokens.flatten(2).transpose(1, 2) + position


def random_patches(tokens, patch_drop):
    """Which tokens to keep, at random for each image: (B, N, dim) -> indices (B, kept)."""
    batch, count, _ = tokens.shape
    kept = max(1, int((1 - patch_drop) * count + 1e-6))  # 1e-6: (1 - .9) * 20 is 1.99..
    return torch.rand(batch, count, device=tokens.device).argsort(dim=1)[:, :kept]


def init_weights(module):
    """The initialization of MSN, for encoder and head."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.zeros_(module.bias)


# ---- PMSN: a trained network, and a target network that follows it -------------------------------
def projection_head(input_dim, hidden_dim=2048, output_dim=256):
    """The head of MSN: (B, input_dim) -> (B, output_dim)."""
    return nn.Sequential(
        nn.Linear(input_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.GELU(),
        nn.Linear(hidden_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.GELU(),
        nn.Linear(hidden_dim, output_dim),
    ).apply(init_weights)


class PMSN(nn.Module):
    """Encoder, head and prototypes, and the target network: a moving average of encoder and head.

    The encoder maps images to (B, encoder.embed_dim), and the head maps this to (B, output_dim).
    Without `head`, it is the head of MSN. The prior is (K,). `patch_drop` in [0, 1) is the share of
    the patches that a rand view loses. With patch_drop = 0 the encoder is called without this
    argument, so that other encoders fit, for example those of the library timm.
    """
    def __init__(self, encoder, prior, *, head=None, output_dim=256, patch_drop=0.15):
        super().__init__()
        check_prior(prior)
        if head is None:
            head = projection_head(encoder.embed_dim, output_dim=output_dim)
        self.encoder, self.head = encoder, head
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.target_head = copy.deepcopy(head).requires_grad_(False)
        # Prototypes are parameters of this module, so that DDP averages their gradients too.
        prototypes = torch.empty(len(prior), output_dim).uniform_(-1, 1) / math.sqrt(output_dim)
        self.prototypes = nn.Parameter(prototypes)
        self.register_buffer("prior", prior.clone())
        self.patch_drop = patch_drop

    def forward(self, views, **loss_options):
        """[target, rand, focal] views -> (loss, terms). `loss_options` go to `pmsn_loss`.

        Target views are (B, 3, H, W), and the others (number of views * B, 3, H, W), ordered by
        views. Only the rand views are masked. Focal views can be left out, or have several sizes:
        [target, rand] or [target, rand, focal, focal ...].
        """
        target_views, rand_views, *focal_views = views
        if self.patch_drop:
            features = [self.encoder(rand_views, patch_drop=self.patch_drop)]
        else:
            features = [self.encoder(rand_views)]
        features += [self.encoder(x) for x in focal_views]
        # As in MSN, BatchNorm in the head treats each crop size separately.
        anchors = torch.cat([self.head(x) for x in features])  # (M*B, d)
        with torch.no_grad():
            targets = self.target_head(self.target_encoder(target_views))  # (B, d)
        return pmsn_loss(anchors, targets, self.prototypes, self.prior, **loss_options)

    def update_target(self, ema_momentum):
        """target = m * target + (1 - m) * trained for all parameters, with m = ema_momentum.

        As in MSN, the target head stays in training mode: its BatchNorm normalizes with the
        statistics of the target views. Running statistics are not averaged.
        """
        move_target(self.target_encoder, self.encoder, ema_momentum)
        move_target(self.target_head, self.head, ema_momentum)


@torch.no_grad()
def move_target(target, trained, ema_momentum):
    """Move a target network toward a trained network, in place. See `PMSN.update_target`."""
    for slow, fast in zip(target.parameters(), trained.parameters()):
        slow.lerp_(fast, 1 - ema_momentum)


# ---- Views: crops by the workers of the data loader, colors on the device ------------------------
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BLUR_REACH = 8  # pixels to each side: four times the largest sigma of the blur


def multi_crop(image, *, rand_views=1, focal_views=10, rand_size=224, focal_size=96,
               rand_scale=(0.3, 1.0), focal_scale=(0.05, 0.3)):
    """Random crops and flips of one image, uint8 (3, H, W). The defaults are those of MSN.

    A scale is a range of the share of the area. Returns [target (1, 3, S, S), rand (rand_views, 3,
    S, S), focal (focal_views, 3, s, s)], uint8. Raises ValueError without any rand view: then
    `PMSN.forward` would mask the focal views.
    """
    if rand_views < 1 or focal_views < 0:
        raise ValueError("rand_views must be at least 1 and focal_views at least 0, got "
                         f"{rand_views} and {focal_views}")
    rand = v2.RandomResizedCrop(rand_size, rand_scale, antialias=True)
    focal = v2.RandomResizedCrop(focal_size, focal_scale, antialias=True)
    flip = v2.RandomHorizontalFlip()
    crops = [
        [flip(rand(image))],
        [flip(rand(image)) for _ in range(rand_views)],
        [flip(focal(image)) for _ in range(focal_views)],
    ]
    return [torch.stack(views) for views in crops if views]


def make_views(crops, **color_options):
    """Collated crops [(B, views, 3, S, S), ...] -> the views that `PMSN.forward` takes."""
    # In chunks: small ones are faster on a CPU, and large ones bound the memory of a GPU.
    chunk = 8 if crops[0].device.type == "cpu" else 4096
    views = []
    for crop in crops:
        view = crop.transpose(0, 1).flatten(0, 1)  # (views * B, 3, S, S), ordered by views
        parts = [augment_colors(part, **color_options) for part in view.split(chunk)]
        views.append(torch.cat(parts))
    return views


def augment_colors(images, *, jitter=0.5, jitter_p=0.8, gray_p=0.2, blur_p=0.5):
    """Color jitter, grayscale and blur as in MSN, then normalization: (N, 3, H, W) -> the same.

    Images are uint8, or float in [0, 1]. Each `_p` is the probability that an image is changed.
    Jitter is like ColorJitter(.8 j, .8 j, .8 j, .2 j) of torchvision with j = `jitter`, but in a
    fixed order, with one clamp at the end, and hue is a rotation of the RGB space. Then all steps
    are linear, and together they are two matrices A and C per image:

        new color = A @ color + C @ (mean color of the image)

    The only reason is speed: on a CPU core the views of an image take 5 ms, and 24 ms with
    torchvision's classes. On a first reading, go on with the samplers. Raises ValueError for float
    images that leave [0, 1], and for images too small to blur.
    """
    if blur_p and min(images.shape[2:]) <= BLUR_REACH:
        raise ValueError(f"images of {tuple(images.shape[2:])} pixels are too small to blur, they "
                         f"need more than {BLUR_REACH} per side: take blur_p=0")
    if images.dtype != torch.uint8 and (images.min() < 0 or images.max() > 1):
        raise ValueError("float images must lie in [0, 1]; they are normalized here")
    images = v2.functional.to_dtype(images, torch.float32, scale=True)
    pixels = images.flatten(2)  # (N, 3, H * W)
    # Random numbers are drawn on the CPU. The device gets two small matrices per image.
    matrices = color_matrices(len(images), jitter, jitter_p, gray_p)
    on_color, on_mean = matrices.to(images.device, non_blocking=True)
    pixels = on_color @ pixels + on_mean @ pixels.mean(dim=2, keepdim=True)
    images = pixels.clamp_(0, 1).view_as(images)
    chosen = torch.rand(len(images)) < blur_p
    if chosen.any():
        index = chosen.nonzero()[:, 0].to(images.device, non_blocking=True)
        sigma = torch.empty(len(index)).uniform_(0.1, 2.0)
        images[index] = gaussian_blur(images[index], sigma)
    return v2.functional.normalize(images, IMAGENET_MEAN, IMAGENET_STD)


def color_matrices(count, jitter, jitter_p, gray_p):
    """The random matrices A and C of `augment_colors` for each image, (2, count, 3, 3).

    The steps in this order, where a gray level stands for its color (r = g = b):

        x  <-  contrast * x + (1 - contrast) * gray level of the mean color
        x  <-  saturation * x + (1 - saturation) * gray level of x      (saturation 0: a gray image)
        x  <-  brightness * (x, rotated about the axis of the grays)

    The last two leave grays as they are, up to the brightness. This gives A and C.
    """
    strength = jitter * (torch.rand(count, 1, 1) < jitter_p)
    change = torch.empty(4, count, 1, 1).uniform_(-1, 1) * strength
    brightness, contrast, saturation = 1 + 0.8 * change[:3]
    angle = 2 * math.pi * 0.2 * change[3]
    saturation = torch.where(torch.rand(count, 1, 1) < gray_p, 0.0, saturation)
    to_gray = torch.tensor([0.2989, 0.587, 0.114]).expand(3, 3)
    saturate = torch.lerp(to_gray, torch.eye(3), saturation)
    # The rotation by an angle about an axis is the matrix exp(angle * X), where X @ v is the cross
    # product of the axis and v.
    gray_axis = torch.full((3, 3), 1 / math.sqrt(3))
    cross_product = torch.linalg.cross(torch.eye(3), gray_axis)  # the matrix X
    rotate = torch.matrix_exp(angle * cross_product)
    on_color = brightness * contrast * (rotate @ saturate)
    on_mean = brightness * (1 - contrast) * to_gray
    return torch.stack([on_color, on_mean])


def gaussian_blur(images, sigma):
    """Blur each image with its own sigma in (0, 2] pixels: (N, C, H, W), (N,) on the CPU."""
    offset = torch.arange(-BLUR_REACH, BLUR_REACH + 1)
    kernel = F.softmax(-0.5 * (offset / sigma[:, None]) ** 2, dim=1)  # (N, 17)
    kernel = kernel.to(images.device, non_blocking=True)
    # A depthwise convolution with one group per channel and image, along both directions.
    groups = math.prod(images.shape[:2])
    kernel = kernel.repeat_interleave(images.shape[1], dim=0)
    x = F.pad(images, [BLUR_REACH] * 4, mode="reflect")
    x = x.flatten(0, 1)[None]
    for shape in ((groups, 1, 1, 17), (groups, 1, 17, 1)):
        x = F.conv2d(x, kernel.view(shape), groups=groups)
    return x.view_as(images)


# ---- Samplers: which images exist, and which ones share a mini-batch -----------------------------
def long_tail_indices(labels, prior, seed=0):
    """A random subset, as large as possible, in which class c has about the share prior[c].

    labels (N,), prior (C,) -> indices (n,). Raises ValueError for a class without images, for
    labels of more than C classes, and for an invalid prior.
    """
    check_prior(prior)
    counts = torch.bincount(labels, minlength=len(prior))
    if counts.min() == 0 or len(counts) > len(prior):
        raise ValueError(f"a long-tailed subset needs images of each of {len(prior)} classes, and "
                         f"of no others. The {len(counts)} classes have {counts.tolist()} images")
    wanted = prior * (counts / prior).min()  # images per class, as many as the scarcest allows
    wanted = wanted.round().long().clamp_min(1)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = labels[order]
    return torch.cat([order[shuffled == c][:n] for c, n in enumerate(wanted)])


class ClassBatchSampler(torch.utils.data.Sampler):
    """A batch_sampler for table 1: mini-batches with images of few classes, from labels (N,).

    In each epoch, the images of a class are cut at random into parts of `batch_size` divided by
    `classes_per_batch` images. A batch takes one part of each of `classes_per_batch` classes. What
    is left of a class is not used in this epoch. Of a batch, each of `world_size` processes gets
    an equal share. `set_epoch` gives a new order. Raises ValueError if a class has no whole part,
    or more parts than there are batches.
    """
    MUST = 1e30  # the weight of a class that has to be in the next batch

    def __init__(self, labels, batch_size, classes_per_batch, rank=0, world_size=1, seed=0):
        classes, counts = labels.unique(return_counts=True)
        if not 0 <= rank < world_size or classes_per_batch < 1 or len(labels) == 0:
            raise ValueError(f"rank {rank} of {world_size} processes, {classes_per_batch} classes "
                             f"per batch or {len(labels)} labels are not possible")
        if batch_size % classes_per_batch or batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} must be a multiple of {classes_per_batch} "
                             f"classes per batch and of {world_size} processes")
        self.part_size = batch_size // classes_per_batch  # images of a class in a batch
        self.num_parts = counts // self.part_size
        self.num_batches = int(self.num_parts.sum()) // classes_per_batch
        if self.num_parts.min() < 1 or self.num_parts.max() > self.num_batches:
            raise ValueError(f"{self.part_size} images of {classes_per_batch} classes per batch do "
                             f"not fit classes of {counts.min()} to {counts.max()} images")
        self.members = [(labels == c).nonzero()[:, 0] for c in classes]
        self.classes_per_batch = classes_per_batch
        self.rank, self.world_size = rank, world_size
        self.seed, self.epoch = seed, 0

    def __len__(self):
        return self.num_batches

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)

        def shuffle(x):
            return x[torch.randperm(len(x), generator=generator)]

        parts = [shuffle(member).split(self.part_size) for member in self.members]
        parts_left = self.num_parts.double()  # of each class, (C,)
        # Classes with more parts left are drawn more often, so that all parts are used up together.
        # A class with as many parts left as there are batches left must be in all of them.
        for batches_left in range(self.num_batches, 0, -1):
            weights = torch.where(parts_left >= batches_left, self.MUST, parts_left)
            chosen = weights.multinomial(self.classes_per_batch, generator=generator)
            parts_left[chosen] -= 1
            # The parts of a class are used from the last one to the first.
            batch = shuffle(torch.cat([parts[c][int(parts_left[c])] for c in chosen]))
            yield batch[self.rank :: self.world_size].tolist()


# ---- The same hidden prior in three other losses: two views (B, d) -> (loss, terms) --------------
# Why do they prefer clusters of equal size? Let all images of a cluster have the same embedding,
# and let clusters be far apart. A cluster with the share s has s * B images.
#   SimCLR: the uniformity of an image is the log of a sum of exp(similarity) over the batch. Only
#       the s * B images of its own cluster count, with equal terms, so it is log s + constant. The
#       mean over all images is the sum over clusters of s * log s, which is smallest for equal s.
#   VICReg wants a variance of 1 along every dimension. A dimension that tells two clusters apart
#       varies most if each of them has half of the images.
#   SwAV: the codes have equal shares, because Sinkhorn makes them.
# (The paper's propositions 2 to 4. tests/test_propositions.py computes examples.)
def simclr_loss(first, second, temperature=0.1):
    """SimCLR (Chen et al., 2020). Its uniformity spreads the batch, which is that of this GPU."""
    check_views(first, second)
    check_temperature(temperature)
    z = torch.cat([first, second])
    similarity = cosine(z, z) / temperature  # (2B, 2B)
    alignment = -similarity.diagonal(len(first)).mean()  # (i, i + B). (i + B, i) is the same.
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    uniformity = similarity.masked_fill(itself, -math.inf).logsumexp(dim=1).mean()
    terms = {"alignment": alignment.detach(), "uniformity": uniformity.detach()}
    return alignment + uniformity, terms


def vicreg_loss(first, second):
    """VICReg (Bardes et al., 2022). Its variance and covariance terms spread the local batch."""
    check_views(first, second)
    if len(first) < 2:
        raise ValueError("VICReg needs at least two images, because it takes their variance")
    first, second = at_least_float32(first), at_least_float32(second)
    variance, covariance = 0.0, 0.0
    for z in (first, second):
        with torch.autocast(z.device.type, enabled=False):
            cov = torch.atleast_2d(z.T.cov())  # (d, d), also for d = 1
        std = (cov.diagonal() + 1e-4).sqrt()
        variance = variance + F.relu(1 - std).mean() / 2
        off_diagonal = cov - cov.diagonal().diag()
        covariance = covariance + off_diagonal.square().sum() / len(cov)
    invariance = F.mse_loss(first, second)
    loss = 25 * invariance + 25 * variance + covariance
    return loss, {"invariance": invariance.detach(), "variance": variance.detach(),
                  "covariance": covariance.detach()}


def swav_loss(first, second, prototypes, temperature=0.1, epsilon=0.05, sinkhorn_iterations=3):
    """SwAV (Caron et al., 2020). Over the batch of all GPUs, its codes use prototypes equally."""
    check_views(first, second)
    check_temperature(epsilon)
    fit = prototypes.ndim == 2 and prototypes.shape[1] == first.shape[1] and len(prototypes) > 0
    if not fit or sinkhorn_iterations < 1:
        raise ValueError(f"prototypes (K, {first.shape[1]}) and at least one Sinkhorn iteration "
                         f"are needed, got {tuple(prototypes.shape)} and {sinkhorn_iterations}")
    log_uniform = -math.log(len(prototypes))  # the same for all prototypes
    loss = 0.0
    for view, other in ((first, second), (second, first)):  # each view predicts the other's code
        with torch.no_grad():
            # As in the published code, Sinkhorn begins with the scores themselves. A softmax
            # before it would change the codes, because three iterations do not converge.
            log_code = cosine(other, prototypes) / epsilon
            code = sinkhorn(log_code, log_uniform, sinkhorn_iterations).exp()
        log_p = log_predictions(view, prototypes, temperature)  # (B, K)
        loss = loss - (code * log_p).sum(dim=-1).mean() / 2
    return loss, {"cross_entropy": loss.detach()}


# ---- Checks of arguments -------------------------------------------------------------------------
def check_prior(prior):
    """Raise ValueError unless the prior is a tensor (K,) of floats, positive, with sum 1.

    On a GPU the values are not checked, because the CPU would have to wait for them.
    """
    if not isinstance(prior, torch.Tensor) or prior.ndim != 1 or not prior.is_floating_point():
        raise ValueError(f"a prior must be a tensor (K,) of floats, got {prior!r}")
    # After model.half() the prior has rounded shares, whose sum is not exactly 1.
    tolerance = 1e-4 if torch.finfo(prior.dtype).bits >= 32 else 1e-2
    on_cpu = prior.device.type == "cpu"
    if on_cpu and not ((prior > 0).all() and abs(prior.double().sum() - 1) < tolerance):
        raise ValueError(f"a prior must be positive and sum to 1, got {prior}")


def check_embeddings(anchors, targets, prototypes, prior):
    """Raise ValueError unless these are (M*B, d), (B, d), (K, d) and (K,)."""
    matrices = (anchors, targets, prototypes)
    fit = all(x.ndim == 2 for x in matrices) and len({x.shape[1] for x in matrices}) == 1
    fit = fit and len(anchors) >= len(targets) > 0 and len(anchors) % len(targets) == 0
    if not fit or len(prototypes) != len(prior):
        shapes = ", ".join(str(tuple(x.shape)) for x in (*matrices, prior))
        raise ValueError("anchors (M*B, d), targets (B, d), prototypes (K, d) and prior (K,) must "
                         f"fit, but they have the shapes {shapes}")


def check_at_least_0(name, value):
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


def check_sharpening(sharpening):
    if not 0 < sharpening <= 1:
        raise ValueError(f"sharpening must lie in (0, 1], got {sharpening}")


def check_temperature(temperature):
    if not 0 < temperature < math.inf:
        raise ValueError(f"a temperature must be positive, got {temperature}")


def check_views(first, second):
    """Raise ValueError unless these are two views (B, d) of the same images."""
    if first.ndim != 2 or first.shape != second.shape or len(first) == 0:
        raise ValueError("two views must both have the shape (B, d), got "
                         f"{tuple(first.shape)} and {tuple(second.shape)}")


if __name__ == "__main__":
    # Ten training steps of a small network on noise, to see it run: python pmsn.py
    torch.manual_seed(0)
    images = torch.randint(256, (64, 3, 40, 40), dtype=torch.uint8)
    small_vit = VisionTransformer(image_size=32, patch_size=8, embed_dim=96, depth=2, num_heads=3)
    model = PMSN(small_vit, prior=power_law_prior(16, exponent=0.25))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    for step in range(10):
        crops = [multi_crop(x, rand_size=32, focal_size=16, focal_views=2) for x in images]
        crops = torch.utils.data.default_collate(crops)  # a DataLoader does this
        loss, terms = model(make_views(crops))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target(ema_momentum=0.996)
        print(f"step {step + 1:>2}  loss {loss:.3f}  KL(p_bar || prior) {terms['prior_kl']:.3f}")
