"""walkers.py: the same bytes for the same seed, HITSZ-VCM's layout, true masks, and no identity in
colour or brightness."""
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import train
import walkers
from support import pedestrian
from support.clip import VOCABULARY
from support.files import UserError
from support.options import cli

import numpy as np
import pytest
from PIL import Image

SMALL = {"train_identities": 2, "test_identities": 2, "tracklets": 3, "frames": 12, "height": 48,
         "cameras": 2}
# For what happens to folders.
LITTLE = SMALL | {"train_identities": 1, "tracklets": 1}
LITTLE_OPTIONS = ["--identities", 1, "--test-identities", 2, "--tracklets", 1, "--frames", 12,
                  "--height", 48, "--cameras", 2]
SCRIPT = Path(walkers.__file__)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small") / "walkers"
    assert walkers.make_walkers(root, **SMALL)
    return root


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    root = tmp_path_factory.mktemp("little") / "walkers"
    assert walkers.make_walkers(root, **LITTLE)
    return root


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """32 test identities, 4 tracklets per modality: enough to tell a leak from luck."""
    root = tmp_path_factory.mktemp("crowd") / "walkers"
    walkers.make_walkers(root, train_identities=1, test_identities=32, frames=12, height=64)
    return root


def contents(root):
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def read_split(root, split):
    """-> [(modality, pid, camera, paths of the frames)] of a split, by the letters of the names."""
    names = (root / f"info/{split}_name.txt").read_text().split()
    out = []
    for line in (root / f"info/track_{split}_info.txt").read_text().splitlines():
        number, start, end, pid, camera = map(int, line.split())
        modality, folder = {1: ("infrared", "ir"), 2: ("visible", "rgb")}[number]
        frames = []
        for name in names[start - 1:end]:
            letters = re.fullmatch(r"(\d{4})M([12])D(\d+)T(\d+)F(\d+)\.jpg", name)
            assert [int(letters[i]) for i in (1, 2, 3)] == [pid, number, camera]
            place = root / split.capitalize() / letters[1] / folder / f"D{camera}"
            frames.append(place / f"{letters[5]}.jpg")
        out.append((modality, pid, camera, frames))
    return out


def mask_of(root, frame):
    return (root / "masks" / frame.relative_to(root)).with_suffix(".png")


# ----------------------------------------------------------- determinism ----

def test_same_seed_same_bytes_whatever_the_workers(small, tmp_path):
    walkers.make_walkers(tmp_path / "one", **SMALL, workers=1)
    walkers.make_walkers(tmp_path / "two", **SMALL, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(small)


def test_another_seed_draws_other_people(small, tmp_path):
    walkers.make_walkers(tmp_path / "w", **SMALL, seed=1)
    ours, other = contents(small), contents(tmp_path / "w")
    shared = [name for name in ours if name.endswith(".jpg") and name in other]
    assert shared and all(ours[name] != other[name] for name in shared)


# ------------------------------------------------------------ the layout ----

def test_names_and_rows_are_consecutive_and_every_frame_exists(small):
    everything = set()
    for split, pids in ("train", {1, 2}), ("test", {3, 4}):
        names = (small / f"info/{split}_name.txt").read_text().splitlines()
        info = (small / f"info/track_{split}_info.txt").read_text()
        rows = [line.split() for line in info.splitlines()]
        assert len(set(names)) == len(names) == 2 * 2 * 3 * 12
        assert [int(row[1]) for row in rows] == list(range(1, len(names), 12))
        assert [int(row[2]) for row in rows] == list(range(12, len(names) + 1, 12))
        assert {int(row[3]) for row in rows} == pids
        frames = [path for *_, paths in read_split(small, split) for path in paths]
        # Three tracklets in two cameras: numbers must not collide.
        assert len(set(frames)) == len(frames)
        everything |= {path.relative_to(small).as_posix() for path in frames}
    on_disk = {name for name in contents(small) if name.endswith(".jpg")}
    assert on_disk == everything
    masks = {name for name in contents(small) if name.endswith(".png")}
    assert masks == {f"masks/{name[:-4]}.png" for name in on_disk}


def test_the_queries_are_one_line_and_all_the_infrared_rows(small):
    lines = (small / "info/query_IDX.txt").read_text().splitlines()
    rows = (small / "info/track_test_info.txt").read_text().splitlines()
    infrared = [i for i, row in enumerate(rows, 1) if row.split()[0] == "1"]
    assert len(lines) == 1
    assert [int(x) for x in lines[0].split()] == infrared


def test_tracklets_spread_over_the_cameras(small, crowd):
    for root, per_camera in (small, {1, 2}), (crowd, {1}):
        rows = [(modality, pid, camera) for modality, pid, camera, _ in read_split(root, "test")]
        assert {rows.count(row) for row in rows} == per_camera
    for modality in "infrared", "visible":
        assert {camera for m, _, camera in rows if m == modality} == set(range(1, 7))
    places = {}
    for modality, pid, camera in rows:
        places.setdefault((modality, pid), set()).add(camera)
    # Drawn independently
    assert any(places["infrared", pid] != places["visible", pid] for _, pid in places)


def test_the_parameters_are_written(small):
    text = (small / "walkers.json").read_text()
    made = json.loads(text)
    assert {**made, **SMALL, "seed": 0} == made and list(made) == sorted(made)


# ---------------------------------------------------------- the pictures ----

def test_masks_agree_with_the_frames(crowd):
    sizes, margins = {}, {"infrared": [], "visible": []}
    for modality, _, camera, frames in read_split(crowd, "test"):
        for path in frames:
            frame, mask = Image.open(path), Image.open(mask_of(crowd, path))
            assert frame.mode == ("L" if modality == "infrared" else "RGB")
            assert (mask.mode, mask.size) == ("L", frame.size)
            sizes.setdefault(camera, set()).add(frame.size)
            grey, mask = np.asarray(frame.convert("L"), float) / 255, np.asarray(mask)
            assert set(np.unique(mask)) == {0, 255}
            inside = mask > 0
            assert 0.06 < inside.mean() < 0.6, path
            margins[modality].append(grey[inside].mean() - grey[~inside].mean())
            # On the mask's edge the picture changes more than elsewhere in the background.
            edge = inside ^ (np.roll(inside, 1, 1) & inside & np.roll(inside, -1, 1))
            changes = np.abs(np.diff(grey, axis=1, prepend=grey[:, :1]))
            assert changes[edge].mean() > 1.5 * changes[~inside].mean(), path
    # Neither dark nor bright means a person, by day or by night.
    for differences in margins.values():
        darker = np.mean(np.array(differences) < 0)
        assert 0.1 < darker < 0.9, darker
    # The size belongs to the camera.
    assert all(len(s) == 1 for s in sizes.values())
    assert all(w * 2 == h and 56 <= h <= 72 for s in sizes.values() for w, h in s)


def test_people_stand_in_the_middle(crowd):
    """Of all frames, a hundredth at most has anything in the top or bottom 2 % of its rows."""
    close = []
    for *_, frames in read_split(crowd, "test"):
        for path in frames:
            mask = np.asarray(Image.open(mask_of(crowd, path)))
            rows = np.flatnonzero(mask.any(axis=1))
            h = len(mask)
            assert h == Image.open(path).height
            close.append(rows[0] < int(0.02 * h) or rows[-1] >= h - int(0.02 * h))
            assert 0.7 < (rows[-1] - rows[0] + 1) / h <= 1, path
    assert np.mean(close) < 0.01


def rank1(features, query_modality):
    """features: [(modality, pid, camera, vector)] -> Rank-1 of the nearest neighbour, and that
    expected of a random ranking."""
    hits, chance = [], []
    for modality, pid, camera, vector in features:
        if modality != query_modality:
            continue
        gallery = [(np.linalg.norm(v - vector), p) for m, p, c, v in features
                   if m != modality and (p, c) != (pid, camera)]
        right = sum(p == pid for _, p in gallery)
        if right:
            _, nearest = min(gallery)
            hits.append(nearest == pid)
            chance.append(right / len(gallery))
    return np.mean(hits), np.mean(chance)


def descriptors(root, describe):
    out = []
    for modality, pid, camera, frames in read_split(root, "test"):
        vectors = [describe(Image.open(path).convert("RGB")) for path in frames]
        out.append((modality, pid, camera, np.mean(vectors, axis=0)))
    return out


def mean_colour(image):
    return np.asarray(image, float).mean(axis=(0, 1))


def pixels(image):
    return np.asarray(image.resize((8, 16), Image.BOX), float)


def grey_standardised(image):
    x = pixels(image.convert("L"))
    return (x - x.mean()) / x.std()


@pytest.mark.parametrize(("describe", "times"), [
    (mean_colour, 3), (pixels, 6), (grey_standardised, 6)])    # a small picture has some shape
def test_colour_and_brightness_do_not_tell_who_it_is(crowd, describe, times):
    features = descriptors(crowd, describe)
    for query_modality in "infrared", "visible":
        found, chance = rank1(features, query_modality)
        assert found < times * chance, f"Rank-1 {found:.3f}, chance {chance:.3f}"


# ------------------------------------------------------------ the uniform ----

def clothes_of(walker):
    """Numbers of what a walker wears; a garment's cut and pattern by one number for each kind."""
    kinds = (walker.top, pedestrian.UPPERS), (walker.bottom, pedestrian.LOWERS), (
        walker.bag, pedestrian.BAGS), (walker.hair, pedestrian.HAIRS)
    one_hot = [float(word == kind) for word, all_of_them in kinds for kind in all_of_them]
    garments = [[10 * (g.pattern == pattern) for pattern in pedestrian.PATTERNS]
                + [g.period, g.duty, g.level] for g in (walker.upper, walker.lower)]
    return np.array([*one_hot, *sum(garments, [])], float)


def test_those_in_uniform_differ_in_body_and_gait_alone():
    people = [walkers.make_walker(0, pid, uniform=True) for pid in range(1, 41)]
    clothes = np.array([clothes_of(walker) for walker in people])
    assert (clothes == clothes[0]).all()    # a nearest neighbour in clothes is at chance
    free = np.array([clothes_of(walkers.make_walker(0, pid)) for pid in range(1, 41)])
    assert len(np.unique(free, axis=0)) == 40
    for body in "stature", "girth", "step", "pace", "lean":
        own = [getattr(walkers.make_walker(0, pid), body) for pid in range(1, 41)]
        assert [getattr(walker, body) for walker in people] == own and len(set(own)) == 40


@pytest.mark.parametrize("share", [0, 0.25, 0.5, 1])
def test_the_share_in_uniform_is_exact_and_spread(share):
    wear = [walkers.wears_uniform(number, share) for number in range(40)]
    assert sum(wear) == 40 * share == 2 * sum(wear[:20])


def test_uniforms_are_drawn_alike(tmp_path):
    """One paint for all of them in a modality; the others keep their own."""
    options = {"train_identities": 1, "test_identities": 2, "tracklets": 1, "frames": 12,
               "height": 48, "cameras": 1}
    walkers.make_walkers(tmp_path / "own", **options)
    walkers.make_walkers(tmp_path / "half", uniform=0.5, **options)
    own, half = contents(tmp_path / "own"), contents(tmp_path / "half")
    changed = {name.split("/")[-4] for name in own
               if name.endswith(".jpg") and own[name] != half[name]}
    assert changed == {"0003"}    # the second of the two test identities; of one, half is none
    assert json.loads(half["walkers.json"])["uniform"] == 0.5


@pytest.mark.parametrize("modality", ["rgb", "ir"])
def test_people_in_uniform_wear_the_same_paint(tmp_path, modality):
    """The same colours, where the camera and its light are the same: the greatest distance of a
    body's mean colours, of people in uniform and of others."""
    options = {"train_identities": 1, "test_identities": 8, "tracklets": 1, "frames": 12,
               "height": 64, "cameras": 1}
    spreads = []
    for share in (0, 1):
        root = tmp_path / str(share)
        walkers.make_walkers(root, uniform=share, **options)
        colours = []
        for mask_file in sorted((root / "masks" / "Test").glob(f"*/{modality}/*/*.png"))[::12]:
            image = root / mask_file.relative_to(root / "masks").with_suffix(".jpg")
            mask = np.asarray(Image.open(mask_file)) > 127
            colours.append(np.asarray(Image.open(image).convert("RGB"))[mask].mean(0))
        assert len(colours) == 8
        spreads.append(np.std(colours, axis=0).max())
    assert spreads[1] < spreads[0] / 2


# ------------------------------------------------------------ the folder ----

def test_an_existing_folder_is_kept_or_refused_never_overwritten(small, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*")}
    assert not walkers.make_walkers(small, **SMALL)
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
    walkers.make_walkers(tmp_path / "w/deep", **LITTLE)
    (tmp_path / "empty").mkdir()
    walkers.make_walkers(tmp_path / "empty", **LITTLE)
    assert contents(tmp_path / "w/deep") == contents(tmp_path / "empty")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, interruption):
    def stop(folder, split, rows):
        # The pictures are there, the lists are not.
        assert (folder / "Train/0001").is_dir()
        raise interruption

    monkeypatch.setattr(walkers, "write_info", stop)
    with pytest.raises(interruption):
        walkers.make_walkers(tmp_path / "w", **LITTLE)
    assert list(tmp_path.iterdir()) == []


# When all pictures are drawn and nothing is in its place yet
KILLS_ITSELF = """
import signal, walkers
from support.options import cli

walkers.write_info = lambda *_: signal.raise_signal(signal.{name})
cli(walkers.main)
"""


@pytest.mark.skipif(os.name == "nt", reason="no such signals there")
@pytest.mark.parametrize("name, code", [("SIGTERM", 130), ("SIGKILL", -9)])
def test_a_killed_run_leaves_what_it_was_making_or_nothing(little, tmp_path, name, code):
    words = KILLS_ITSELF.format(name=name)
    done = run(["-c", words, "w", *LITTLE_OPTIONS], tmp_path, PYTHONPATH=SCRIPT.parent)
    assert done.returncode == code
    left = os.listdir(tmp_path)
    if name == "SIGTERM":
        assert left == []
    else:
        assert len(left) == 1 and re.fullmatch(r"\.w\.making-\d+", left[0])
    assert walkers.make_walkers(tmp_path / "w", **LITTLE)
    assert contents(tmp_path / "w") == contents(little)


def test_a_leftover_with_our_number_is_in_nobody_s_way(little, tmp_path):
    leftover = tmp_path / f".w.making-{os.getpid()}" / "info"
    leftover.mkdir(parents=True)
    (leftover / "stale.txt").write_text("stale")
    assert walkers.make_walkers(tmp_path / "w", **LITTLE)
    assert contents(tmp_path / "w") == contents(little)
    assert os.listdir(tmp_path) == ["w"]


def arrive_during_drawing(monkeypatch, arrive):
    """Calls arrive() once, when all pictures are drawn and nothing is in its place yet."""
    write_info = walkers.write_info

    def write(folder, split, rows):
        if split == "train":
            arrive()
        write_info(folder, split, rows)

    monkeypatch.setattr(walkers, "write_info", write)


@pytest.mark.parametrize("empty_before", [False, True])
def test_two_that_draw_the_same_at_once_both_go_on(little, tmp_path, monkeypatch, empty_before):
    if empty_before:
        (tmp_path / "w").mkdir()
    said = []

    def another_process():
        done = script("w", *LITTLE_OPTIONS, cwd=tmp_path)
        said.append((done.returncode, done.stdout))

    arrive_during_drawing(monkeypatch, another_process)
    assert not walkers.make_walkers(tmp_path / "w", **LITTLE)
    (code, line), = said
    assert code == 0 and "72 frames" in line
    assert contents(tmp_path / "w") == contents(little)
    assert os.listdir(tmp_path) == ["w"]


@pytest.mark.parametrize("what, words", [("other walkers", "seed=1.*seed=0"),
                                         ("other files", "something else")])
def test_what_has_come_during_the_drawing_is_not_overwritten(little, tmp_path, monkeypatch, what,
                                                             words):
    def arrive():
        if what == "other walkers":
            shutil.copytree(little, tmp_path / "w")
            made = json.loads((little / "walkers.json").read_text())
            (tmp_path / "w" / "walkers.json").write_text(json.dumps(made | {"seed": 1}))
        else:
            (tmp_path / "w").mkdir()
            (tmp_path / "w" / "notes.txt").write_text("mine")
        before.update(contents(tmp_path / "w"))

    before = {}
    arrive_during_drawing(monkeypatch, arrive)
    with pytest.raises(UserError, match=words):
        walkers.make_walkers(tmp_path / "w", **LITTLE)
    assert before and contents(tmp_path / "w") == before
    assert os.listdir(tmp_path) == ["w"]


@pytest.mark.parametrize("wrong", [
    {"frames": 11}, {"tracklets": 0}, {"test_identities": -1}, {"height": 8}, {"cameras": 0},
    {"seed": -1}, {"workers": 0}, {"train_identities": 9999}])
def test_a_wrong_number_is_refused_with_its_value(tmp_path, wrong):
    (name, value), = wrong.items()
    option, *_ = walkers.OPTIONS[name]
    with pytest.raises(UserError, match=rf"{option} {value}; expected \d+"):
        walkers.make_walkers(tmp_path / "w", **LITTLE | wrong)
    assert not (tmp_path / "w").exists()


# ------------------------------------------------------ the command line ----

def run(args, cwd, **env):
    env = {**os.environ, **{name: str(value) for name, value in env.items()}}
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=env, capture_output=True,
                          text=True)


def script(*args, cwd, **env):
    return run([SCRIPT, *args], cwd, **env)


def says_so_in_one_line(done):
    """On standard error there may be lines of a bar, where the machine is slow, but nothing that is
    for a terminal."""
    assert done.returncode == 0, done.stderr
    one_line = r"w: 3 identities, 6 tracklets, 72 frames in .* s, \d+ frames/s\n"
    assert re.fullmatch(one_line, done.stdout)
    assert re.fullmatch(r"(walkers \d/3 .*\n)*", done.stderr) and "\r" not in done.stderr


def test_the_script_makes_the_same_folder_and_says_so_in_one_line(little, tmp_path):
    done = script("w", *LITTLE_OPTIONS, cwd=tmp_path)
    says_so_in_one_line(done)
    assert contents(tmp_path / "w") == contents(little)
    again = script("w", *LITTLE_OPTIONS, cwd=tmp_path)
    assert again.returncode == 0 and again.stdout == "w: these walkers are there already\n"
    assert os.listdir(tmp_path) == ["w"]


# Python runs it first, in every process.
SITECUSTOMIZE = """
import multiprocessing, pathlib

multiprocessing.set_start_method({method!r})
pathlib.Path(__file__).with_name("was-run").touch()
"""


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_processes_may_be_started_in_any_way(little, tmp_path, method):
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITECUSTOMIZE.format(method=method))
    done = script("w", *LITTLE_OPTIONS, "--workers", 2, cwd=tmp_path, PYTHONPATH=site)
    assert (site / "was-run").exists()
    says_so_in_one_line(done)
    assert contents(tmp_path / "w") == contents(little)


def test_torch_is_not_imported(tmp_path):
    """Or every process of the pool would start for seconds."""
    words = "import sys, walkers; sys.exit('torch' in sys.modules)"
    assert run(["-c", words], tmp_path, PYTHONPATH=SCRIPT.parent).returncode == 0


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    done = script("w", "--identities", 2, "--frames", 11, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --frames 11; expected 12")
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("args, words", [
    (["w", "--identities", "-3"], "--identities -3; expected"),
    (["w", "--test-identities", "0"], "--test-identities 0; expected"),
    (["w", "--hieght", "64"], "did you mean --height?"), (["w", "--height", "tall"], "--height"),
    ([], "DIR"), (["file"], "something else")])
def test_other_bad_input_without_a_process_of_its_own(tmp_path, monkeypatch, capsys, args, words):
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["walkers.py", *args])
    with pytest.raises(SystemExit) as stop:
        cli(walkers.main)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert os.listdir(tmp_path) == ["file"]


def test_everyone_comes_with_a_sentence_in_words_that_the_tiny_clip_knows(small):
    def sentence_of(seed, pid, uniform=False):
        return pedestrian.describe(walkers.make_walker(seed, pid, uniform))

    sentences = json.loads((small / "sentences.json").read_text())
    assert sentences == {str(pid): sentence_of(0, pid) for pid in range(1, 5)}
    spoken = {word for pid in range(1, 400) for word in sentence_of(5, pid).split()}
    assert spoken == set(VOCABULARY[3:])    # all but "X", "<start>" and "<end>"
    for pid in range(1, 50):
        dressed = sentence_of(5, pid, uniform=True)
        assert "person in a banded jacket and plain trousers with a cap ." in dressed


@pytest.mark.parametrize("people, folder", [(96, "walkers"), (320, "walkers-320")])
def test_training_without_data_draws_as_many_as_people_says(people, folder, small, tmp_path,
                                                            monkeypatch):
    drawn = []

    def draw(root, **how):
        drawn.append((root, how))
        shutil.copytree(small, root)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(walkers, "make_walkers", draw)
    config = train.Config(people=people)
    assert len(train.training_data(config).train) == 12
    assert drawn == [(os.path.join("runs", folder), {"train_identities": people})]
    assert config.data == (os.path.join("runs", folder),) and config.trained_on[0] == "walkers"
