"""data.py: which frames, which tracklets, and the augmentation."""
from collections import Counter
from itertools import product

from data import IdentitySampler, Tracklet, augment, chunks, erased_box, linspace
from support.files import UserError
from support.footage import normalise

import numpy as np
import pytest
import torch
import torch.nn.functional as F


def test_frame_rules_by_hand():
    """The first frame of each chunk of ceil(n / T); frames at equal distances. Of fewer than T
    frames some come again."""
    assert chunks(13, 6).tolist() == [0, 3, 6, 9, 12, 12]
    assert chunks(3, 6).tolist() == [0, 1, 2, 2, 2, 2]
    assert linspace(13, 6).tolist() == [0, 2, 4, 6, 8, 10]


def test_frame_rules_in_training():
    """Any frame of each chunk, in order."""
    rng = np.random.default_rng(0)
    for rule in chunks, linspace:
        drawn = {tuple(rule(7, 3, rng)) for _ in range(200)}
        assert drawn == set(product((0, 1, 2), (3, 4, 5), (6,)))


# ---------------------------------------------------------------- sampler ----

# pid -> number of visible and of infrared tracklets
SIZES = {31: (5, 5), 4: (6, 3), 12: (1, 4), 7: (2, 2), 50: (4, 1), 9: (3, 3)}
CROWD = [Tracklet(("x.jpg",), pid, f"D{i}", modality)
         for pid, (visible, infrared) in SIZES.items()
         for modality, n in (("visible", visible), ("infrared", infrared))
         for i in range(n)]
THERE = Counter((t.pid, t.modality) for t in CROWD)


def sampler(epoch=0, **options):
    drawn = IdentitySampler(CROWD, **{"P": 4, "K": 3, "steps": 12, "seed": 1, **options})
    drawn.epoch = epoch
    return drawn


def test_batches_of_people():
    """P people x K tracklets x 2 modalities, visible first. A person's K tracklets differ; of fewer
    each is there, and some again."""
    batches = list(sampler())
    assert len(sampler()) == len(batches) == 12
    for batch in batches:
        tracklets = [CROWD[i] for i, _ in batch]
        assert [t.modality for t in tracklets] == ["visible"] * 12 + ["infrared"] * 12
        pids = [t.pid for t in tracklets]
        assert pids[:12] == pids[12:] and len(set(pids)) == 4
        distinct = Counter((t.pid, t.modality) for t in set(tracklets))
        assert distinct == {one: min(THERE[one], 3) for one in distinct}
    keys = [key for batch in batches for key in batch]
    assert {i for i, _ in keys} == set(range(len(CROWD)))
    assert len({seed for _, seed in keys}) == len(keys)


def test_batches_are_a_function_of_seed_and_epoch():
    """Whatever was drawn before: resuming needs it."""
    first = sampler()
    once = list(first)
    assert list(first) == once == list(sampler())
    assert list(sampler(seed=2)) != once
    first.epoch = 3
    assert list(first) == list(sampler(epoch=3)) != once


def test_shares_of_processes_add_up_to_the_batch_of_one():
    shares = [list(sampler(rank=rank, world=2)) for rank in (0, 1)]
    for step, whole in enumerate(sampler()):
        assert sorted(shares[0][step] + shares[1][step]) == sorted(whole)
        for share in shares:
            tracklets = [CROWD[i] for i, _ in share[step]]
            assert [t.modality for t in tracklets] == ["visible"] * 6 + ["infrared"] * 6
            assert len({t.pid for t in tracklets}) == 2
    with pytest.raises(UserError, match="expected 2 to 6, a multiple of 2"):
        sampler(P=5, world=2)


@pytest.mark.parametrize("P", [1, 7])
def test_too_few_or_many_people_are_refused(P):
    with pytest.raises(UserError, match="expected 2 to 6"):
        sampler(P=P)


# ----------------------------------------------------------- augmentation ----

FILL = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
GRAY = torch.tensor([0.2989, 0.5870, 0.1140]).view(3, 1, 1)


@pytest.mark.parametrize("modality", [0, 1])
def test_augmentation_equals_its_steps_on_whole_pictures(modality):
    """Defect 4: all frames of a tracklet alike. All crops are drawn first, then each tracklet's
    box, channel and coin: the order of the draws is part of what a seed means."""
    frames = torch.randint(256, (40, 2, 3, 64, 32), dtype=torch.uint8)
    found = augment(frames, torch.full((40,), modality), np.random.default_rng(0))
    rng = np.random.default_rng(0)
    crops = [(rng.integers(5), rng.integers(5), rng.random()) for _ in frames]
    for tracklet, out, (top, left, coin) in zip(frames, found, crops, strict=True):
        moved = F.pad(tracklet, [2] * 4)[..., top:top + 64, left:left + 32]
        if coin < 0.5:
            moved = moved.flip(-1)
        expected = normalise(moved)
        if rng.random() < 0.5:
            y, x, h, w = erased_box(64, 32, rng)
            expected[..., y:y + h, x:x + w] = FILL
        channel = rng.integers(4 if modality else 6)
        coin = rng.random()
        if channel < 3:
            expected = expected[:, [channel] * 3]
        elif modality and coin < 0.5:
            expected = (expected * GRAY).sum(1, keepdim=True).expand(-1, 3, -1, -1)
        assert torch.allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("modality, kept, each, mixed", [
    (0, 0.5, 0.167, 0), (1, 0.125, 0.25, 0.125)])
def test_channels_are_exchanged_with_these_probabilities(modality, kept, each, mixed):
    colour = torch.tensor([200, 100, 50], dtype=torch.uint8).view(3, 1, 1)
    frames = colour.expand(1000, 1, 3, 8, 4)
    rng = np.random.default_rng(0)
    out = augment(frames, torch.full((1000,), modality), rng, erase=0)[:, 0]
    own = normalise(colour)
    shares = []
    for kind in own, *own, (own * GRAY).sum():
        is_this = torch.isclose(out, kind, atol=1e-5).flatten(1).all(1)
        shares.append(is_this.float().mean().item())
    assert sum(shares) == pytest.approx(1)
    assert shares == pytest.approx([kept, each, each, each, mixed], abs=0.04)


def test_erased_boxes_keep_their_bounds():
    """2 to 40 % of the area, aspect 0.3 to 3.3, anywhere inside."""
    rng = np.random.default_rng(0)
    y, x, h, w = np.array([erased_box(256, 128, rng) for _ in range(500)]).T
    for found, low, high in (h * w / (256 * 128), 0.02, 0.4), (h / w, 0.3, 3.33):
        assert 0.95 * low < found.min() < 1.5 * low
        assert 0.8 * high < found.max() < 1.05 * high
    assert y.min() == 0 and (y + h).max() == 256
    assert x.min() == 0 and (x + w).max() == 128
