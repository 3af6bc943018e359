"""data.py: identities drawn the same way every time, and one draw of the augmentation per tracklet (defect 4)."""
from collections import Counter

import numpy as np
import pytest
import torch

from data import IdentitySampler, Tracklet, UserError, augment, normalise

MEAN, STD, FILL = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.4914, 0.4822, 0.4465)


# ---------------------------------------------------------------------------------------------------------- sampler

SIZES = {31: (5, 5), 4: (6, 3), 12: (1, 4), 7: (2, 2), 50: (4, 1), 9: (3, 3)}       # pid -> visible, infrared tracklets
CROWD = [Tracklet(("x.jpg",) * 12, pid, f"D{i}", modality) for pid, sizes in SIZES.items()
         for modality, n in zip(("visible", "infrared"), sizes) for i in range(n)]


def sampler(epoch=0, **options):
    out = IdentitySampler(CROWD, **{**dict(P=4, K=3, steps=12, seed=1), **options})
    out.epoch = epoch
    return out


def test_sampler_batches():
    """P identities x K tracklets, visible first, the same identities in both halves; distinct tracklets where there are K."""
    keys = [key for batch in sampler() for key in batch]
    assert len(sampler()) == 12 and len(keys) == 12 * 24
    for batch in sampler():
        halves = [[CROWD[index] for index, _ in half] for half in (batch[:12], batch[12:])]
        pids = [Counter(t.pid for t in half) for half in halves]
        assert pids[0] == pids[1] and sorted(pids[0].values()) == [3] * 4
        for column, modality in enumerate(("visible", "infrared")):
            assert {t.modality for t in halves[column]} == {modality}
            for pid in pids[0]:
                assert len({t for t in halves[column] if t.pid == pid}) == 3 or SIZES[pid][column] < 3
    assert {index for index, _ in keys} == set(range(len(CROWD)))           # every tracklet has its turn
    assert len({seed for _, seed in keys}) > 0.9 * len(keys)                 # with other frames the second time


def test_sampler_is_a_function_of_seed_and_epoch():
    """Whatever was drawn before and whatever the global random state: what resuming needs."""
    first = sampler()
    once = list(first)
    np.random.seed(5)
    torch.manual_seed(5)
    assert list(first) == once == list(sampler()) != list(sampler(seed=2))
    first.epoch = 3
    assert list(first) == list(sampler(epoch=3)) != once


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batch_of_one_process(world):
    """The union over ranks is the batch of world=1; each rank has P / world identities of its own, visible first."""
    shares = [list(sampler(rank=rank, world=world)) for rank in range(world)]
    for step, whole in enumerate(sampler()):
        assert sorted(key for share in shares for key in share[step]) == sorted(whole)
        for share in shares:
            rows = [CROWD[index] for index, _ in share[step]]
            assert [t.modality for t in rows] == ["visible"] * (12 // world) + ["infrared"] * (12 // world)
            assert len({t.pid for t in rows}) == 4 // world


@pytest.mark.parametrize("options", [dict(P=7), dict(P=5, world=2)])
def test_sampler_refuses_impossible_numbers(options):
    with pytest.raises(UserError, match=str(options["P"])):
        list(sampler(**options))


# ----------------------------------------------------------------------------------------------------- augmentation

def augmented(frames, modality=0, seed=0):
    """frames: uint8 (B, T, 3, H, W); modality: 0 visible, 1 infrared, for all tracklets."""
    out = augment(frames, torch.full((len(frames),), modality), np.random.default_rng(seed))
    assert out.shape == frames.shape and out.dtype == torch.float32
    return out


def plain(B, *colour):
    """-> B tracklets of one frame, all of one colour."""
    return torch.tensor(colour, dtype=torch.uint8).view(1, 1, 3, 1, 1).repeat(B, 1, 1, 64, 32)


def typical(frames):
    """(B, T, 3, H, W) -> (B, T, 3): the median pixel of each frame lies neither in the border nor in the erased box."""
    return frames.flatten(-2).median(-1).values


def test_normalise():
    """ImageNet's mean and deviation by hand, for any leading dimensions; the input stays as it was."""
    frames = torch.zeros(2, 5, 3, 4, 2, dtype=torch.uint8)
    frames[1] = 255
    out = normalise(frames)
    assert out.dtype == torch.float32 and frames.unique().tolist() == [0, 255]
    assert torch.allclose(out[0, 0, :, 0, 0], torch.tensor([-2.1179, -2.0357, -1.8044]), atol=1e-4)
    assert torch.allclose(out[1, 4, :, 3, 1], torch.tensor([2.2489, 2.4286, 2.6400]), atol=1e-4)
    assert torch.equal(normalise(frames[1, 2]), out[1, 2])


@pytest.mark.parametrize("modality", [0, 1])
def test_one_draw_per_tracklet(modality):
    """Defect 4: identical frames stay identical; 16 copies of a tracklet come out in many ways; the rng alone decides."""
    noise = torch.randint(0, 256, (1, 1, 3, 64, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    frames = noise.repeat(16, 4, 1, 1, 1)
    out = augmented(frames, modality)
    assert (out == out[:, :1]).all()
    assert len({tracklet[0].numpy().tobytes() for tracklet in out}) >= 12
    torch.manual_seed(3)
    np.random.seed(3)
    assert torch.equal(augmented(frames, modality), out) and not torch.equal(augmented(frames, modality, seed=1), out)
    assert torch.equal(frames, noise.repeat(16, 4, 1, 1, 1))


def test_about_half_are_flipped_and_frames_keep_their_order():
    """A picture that brightens to the right brightens to the left in half of the tracklets; a brighter second frame stays so."""
    ramp = (torch.arange(32) * 6).to(torch.uint8).expand(400, 1, 3, 64, 32)
    out = augmented(torch.cat([ramp, ramp + 60], dim=1))
    rising = out[:, :, 0].diff(dim=-1).sign().sum((-2, -1)).sign()
    assert (rising[:, 0] == rising[:, 1]).all() and 0.4 < (rising[:, 0] < 0).float().mean() < 0.6
    brighter = out[:, 1] - out[:, 0]                         # 0 in the border and in the erased box
    assert (brighter >= 0).all() and ((brighter > 0.5).flatten(1).float().mean(1) > 0.25).all()


@pytest.mark.parametrize("modality", [0, 1])
def test_about_half_are_erased(modality):
    """One full rectangle, filled with the given values after normalisation (the input is black, so nothing else is grey)."""
    out = augmented(plain(400, 0, 0, 0), modality)[:, 0]
    boxes = out[:, 0] > 0.1
    assert 0.4 < boxes.flatten(1).any(1).float().mean() < 0.6
    sizes, fills = set(), set()
    for picture, box in zip(out, boxes):
        if box.any():
            height, width = int(box.any(1).sum()), int(box.any(0).sum())
            assert box.sum() == height * width < 0.7 * box.numel()
            sizes.add((height, width))
            fills |= {tuple(colour) for colour in picture[:, box].T.double().numpy().round(4).tolist()}
    assert FILL in fills and len(sizes) > 50
    assert all(min(FILL) - 1e-4 <= value <= max(FILL) + 1e-4 for fill in fills for value in fill)


def test_channel_exchange_on_half_of_the_visible():
    """Half keep their colour; the others show one channel, not always the same one, three times."""
    colours = typical(augmented(plain(400, 200, 100, 50)))[:, 0]
    kept = (colours - normalise(plain(1, 200, 100, 50))[0, 0, :, 0, 0]).abs().amax(1) < 1e-3
    assert 0.4 < kept.float().mean() < 0.6
    changed, raw = colours[~kept], (colours * torch.tensor(STD) + torch.tensor(MEAN))[~kept]
    assert torch.minimum(changed.amax(1) - changed.amin(1), raw.amax(1) - raw.amin(1)).max() < 1e-3    # after or before
    assert len(set(changed[:, 0].numpy().round(2).tolist())) >= 2


def test_channel_or_grey_mix_on_infrared():
    """Infrared tracklets of three unequal channels come out in several mixes, none beyond what went in."""
    colours = typical(augmented(plain(400, 200, 100, 50), modality=1))[:, 0]
    assert len({tuple(colour) for colour in colours.numpy().round(2).tolist()}) >= 3
    assert normalise(plain(1, 50, 50, 50)).min() - 1e-3 <= colours.min()
    assert colours.max() <= normalise(plain(1, 200, 200, 200)).max() + 1e-3


def test_pixels_outside_the_box_are_a_crop_of_the_input():
    """Of every flip and shift of up to 7 pixels one explains all pixels but the box, within 10 * 128 / 256 = 5 pixels."""
    H, W, far, B = 128, 32, 7, 24
    source = np.random.default_rng(0).integers(0, 256, (H, W))
    canvas = np.full((2, H + 2 * far, W + 2 * far), np.nan)                  # NaN: the border's value is not asked here
    canvas[:, far:-far, far:-far] = source, source[:, ::-1]
    found = []
    for picture in augmented(torch.as_tensor(source, dtype=torch.uint8).repeat(B, 1, 3, 1, 1))[:, 0, 0].double().numpy():
        tries = {}
        for k in range(3):                                   # the channel may have been exchanged after normalisation
            values = (canvas / 255 - MEAN[k]) / STD[k]
            for flip, dy, dx in np.ndindex(2, 2 * far + 1, 2 * far + 1):
                tries[flip, dy - far, dx - far, k] = np.abs(picture - values[flip, dy:dy + H, dx:dx + W]) > 1e-3
        flip, dy, dx, k = min(tries, key=lambda key: tries[key].sum())
        assert all(np.abs(np.array(FILL) - value).min() < 1e-4 for value in picture[tries[flip, dy, dx, k]])
        found.append((dy, dx))
    assert np.abs(found).max() <= 5 and (np.ptp(found, axis=0) >= 7).all() and len(set(found)) > B // 2
