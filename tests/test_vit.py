"""The vision transformer: timm as the oracle, and what dropping patches must mean."""

from fractions import Fraction

import pytest
import torch

import pmsn


def small_vit(seed=0, **options):
    """A ViT in float64 whose zeros (cls_token, biases) are noise too, so that each of them matters."""
    torch.manual_seed(seed)
    vit = pmsn.VisionTransformer(**{"image_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3,
                                    **options}).double()
    return add_noise(vit)


def add_noise(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module


def timm_vit(name, **options):
    timm = pytest.importorskip("timm", reason="timm is the oracle of this test: pip install timm")
    return timm.create_model(name, num_classes=0, pretrained=False, **options)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_224"])
def test_features_equal_timms(name):
    """The same state dict, loaded strictly in both directions; float64, noise on every weight."""
    torch.manual_seed(0)
    oracle = add_noise(timm_vit(name)).double().eval()
    vit = {"tiny": pmsn.vit_tiny, "small": pmsn.vit_small}[name.split("_")[1]]().double()
    vit.load_state_dict(oracle.state_dict())
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(vit(images), oracle(images), atol=1e-8, rtol=1e-8)
    oracle.load_state_dict(add_noise(vit).state_dict())
    with torch.no_grad():
        torch.testing.assert_close(vit(images), oracle(images), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("size", [(96, 96), (256, 256), (160, 96)])
def test_features_equal_timms_at_another_resolution(size):
    """Position embeddings interpolated as timm does (in float32), for square and other images."""
    torch.manual_seed(0)
    oracle = add_noise(timm_vit("vit_tiny_patch16_224", dynamic_img_size=True, depth=3)).double().eval()
    vit = pmsn.vit_tiny(depth=3).double()
    vit.load_state_dict(oracle.state_dict())
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(vit(images), oracle(images), atol=1e-5, rtol=1e-5)


def test_vit_base_has_the_published_size():
    """85,798,656 parameters: ViT-B/16 without classification head (timm's vit_base_patch16_224, num_classes=0)."""
    with torch.device("meta"):
        vit = pmsn.vit_base()
    assert sum(p.numel() for p in vit.parameters()) == 85_798_656
    assert vit.embed_dim == 768 and vit.blocks[0].attn.num_heads == 12


def test_msn_checkpoint_loads_as_the_docstring_says():
    """Keys with "module." in front and a head "module.fc.*" in the same dict."""
    trained, vit = small_vit(seed=1), small_vit(seed=2)
    file = {"target_encoder": {f"module.{k}": v for k, v in trained.state_dict().items()}}
    file["target_encoder"] |= {"module.fc.fc1.weight": torch.zeros(4, 12), "module.fc.bn1.running_mean": torch.zeros(4)}
    state = {k.removeprefix("module."): v for k, v in file["target_encoder"].items()}
    result = vit.load_state_dict(state, strict=False)
    assert result.missing_keys == [] and all(k.startswith("fc.") for k in result.unexpected_keys)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(vit(images), trained(images))


def test_dropped_patches_never_existed(monkeypatch):
    """For each image alone: cut the kept patches out, embed them by a dot product, run the blocks on them and CLS."""
    vit, images = small_vit(), torch.randn(5, 3, 32, 32, dtype=torch.float64)
    recorded = []

    def recorder(tokens, patch_drop, original=pmsn.drop_patches):
        recorded.append(original(tokens, patch_drop))
        return recorded[-1]

    monkeypatch.setattr(pmsn, "drop_patches", recorder)
    features = vit(images, patch_drop=0.5)
    (_, indices), = recorded
    weight, bias = vit.patch_embed.proj.weight.flatten(1), vit.patch_embed.proj.bias
    for image, kept, feature in zip(images, indices.tolist(), features):
        sequence = [vit.cls_token[0, 0] + vit.pos_embed[0, 0]]
        for i in sorted(kept):
            row, column = 8 * (i // 4), 8 * (i % 4)
            patch = image[:, row : row + 8, column : column + 8].flatten()
            sequence.append(weight @ patch + bias + vit.pos_embed[0, 1 + i])
        expected = vit.norm(vit.blocks(torch.stack(sequence)[None]))[0, 0]
        torch.testing.assert_close(feature, expected, atol=1e-10, rtol=0)


def test_pixels_of_dropped_patches_get_no_gradient():
    """Without looking inside: 16 patches, .3 dropped, so floor(.7 * 16) = 11 patches of every image matter."""
    vit, images = small_vit(), torch.randn(6, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    vit(images, patch_drop=0.3).square().sum().backward()
    touched = images.grad.unfold(2, 8, 8).unfold(3, 8, 8).abs().sum(dim=(1, 4, 5)).flatten(1) > 0  # (6, 16)
    assert touched.sum(dim=1).tolist() == [11] * 6
    assert len({tuple(mask) for mask in touched.tolist()}) > 1  # not one mask for the batch


@pytest.mark.parametrize("count", [1, 9, 10, 16, 20, 36, 196])
@pytest.mark.parametrize("drop", ["0", "0.1", "0.15", "0.3", "0.5", "0.7", "0.9", "0.95"])
def test_number_of_kept_patches(count, drop):
    """floor((1 - drop) * N) in exact arithmetic, but never nothing; the tokens at the indices, no index twice.

    In floating point (1 - .9) * 20 is 1.9999999999999996."""
    tokens = torch.randn(3, count, 2)
    kept, indices = pmsn.drop_patches(tokens, float(drop))
    expected = max(1, int((1 - Fraction(drop)) * count))
    assert kept.shape == (3, expected, 2) and indices.shape == (3, expected)
    for b in range(3):
        assert len(set(indices[b].tolist())) == expected
        assert torch.equal(kept[b], tokens[b, indices[b]])


def test_masks_are_uniform_and_independent():
    """4000 images, 12 patches, 3 dropped: each patch kept 3000 times, each pair 4000 * 9/12 * 8/11 times; 5 sigma."""
    torch.manual_seed(0)
    _, indices = pmsn.drop_patches(torch.zeros(4000, 12, 1), 0.25)
    kept = torch.zeros(4000, 12).scatter_(1, indices, 1.0)
    assert (kept.sum(dim=0) - 3000).abs().max() < 5 * (4000 * 0.75 * 0.25) ** 0.5
    pairs, p = kept.T @ kept, 9 / 12 * 8 / 11
    off_diagonal = ~torch.eye(12, dtype=torch.bool)
    assert (pairs[off_diagonal] - 4000 * p).abs().max() < 5 * (4000 * p * (1 - p)) ** 0.5


def test_no_drop_is_the_plain_forward():
    vit, images = small_vit(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(vit(images, patch_drop=0.0), vit(images))
    tokens, indices = pmsn.drop_patches(torch.arange(8.0).view(1, 8, 1), 0.0)
    assert sorted(tokens.flatten().tolist()) == list(range(8)) == sorted(indices.flatten().tolist())


def test_bfloat16_autocast():
    """Runs, masked and at another resolution, and is near float64; parameters get finite gradients."""
    exact = small_vit()
    vit = pmsn.VisionTransformer(image_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=3)
    vit.load_state_dict(exact.state_dict())
    torch.manual_seed(0)
    for size in (32, 48):
        images = torch.randn(4, 3, size, size)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = vit(images)
            masked = vit(images, patch_drop=0.5)
        torch.testing.assert_close(features.double(), exact(images.double()), atol=0.1, rtol=0.1)
        masked.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vit.parameters())


@pytest.mark.parametrize("drop", [-0.1, 1.0, 1.5])
def test_refused_drops(drop):
    with pytest.raises(ValueError, match="patch_drop"):
        pmsn.drop_patches(torch.zeros(1, 4, 1), drop)


def test_refused_sizes():
    with pytest.raises(ValueError, match="image_size"):
        pmsn.VisionTransformer(image_size=30, patch_size=8, embed_dim=12, depth=1, num_heads=3)
    with pytest.raises(ValueError, match="embed_dim"):
        pmsn.VisionTransformer(image_size=32, patch_size=8, embed_dim=13, depth=1, num_heads=3)
