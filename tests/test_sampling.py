"""data.py: which frames, which tracklets, and the augmentation."""
from collections import Counter

from data import IdentitySampler, Tracklet, augment, chunks, consecutive, erased_box, linspace
from support.files import UserError
from support.footage import normalise

import numpy as np
import pytest
import torch
import torch.nn.functional as F


def test_frame_rules_by_hand():
    """The first frame of each chunk of ceil(n / T), frames at equal distances, those in the middle.
    Of fewer than T frames some come again."""
    assert chunks(13, 6).tolist() == [0, 3, 6, 9, 12, 12]
    assert chunks(3, 6).tolist() == [0, 1, 2, 2, 2, 2]
    assert linspace(13, 6).tolist() == [0, 2, 4, 6, 8, 10]
    assert linspace(3, 6).tolist() == [0, 0, 1, 1, 2, 2]
    assert consecutive(10, 4).tolist() == [3, 4, 5, 6]
    assert consecutive(3, 4).tolist() == [0, 1, 2, 2]


def test_frame_rules_in_training():
    """Any frame of each chunk, in order; or successive frames from anywhere."""
    rng = np.random.default_rng(0)
    for rule in chunks, linspace:
        drawn = np.stack([rule(13, 6, rng) for _ in range(300)])
        found = [set(frames.tolist()) for frames in drawn.T]
        assert found == [{0, 1, 2}, {3, 4, 5}, {6, 7, 8}, {9, 10, 11}, {12}, {12}]
    starts = Counter()
    for _ in range(100):
        first, *rest = consecutive(6, 4, rng).tolist()
        assert rest == [first + 1, first + 2, first + 3]
        starts[first] += 1
    assert set(starts) == {0, 1, 2}


# ---------------------------------------------------------------- sampler ----

# pid -> number of visible and of infrared tracklets
SIZES = {31: (5, 5), 4: (6, 3), 12: (1, 4), 7: (2, 2), 50: (4, 1), 9: (3, 3)}
CROWD = [Tracklet(("x.jpg",), pid, f"D{i}", modality)
         for pid, (visible, infrared) in SIZES.items()
         for modality, n in (("visible", visible), ("infrared", infrared))
         for i in range(n)]


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
        people = [{t.pid for t in half} for half in (tracklets[:12], tracklets[12:])]
        assert people[0] == people[1] and len(people[0]) == 4
        found = Counter((t.pid, t.modality) for t in set(tracklets))
        for pid in people[0]:
            visible, infrared = SIZES[pid]
            assert found[pid, "visible"] == min(visible, 3)
            assert found[pid, "infrared"] == min(infrared, 3)
    keys = [key for batch in batches for key in batch]
    assert {i for i, _ in keys} == set(range(len(CROWD)))
    assert len({seed for _, seed in keys}) == len(keys)


def test_batches_are_a_function_of_seed_and_epoch():
    """Whatever was drawn before: resuming needs it."""
    first = sampler()
    once = list(first)
    torch.manual_seed(5)
    assert list(first) == once == list(sampler()) != list(sampler(seed=2))
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
    for impossible in {"P": 7}, {"P": 1}, {"P": 5, "world": 2}:
        with pytest.raises(UserError, match="expected 2 to 6"):
            sampler(**impossible)


# ----------------------------------------------------------- augmentation ----

FILL = torch.tensor([0.4914, 0.4822, 0.4465])[:, None, None]
GRAY = torch.tensor([0.2989, 0.5870, 0.1140])[:, None, None]


@pytest.mark.parametrize("modality", [0, 1])
def test_augmentation_equals_its_steps_on_whole_pictures(modality):
    """Defect 4: all frames of a tracklet alike. All crops are drawn first, then each tracklet's
    box, channel and coin: the order of the draws is part of what a seed means."""
    frames = torch.randint(256, (40, 2, 3, 64, 32), dtype=torch.uint8)
    found = augment(frames, torch.full((40,), modality), np.random.default_rng(0))
    rng = np.random.default_rng(0)
    crops = [(rng.integers(5), rng.integers(5), rng.random() < 0.5) for _ in range(40)]
    for tracklet, out, (top, left, is_flipped) in zip(frames, found, crops, strict=True):
        moved = F.pad(tracklet, [2] * 4)[..., top:top + 64, left:left + 32]
        expected = normalise(moved.flip(-1) if is_flipped else moved)
        if rng.random() < 0.5:
            y, x, h, w = erased_box(64, 32, rng)
            expected[..., y:y + h, x:x + w] = FILL
        channel, coin = rng.integers(4 if modality else 6), rng.random()
        if channel < 3:
            expected = expected[:, [channel] * 3]
        elif modality and coin < 0.5:
            expected = (expected * GRAY).sum(1, keepdim=True).expand(-1, 3, -1, -1)
        assert torch.allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("modality, kept, each, mixed", [
    (0, 0.5, 0.167, 0), (1, 0.125, 0.25, 0.125)])
def test_channels_are_exchanged_with_these_probabilities(modality, kept, each, mixed):
    colour = torch.tensor([200, 100, 50], dtype=torch.uint8)[:, None, None]
    frames = colour.expand(1000, 1, 3, 8, 4)
    rng = np.random.default_rng(0)
    out = augment(frames, torch.full((1000,), modality), rng, erase=0)[:, 0]
    own = normalise(colour)
    shares = []
    for kind in own, own[0], own[1], own[2], (own * GRAY).sum():
        distance = (out - kind).abs().flatten(1).amax(1)
        shares.append((distance < 1e-5).float().mean().item())
    assert sum(shares) == pytest.approx(1)
    assert shares == pytest.approx([kept, each, each, each, mixed], abs=0.04)


def test_erased_boxes_keep_their_bounds():
    """2 to 40 % of the area, aspect 0.3 to 3.3, anywhere inside."""
    rng = np.random.default_rng(0)
    y, x, h, w = np.array([erased_box(256, 128, rng) for _ in range(500)]).T
    area, aspect = h * w / (256 * 128), h / w
    assert 0.019 < area.min() < 0.04
    assert 0.35 < area.max() < 0.401
    assert 0.29 < aspect.min() < 0.4
    assert 2.5 < aspect.max() < 3.4
    assert y.min() == x.min() == 0
    assert (y + h).max() == 256 and (x + w).max() == 128
