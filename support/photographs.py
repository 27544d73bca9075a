"""Small photographs: CIFAR-10 or folders of images, their random crops, and a small ResNet.

Used by imbalance.py and which_prior.py.
"""

import math
from pathlib import Path

import torch
from torch import nn
from torchvision.datasets import CIFAR10, DatasetFolder
from torchvision.models.resnet import BasicBlock
from torchvision.transforms import v2

import pmsn
from support.drawings import SIZE, random_numbers, warp
from support.images import IMAGE_ENDINGS, open_image


def load_splits(data, root):
    """Data sets of torchvision for training and for tests: CIFAR10, or a folder with both.

    CIFAR10 is downloaded to the folder `root`. A data set has `classes`, `targets`, and items (PIL
    image, class). Raises an error with the reason if there are no such images.
    """
    if data == "CIFAR10":
        splits = [CIFAR10(root, train, download=True) for train in (True, False)]
    else:
        splits = [DatasetFolder(Path(data, name), open_image, IMAGE_ENDINGS)
                  for name in ("train", "test")]
    if splits[0].classes != splits[1].classes:
        raise ValueError("training and test images have different classes")
    return splits


def read_images(dataset, per_class=None):
    """Images of a torchvision dataset, the same number of each class and the classes in turn.

    uint8 (N, 3, 32, 32). Without `per_class`, as many as the smallest class has.
    """
    uniform = pmsn.power_law_prior(len(dataset.classes), 0.0)
    index = pmsn.long_tail_indices(torch.tensor(dataset.targets), uniform)
    # They are sorted by class, equally many of each.
    index = index.view(len(uniform), -1)[:, :per_class]  # (C, n)
    images = [dataset[i][0].resize((SIZE, SIZE)) for i in index.T.flatten().tolist()]
    return torch.stack([v2.functional.pil_to_tensor(image) for image in images])


def random_crops(images, area=(0.2, 1.0)):
    """A random crop and flip of each image: uint8 (B, 3, 32, 32) -> (B, 3, 32, 32) in [0, 1].

    Like RandomResizedCrop of torchvision, with a share of the area from `area` and an aspect ratio
    from 3/4 to 4/3, but ten times faster, because it is one call for a mini-batch. One difference:
    a side that would be longer than the image is as long as the image. torchvision draws again.
    """
    share = torch.empty(len(images), 1).uniform_(*area)
    stretch = random_numbers(images, math.log(4 / 3) / 2, 1).exp()  # root of the aspect ratio
    sides = (share.sqrt() * torch.cat([stretch, 1 / stretch], dim=1)).clamp(max=1)  # (B, 2)
    shift = (1 - sides) * random_numbers(images, 1, 2)
    sides[torch.rand(len(images)) < 0.5, 0] *= -1  # a flip
    crops = warp(images / 255, SIZE, angle=torch.zeros(len(images)), shear=0,
                 scale=sides[:, :, None], shift=shift[:, :, None])
    return crops.clamp(0, 1)  # Rounding could leave this range.


def make_resnet(norm=nn.BatchNorm2d):
    """A small ResNet, (B, 3, 32, 32) -> (B, 128). `norm` maps a number of channels to a layer."""
    def block(inputs, outputs):  # half as many positions per side
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), norm(outputs))
        return BasicBlock(inputs, outputs, stride=2, downsample=shortcut, norm_layer=norm)

    return nn.Sequential(
        nn.Conv2d(3, 32, 4, stride=2, padding=1, bias=False), norm(32), nn.ReLU(),  # 16 x 16
        block(32, 64), block(64, 128),  # 8 x 8, 4 x 4
        nn.AdaptiveAvgPool2d(1), nn.Flatten())


def warmup_cosine(step, steps):
    """The share of the learning rate: it rises over a tenth of the steps, then falls to zero."""
    rise = min(1.0, (step + 1) / (0.1 * steps))
    return rise * (0.5 + 0.5 * math.cos(math.pi * step / steps))
