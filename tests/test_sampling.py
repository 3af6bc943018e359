"""data.py: identities drawn the same way every time, and one draw of the augmentation per tracklet
(defect 4)."""
from collections import Counter

from data import IdentitySampler, Tracklet, augment, normalise
from support.files import UserError

import numpy as np
import pytest
import torch

MEAN, STD, FILL = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.4914, 0.4822, 0.4465)


# ---------------------------------------------------------------- sampler ----

# pid -> number of visible and of infrared tracklets
SIZES = {31: (5, 5), 4: (6, 3), 12: (1, 4), 7: (2, 2), 50: (4, 1), 9: (3, 3)}
CROWD = [Tracklet(("x.jpg",) * 12, pid, f"D{i}", modality) for pid, sizes in SIZES.items()
         for modality, n in zip(("visible", "infrared"), sizes, strict=True) for i in range(n)]


def sampler(epoch=0, **options):
    out = IdentitySampler(CROWD, **{"P": 4, "K": 3, "steps": 12, "seed": 1, **options})
    out.epoch = epoch
    return out


def test_sampler_batches():
    """P identities x K tracklets, visible first, the same identities in both halves; distinct
    tracklets where there are K."""
    batches = list(sampler())
    assert len(sampler()) == len(batches) == 12
    for batch in batches:
        assert len(batch) == 24
        tracklets = [CROWD[index] for index, _ in batch]
        visible, infrared = tracklets[:12], tracklets[12:]
        assert {t.modality for t in visible} == {"visible"}
        assert {t.modality for t in infrared} == {"infrared"}
        pids = Counter(t.pid for t in visible)
        assert pids == Counter(t.pid for t in infrared) and sorted(pids.values()) == [3] * 4
        for pid in pids:
            for half, there in zip((visible, infrared), SIZES[pid], strict=True):
                distinct = {t for t in half if t.pid == pid}
                assert len(distinct) == min(there, 3)


def test_every_tracklet_has_its_turn_with_other_frames_each_time():
    keys = [key for batch in sampler() for key in batch]
    assert {index for index, _ in keys} == set(range(len(CROWD)))
    assert len({seed for _, seed in keys}) > 0.9 * len(keys)


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
    """The union over ranks is the batch of world=1; each rank has P / world identities of its own,
    visible first."""
    shares = [list(sampler(rank=rank, world=world)) for rank in range(world)]
    each = 12 // world
    for step, whole in enumerate(sampler()):
        assert sorted(key for share in shares for key in share[step]) == sorted(whole)
        for share in shares:
            rows = [CROWD[index] for index, _ in share[step]]
            assert [t.modality for t in rows] == ["visible"] * each + ["infrared"] * each
            assert len({t.pid for t in rows}) == 4 // world


@pytest.mark.parametrize("options", [{"P": 7}, {"P": 1}, {"P": 5, "world": 2}])
def test_sampler_refuses_impossible_numbers(options):
    with pytest.raises(UserError, match=f"--identities {options['P']}"):
        sampler(**options)


# ----------------------------------------------------------- augmentation ----

def augmented(frames, modality=0, seed=0, **options):
    """frames: uint8 (B, T, 3, H, W); modality: 0 visible, 1 infrared, for all tracklets."""
    modalities = torch.full((len(frames),), modality)
    out = augment(frames, modalities, np.random.default_rng(seed), **options)
    assert out.shape == frames.shape and out.dtype == torch.float32
    return out


def plain(B, *colour):
    """-> B tracklets of one frame, all of one colour."""
    return torch.tensor(colour, dtype=torch.uint8).view(1, 1, 3, 1, 1).repeat(B, 1, 1, 64, 32)


def typical(frames):
    """(B, T, 3, H, W) -> (B, T, 3): the median pixel of each frame lies neither in the border nor
    in the erased box."""
    return frames.flatten(-2).median(-1).values


def test_normalise():
    """ImageNet's mean and deviation by hand, for any leading dimensions; the input stays as it
    was."""
    frames = torch.zeros(2, 5, 3, 4, 2, dtype=torch.uint8)
    frames[1] = 255
    out = normalise(frames)
    assert out.dtype == torch.float32 and frames.unique().tolist() == [0, 255]
    black, white = torch.tensor([-2.1179, -2.0357, -1.8044]), torch.tensor([2.2489, 2.4286, 2.6400])
    assert torch.allclose(out[0, 0, :, 0, 0], black, atol=1e-4)
    assert torch.allclose(out[1, 4, :, 3, 1], white, atol=1e-4)
    assert torch.equal(normalise(frames[1, 2]), out[1, 2])


@pytest.mark.parametrize("modality", [0, 1])
def test_one_draw_per_tracklet(modality):
    """Defect 4: identical frames stay identical; 16 copies of a tracklet come out in many ways; the
    rng alone decides."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (1, 1, 3, 64, 32), dtype=torch.uint8, generator=generator)
    frames = noise.repeat(16, 4, 1, 1, 1)
    out = augmented(frames, modality)
    assert (out == out[:, :1]).all()
    assert len({tracklet[0].numpy().tobytes() for tracklet in out}) >= 12
    torch.manual_seed(3)
    np.random.seed(3)
    assert torch.equal(augmented(frames, modality), out)
    assert not torch.equal(augmented(frames, modality, seed=1), out)
    assert torch.equal(frames, noise.repeat(16, 4, 1, 1, 1))


def test_about_half_are_flipped_and_frames_keep_their_order():
    """A picture that brightens to the right brightens to the left in half of the tracklets; a
    brighter second frame stays so."""
    ramp = (torch.arange(32) * 6).to(torch.uint8).expand(400, 1, 3, 64, 32)
    out = augmented(torch.cat([ramp, ramp + 60], dim=1))
    rising = out[:, :, 0].diff(dim=-1).sign().sum((-2, -1)).sign()
    assert (rising[:, 0] == rising[:, 1]).all()
    assert 0.4 < (rising[:, 0] < 0).float().mean() < 0.6
    brighter = out[:, 1] - out[:, 0]    # 0 in the border and in the erased box
    assert (brighter >= 0).all()
    assert ((brighter > 0.5).flatten(1).float().mean(1) > 0.25).all()


@pytest.mark.parametrize("modality", [0, 1])
def test_about_half_are_erased(modality):
    """One full rectangle, filled with the given values after normalisation (the input is black, so
    nothing else is grey)."""
    out = augmented(plain(400, 0, 0, 0), modality)[:, 0]
    boxes = out[:, 0] > 0.1
    assert 0.4 < boxes.flatten(1).any(1).float().mean() < 0.6
    sizes, fills = set(), set()
    for picture, box in zip(out, boxes, strict=True):
        if not box.any():
            continue
        height, width = int(box.any(1).sum()), int(box.any(0).sum())
        assert box.sum() == height * width < 0.7 * box.numel()
        sizes.add((height, width))
        colours = picture[:, box].T.double().numpy().round(4)
        fills |= {tuple(colour) for colour in colours.tolist()}
    assert FILL in fills and len(sizes) > 50
    values = [value for fill in fills for value in fill]
    assert min(FILL) - 1e-4 <= min(values) and max(values) <= max(FILL) + 1e-4


def test_erase_is_its_probability():
    """--erase 0 erases nothing, 1 each tracklet."""
    for erase in 0, 1:
        boxes = augmented(plain(50, 0, 0, 0), erase=erase)[:, 0, 0] > 0.1
        assert (boxes.flatten(1).any(1) == bool(erase)).all()


def test_channel_exchange_on_half_of_the_visible():
    """Half keep their colour; the others show one channel, not always the same one, three times."""
    colours = typical(augmented(plain(400, 200, 100, 50)))[:, 0]
    own = normalise(plain(1, 200, 100, 50))[0, 0, :, 0, 0]
    kept = (colours - own).abs().amax(1) < 1e-3
    assert 0.4 < kept.float().mean() < 0.6
    # Exchanged after normalisation, or before it.
    changed = colours[~kept]
    raw = changed * torch.tensor(STD) + torch.tensor(MEAN)
    spread = [values.amax(1) - values.amin(1) for values in (changed, raw)]
    assert torch.minimum(*spread).max() < 1e-3
    assert len(set(changed[:, 0].numpy().round(2).tolist())) >= 2


def test_channel_or_grey_mix_on_infrared():
    """Infrared tracklets of three unequal channels come out in several mixes, none beyond what went
    in."""
    colours = typical(augmented(plain(400, 200, 100, 50), modality=1))[:, 0]
    assert len({tuple(colour) for colour in colours.numpy().round(2).tolist()}) >= 3
    assert normalise(plain(1, 50, 50, 50)).min() - 1e-3 <= colours.min()
    assert colours.max() <= normalise(plain(1, 200, 200, 200)).max() + 1e-3


FAR = 7    # pixels: a shift that is looked for, beyond the largest allowed


def best_crop(picture, canvas):
    """The shift (dy, dx) that explains most pixels of `picture`, and where it explains none."""
    H, W = picture.shape
    best, fewest = None, None
    for k in range(3):    # the channel may have been exchanged after normalisation
        values = (canvas / 255 - MEAN[k]) / STD[k]
        for flip, y, x in np.ndindex(2, 2 * FAR + 1, 2 * FAR + 1):
            wrong = np.abs(picture - values[flip, y:y + H, x:x + W]) > 1e-3
            if best is None or wrong.sum() < fewest:
                best, fewest = ((y - FAR, x - FAR), wrong), wrong.sum()
    return best


def test_pixels_outside_the_box_are_a_crop_of_the_input():
    """Of every flip and shift of up to 7 pixels one explains all pixels but the box, within
    10 * 128 / 256 = 5 pixels."""
    H, W, B = 128, 32, 24
    source = np.random.default_rng(0).integers(0, 256, (H, W))
    # NaN: the border's value is not asked here.
    canvas = np.full((2, H + 2 * FAR, W + 2 * FAR), np.nan)
    canvas[:, FAR:-FAR, FAR:-FAR] = source, source[:, ::-1]
    frames = torch.as_tensor(source, dtype=torch.uint8).repeat(B, 1, 3, 1, 1)
    found = []
    for picture in augmented(frames)[:, 0, 0].double().numpy():
        shift, wrong = best_crop(picture, canvas)
        distance = np.abs(picture[wrong][:, None] - np.array(FILL)).min(1)
        assert (distance < 1e-4).all()
        found.append(shift)
    assert np.abs(found).max() <= 5 and (np.ptp(found, axis=0) >= 7).all()
    assert len(set(found)) > B // 2
