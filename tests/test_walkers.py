"""walkers.py: the same bytes for the same seed, the layout of HITSZ-VCM, true masks, and no identity in colour or brightness."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import walkers
from data import UserError, cli

SMALL = dict(train_identities=2, test_identities=2, tracklets=3, frames=12, height=48, cameras=2)
SCRIPT = Path(walkers.__file__)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small") / "walkers"
    walkers.make_walkers(root, **SMALL)
    return root


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """32 test identities, 4 tracklets per modality: enough to tell a leak from luck."""
    root = tmp_path_factory.mktemp("crowd") / "walkers"
    walkers.make_walkers(root, train_identities=1, test_identities=32, tracklets=4, frames=12, height=64)
    return root


def contents(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def read_split(root, split):
    """-> [(modality, pid, camera, paths of the frames)] of one split, by the letters of the names file."""
    names = (root / f"info/{split}_name.txt").read_text().split()
    rows = [[int(x) for x in line.split()] for line in (root / f"info/track_{split}_info.txt").read_text().splitlines()]
    out = []
    for modality, start, end, pid, camera in rows:
        parts = [re.fullmatch(r"(\d{4})M([12])D(\d+)T(\d+)F(\d+)\.jpg", name) for name in names[start - 1:end]]
        assert {(int(m[1]), int(m[2]), int(m[3])) for m in parts} == {(pid, modality, camera)}
        out.append((modality, pid, camera,
                    [root / split.capitalize() / m[1] / ("ir", "rgb")[int(m[2]) - 1] / f"D{m[3]}" / f"{m[5]}.jpg" for m in parts]))
    return out


def mask_of(root, frame):
    return (root / "masks" / frame.relative_to(root)).with_suffix(".png")


# ------------------------------------------------------------------------------------------------------ determinism

def test_same_seed_same_bytes_whatever_the_workers(small, tmp_path):
    walkers.make_walkers(tmp_path / "one", **SMALL, workers=1)
    walkers.make_walkers(tmp_path / "two", **SMALL, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(small)


def test_another_seed_draws_other_people(small, tmp_path):
    walkers.make_walkers(tmp_path / "w", **SMALL, seed=1)
    ours, other = contents(small), contents(tmp_path / "w")
    shared = [name for name in ours if name.endswith(".jpg") and name in other]
    assert shared and all(ours[name] != other[name] for name in shared)


# ------------------------------------------------------------------------------------------------------ the layout

def test_names_and_rows_are_consecutive_and_every_frame_exists(small):
    everything = set()
    for split, pids in ("train", {1, 2}), ("test", {3, 4}):
        names = (small / f"info/{split}_name.txt").read_text().splitlines()
        rows = [line.split() for line in (small / f"info/track_{split}_info.txt").read_text().splitlines()]
        assert len(set(names)) == len(names) == 2 * 2 * 3 * 12
        assert [int(row[1]) for row in rows] == list(range(1, len(names), 12))
        assert [int(row[2]) for row in rows] == list(range(12, len(names) + 1, 12))
        assert {int(row[3]) for row in rows} == pids
        frames = [path for *_, paths in read_split(small, split) for path in paths]
        assert len(set(frames)) == len(frames)     # three tracklets in two cameras: numbers must not collide
        everything |= {path.relative_to(small).as_posix() for path in frames}
    on_disk = {name for name in contents(small) if name.endswith(".jpg")}
    assert on_disk == everything
    assert {name for name in contents(small) if name.endswith(".png")} == {f"masks/{name[:-4]}.png" for name in on_disk}


def test_the_queries_are_one_line_and_all_the_infrared_rows(small):
    lines = (small / "info/query_IDX.txt").read_text().splitlines()
    rows = (small / "info/track_test_info.txt").read_text().splitlines()
    assert len(lines) == 1
    assert [int(x) for x in lines[0].split()] == [i for i, row in enumerate(rows, 1) if row.split()[0] == "1"]


def test_tracklets_spread_over_the_cameras(small, crowd):
    for root, per_camera in (small, {1, 2}), (crowd, {1}):
        rows = [(modality, pid, camera) for modality, pid, camera, _ in read_split(root, "test")]
        assert {rows.count(row) for row in rows} == per_camera
    for modality in (1, 2):
        assert {camera for m, _, camera in rows if m == modality} == set(range(1, 7))
    places = {(m, pid): sorted(c for mm, p, c in rows if (mm, p) == (m, pid)) for m, pid, _ in rows}
    assert any(places[1, pid] != places[2, pid] for _, pid in places)      # drawn independently


def test_the_parameters_are_written(small):
    text = (small / "walkers.json").read_text()
    made = json.loads(text)
    assert {**made, **SMALL, "seed": 0} == made and list(made) == sorted(made)


# ------------------------------------------------------------------------------------------------------ the pictures

def test_masks_agree_with_the_frames(crowd):
    sizes = {}
    for modality, _, camera, frames in read_split(crowd, "test"):
        for path in frames:
            frame, mask = Image.open(path), Image.open(mask_of(crowd, path))
            assert (frame.mode, mask.mode, mask.size) == ("L" if modality == 1 else "RGB", "L", frame.size)
            sizes.setdefault(camera, set()).add(frame.size)
            grey, mask = np.asarray(frame.convert("L"), float) / 255, np.asarray(mask)
            assert set(np.unique(mask)) == {0, 255}
            inside = mask > 0
            assert 0.06 < inside.mean() < 0.40, path
            assert not inside[[0, -1]].any(), path
            margin = grey[inside].mean() - grey[~inside].mean()
            assert (margin if modality == 1 else -margin) > 0.25, (path, margin)
    assert all(len(s) == 1 for s in sizes.values())       # the size belongs to the camera
    assert all(w * 2 == h and 56 <= h <= 72 for s in sizes.values() for w, h in s)


def test_people_stand_in_the_middle(crowd):
    """Of all frames, a hundredth at most has anything in the top or bottom 8 % of its rows."""
    close = []
    for *_, frames in read_split(crowd, "test"):
        for path in frames:
            rows = np.flatnonzero(np.asarray(Image.open(mask_of(crowd, path))).any(axis=1))
            h = Image.open(path).height
            close.append(rows[0] < int(0.08 * h) or rows[-1] >= h - int(0.08 * h))
            assert 0.62 < (rows[-1] - rows[0] + 1) / h < 0.9, path
    assert np.mean(close) < 0.01


def rank1(features, query_modality):
    """features: [(modality, pid, camera, vector)] -> (Rank-1 of the nearest neighbour, that expected of a random ranking)."""
    hits, chance = [], []
    for modality, pid, camera, vector in features:
        if modality == query_modality:
            gallery = [(np.linalg.norm(v - vector), p) for m, p, c, v in features if m != modality and (p, c) != (pid, camera)]
            right = sum(p == pid for _, p in gallery)
            if right:
                hits.append(min(gallery)[1] == pid)
                chance.append(right / len(gallery))
    return np.mean(hits), np.mean(chance)


def descriptors(root, describe):
    return [(modality, pid, camera, np.mean([describe(Image.open(path).convert("RGB")) for path in frames], axis=0))
            for modality, pid, camera, frames in read_split(root, "test")]


def standardised(x):
    return (x - x.mean()) / x.std()


SIMPLE = {"mean colour": lambda image: np.asarray(image, float).mean(axis=(0, 1)),
          "16x8 pixels": lambda image: np.asarray(image.resize((8, 16), Image.BOX), float),
          "16x8 grey, standardised": lambda image: standardised(np.asarray(image.convert("L").resize((8, 16), Image.BOX), float))}


@pytest.mark.parametrize("name", SIMPLE)
def test_colour_and_brightness_do_not_tell_who_it_is(crowd, name):
    features = descriptors(crowd, SIMPLE[name])
    for query_modality in (1, 2):
        found, chance = rank1(features, query_modality)
        assert found < 3 * chance, f"{name}: Rank-1 {found:.3f}, chance {chance:.3f}"


# ------------------------------------------------------------------------------------------------------ the folder

def test_an_existing_folder_is_kept_or_refused_never_overwritten(small, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*")}
    walkers.make_walkers(small, **SMALL)
    with pytest.raises(UserError, match="seed=0.*seed=7"):
        walkers.make_walkers(small, **SMALL | {"seed": 7})
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*")} == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="something else"):
        walkers.make_walkers(tmp_path, **SMALL)
    with pytest.raises(UserError, match="something else"):
        walkers.make_walkers(tmp_path / "notes.txt", **SMALL)
    with pytest.raises(UserError, match="cannot write"):
        walkers.make_walkers(tmp_path / "notes.txt/below", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_filled(tmp_path):
    walkers.make_walkers(tmp_path / "w/deep", **SMALL | {"tracklets": 1, "test_identities": 1})
    (tmp_path / "empty").mkdir()
    walkers.make_walkers(tmp_path / "empty", **SMALL | {"tracklets": 1, "test_identities": 1})
    assert contents(tmp_path / "w/deep") == contents(tmp_path / "empty")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, interruption):
    def stop(folder, split, people):
        assert (folder / "Train/0001").is_dir()      # the pictures are there, the lists are not
        raise interruption
    monkeypatch.setattr(walkers, "write_info", stop)
    with pytest.raises(interruption):
        walkers.make_walkers(tmp_path / "w", **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [dict(frames=11), dict(tracklets=0), dict(test_identities=-1), dict(height=8), dict(cameras=0),
                                   dict(seed=-1), dict(workers=0), dict(train_identities=9999)])
def test_a_wrong_number_is_refused_with_its_value(tmp_path, wrong):
    (name, value), = wrong.items()
    with pytest.raises(UserError, match=rf"{name}={value}; expected \d+"):
        walkers.make_walkers(tmp_path / "w", **SMALL | wrong)
    assert not (tmp_path / "w").exists()


# ------------------------------------------------------------------------------------------------------ the command line

def run(*args, cwd):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, args)], cwd=cwd, capture_output=True, text=True)


def test_the_script_makes_the_same_folder_and_says_so_in_one_line(small, tmp_path):
    args = ("w", "--identities", 2, "--test-identities", 2, "--tracklets", 3, "--frames", 12, "--height", 48, "--cameras", 2)
    done = run(*args, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r".*4 identities, 24 tracklets, 288 frames in .* s, \d+ frames/s\n", done.stdout)
    assert contents(tmp_path / "w") == contents(small)
    again = run(*args, cwd=tmp_path)
    assert again.returncode == 0 and "already" in again.stdout
    assert os.listdir(tmp_path) == ["w"]


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    done = run("w", "--identities", 2, "--frames", 11, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: frames=11; expected 12") and done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("args", [["w", "--identities", "-3"], ["w", "--test-identities", "0"], ["file"]])
def test_other_bad_input_without_a_process_of_its_own(tmp_path, monkeypatch, capsys, args):
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["walkers.py", *args])
    with pytest.raises(SystemExit) as stop:
        cli(walkers.main)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert os.listdir(tmp_path) == ["file"]
