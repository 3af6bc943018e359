"""walkers.py: the same bytes for the same seed, HITSZ-VCM's layout, true masks, and no identity in
colour or brightness."""
import json
from dataclasses import asdict

import walkers
from data import load_dataset
from scripts import fails, here, succeeds
from support.clip import VOCABULARY
from support.files import UserError
from support.footage import read_frame, true_masks
from support.pedestrian import describe
from walkers import Camera, draw_tracklet, make_paint, make_walker, make_walkers

import numpy as np
import pytest
import torch
import torch.nn.functional as F

SMALL = {"train_identities": 2, "test_identities": 2, "tracklets": 3, "height": 48, "cameras": 2}
LITTLE = {"train_identities": 2, "test_identities": 6, "tracklets": 1, "height": 48, "cameras": 1}
OPTIONS = str.split("--train-identities 2 --test-identities 2 --tracklets 3 --height 48 "
                    "--cameras 2")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small") / "walkers"
    make_walkers(root, **SMALL, workers=1)
    return root


@pytest.fixture(scope="module")
def crowd():
    """Two short walks of each of 32 people by day and two by night, before different cameras ->
    pid, night and camera (128,), frames (128, 3, 3, 64, 32) in 0..1, masks (128, 3, 64, 32)."""
    rows, frames, masks = [], [], []
    for pid in range(32):
        for night, modality in enumerate(("visible", "infrared")):
            rng = np.random.default_rng([pid, night])
            walker = make_walker(0, pid)
            paint = make_paint(0, pid, modality)
            for number in rng.permutation(6)[:2].tolist():
                camera = Camera(0, 1 + number, 6, 64)
                walk = list(draw_tracklet(rng, walker, paint, camera, modality, 3))
                rows.append([pid, night, number])
                frames += [read_frame(frame, (64, 32)) / 255 for frame, _ in walk]
                masks += [read_frame(mask, (64, 32))[0] > 127 for _, mask in walk]
    frames, masks = torch.stack(frames), torch.stack(masks)
    return *torch.tensor(rows).t(), frames.unflatten(0, (-1, 3)), masks.unflatten(0, (-1, 3))


def contents(root):
    files = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def test_the_script_draws_the_same_bytes_whatever_the_processes(small, tmp_path):
    for _ in range(2):    # the second time it is there
        succeeds(here("walkers.py", tmp_path / "w", *OPTIONS))
        assert contents(tmp_path / "w") == contents(small)
    fails(here("walkers.py", tmp_path / "x", *OPTIONS, "--frames", 11), "11", "12")
    # Another seed draws other people in other places.
    assert make_walker(1, 1) != make_walker(0, 1)
    assert Camera(1, 1, 6, 64).tilt != Camera(0, 1, 6, 64).tilt


def test_the_layout_is_hitsz_vcm_s_and_every_frame_is_used_and_has_a_mask(small):
    dataset = load_dataset(small)
    assert dataset.classes == [1, 2]
    assert {t.pid for t in dataset.test} == {3, 4}
    for split in dataset.train, dataset.test:
        assert {t.camera for t in split} == {"D1", "D2"}
        tracks = [(t.pid, t.modality, len(t.frames)) for t in split]
        assert len(tracks) == 2 * 2 * 3
        assert all(tracks.count(track) == 3 for track in tracks)
    for direction, sides in dataset.directions.items():
        assert [dataset.test[side[0]].modality for side in sides] == direction.split("->")
        assert [len(side) for side in sides] == [6, 6]
    # Three tracklets in two cameras: their numbers do not collide.
    frames = [frame for t in dataset.train + dataset.test for frame in t.frames]
    on_disk = sorted(small.glob("T*/**/*.jpg"))
    assert sorted(frames) == sorted(map(str, on_disk))
    masks = [small / "masks" / path.relative_to(small).with_suffix(".png") for path in on_disk]
    assert set(masks) == set(small.rglob("*.png"))


def test_masks_show_people_in_the_middle_neither_darker_nor_brighter_than_the_place(crowd):
    _, night, _, frames, masks = crowd
    share = masks.float().mean((2, 3))
    assert share.min() > 0.06
    assert share.max() < 0.6
    # From head to foot they fill most of the rows, but hardly ever the first or the last one.
    assert masks.any(3).sum(2).min() > 0.7 * 64
    assert masks[:, :, [0, -1]].any(3).float().mean() < 0.01
    # The picture changes more on the mask's edge than elsewhere in the background.
    grey = frames.mean(2)
    edge = masks.diff(dim=3)
    changes = grey.diff(dim=3).abs()
    assert changes[edge].mean() > 1.5 * changes[~edge & ~masks[..., 1:]].mean()
    person = (grey * masks).sum((1, 2, 3)) / masks.sum((1, 2, 3))
    place = (grey * ~masks).sum((1, 2, 3)) / (~masks).sum((1, 2, 3))
    for modality in 0, 1:
        assert 0.1 < (person < place)[night == modality].float().mean() < 0.9


def test_colour_and_brightness_do_not_tell_who_it_is(crowd):
    pid, night, camera, frames, masks = crowd

    def times_chance(features, query, gallery):
        """Rank-1 of the nearest neighbour, divided by that of a random ranking."""
        asked, others = night == query, night == gallery
        same = pid[asked, None] == pid[others]
        # As the benchmark does: a person's tracklets of the same camera do not count.
        skipped = same & (camera[asked, None] == camera[others])
        distance = torch.cdist(features[asked], features[others])
        nearest = distance.masked_fill(skipped, torch.inf).argmin(1)
        found = same.gather(1, nearest[:, None]).float().mean()
        return found / ((same & ~skipped).sum(1) / (~skipped).sum(1)).mean()

    colour = (frames * masks[:, :, None]).sum((1, 3, 4)) / masks.sum((1, 2, 3))[:, None]
    picture = F.adaptive_avg_pool2d(frames.mean(1), (16, 8)).flatten(1)
    assert times_chance(colour, 0, 0) > 10    # by day it tells
    for sides in (0, 1), (1, 0):
        assert times_chance(colour, *sides) < 3
        assert times_chance(picture, *sides) < 6    # it has some shape


def test_people_in_uniform_share_clothes_and_paint_but_not_bodies(tmp_path):
    """Every second one wears it, the others stay as they are."""
    make_walkers(tmp_path / "own", **LITTLE)
    make_walkers(tmp_path / "half", **LITTLE, uniform=0.5)
    own, half = contents(tmp_path / "own"), contents(tmp_path / "half")
    changed = {int(name.split("/")[1]) for name in own
               if name.endswith(".jpg") and own[name] != half[name]}
    assert changed == {2, 4, 6, 8}

    sentences = json.loads(half["sentences.json"])
    clothes = "person in a banded jacket and plain trousers with a cap"
    assert {int(pid) for pid in sentences if clothes in sentences[pid]} == changed
    body, uniform = (asdict(make_walker(0, 2, is_dressed)) for is_dressed in (False, True))
    assert {key for key in body if body[key] != uniform[key]} <= walkers.UNIFORM.keys()

    colours = {True: [], False: []}
    for t in load_dataset(tmp_path / "half", checked=False).test:
        if t.modality == "visible":
            [mask] = true_masks(tmp_path / "half", t.frames[:1], (48, 24))
            frame = read_frame(t.frames[0], (48, 24)).float()
            colours[t.pid in changed].append(frame[:, mask].mean(1))
    alike, others = (torch.stack(colours[key]).std(0).max() for key in (True, False))
    assert alike < others / 2


def test_sentences_say_who_wears_what_in_words_that_the_tiny_clip_knows(small):
    people = {str(pid): describe(make_walker(0, pid)) for pid in range(1, 400)}
    sentences = json.loads((small / "sentences.json").read_text())
    assert sentences == {pid: people[pid] for pid in "1234"}
    spoken = {word for sentence in people.values() for word in sentence.split()}
    assert spoken == set(VOCABULARY[3:])    # all but "X", "<start>" and "<end>"


def test_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    def stop(info, *_):
        assert (info.parent / "Train/0001").is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(walkers, "write_info", stop)
    with pytest.raises(KeyboardInterrupt):
        make_walkers(tmp_path / "w", **LITTLE | {"test_identities": 0})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_kept_or_refused_never_overwritten(small, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*")}
    make_walkers(small, **SMALL)
    with pytest.raises(UserError, match="'seed': 7"):
        make_walkers(small, **SMALL, seed=7)
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*")} == before
    (tmp_path / "notes.txt").write_text("mine")
    for path in tmp_path, tmp_path / "notes.txt", tmp_path / "notes.txt/below":
        with pytest.raises(UserError, match="DIR"):
            make_walkers(path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_sample_has_everybody_by_day_and_then_by_night():
    frames, modality, label = walkers.sample(people=3, T=2)
    assert frames.shape == (6, 2, 3, 128, 64)
    assert frames.dtype == torch.uint8
    assert modality.tolist() == [0, 0, 0, 1, 1, 1]
    assert label.tolist() == [0, 1, 2, 0, 1, 2]
    is_grey = (frames == frames[:, :, :1]).flatten(1).all(1)
    assert torch.equal(is_grey, modality == 1)
