"""Many heads on one encoder: a search for the lowest loss of PMSN.

The loss has local minima, as the objective of K-means has. So many heads learn side by side from
random starts, and the head with the lowest loss wins. There are three steps:

1. An encoder learns from images by SimCLR, without labels: `train_encoder`.
2. On this encoder many heads learn by the loss of PMSN: `train_heads`. A head is a linear layer
   with prototypes of its own. The encoder stays as it is, so its features of a few random views of
   each image are computed once, for all heads: `cache_views`.
3. The winner teaches a new network from random weights, by the same loss: `teach`.

Images come from a function `views_of(index)`. It gives a random view of each image with these
numbers: (n,) -> (n, 1, 32, 32). `judge` measures what each head knows of labels, and
`find_grouping` searches for the lowest loss without a network.

Used by mnist_corner.py and which_feature.py.
"""

import copy
import functools
import time

import torch
import torch.nn.functional as F
from torch import nn

import pmsn
from support.drawings import SIZE, make_encoder, make_head, schedule
from support.runs import say

BATCH_SIZE = 256  # images per batch
CACHED_VIEWS = 4  # of each image, for the heads


# ---- Model ---------------------------------------------------------------------------------------
class Heads(nn.Module):
    """PMSN with many heads on one encoder. Each head has prototypes of its own.

    The encoder maps its inputs to (B, 128), and each head maps this to (B, dim). The prior is (K,).
    `loss_options` go to `pmsn.pmsn_loss`.
    """
    def __init__(self, encoder, prior, num_heads, dim, **loss_options):
        super().__init__()
        self.network = nn.Sequential(encoder, make_head(num_heads * dim))
        self.target = copy.deepcopy(self.network).requires_grad_(False)
        self.prototypes = nn.Parameter(torch.empty(num_heads, len(prior), dim).uniform_(-1, 1))
        self.prior, self.dim, self.loss_options = prior, dim, loss_options

    def forward(self, target_view, anchor_view, sharpening):
        """Inputs of the encoder, (B, ...) each -> the loss of every head (heads,)."""
        anchors = self.network(anchor_view).unflatten(1, (-1, self.dim))  # (B, heads, dim)
        with torch.no_grad():
            targets = self.target(target_view).unflatten(1, (-1, self.dim))
        loss = functools.partial(pmsn.pmsn_loss, prior=self.prior, sharpening=sharpening,
                                 **self.loss_options)
        # vmap computes the losses of all heads at once.
        losses, _ = torch.vmap(loss, in_dims=(1, 1, 0))(anchors, targets, self.prototypes)
        return losses

    def head(self, i):
        """The target head i: (B, 128) -> (B, dim)."""
        head, entries = make_head(self.dim), slice(i * self.dim, (i + 1) * self.dim)
        head.load_state_dict({name: value[entries] if value.ndim else value
                              for name, value in self.target[1].state_dict().items()})
        return head.eval().requires_grad_(False)


# ---- Training ------------------------------------------------------------------------------------
def train(models, losses_of, epochs, num_images, title, lr_scale=1.0, after_step=None):
    """Train models on the same batches. Returns the mean losses of each in the last epoch.

    losses_of(batch, done) gives the loss or the losses of each model for the images with these
    numbers, and after_step(model, done) follows each step, when this share of the training is done.
    """
    parameters = [[p for p in model.parameters() if p.requires_grad] for model in models]
    optimizers = [torch.optim.AdamW(each, weight_decay=0.05) for each in parameters]
    steps_per_epoch = num_images // BATCH_SIZE
    began = time.monotonic()
    for epoch in range(epochs):
        totals = [0.0 for _ in models]
        for step, batch in enumerate(torch.randperm(num_images).split(BATCH_SIZE)):
            done = (epoch + step / steps_per_epoch) / epochs  # from 0 to 1
            learning_rate, _, _ = schedule(done)
            for i, losses in enumerate(losses_of(batch, done)):
                optimizers[i].param_groups[0]["lr"] = lr_scale * learning_rate
                optimizers[i].zero_grad()
                losses.sum().backward()
                nn.utils.clip_grad_norm_(parameters[i], 3.0)  # the norm of all heads together
                optimizers[i].step()
                if after_step:
                    after_step(models[i], done)
                totals[i] += losses.detach() / steps_per_epoch
        left = (time.monotonic() - began) * (epochs / (epoch + 1) - 1)
        lowest = "".join(f"{losses.min():>7.3f}" for losses in totals)
        say(f"{title}{epoch + 1:>6}{left:>6.0f}s {lowest}")
    return totals


def train_encoder(views_of, num_images, epochs, title):
    """Step 1: an encoder by SimCLR, (B, 1, 32, 32) -> (B, 128)."""
    encoder = make_encoder(SIZE).to(memory_format=torch.channels_last)  # faster on a CPU
    network = nn.Sequential(encoder, nn.GELU(), nn.Linear(128, 64))

    def losses_of(batch, done):
        first, second = network(views_of(batch.repeat(2))).chunk(2)
        return [pmsn.simclr_loss(first, second, temperature=0.2)[0]]
    train([network], losses_of, epochs, num_images, title)
    return encoder.requires_grad_(False)


def cache_views(encoder, views_of, num_images):
    """The features of a few random views of all images: a list of (N, 128), one per view."""
    return [torch.cat([encoder(views_of(index)) for index in torch.arange(num_images).split(512)])
            for _ in range(CACHED_VIEWS)]


def two_cached_views(views):
    """The function two_views(batch) for `train_heads`: two of the views of each image, (B, 128)."""
    def two_views(batch):
        return [views[i][batch] for i in torch.randperm(len(views))[:2]]
    return two_views


def train_heads(models, two_views, epochs, num_images, title):
    """Step 2: heads with prototypes by PMSN. two_views(batch) gives inputs of the encoders."""
    def losses_of(batch, done):
        views = two_views(batch)
        return [model(*views, sharpening=sharpening_at(done)) for model in models]

    def after_step(model, done):
        _, _, ema_momentum = schedule(done)
        pmsn.move_target(model.target, model.network, ema_momentum)
    return train(models, losses_of, epochs, num_images, title, 2.0, after_step)


def sharpening_at(done):
    """From soft targets on, so that the first clusters can still change."""
    return max(0.25, 1 - 1.5 * done)


def make_student(encoder, head, prototypes, prior):
    """A new network as PMSN, whose target network and prototypes are those of a winner."""
    new = make_encoder(SIZE).to(memory_format=torch.channels_last)
    dim = prototypes.shape[1]
    student = pmsn.PMSN(new, prior, head=make_head(dim), output_dim=dim, patch_drop=0.0)
    student.target_encoder, student.target_head = encoder, head
    student.prototypes = nn.Parameter(prototypes, requires_grad=False)
    return student


def teach(students, views_of, num_images, epochs, title, **loss_options):
    """Step 3: each student is a new network. Its target network is a winner, which stays."""
    def losses_of(batch, done):
        views = [views_of(batch) for _ in range(2)]
        return [student(views, **loss_options)[0] for student in students]
    train(students, losses_of, epochs, num_images, title)


# ---- Measures ------------------------------------------------------------------------------------
@torch.no_grad()
def judge(model, losses, images, labels):
    """For each head: its loss, and what its prototypes tell about each kind of labels, in nats.

    `labels` are {name: (N,)}, and the images are inputs of `model.target`.
    """
    projections = model.eval().target(images).unflatten(1, (-1, model.dim))  # (N, heads, dim)
    heads = []
    for i, loss in enumerate(losses.tolist()):
        prototype = pmsn.cosine(projections[:, i], model.prototypes[i]).argmax(dim=1)
        heads.append({"loss": loss, **{name: information(prototype, values)
                                       for name, values in labels.items()}})
    return heads


def information(prototypes, labels):
    """Mutual information of two integers per image, (N,) each, in nats.

    It is at most the entropy of the prototypes' shares: 1.61 for five equal ones, and 1.33 for
    five that follow a power law with the exponent 1.25.
    """
    joint = F.one_hot(prototypes).double().T @ F.one_hot(labels).double() / len(labels)
    independent = joint.sum(dim=1, keepdim=True) * joint.sum(dim=0)
    return (torch.xlogy(joint, joint) - torch.xlogy(joint, independent)).sum().item()


# ---- What a loss could be at best ----------------------------------------------------------------
def two_views_of(shares, disagree):
    """The probability that two views of an image show the classes i and j: (n,) -> (n, n)."""
    n = len(shares)
    view = (1 - disagree) * torch.eye(n) + disagree * shares.expand(n, n)  # given the image, (n, n)
    return view.T @ (shares[:, None] * view)


def find_grouping(two_views, prior, tables=40, steps=400):
    """The lowest loss of tables (n, K) of logits, of gradient descent from 40 random tables."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(tables, len(two_views), len(prior))).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for step in range(steps):
        loss = functools.partial(loss_of_table, two_views=two_views, prior=prior,
                                 sharpening=sharpening_at(step / steps))  # as for the heads
        losses = torch.vmap(loss)(logits)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    return losses.min().item()


def loss_of_table(logits, two_views, prior, sharpening=0.25):
    """The loss of PMSN if a view of class i has the logits of row i: (n, K) -> one number."""
    log_p = logits.log_softmax(dim=1)  # (n, K)
    p_target = pmsn.sharpen(log_p, sharpening).exp().detach()
    p_bar = two_views.sum(dim=1) @ log_p.exp()  # (K,)
    cross_entropy = -(two_views * (p_target @ log_p.T)).sum()
    log_prior = pmsn.in_order_of(p_bar, prior.log())  # A table can swap its columns.
    return cross_entropy + (torch.xlogy(p_bar, p_bar) - p_bar * log_prior).sum()
