"""Which images exist and which share a mini-batch: counts worked by hand, and frequencies counted."""

import itertools
import math

import numpy as np
import pytest
import torch

import pmsn

BALANCED = torch.arange(600) % 12  # 12 classes of 50
LONG_TAIL = torch.repeat_interleave(torch.arange(6), torch.tensor([300, 120, 80, 50, 30, 20]))  # class 0: a half


# ---- long_tail_indices -----------------------------------------------------------------------------------------------


def test_long_tail_frequencies_by_hand():
    """Five classes of 40 and shares 8, 4, 2, 1, 1 of 16: class 0 allows 80 images, hence 40, 20, 10, 5, 5."""
    labels = torch.arange(200) % 5
    prior = pmsn.class_prior([8, 4, 2, 1, 1])
    indices = pmsn.long_tail_indices(labels, prior)
    assert torch.bincount(labels[indices]).tolist() == [40, 20, 10, 5, 5]
    assert len(set(indices.tolist())) == 80
    fewer = pmsn.long_tail_indices(labels.tolist(), prior, num_images=39)  # 19.5, 9.75, 4.9, 2.4, 2.4 rounded down
    assert torch.bincount(labels[fewer]).tolist() == [19, 9, 4, 2, 2]
    few = pmsn.long_tail_indices(labels, prior, num_images=9)  # 4.5, 2.25, 1.1, .56, .56: at least one
    assert torch.bincount(labels[few]).tolist() == [4, 2, 1, 1, 1]


@pytest.mark.parametrize("counts", [[70, 30], [40, 20, 10, 5], [700, 200, 100]])
def test_long_tail_of_its_own_histogram_is_everything(counts):
    """The prior is the histogram of the labels, rounded to float32: every image is wanted."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    indices = pmsn.long_tail_indices(labels, pmsn.class_prior(counts))
    assert torch.bincount(labels[indices]).tolist() == counts


def test_long_tail_prior_order_is_the_class_order():
    """The prior is indexed by class: shares 1, 1, 2 of 4 with 10 images each allow 20 images: 5, 5, 10."""
    labels = torch.arange(30) % 3
    indices = pmsn.long_tail_indices(labels, torch.tensor([0.25, 0.25, 0.5]))
    assert torch.bincount(labels[indices]).tolist() == [5, 5, 10]


def test_long_tail_seeds_and_shuffling():
    labels, prior = BALANCED, pmsn.power_law_prior(12, 1.0)
    first, again, other = (pmsn.long_tail_indices(labels, prior, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert set(first.tolist()) != set(other.tolist())  # other images, not only another order
    assert len(labels[first].unique_consecutive()) > 20  # classes are mixed


@pytest.mark.parametrize("labels, prior, num_images, word", [
    ([0, 1, 0, 1], [0.5, 0.5], 5, "num_images"), ([0, 1, 0, 1], [0.5, 0.5], 0, "num_images"),
    ([0, 1, 0, 1], [0.75, 0.25], 4, "num_images"), ([0, 0, 1], [0.4, 0.4, 0.2], None, "num_images"),
    ([0, 1, 2], [0.5, 0.5], None, "prior"), ([0, 1], [1.0, 0.0], None, "prior"), ([0, 1], [0.5, 0.6], None, "prior")])
def test_long_tail_refuses(labels, prior, num_images, word):
    """Too many images, none, too many of one class, a class without images, priors that are none."""
    with pytest.raises(ValueError, match=word):
        pmsn.long_tail_indices(torch.tensor(labels), torch.tensor(prior), num_images=num_images)


# ---- ClassBatchSampler -----------------------------------------------------------------------------------------------


def batches_of(sampler, epochs):
    for epoch in epochs:
        sampler.set_epoch(epoch)
        yield from sampler


CASES = [(BALANCED, 24, 3), (BALANCED, 25, 2), (BALANCED, 36, 12), (BALANCED, 7, 1), (LONG_TAIL, 24, 2),
         (LONG_TAIL, 30, 3), (LONG_TAIL, 60, 5), (LONG_TAIL, 60, 6), (LONG_TAIL, 10, 1)]


@pytest.mark.parametrize("labels, batch_size, k", CASES)
def test_every_batch_has_exactly_k_classes(labels, batch_size, k):
    """And batch_size images, N // batch_size times an epoch."""
    sampler = pmsn.ClassBatchSampler(labels, batch_size, k)
    for epoch in range(4):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == len(labels) // batch_size
        for batch in batches:
            assert len(batch) == batch_size and len(labels[batch].unique()) == k


@pytest.mark.parametrize("labels, batch_size, k", CASES)
def test_marginal_class_frequencies_are_those_of_the_labels(labels, batch_size, k):
    """Within 4 standard errors, estimated from the epochs themselves (whose class shares are independent draws)."""
    sampler = pmsn.ClassBatchSampler(labels, batch_size, k)
    classes = int(labels.max()) + 1
    shares = []
    for epoch in range(150):
        drawn = torch.tensor(list(itertools.chain(*batches_of(sampler, [epoch]))))
        shares.append((torch.bincount(labels[drawn], minlength=classes) / len(drawn)).numpy())
    shares, expected = np.array(shares), np.bincount(labels) / len(labels)
    error = shares.std(axis=0) / math.sqrt(len(shares))
    assert error.max() < 0.01  # the test has power
    np.testing.assert_array_less(np.abs(shares.mean(axis=0) - expected), 4 * error + 1e-6)


def test_composition_with_a_class_of_more_than_its_share():
    """Frequencies .6, .2, .2 and k = 2: class 0 is in every batch with 60 % of it, one of the others with 40 %."""
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([60, 20, 20]))
    counts = [torch.bincount(labels[batch], minlength=3).tolist()
              for batch in batches_of(pmsn.ClassBatchSampler(labels, 10, 2), range(20))]
    assert all(c in ([6, 4, 0], [6, 0, 4]) for c in counts)
    assert sum(c[1] > 0 for c in counts) == sum(c[2] > 0 for c in counts) == 100


def test_an_epoch_covers_balanced_data_exactly_once():
    """12 classes of 50 images; 3 classes of 10 images a batch: every class in 5 batches, every image in one."""
    sampler = pmsn.ClassBatchSampler(BALANCED, 30, 3)
    for epoch in range(3):
        drawn = list(itertools.chain(*batches_of(sampler, [epoch])))
        assert sorted(drawn) == list(range(600))


def test_which_images_of_a_class_meet_is_random():
    """The first ten images of class 0 to be dealt: over ten epochs ten different sets, never the first in order."""
    sampler = pmsn.ClassBatchSampler(BALANCED, 30, 3)
    dealt = set()
    for epoch in range(10):
        first = next(batch for batch in batches_of(sampler, [epoch]) if (BALANCED[batch] == 0).any())
        dealt.add(tuple(sorted(i for i in first if BALANCED[i] == 0)))
    assert len(dealt) == 10 and tuple(range(0, 120, 12)) not in dealt


def test_which_classes_meet_is_random():
    """4 classes, 2 a batch: all 6 pairs about equally often over many epochs (5 sigma of independent draws)."""
    labels = torch.arange(80) % 4
    sampler = pmsn.ClassBatchSampler(labels, 8, 2)
    pairs = [tuple(labels[batch].unique().tolist()) for batch in batches_of(sampler, range(120))]
    for pair in itertools.combinations(range(4), 2):
        assert abs(pairs.count(pair) - 200) < 5 * math.sqrt(1200 / 6 * 5 / 6)


@pytest.mark.parametrize("labels", [BALANCED, LONG_TAIL])
def test_ranks_share_a_batch(labels):
    """Disjoint, equally large, together the batch of the single process; images are mixed over ranks, not by class."""
    whole = pmsn.ClassBatchSampler(labels, 30, 3, seed=3)
    ranks = [pmsn.ClassBatchSampler(labels, 30, 3, rank=rank, world_size=3, seed=3) for rank in range(3)]
    for epoch in (0, 5):
        parts = zip(*(list(batches_of(rank, [epoch])) for rank in ranks), strict=True)
        for batch, part in zip(batches_of(whole, [epoch]), parts, strict=True):
            assert [len(share) for share in part] == [10, 10, 10]
            assert sorted(itertools.chain(*part)) == sorted(batch)
            assert len(set(batch)) == 30 or labels is LONG_TAIL  # a rare class may be dealt twice in a batch
    mixed = [len(labels[batch].unique()) for batch in batches_of(ranks[0], range(5))]
    assert np.mean(mixed) > 2


def test_seeds_and_epochs():
    def order(seed, epoch):
        return list(batches_of(pmsn.ClassBatchSampler(BALANCED, 24, 3, seed=seed), [epoch]))

    assert order(0, 1) == order(0, 1)
    assert order(0, 0) != order(0, 1) and order(0, 1) != order(1, 1) and order(0, 1) != order(1, 0)
    sampler = pmsn.ClassBatchSampler(BALANCED, 24, 3)
    assert list(sampler) == list(sampler) == order(0, 0)  # without set_epoch the epoch stays


def test_labels_need_not_count_from_zero():
    """Any integers, also as a list; the loader takes the sampler as batch_sampler."""
    labels = [7, 7, 7, 7, -3, -3, -3, -3]
    data = torch.utils.data.TensorDataset(torch.tensor(labels))
    loader = torch.utils.data.DataLoader(data, batch_sampler=pmsn.ClassBatchSampler(labels, 4, 1))
    assert sorted(batch[0].tolist() for batch in loader) == [[-3] * 4, [7] * 4]


@pytest.mark.parametrize("options, word", [
    ({"classes_per_batch": 0}, "classes_per_batch"), ({"classes_per_batch": 13}, "classes_per_batch"),
    ({"batch_size": 2}, "classes_per_batch"), ({"batch_size": 0}, "classes_per_batch"),
    ({"batch_size": 601}, "batch_size"),
    ({"world_size": 5}, "world_size"), ({"rank": 2, "world_size": 2}, "rank"), ({"rank": -1}, "rank"),
    ({"labels": LONG_TAIL, "batch_size": 24, "classes_per_batch": 6}, "batch_size")])
def test_sampler_refuses(options, word):
    """The last: class 5 has 1/30 of the images, less than one of 24."""
    with pytest.raises(ValueError, match=word):
        pmsn.ClassBatchSampler(**{"labels": BALANCED, "batch_size": 24, "classes_per_batch": 3, **options})


def test_round_randomly_keeps_sum_and_expectation():
    """Quotas .5, 1.25, 2, 0, 3.25 (sum 7): each rounded up or down, whole numbers kept, means exact within 5 sigma."""
    quotas = torch.tensor([0.5, 1.25, 2.0, 0.0, 3.25])
    generator = torch.Generator().manual_seed(0)
    rounded = torch.stack([pmsn.round_randomly(quotas, generator) for _ in range(2000)])
    assert (rounded.sum(dim=1) == 7).all()
    assert ((rounded >= quotas.floor()) & (rounded <= quotas.ceil())).all()
    assert (rounded.double().mean(dim=0) - quotas).abs().max() < 5 * 0.5 / math.sqrt(2000)


def test_round_randomly_rounds_up_any_two():
    """Four quotas of 1/2: every pair rounds up together now and then (neighbours in a fixed order never would)."""
    generator = torch.Generator().manual_seed(0)
    rounded = {tuple(pmsn.round_randomly(torch.full((4,), 0.5), generator).tolist()) for _ in range(200)}
    assert rounded == {pattern for pattern in itertools.product((0, 1), repeat=4) if sum(pattern) == 2}
