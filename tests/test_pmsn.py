"""pmsn.py, section by section, against cases by hand, NumPy, float64, and other libraries."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import pmsn


def close(got, expected, atol):
    """Compare tensors, arrays, lists or numbers, whatever their precision."""
    got, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (got, expected))
    torch.testing.assert_close(got, expected, atol=atol, rtol=0)


def random_inputs(views=3, batch=4, dim=6, num_prototypes=5):
    """Anchors (views * batch, dim), targets (batch, dim) and prototypes, none of unit length."""
    generator = torch.Generator().manual_seed(0)
    return [2 * torch.randn(n, dim, generator=generator, dtype=torch.float64)
            for n in (views * batch, batch, num_prototypes)]


def add_noise(module):
    """Move every parameter, so that biases and scales matter too."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module


def numpy_predict(z, prototypes, temperature):
    """softmax(cosine / temperature) over the prototypes, for one embedding."""
    cosines = [z @ q / math.sqrt(z @ z) / math.sqrt(q @ q) for q in prototypes]
    scores = np.exp(np.array(cosines) / temperature)
    return scores / scores.sum()


def numpy_sinkhorn(p, prior, iterations):
    """Every column gets its share, then every row the sum 1."""
    for _ in range(iterations):
        p = p * prior * len(p) / p.sum(axis=0)
        p = p / p.sum(axis=1, keepdims=True)
    return p


def numpy_pmsn(anchors, targets, prototypes, prior, temperature=0.1, sharpening=0.25,
               prior_weight=1.0, sinkhorn_iterations=0, relative_sharpening=False,
               any_order=False):
    """Loss, cross-entropy, KL, p_bar as the paper writes them. Anchor i has target i modulo B."""
    anchors, targets, prototypes, prior = map(np.asarray, (anchors, targets, prototypes, prior))
    predictions = np.array([numpy_predict(z, prototypes, temperature) for z in anchors])
    p_bar = predictions.mean(axis=0)

    def kl_for(order):
        return sum(p_bar[k] * math.log(p_bar[k] / order[k]) for k in range(len(order)))
    if any_order:
        prior = np.array(min(itertools.permutations(prior), key=kl_for))
    reference = prior if relative_sharpening else np.ones_like(prior)
    codes = []
    for target in targets:
        p = numpy_predict(target, prototypes, temperature)
        p = reference * (p / reference) ** (1 / sharpening)
        codes.append(p / p.sum())
    codes = numpy_sinkhorn(np.array(codes), prior, sinkhorn_iterations)
    costs = [-codes[i % len(targets)] @ np.log(p) for i, p in enumerate(predictions)]
    cross_entropy, kl = np.mean(costs), kl_for(prior)
    return cross_entropy + prior_weight * kl, cross_entropy, kl, p_bar


# ---- Priors --------------------------------------------------------------------------------------
def test_priors_by_hand():
    # 1 + 1/2 + 1/3 = 11/6, and 1 + 1/4 + 1/9 + 1/16 = 205/144
    close(pmsn.power_law_prior(3, 1.0), [6 / 11, 3 / 11, 2 / 11], 1e-7)
    close(pmsn.power_law_prior(4, 2.0), [144 / 205, 36 / 205, 16 / 205, 9 / 205], 1e-7)
    close(pmsn.power_law_prior(4, 0.0), [0.25] * 4, 0)
    close(pmsn.class_prior([1, 5, 2]), [0.125, 0.625, 0.25], 0)
    assert pmsn.power_law_prior(1024, 0.25).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_prototypes, exponent", [(5, 1.0), (1024, 0.25), (8142, 1.0)])
def test_a_rounded_prior_is_still_a_prior(num_prototypes, exponent, dtype):
    """After model.half() the shares are rounded. The loss is that of the unrounded prior."""
    anchors, targets, _ = random_inputs()
    prototypes = torch.randn(num_prototypes, 6, dtype=torch.float64)
    prior = pmsn.power_law_prior(num_prototypes, exponent)
    expected, _ = pmsn.pmsn_loss(anchors, targets, prototypes, prior)
    loss, _ = pmsn.pmsn_loss(anchors, targets, prototypes, prior.to(dtype))
    close(loss, expected, 1e-2)


# ---- Loss ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [
    {},
    {"temperature": 0.3, "sharpening": 1.0, "prior_weight": 0.0},
    {"temperature": 0.02},  # Some prototypes have shares below 1e-9.
    {"temperature": 0.5, "prior_weight": 2.5, "sinkhorn_iterations": 2},
    {"temperature": 0.5, "sharpening": 0.5, "relative_sharpening": True},
    {"sharpening": 0.4, "relative_sharpening": True, "sinkhorn_iterations": 3},
    {"any_order": True, "prior_weight": 2.5},
    {"any_order": True, "relative_sharpening": True},
    {"any_order": True, "temperature": 0.5, "sinkhorn_iterations": 3}])
def test_loss_equals_numpy_loop(options):
    """Three views and a skewed prior that is not sorted. The defaults are the ones of the paper."""
    prior = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2], dtype=torch.float64)
    expected, cross_entropy, kl, p_bar = numpy_pmsn(*random_inputs(), prior, **options)
    loss, terms = pmsn.pmsn_loss(*random_inputs(), prior, **options)
    close(loss, expected, 1e-9)
    close(terms["cross_entropy"], cross_entropy, 1e-9)
    close(terms["prior_kl"], kl, 1e-9)
    close(terms["mean_prediction"], p_bar, 1e-9)
    close(terms["effective_prototypes"], math.exp(-(p_bar @ np.log(p_bar))), 1e-8)


def test_prototypes_per_view_tell_both_collapses_from_clusters():
    """Of two anchors one is at a prototype, and one is between two. Then all are alike."""
    prior, axes = pmsn.power_law_prior(3, 1.0), torch.eye(3, dtype=torch.float64)

    def terms_of(anchors):
        return pmsn.pmsn_loss(anchors, anchors, axes, prior.double(), temperature=0.01)[1]

    mixed = terms_of(torch.stack([axes[0], axes[1] + axes[2]]))
    close(mixed["prototypes_per_view"], 2**0.5, 1e-9)  # exp of the mean of 0 and log 2
    same = terms_of(0.01 * prior.double().log().expand(4, 3) + 1)
    one = terms_of(axes[:1].expand(4, 3))
    close(one["prototypes_per_view"], 1, 1e-9)
    close(one["effective_prototypes"], 1, 1e-9)
    assert same["effective_prototypes"] > 2
    close(same["prototypes_per_view"], same["effective_prototypes"], 1e-9)


def test_gradient_is_the_one_with_constant_targets():
    anchors, targets, prototypes = random_inputs(views=2)
    prior = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2], dtype=torch.float64)
    z, z_target, q = (x.clone().requires_grad_() for x in (anchors, targets, prototypes))
    loss, terms = pmsn.pmsn_loss(z, z_target, q, prior, temperature=0.5, sinkhorn_iterations=2)
    loss.backward()
    assert z_target.grad is None and not any(term.requires_grad for term in terms.values())
    log_target = pmsn.sharpen(pmsn.log_predictions(targets, prototypes, 0.5), 0.25)
    p_target = pmsn.sinkhorn(log_target, prior.log(), 2).exp()
    anchors.requires_grad_(), prototypes.requires_grad_()
    p = (F.normalize(anchors) @ F.normalize(prototypes).T / 0.5).softmax(dim=1)
    prior_kl = (p.mean(dim=0) * (p.mean(dim=0) / prior).log()).sum()
    (prior_kl - (p_target.repeat(2, 1) * p.log()).sum(dim=1).mean()).backward()
    close(z.grad, anchors.grad, 1e-7)
    close(q.grad, prototypes.grad, 1e-7)


def test_the_prior_in_any_order_is_the_best_of_all_orders():
    """Of all 120 orders of five shares: the lowest KL and its gradient, whatever it is given."""
    inputs = [x.requires_grad_() for x in random_inputs()]
    shares = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2], dtype=torch.float64)
    plain = []
    for order in itertools.permutations(range(5)):
        plain.append(pmsn.pmsn_loss(*inputs, shares[list(order)]))
    loss, terms = min(plain, key=lambda found: found[1]["prior_kl"])
    expected = torch.autograd.grad(loss, [inputs[0], inputs[2]])
    assert terms["prior_kl"] < 0.5 * plain[0][1]["prior_kl"]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 1, 3]):
        found, found_terms = pmsn.pmsn_loss(*inputs, shares[order], any_order=True)
        close(found_terms["prior_kl"], terms["prior_kl"], 1e-12)
        for gradient, best in zip(torch.autograd.grad(found, [inputs[0], inputs[2]]), expected):
            close(gradient, best, 1e-12)


def test_the_order_of_a_uniform_prior_changes_nothing():
    uniform = pmsn.power_law_prior(5, 0.0)
    for options in ({}, {"sinkhorn_iterations": 2}, {"relative_sharpening": True}):
        plain, _ = pmsn.pmsn_loss(*random_inputs(), uniform, **options)
        loss, _ = pmsn.pmsn_loss(*random_inputs(), uniform, any_order=True, **options)
        assert torch.equal(loss, plain)


@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("options", [{}, {"sinkhorn_iterations": 3}, {"relative_sharpening": True},
                                     {"any_order": True}])
def test_extreme_inputs_stay_finite(options, autocast, temperature):
    """Only directions count, so embeddings of norm 1e-8 and 1e8 have the same loss."""
    plain, prior = [x.float() for x in random_inputs()], pmsn.power_law_prior(5, 1.5)
    # All images fit the first prototype. At temperature .01 the other predictions underflow to 0.
    first = plain[2][:1]
    collapsed = [first.repeat(12, 1), first.repeat(4, 1), torch.cat([first, -first.repeat(4, 1)])]
    zero = [0 * plain[0], 0 * plain[1], plain[2]]
    losses = []
    for inputs in ([1e-8 * x for x in plain], plain, [1e8 * x for x in plain], zero, collapsed):
        z, z_target, q = (x.clone().requires_grad_() for x in inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, terms = pmsn.pmsn_loss(z, z_target, q, prior, temperature=temperature, **options)
        loss.backward()
        assert all(x.isfinite().all() for x in (loss, *terms.values(), z.grad, q.grad))
        losses.append(loss.item())
    assert losses[:3] == pytest.approx([losses[1]] * 3, rel=1e-4)


@pytest.mark.parametrize("name", ["pmsn", "swav", "simclr", "vicreg"])
def test_bfloat16_embeddings_get_the_float32_loss(name):
    """Under autocast every loss is exactly the float32 loss of the same rounded embeddings."""
    first, second, prototypes = (x.bfloat16() for x in random_inputs(views=1))
    others = {"pmsn": [prototypes, pmsn.power_law_prior(5, 1.0)], "swav": [prototypes]}
    inputs, loss = [first, second, *others.get(name, [])], getattr(pmsn, f"{name}_loss")
    expected, _ = loss(*(x.float() for x in inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = loss(*inputs)
    assert torch.equal(got, expected)


def test_constant_answer_and_its_two_remedies():
    """Every image answers pi (K = 10, exponent 1.5, T = .25), so the prior term is 0.

    Plain sharpening makes s = pi^4 / sum(pi^4) the target, which costs only -sum(s log pi) = .71.
    Relative sharpening and Sinkhorn make pi the target, so the collapse costs H(pi) = 1.63.
    """
    prior = pmsn.power_law_prior(10, 1.5).double()
    # The prototypes are the axes. Off its mean, z is .1 log pi, and its length is 1.
    z = 0.1 * (prior.log() - prior.log().mean())
    z = (z + ((1 - z @ z) / 10).sqrt()).expand(6, -1)
    for options, cost in (({}, 0.7098), ({"any_order": True}, 0.7098),
                          ({"relative_sharpening": True}, 1.6281),
                          ({"sinkhorn_iterations": 1}, 1.6281)):
        _, terms = pmsn.pmsn_loss(z, z, torch.eye(10).double(), prior, **options)
        close(terms["prior_kl"], 0, 1e-6)
        close(terms["cross_entropy"], cost, 1e-4)


def test_where_the_same_prediction_for_every_image_ends():
    """K = 10, exponent 1, T = 1/4: the gradient of one prediction, followed to its end.

    There s = p (1 + log(p / pi) - KL), where s is the sharpened p. The loss is .62 nats from any
    start. With relative sharpening it depends on the start: 1.61 from equal predictions.
    """
    prior, axes = pmsn.power_law_prior(10, 1.0).double(), torch.eye(10, dtype=torch.float64)

    def descend(start, **options):
        z = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([z], lr=0.02)
        for _ in range(400):
            anchors = z.expand(2, -1)
            loss, terms = pmsn.pmsn_loss(anchors, anchors, axes, prior, **options)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item(), terms

    torch.manual_seed(0)
    for start in (0.1 * prior.log(), torch.zeros(10), 0.1 * torch.randn(10)):
        start = (start + 0.3 + 1e-4 * torch.randn(10)).double()
        loss, terms = descend(start)
        assert loss == pytest.approx(0.624, abs=2e-3)
        p, pi = terms["mean_prediction"].numpy(), prior.numpy()
        kl = (p * np.log(p / pi)).sum()
        np.testing.assert_allclose(p**4 / (p**4).sum(), p * (1 + np.log(p / pi) - kl), atol=2e-3)
        for name in ("effective_prototypes", "prototypes_per_view"):
            close(terms[name], 3.52, 0.01)
        assert 0.63 < descend(start, relative_sharpening=True)[0] < 1.62
    equal = torch.full((10,), 0.3).double()
    assert descend(equal, relative_sharpening=True)[0] == pytest.approx(1.607, abs=2e-3)


# ---- Vision transformer --------------------------------------------------------------------------
def small_vit(seed=0):
    torch.manual_seed(seed)
    vit = pmsn.VisionTransformer(image_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=3)
    return add_noise(vit.double())


@pytest.mark.parametrize("size", [(224, 224), (96, 96), (160, 96)])
def test_features_equal_timms(size):
    """Weights load strictly in both directions. Both interpolate position embeddings in float32."""
    timm = pytest.importorskip("timm", reason="timm is the oracle of this test")
    torch.manual_seed(0)
    oracle = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2,
                               dynamic_img_size=True).double().eval()
    vit = pmsn.VisionTransformer(embed_dim=192, depth=2, num_heads=3).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    for source, destination in ((oracle, vit), (vit, oracle)):
        destination.load_state_dict(add_noise(source).state_dict())
        close(vit(images), oracle(images), 1e-5)


def test_dropped_patches_never_existed():
    """For each image we run the blocks on its kept patches and CLS alone, in another order."""
    vit, images = small_vit(), torch.randn(5, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(0)
    features = vit(images, patch_drop=0.5)
    torch.manual_seed(0)
    indices = pmsn.random_patches(torch.zeros(5, 16, 1), 0.5)
    cls = vit.cls_token[0] + vit.pos_embed[0, :1]
    for patches, kept, feature in zip(vit.embed_patches(images), indices.tolist(), features):
        sequence = torch.cat([cls, patches[sorted(kept)]])
        close(feature, vit.norm(vit.blocks(sequence[None]))[0, 0], 1e-10)


def test_number_of_kept_patches():
    """The share (1 - drop), rounded down, but at least 1. As floats, (1 - .9) * 20 < 2."""
    for drop, count, kept in ((0.9, 20, 2), (0.15, 196, 166), (0.5, 9, 4), (0.95, 9, 1)):
        assert pmsn.random_patches(torch.zeros(2, count, 3), drop).shape == (2, kept)


def test_masks_are_uniform_and_independent():
    """4000 images keep 9 of 12 patches. How often are patches and pairs kept? (5 sigma)"""
    torch.manual_seed(0)
    indices = pmsn.random_patches(torch.zeros(4000, 12, 1), 0.25)
    kept = torch.zeros(4000, 12).scatter_(1, indices, 1.0)
    p = torch.full((12, 12), 9 / 12 * 8 / 11).fill_diagonal_(9 / 12)
    sigma = (4000 * p * (1 - p)).sqrt()
    assert ((kept.T @ kept - 4000 * p) / sigma).abs().max() < 5


def test_an_exported_encoder_takes_any_number_of_images():
    """Exported with two images, as for ONNX, it has the features of five."""
    vit, images = small_vit(), torch.randn(5, 3, 32, 32, dtype=torch.float64)
    any_number = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(vit, (images[:2],), dynamic_shapes=any_number).module()
    close(exported(images), vit(images), 1e-10)


# ---- PMSN ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype, atol", [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
def test_half_precision_features_of_smaller_images(dtype, atol):
    """Position embeddings are interpolated in float32, and features keep the given dtype."""
    vit, images = small_vit(), torch.randn(2, 3, 16, 24, dtype=torch.float64)
    expected = vit(images)
    features = vit.to(dtype)(images.to(dtype))
    assert features.dtype == dtype
    close(features, expected, atol)


class SmallEncoder(nn.Sequential):
    """A linear encoder with BatchNorm, for images (B, 3, 4, 4). Patch drop scales the features."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(48, 6), nn.BatchNorm1d(6), nn.GELU())
        self.embed_dim = 6

    def forward(self, images, **options):
        assert options in ({}, {"patch_drop": 0.3})  # Without dropping, it is not passed.
        return super().forward(images) * (1 - options.get("patch_drop", 0))


def small_pmsn(patch_drop=0.0):
    torch.manual_seed(0)
    return pmsn.PMSN(SmallEncoder(), pmsn.power_law_prior(4, 1.0), output_dim=5,
                     head=add_noise(pmsn.projection_head(6, 7, 5)), patch_drop=patch_drop).double()


def random_views(seed=0):
    """A target view, a masked anchor view, and two more anchor views, of 6 images."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, 4, 4, generator=generator, dtype=torch.float64) for n in (6, 6, 12)]


def test_defaults_and_initialization_are_the_ones_of_msn():
    """Linear layers: std .02. Patch embedding: std sqrt(2 / fan_in). All biases: 0."""
    torch.manual_seed(0)
    prior = pmsn.power_law_prior(1024, 0.25)
    model = pmsn.PMSN(pmsn.VisionTransformer(), prior)
    assert sum(p.numel() for p in model.encoder.parameters()) == 21_665_664  # ViT-S/16 of timm
    assert [type(m) for m in model.head] == 2 * [nn.Linear, nn.BatchNorm1d, nn.GELU] + [nn.Linear]
    assert [model.head[i].out_features for i in (0, 3, 6)] == [2048, 2048, 256]
    layers = [*model.encoder.modules(), *model.head]
    stds = {layer: 0.02 for layer in layers if isinstance(layer, nn.Linear)}
    stds[model.encoder.patch_embed.proj] = math.sqrt(2 / (3 * 16 * 16))
    for layer, std in stds.items():
        assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
        assert layer.weight.mean().abs() < 0.02 * std and layer.bias.abs().max() == 0
    # Prototypes are uniform within +-1 / sqrt(d), so their std is 1 / sqrt(3 d).
    assert model.prototypes.shape == (1024, 256) and model.prototypes.abs().max() <= 1 / 16
    assert model.prototypes.std().item() == pytest.approx(1 / math.sqrt(3 * 256), rel=0.02)
    assert model.patch_drop == 0.15 and torch.equal(model.state_dict()["prior"], prior)
    prior.zero_()
    assert model.prior.sum().item() == pytest.approx(1)  # It is a copy.


def test_target_is_the_exact_moving_average_of_the_parameters():
    """target <- m * target + (1 - m) * anchor, from a copy. Nothing in BatchNorm moves with it."""
    model = small_pmsn()
    targets = {name for name, _ in model.named_parameters() if name.startswith("target")}
    for name in targets:
        assert torch.equal(*map(model.get_parameter, (name, name.removeprefix("target_"))))
    for step, ema_momentum in enumerate([0.9, 0.5, 0.99, 0.0, 0.7]):
        model(random_views(seed=step))  # The statistics of BatchNorm move.
        add_noise(model.encoder)
        add_noise(model.head)
        before = copy.deepcopy(model.state_dict())
        model.update_target(ema_momentum)
        for name, value in model.state_dict().items():
            anchor, expected = before[name.removeprefix("target_")], before[name]
            if name in targets:
                expected = ema_momentum * expected + (1 - ema_momentum) * anchor
            close(value, expected, 1e-12)


def test_forward_is_the_loss_of_its_networks():
    """Only masked anchors lose patches. Each entry of the views is one batch of BatchNorm."""
    options = {"temperature": 0.2, "prior_weight": 2.0, "sharpening": 0.5}
    model = small_pmsn(patch_drop=0.3)
    add_noise(model.target_encoder)  # Now it matters which network sees the target view.
    parts = copy.deepcopy(model)
    target, masked, others = random_views()
    features = [parts.encoder(masked, patch_drop=0.3), parts.encoder(others)]
    anchors = torch.cat([parts.head(x) for x in features])
    targets = parts.target_head(parts.target_encoder(target))
    expected, _ = pmsn.pmsn_loss(anchors, targets, parts.prototypes, parts.prior, **options)
    close(model([target, masked, others], **options)[0], expected, 1e-12)
    loss, terms = model([target, masked, others], **{**options, "prior_weight": 0.0})
    close(loss, terms["cross_entropy"], 0)


@pytest.mark.parametrize("head", [
    nn.Sequential(),  # is False as a truth value
    torch.compile(nn.Linear(6, 6), backend="eager")])  # has no truth value
def test_a_given_head_is_used(head):
    model = pmsn.PMSN(SmallEncoder(), pmsn.power_law_prior(4, 1.0), head=head, output_dim=6)
    assert model.head is head


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_networks_of_timm_are_encoders_without_patch_drop(name):
    timm = pytest.importorskip("timm", reason="timm has the networks of this test")
    encoder = timm.create_model(name, num_classes=0)
    encoder.embed_dim = encoder.num_features
    model = pmsn.PMSN(encoder, pmsn.power_law_prior(4, 1.0), patch_drop=0)
    loss, _ = model([torch.randn(2, 3, 224, 224) for _ in range(2)])
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in model.encoder.parameters())


# ---- Views ---------------------------------------------------------------------------------------
def random_images(batch, size):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0))

NO_COLORS = {"jitter_p": 0.0, "gray_p": 0.0, "blur_p": 0.0}


def augment(images, **options):
    """Colors without normalization, and without any change that is not asked for."""
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    return pmsn.augment_colors(images, **{**NO_COLORS, **options}) * std + mean


@pytest.mark.parametrize("options, sizes, scales", [
    ({}, [(1, 224), (1, 224), (10, 96)], [(0.3, 1.0), (0.3, 1.0), (0.05, 0.3)]),
    ({"rand_views": 2, "focal_views": 3, "rand_size": 32, "focal_size": 16,
      "rand_scale": (0.4, 0.6), "focal_scale": (0.1, 0.2)},
     [(1, 32), (2, 32), (3, 16)], [(0.4, 0.6), (0.4, 0.6), (0.1, 0.2)]),
    ({"focal_views": 0, "rand_size": 16}, [(1, 16), (1, 16)], [(0.3, 1.0), (0.3, 1.0)])])
def test_crops_are_the_ones_of_torchvision(options, sizes, scales):
    """The same seed gives the same boxes and flips. The defaults are from MSN."""
    image = (255 * random_images(1, 100)[0]).to(torch.uint8)[:, :70]
    torch.manual_seed(0)
    crops = pmsn.multi_crop(image, **options)
    assert [x.shape for x in crops] == [(n, 3, size, size) for n, size in sizes]
    torch.manual_seed(0)
    for views, (_, size), scale in zip(crops, sizes, scales):
        for view in views:
            expected = v2.RandomResizedCrop(size, scale, antialias=True)(image)
            expected = expected.flip(-1) if torch.rand(1) < 0.5 else expected
            assert view.dtype == torch.uint8 and torch.equal(view, expected)


def test_views_are_in_view_major_order():
    """Entry i shows view i // B of image i modulo B. Each crop has a gray level of its own."""
    levels = torch.arange(19 * 7, dtype=torch.uint8).view(19, 7)  # image, view
    images = levels[:, :, None, None, None].expand(-1, -1, 3, 20, 20)
    crops = torch.utils.data.default_collate([[x[:1], x[1:3], x[3:]] for x in images])
    views = pmsn.make_views(crops, **NO_COLORS)
    for view, level in zip(views, levels.split([1, 2, 4], dim=1), strict=True):
        expected = level.T.flatten()[:, None, None, None].expand(-1, 3, 20, 20)
        close(view, pmsn.augment_colors(expected, **NO_COLORS), 1e-6)


def test_without_augmentation_a_view_is_the_normalized_image():
    """Bytes and floats in [0, 1] give the same views, and the input is not changed."""
    images = (255 * random_images(4, 20)).to(torch.uint8)
    floats = images / 255
    close(augment(images), floats, 1e-6)
    views = []
    for x in (images, floats):
        torch.manual_seed(0)
        views.append(pmsn.augment_colors(x))
    close(*views, 1e-5)
    assert torch.equal(floats, images / 255)


def draw(monkeypatch, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0):
    """Replace the uniform draws: each is at this place between the ends -1 and 1 of its range."""
    place = torch.tensor([brightness, contrast, saturation, hue]).view(4, 1, 1, 1)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda x, low, high: x.copy_(
        (low + high) / 2 + place * (high - low) / 2))


@pytest.mark.parametrize("place", [-1.0, 0.6, 1.0])
@pytest.mark.parametrize("steps", [["brightness"], ["contrast"], ["saturation"],
                                   ["saturation", "contrast", "brightness"]])
def test_color_jitter_equals_torchvisions_steps(monkeypatch, steps, place):
    """The factors are 1 + .4 * place. No color leaves [0, 1], so nothing is clamped."""
    images = expected = 0.35 + 0.2 * random_images(3, 12)
    draw(monkeypatch, **{step: place for step in steps})
    for step in steps:
        expected = getattr(TF, f"adjust_{step}")(expected, 1 + 0.4 * place)
    close(augment(images, jitter_p=1.0), expected, 2e-4)


@pytest.mark.parametrize("degrees", [-36, 20, 120])
def test_hue_is_a_rotation(monkeypatch, degrees):
    """It leaves the grays (Rodrigues' formula). The largest angle of hue=.1 is 36 degrees."""
    images, angle = 0.4 + 0.2 * random_images(3, 12), math.radians(degrees)
    draw(monkeypatch, hue=degrees / 36)
    gray = images.mean(dim=1, keepdim=True)
    across = (images.roll(1, dims=1) - images.roll(-1, dims=1)) / math.sqrt(3)
    expected = gray + math.cos(angle) * (images - gray) + math.sin(angle) * across
    close(augment(images, jitter_p=1.0), expected, 1e-5)


def test_shares_of_changed_images_and_width_of_the_blur(monkeypatch):
    """Of 1000 images .7 change their colors, .2 become gray and .6 are blurred (5 sigma)."""
    torch.manual_seed(0)
    images = random_images(1000, 10)
    changed = (augment(images, jitter_p=0.7) - images).abs().amax(dim=(1, 2, 3)) > 1e-4
    close(changed.float().mean(), 0.7, 5 * math.sqrt(0.7 * 0.3 / 1000))
    views = augment(images, gray_p=0.2)
    is_gray = (views.amax(dim=1) - views.amin(dim=1)).amax(dim=(1, 2)) < 1e-6
    close(is_gray.float().mean(), 0.2, 5 * math.sqrt(0.2 * 0.8 / 1000))
    gray = TF.rgb_to_grayscale(images, num_output_channels=3)
    close(views, torch.where(is_gray[:, None, None, None], gray, images), 1e-6)
    # The width of the blur is uniform in .1..2. Here the "blur" adds it to the image.
    monkeypatch.setattr(pmsn, "gaussian_blur", lambda images, s: images + s[:, None, None, None])
    width = (augment(images, blur_p=0.6) - images)[:, 0, 0, 0]
    width = width[width > 1e-4].sort().values
    close(len(width) / 1000, 0.6, 5 * math.sqrt(0.6 * 0.4 / 1000))
    close(width, torch.linspace(0.1, 2, len(width)), 5 * 1.9 * 0.5 / math.sqrt(len(width)))


def test_gaussian_blur_equals_torchvision():
    """Each image has its own sigma. A kernel of 23 pixels holds all of a sigma of 2."""
    images, sigmas = random_images(5, 24), [0.1, 0.3, 0.8, 1.3, 2.0]
    blurred = pmsn.gaussian_blur(images, torch.tensor(sigmas))
    for image, sigma, result in zip(images, sigmas, blurred):
        close(result, TF.gaussian_blur(image, [23, 23], [sigma, sigma]), 1e-3)


# ---- Samplers ------------------------------------------------------------------------------------
def labels_of(counts):
    """Labels with this number of images per class, in random order."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("counts, prior, expected", [
    ([40] * 5, [0.5, 0.25, 0.125, 0.0625, 0.0625], [40, 20, 10, 5, 5]),  # class 0 allows 80 images
    ([10] * 3, [0.25, 0.25, 0.5], [5, 5, 10]),  # The prior is in the order of the classes.
    ([40, 40, 4], [0.5, 0.3, 0.2], [10, 6, 4]),  # class 2 allows 20 images
    ([40] * 3, [0.8, 0.1925, 0.0075], [40, 10, 1]),  # 9.6 and .4 are rounded, but not to 0
    ([10, 70, 20], pmsn.class_prior([10, 70, 20]), [10, 70, 20])])  # its own histogram: all
def test_long_tail_by_hand(counts, prior, expected):
    labels, prior = labels_of(counts), torch.as_tensor(prior)
    chosen, again, other = (pmsn.long_tail_indices(labels, prior, seed) for seed in (1, 1, 2))
    assert torch.bincount(labels[chosen]).tolist() == expected
    assert len(chosen.unique()) == len(chosen) and torch.equal(chosen, again)
    assert set(chosen.tolist()) != set(other.tolist()) or expected == counts


def epoch_of(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("counts, batch_size, k", [
    ([50] * 12, 24, 3), ([50] * 12, 36, 12), ([50] * 12, 7, 1), ([53, 41, 37, 29, 22], 8, 2),
    ([300, 120, 80, 50, 30, 20], 10, 1), ([300, 120, 80, 50, 30, 20], 20, 2),  # .5 are of class 0
    ([40, 30, 13], 4, 2)])  # Class 0 must be in every batch, and one part is left over.
def test_batches_have_exactly_k_classes(counts, batch_size, k):
    """They have equal parts of each class, an epoch has no image twice, and over the epochs class
    frequencies are the ones of the labels. Processes share each batch of one process."""
    labels, drawn, world_size = labels_of(counts), [], 7 if batch_size == 7 else 2
    whole = pmsn.ClassBatchSampler(labels, batch_size, k)
    ranks = [pmsn.ClassBatchSampler(labels, batch_size, k, rank=rank, world_size=world_size)
             for rank in range(world_size)]
    for epoch in range(10):
        batches = epoch_of(whole, epoch)
        images = list(itertools.chain(*batches))
        assert len(batches) == len(whole) and len(set(images)) == len(images)
        # What is left over is less than a part of each class and a batch.
        assert len(labels) - len(images) < batch_size // k * len(counts) + batch_size
        drawn += images
        shares = zip(*(epoch_of(rank, epoch) for rank in ranks), strict=True)
        for batch, share in zip(batches, shares, strict=True):
            parts = labels[batch].unique(return_counts=True)[1]
            assert parts.tolist() == [batch_size // k] * k
            assert {len(part) for part in share} == {batch_size // world_size}
            assert sorted(itertools.chain(*share)) == sorted(batch)
    close(torch.bincount(labels[drawn]) / len(drawn), torch.tensor(counts) / len(labels), 0.02)


def test_epochs_are_random_and_follow_from_the_seed():
    """In 10 epochs, all 66 pairs of classes meet. Images of class 0 meet others every time."""
    labels, pairs, together = labels_of([50] * 12), set(), set()
    sampler = pmsn.ClassBatchSampler(labels, 24, 3, seed=1)
    epochs = [epoch_of(sampler, epoch) for epoch in range(10)]
    for batch in itertools.chain(*epochs):
        pairs |= set(itertools.combinations(labels[batch].unique().tolist(), 2))
        together.add(frozenset(i for i in batch if labels[i] == 0))
    assert len(pairs) == 66 and len(together - {frozenset()}) == 10 * 6
    assert epochs[3] == epoch_of(pmsn.ClassBatchSampler(labels, 24, 3, seed=1), 3)
    assert epochs[1] != epoch_of(pmsn.ClassBatchSampler(labels, 24, 3, seed=2), 0)


# ---- Other losses --------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [0.2, 0.002])
def test_simclr_is_the_cross_entropy_of_finding_the_other_view(temperature):
    """Chen et al. 2020, equation 1, over all 2B views. A view cannot choose itself."""
    first, second, _ = random_inputs(views=1)
    z = torch.cat([first, second])
    z = z / z.square().sum(dim=1, keepdim=True).sqrt()
    other = (torch.arange(8) + 4) % 8
    scores = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    loss, terms = pmsn.simclr_loss(first, second, temperature)
    close(loss, F.cross_entropy(scores, other), 1e-9)
    close(terms["alignment"], -scores[range(8), other].mean(), 1e-9)
    close(terms["alignment"] + terms["uniformity"], loss, 1e-9)


def test_vicreg_equals_numpy():
    """Bardes et al. 2022. The hinge is a mean over both views, the covariance is a sum."""
    first, second, _ = random_inputs(views=1)
    first = 0.3 * first  # There are standard deviations on both sides of 1.
    invariance, variance, covariance = ((first - second) ** 2).mean().item(), 0.0, 0.0
    for z in (first.numpy(), second.numpy()):
        cov = np.cov(z, rowvar=False)  # divides by n - 1
        variance += np.maximum(0, 1 - np.sqrt(np.diag(cov) + 1e-4)).mean() / 2
        covariance += (cov[~np.eye(6, dtype=bool)] ** 2).sum() / 6
    loss, terms = pmsn.vicreg_loss(first, second)
    close(terms["variance"], variance, 1e-9)
    close(terms["invariance"], invariance, 1e-9)
    close(terms["covariance"], covariance, 1e-9)
    close(loss, 25 * invariance + 25 * variance + covariance, 1e-9)


@pytest.mark.parametrize("options", [(), (0.5, 0.2, 2)])
def test_swav_equals_numpy(options):
    """Caron et al. 2020, equations 2 and 3. The published code has exp(score / epsilon), first
    divided by its sum, then by the sums of the prototypes and by the sums of the images."""
    first, second, prototypes = random_inputs(views=1)
    temperature, epsilon, iterations = options or (0.1, 0.05, 3)
    views = [z.numpy() / np.linalg.norm(z, axis=1, keepdims=True) for z in (first, second)]
    q = prototypes.numpy() / np.linalg.norm(prototypes, axis=1, keepdims=True)
    expected = 0.0
    for view, other in (views, views[::-1]):
        code = np.exp(other @ q.T / epsilon)
        code = numpy_sinkhorn(code / code.sum(), np.full(5, 1 / 5), iterations)
        p = np.array([numpy_predict(z, prototypes.numpy(), temperature) for z in view])
        expected -= (code * np.log(p)).sum(axis=1).mean() / 2
    loss, terms = pmsn.swav_loss(first, second, prototypes, *options)
    close(loss, expected, 1e-9)
    close(loss, terms["cross_entropy"], 0)


def test_swav_teaches_prototypes_and_both_views():
    """Codes are constants: the gradient is that of the cross-entropy alone."""
    leaves = [x.requires_grad_() for x in random_inputs(views=1)]
    pmsn.swav_loss(*leaves)[0].backward()
    with torch.no_grad():
        codes = [pmsn.sinkhorn(pmsn.cosine(z, leaves[2]) / 0.05, math.log(1 / 5), 3).exp()
                 for z in leaves[:2]]
    again = [x.detach().clone().requires_grad_() for x in leaves]
    for view, code in zip(again[:2], codes[::-1]):
        p = (F.normalize(view) @ F.normalize(again[2]).T / 0.1).softmax(dim=1)
        (-(code * p.log()).sum(dim=1).mean() / 2).backward()
    for leaf, other in zip(leaves, again):
        close(leaf.grad, other.grad, 1e-9)


# ---- Wrong arguments -----------------------------------------------------------------------------
NO_PRIORS = [[0.5, 0.3, 0.2], np.array([0.5, 0.3, 0.2]), *map(torch.tensor, [  # two non-tensors
    [0.5, 0.5, 0.0], [0.6, 0.6, -0.2], [0.5, 0.5, math.nan],
    [0.4, 0.4, 0.4], [0.3, 0.3, 0.3],  # The sum is wrong.
    [[0.5, 0.3, 0.2]], 1.0])]  # The rank is wrong.
NO_BATCHES = [
    ([50] * 12, 25, 3, 0, 1), ([50] * 12, 24, 3, 0, 5),  # no multiple of k, or of the processes
    ([50] * 12, 26, 13), ([20, 20, 20, 3], 12, 3),  # 13 classes of 12; a class without a part
    ([60, 20, 20], 30, 3),  # Class 0 has more parts than there are batches.
    ([50] * 12, 24, 3, 2, 2), ([50] * 12, 24, 3, -1, 2), ([50] * 12, 24, 3, 0, 0),
    ([50] * 12, 24, 0)]
NO_EMBEDDINGS = [  # anchors, targets, prototypes, prior
    [(3, 4, 6), (4, 6), (5, 6), (5,)], [(12, 6), (4, 5, 6), (5, 6), (5,)],  # stacked, tokens
    [(12, 6), (4, 6), (5, 1, 6), (5,)], [(12,), (4,), (5,), (5,)],
    [(12, 6), (4, 7), (5, 6), (5,)], [(12, 6), (4, 6), (5, 1), (5,)],  # another dimension
    [(12, 6), (5, 6), (5, 6), (5,)], [(12, 6), (0, 6), (5, 6), (5,)],  # 12 anchors of 5 images
    [(0, 6), (4, 6), (5, 6), (5,)],
    [(12, 6), (4, 6), (5, 6), (4,)], [(12, 6), (4, 6), (5, 6), (1,)]]  # another K
NO_VIEWS = [[(4, 6), (3, 6)], [(4, 6), (1, 6)], [(4, 6), (4, 1)], [(6,), (6,)],
            [(4, 2, 6), (4, 2, 6)], [(0, 6), (0, 6)]]


def ones(shapes):
    return [torch.ones(shape) / (shape[0] or 1) for shape in shapes]


def loss_with(**options):
    return pmsn.pmsn_loss(*random_inputs(), pmsn.power_law_prior(5, 1.0), **options)


def two_views(loss, **options):
    return loss(*random_inputs(views=1)[:2], **options)


def swav_with(**options):
    return pmsn.swav_loss(*random_inputs(views=1), **options)


@pytest.mark.parametrize("function, arguments, message", [
    (lambda x: pmsn.power_law_prior(5, x), [-0.1, math.inf, math.nan], "exponent|prior"),
    (pmsn.class_prior, [[], [3, 0, 1], [3, math.inf]], "prior"),
    (lambda x: pmsn.pmsn_loss(*random_inputs(num_prototypes=3), x), NO_PRIORS, "prior"),
    (lambda x: pmsn.PMSN(SmallEncoder(), x), NO_PRIORS, "prior"),
    (lambda x: pmsn.pmsn_loss(*ones(x)), NO_EMBEDDINGS, "must fit, but they have the shapes"),
    (lambda x: loss_with(temperature=x), [0, -1, math.nan, math.inf], "temperature"),
    (lambda x: loss_with(sinkhorn_iterations=x), [-1], "sinkhorn_iterations"),
    (lambda x: loss_with(prior_weight=x), [-1.0, math.nan], "prior_weight"),
    (lambda x: two_views(pmsn.simclr_loss, temperature=x), [0, -1, math.nan], "temperature"),
    (lambda x: swav_with(temperature=x), [0, -1, math.nan], "temperature"),
    (lambda x: swav_with(epsilon=x), [0, -1, math.nan], "temperature"),
    (lambda x: swav_with(sinkhorn_iterations=x), [0, -1], "one Sinkhorn iteration"),
    (lambda x: two_views(pmsn.swav_loss, prototypes=torch.ones(x)), [(3, 5), (6,), (3, 1), (0, 6)],
     "prototypes"),
    *[(lambda x, loss=loss: loss(*ones(x)), NO_VIEWS, "two views must")
      for loss in (pmsn.simclr_loss, pmsn.vicreg_loss)],
    (lambda x: pmsn.swav_loss(*ones(x), torch.ones(3, 6)), NO_VIEWS, "two views must"),
    (lambda x: pmsn.vicreg_loss(*ones(x)), [[(1, 6), (1, 6)]], "at least two images"),
    (lambda x: pmsn.multi_crop(torch.zeros(3, 8, 8, dtype=torch.uint8), **x),
     [{"rand_views": 0}, {"focal_views": -1}], "rand_views must be at least 1"),
    (lambda x: pmsn.sharpen(torch.zeros(2, 3), x), [0.0, -1.0, 1.5, math.nan], "sharpening"),
    (lambda x: small_vit()(torch.zeros(1, 3, *x)), [(30, 32), (32, 20), (4, 4)], "sides of images"),
    (lambda x: pmsn.sharpen_relative(torch.zeros(2, 3), x, torch.zeros(3)), [0.0, 1.5, math.nan],
     "sharpening"),
    (lambda x: pmsn.augment_colors(torch.full((2, 3, 4, 4), x), blur_p=0), [-0.1, 1.1],
     "must lie in"),
    (lambda x: pmsn.augment_colors(torch.zeros(x)), [(2, 3, 8, 20), (1, 3, 9, 8)],
     "too small to blur"),
    (lambda x: pmsn.long_tail_indices(torch.tensor(x), torch.ones(3) / 3),
     [[0, 1, 0], [0, 1, 2, 3]], "each of"),
    (lambda x: pmsn.long_tail_indices(torch.arange(3), x), NO_PRIORS, "prior"),
    (lambda x: pmsn.ClassBatchSampler(labels_of(x[0]), *x[1:]), NO_BATCHES, "classes")])
def test_wrong_arguments_are_refused(function, arguments, message):
    for wrong in arguments:
        with pytest.raises(ValueError, match=message):
            function(wrong)
