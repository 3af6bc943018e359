"""data.py: both benchmarks read whole and in the same order every time, every fault named, one draw per tracklet.

"Defect n" is the n-th of the list of what existing loaders get wrong: 1 samples dropped, 2 a last batch of one, 3 unreadable
images, 4 augmentation drawn per frame, 5 labels that move, 7 galleries under 20, 8 test tracklets doubled.
"""
import contextlib
import dataclasses
import io
import json
import os
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

import data
from data import Frames, Tracklet, UserError, frame_indices, load_dataset, read_dataset, read_frame
from layouts import FOLDER, bupt_rows, clone, hitsz_rows, pairs, tracks, write_buptcampus, write_hitsz

SCRIPT = Path(data.__file__)
TRAIN = tracks((1, 2, 3, 77)) + [("visible", 1, 5, 14)]
TEST = tracks((21, 22, 23, 24, 25, 26)) + [("visible", 22, 12, 13), ("infrared", 22, 12, 12)]   # (a row "0" would be infrared)
MEAN, STD, FILL = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.4914, 0.4822, 0.4465)


@pytest.fixture(scope="module")
def hitsz(tmp_path_factory):
    return write_hitsz(tmp_path_factory.mktemp("hitsz") / "VCM", train=TRAIN, test=TEST)


@pytest.fixture(scope="module")
def bupt(tmp_path_factory):
    root = tmp_path_factory.mktemp("bupt") / "BUPT"
    write_buptcampus(root, *(pairs(pids, frames=3) for pids in ((1, 2, 3, 4), (11, 12), (21, 22, 23, 24, 25, 26))))
    (root / "outside.jpg").write_bytes(next(root.rglob("*.jpg")).read_bytes())
    return root


def edit(file, change):
    old = file.read_text()
    assert change(old) != old
    file.write_text(change(old))


def refusal(path):
    """-> the one line with which load_dataset refuses `path`."""
    with pytest.raises(UserError) as caught:
        load_dataset(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def printed_by(act):
    """-> exit status, all that was printed."""
    out, code = io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            act()
        except SystemExit as stop:
            code = stop.code or 0
    assert "Traceback" not in out.getvalue()
    return code, out.getvalue()


def check(path, monkeypatch):
    """`python data.py path`, in this process."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(path)])
    return printed_by(lambda: runpy.run_path(str(SCRIPT), run_name="__main__"))


# --------------------------------------------------------------------------------------------------------- datasets

@pytest.mark.parametrize("layout, digits", [("standard", (4, 1, 1, 1)), ("beside", (1, 1, 1, 1)), ("flat", (4, 2, 4, 5))])
def test_hitsz_layouts_and_zero_padding(tmp_path, layout, digits):
    """Names are split at their letters: camera 12, track 2, file 24 and identity 105 are read, padded or not."""
    train, test = tracks((1, 30), each=2, cameras=(12,)), tracks((4, 105), each=10, cameras=(3, 12))
    dataset = load_dataset(write_hitsz(tmp_path, layout, train, test, digits))
    assert (dataset.name, dataset.ignore_same_camera, dataset.test_frames) == ("HITSZ-VCM", True, "chunks")
    assert hitsz_rows(dataset.train) == train and hitsz_rows(dataset.test) == test and dataset.classes == [1, 30]
    for split, tracklets in ("Train", dataset.train), ("Test", dataset.test):
        files = Counter()
        for t in tracklets:
            camera = int(t.camera[1:])
            assert t.camera == f"D{camera}"
            folder = tmp_path / (split if layout == "standard" else "") / f"{t.pid:0{digits[0]}d}" / FOLDER[t.modality]
            for frame in t.frames:
                files[folder] += camera == 12
                files[folder, camera] += 1
                assert Path(frame).samefile(folder / f"D{camera:0{digits[1]}d}" / f"{files[folder, camera]:0{digits[3]}d}.jpg")


def test_hitsz_directions_use_each_tracklet_once(hitsz):
    """Defects 1 and 8: no test row is missing or doubled; the same tracklets serve both directions, roles swapped."""
    dataset = load_dataset(str(hitsz))
    assert hitsz_rows(dataset.test) == TEST and len(set(dataset.test)) == len(TEST)
    infrared, visible = ([i for i, row in enumerate(TEST) if row[0] == m] for m in ("infrared", "visible"))
    directions = {name: tuple(sorted(map(int, part)) for part in parts) for name, parts in dataset.directions.items()}
    assert directions == {"infrared->visible": (infrared, visible), "visible->infrared": (visible, infrared)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset.test[0].pid = 5


def test_short_tracks_go_after_query_IDX_is_applied(tmp_path):
    """11 frames are dropped, 12 kept; dropping before query_IDX is read would move every row after the first."""
    test = [("visible", 21, 9, 11), ("infrared", 21, 9, 5)] + tracks((21, 22, 23, 24, 25)) + [("infrared", 25, 1, 11)]
    train = [("infrared", 1, 1, 11), ("visible", 1, 1, 1)] + tracks((1, 2))
    dataset = load_dataset(write_hitsz(tmp_path, train=train, test=test, one_line=False))
    assert hitsz_rows(dataset.train) == train[2:] and hitsz_rows(dataset.test) == test[2:-1]
    query, gallery = dataset.directions["infrared->visible"]
    assert hitsz_rows(dataset.test[i] for i in query) == [row for row in test[2:-1] if row[0] == "infrared"]
    assert hitsz_rows(dataset.test[i] for i in gallery) == [row for row in test[2:-1] if row[0] == "visible"]


@pytest.mark.parametrize("apart", [False, True])
def test_bupt_tracklets_and_directions(tmp_path, apart):
    """Defects 1 and 8: a query that is in gallery.txt too is one test tracklet, not two; each direction has just its rows."""
    root = write_buptcampus(tmp_path, train=pairs((3, 1), frames=1), test=pairs((21, 22, 23, 24, 25, 26), frames=2), apart=apart)
    dataset = load_dataset(root)
    assert (dataset.name, dataset.ignore_same_camera, dataset.test_frames) == ("BUPTCampus", False, "linspace")
    assert dataset.classes == [1, 3]                         # tracklets of one frame stay, unlike in HITSZ-VCM
    assert bupt_rows(dataset.train) == sorted(f"{pid} {mode} {camera} {tracklet}" for pid, camera, tracklet, _ in pairs((1, 3))
                                              for mode in ("RGB", "IR"))
    query, gallery = ((root / f"{name}.txt").read_text().splitlines() for name in ("query", "gallery"))
    for direction, mine, other in ("infrared->visible", " IR ", " RGB "), ("visible->infrared", " RGB ", " IR "):
        parts = [bupt_rows([dataset.test[i] for i in part]) for part in dataset.directions[direction]]
        assert parts == [sorted(row for row in query if mine in row), sorted(row for row in gallery if other in row)]
    assert bupt_rows(dataset.test) == sorted({*query, *gallery})


def test_bupt_from_its_DATA_folder_with_and_without_the_auxiliary_set(bupt):
    plain, inside, more = load_dataset(bupt), load_dataset(bupt / "DATA"), load_dataset(str(bupt), auxiliary=True)
    assert bupt_rows(plain.train) == bupt_rows(inside.train) and bupt_rows(plain.test) == bupt_rows(inside.test)
    assert all(Path(f).samefile(g) for t, u in zip(plain.test, inside.test) for f, g in zip(t.frames, u.frames))
    assert plain.classes == [1, 2, 3, 4] and more.classes == [1, 2, 3, 4, 11, 12] and len(more.train) == 16 * 2 + 8 * 2


# ----------------------------------------------------------------------------------------------------------- faults

def shorten(rows):
    """Infrared rows of a track_*_info.txt that match `pid camera` become tracks of 11 frames, to be dropped."""
    return lambda text: re.sub(f"(?m)^1 (\\d+) \\d+ ({rows})$", lambda m: f"1 {m[1]} {int(m[1]) + 10} {m[2]}", text)


def replace(old, new):
    return lambda text: text.replace(old, new, 1)


def append(row):
    return lambda text: text.strip() + f"{row}\n"


def in_json(change):
    def edited(text):
        change(paths := json.loads(text))
        return json.dumps(paths)
    return edited


def first_path(path):
    return in_json(lambda paths: paths["1"]["IR"]["LS3"]["1"].__setitem__(0, path))


INFO, NAMES, QUERY, JSON = "info/track_train_info.txt", "info/train_name.txt", "info/query_IDX.txt", "data_paths.json"
FAULTS = {  # dataset and what is wrong: the file, the damage, a word that the message must hold
    "hitsz, row starts at 0": (INFO, replace("1 1 12 1 1", "1 0 12 1 1"), "track_train_info.txt"),
    "hitsz, row ends after the names": (INFO, replace("1 1 12 1 1", "1 1 9999 1 1"), "track_train_info.txt"),
    "hitsz, row ends before it starts": (INFO, replace("1 1 12 1 1", "1 12 1 1 1"), "track_train_info.txt"),
    "hitsz, row of 4 numbers": (INFO, replace("1 1 12 1 1", "1 1 12 1"), "track_train_info.txt"),
    "hitsz, row with a word": (INFO, replace("1 1 12 1 1", "1 1 x 1 1"), "track_train_info.txt"),
    "hitsz, row of modality 3": (INFO, replace("1 1 12 1 1", "3 1 12 1 1"), "track_train_info.txt"),
    "hitsz, test row out of range": ("info/track_test_info.txt", replace("1 1 12", "1 1 9999"), "track_test_info.txt"),
    "hitsz, no frame name": (NAMES, replace("0001M1D1T1F3.jpg", "notes.txt"), "notes.txt"),
    "hitsz, no F in a name": ("info/test_name.txt", replace("0021M1D1T1F3.jpg", "0021M1D1T1.jpg"), "0021M1D1T1.jpg"),
    "hitsz, no such file": (NAMES, replace("0001M1D1T1F3.jpg", "0001M1D1T1F345.jpg"), "345.jpg"),
    "hitsz, query 0": (QUERY, append(" 0"), "query_IDX.txt"),
    "hitsz, query after the last row": (QUERY, append(f" {len(TEST) + 1}"), "query_IDX.txt"),
    "hitsz, visible query": (QUERY, append(" 5"), "query_IDX.txt"),
    "hitsz, query is a word": (QUERY, append(" five"), "query_IDX.txt"),
    "hitsz, identity without infrared": (INFO, lambda s: re.sub(r"(?m)^1 .* 77 \d+\n", "", s), "77"),         # defect 5
    "hitsz, identity without visible": (INFO, lambda s: re.sub(r"(?m)^2 .* 77 \d+\n", "", s), "77"),
    "hitsz, identity with short visible tracks": (INFO, lambda s: re.sub(r"(?m)^2 (\d+) .* (77 .)$", r"2 \1 \1 \2", s), "77"),
    "hitsz, infrared gallery of 19": ("info/track_test_info.txt", shorten("21 [1234]|22 [12]"), "visible->infrared"),   # defect 7
    "bupt, path leaves DATA": (JSON, first_path("../outside.jpg"), "outside.jpg"),
    "bupt, path leaves DATA halfway": (JSON, first_path("1/../../outside.jpg"), "outside.jpg"),
    "bupt, absolute path": (JSON, first_path(str(SCRIPT)), SCRIPT.name),
    "bupt, no such file": (JSON, first_path("1/IR/LS3/345.jpg"), "345.jpg"),
    "bupt, identity absent": (JSON, in_json(lambda paths: paths.pop("21")), "21"),
    "bupt, modality absent": (JSON, in_json(lambda paths: paths["2"].pop("IR")), "train.txt"),
    "bupt, tracklet absent": ("gallery.txt", append("\n21 RGB LS3 77"), "77"),
    "bupt, camera absent": ("query.txt", append("\n21 RGB TSG2 1"), "TSG2"),
    "bupt, row of 3 words": ("train.txt", append("\n1 RGB/IR LS3"), "train.txt"),
    "bupt, no such modality": ("gallery.txt", append("\n21 UV LS3 1"), "gallery.txt"),
    "bupt, tracklet without frames": (JSON, in_json(lambda paths: paths["1"]["IR"]["LS3"]["1"].clear()), "LS3"),
    "bupt, JSON of another shape": (JSON, lambda text: "[]", "data_paths.json"),
    "bupt, invalid JSON": (JSON, lambda text: text[:-9], "data_paths.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_refused_and_printed(request, tmp_path, monkeypatch, fault):
    """load_dataset and `python data.py` name what is at fault, the latter exits 2; image folders are links, as users have."""
    file, damage, word = FAULTS[fault]
    root = clone(request.getfixturevalue(fault.split(",")[0]), tmp_path / "d")
    edit(root / file, damage)
    assert word in refusal(root)
    code, printed = check(root, monkeypatch)
    assert code == 2 and word in printed
    if "invalid JSON" in fault:
        with pytest.raises(UserError, match=word):
            read_dataset(root)
    else:
        assert word in " ".join(read_dataset(root).problems)


def test_gallery_of_20_is_enough(hitsz, tmp_path):
    """The neighbour of "infrared gallery of 19" above; dropped tracks leave no hole in the indices."""
    root = clone(hitsz, tmp_path / "d")
    edit(root / "info/track_test_info.txt", shorten("21 [1234]|22 1"))
    dataset = load_dataset(root)
    assert len(dataset.directions["visible->infrared"][1]) == 20
    assert sorted(sum(map(list, dataset.directions["infrared->visible"]), [])) == list(range(len(dataset.test)))


@pytest.mark.parametrize("name", ["hitsz", "bupt"])
def test_missing_list_is_named(request, tmp_path, name):
    root = clone(request.getfixturevalue(name), tmp_path / "d")
    lists = [file for file in root.rglob("*") if file.suffix in (".txt", ".json")]
    assert len(lists) == 5
    for file in lists:
        content = file.read_text()
        file.unlink()
        with pytest.raises(UserError, match=re.escape(file.name)):
            read_dataset(root, auxiliary=name == "bupt")
        file.write_text(content)


def test_unknown_folder_says_what_was_expected(tmp_path, monkeypatch):
    assert str(tmp_path) in refusal(tmp_path) and "info" in refusal(tmp_path) and "train.txt" in refusal(tmp_path)
    assert str(tmp_path / "nowhere") in refusal(tmp_path / "nowhere")
    assert [check(path, monkeypatch)[0] for path in (tmp_path, tmp_path / "nowhere")] == [2, 2]


@pytest.mark.parametrize("name, pick", [("hitsz", 5), ("bupt", -1)])
def test_missing_and_broken_images_are_named(request, monkeypatch, name, pick):
    """Defect 3: a file that is not there is found by load_dataset, one cut short by `python data.py`, each by its name."""
    root = request.getfixturevalue(name)
    victim = sorted(root.rglob("*/*/*/*.jpg"))[pick]
    content = victim.read_bytes()
    try:
        victim.unlink()
        assert victim.name in refusal(root)
        for cut in content[:-150], content[:10], b"":
            victim.write_bytes(cut)
            load_dataset(root)                               # opening a million images is left to the script
            code, printed = check(root, monkeypatch)
            assert code == 2 and os.path.join(*victim.parts[-4:]) in printed
    finally:
        victim.write_bytes(content)
    assert check(root, monkeypatch)[0] == 0


def test_the_script_counts_and_exits_0(hitsz):
    """`python data.py PATH` itself, from another folder: identities, tracklets, frames, cameras per split and modality."""
    done = subprocess.run([sys.executable, SCRIPT, hitsz], capture_output=True, text=True, cwd=hitsz)
    assert done.returncode == 0 and "HITSZ-VCM" in done.stdout, done.stderr
    table = {tuple(line.split()[:2]): re.findall(r"\d+", line)[:4] for line in done.stdout.lower().splitlines() if line}
    for key, counts in {("train", "visible"): "4 17 206 5", ("train", "infrared"): "4 16 192 4",
                        ("test", "visible"): "6 25 301 5", ("test", "infrared"): "6 25 300 5"}.items():
        assert table[key] == counts.split(), done.stdout


def test_labels_and_batches_do_not_depend_on_hash_seed(hitsz, bupt):
    """Defect 5: classes, order of tracklets, directions and batches are equal in every run."""
    program = ("import sys; from data import *\n"
               "for path in sys.argv[1:]:\n"
               "    d = load_dataset(path)\n"
               "    print(d.classes, d.train, d.test, d.directions, list(IdentitySampler(d.train, P=2, K=2, steps=3, seed=0)))")
    runs = [subprocess.Popen([sys.executable, "-c", program, hitsz, bupt], cwd=SCRIPT.parent, stdout=subprocess.PIPE,
                             env={**os.environ, "PYTHONHASHSEED": seed}) for seed in ("1", "2")]
    one, two = (run.communicate()[0] for run in runs)
    assert one == two and one.startswith(b"[1, 2, 3, 77]") and one.count(b"\n") == 2


# ----------------------------------------------------------------------------------------------------------- frames

@pytest.mark.parametrize("n, T, chunks, linspace", [
    (12, 6, [0, 2, 4, 6, 8, 10], [0, 2, 4, 6, 8, 10]), (13, 6, [0, 3, 6, 9, 12, 12], [0, 2, 4, 6, 8, 10]),
    (100, 6, [0, 17, 34, 51, 68, 85], [0, 16, 33, 50, 66, 83]), (3, 6, [0, 1, 2, 2, 2, 2], [0, 0, 1, 1, 2, 2]),
    (1, 2, [0, 0], [0, 0])])
def test_frame_indices(n, T, chunks, linspace):
    """By hand: first frame of each chunk of ceil(n/T), or linspace; with rng every frame of every chunk is drawn, no other."""
    assert frame_indices(n, T).tolist() == chunks and frame_indices(n, T, rule="linspace").tolist() == linspace
    size, rng = -(-n // T), np.random.default_rng(0)
    drawn = np.stack([frame_indices(n, T, rng) for _ in range(400)])
    for k in range(T):
        assert set(drawn[:, k].tolist()) == {min(i, n - 1) for i in range(k * size, (k + 1) * size)}


@pytest.fixture(scope="module")
def greys(tmp_path_factory):
    """24 plain frames, frame i of grey level 10 i: forward as a visible tracklet, backward as an infrared one."""
    files = tuple(str(tmp_path_factory.getbasetemp() / f"grey{i}.jpg") for i in range(24))
    for i, file in enumerate(files):
        Image.new("L", (20, 40), 10 * i).save(file)
    return [Tracklet(files, 1, "D1", "visible"), Tracklet(files[::-1], 1, "D1", "infrared")]


def numbers(frames):
    return (frames.float().mean((-3, -2, -1)) / 10).round().int().tolist()


def test_frames_of_a_tracklet(greys):
    """frames[i] follows the rule of the benchmark, frames[i, seed] the seed and nothing else."""
    frames = Frames(greys, size=(32, 16), T=5)
    picture, modality, index = frames[1]
    assert len(frames) == 2 and picture.shape == (5, 3, 32, 16) and picture.dtype == torch.uint8
    assert (int(frames[0][1]), int(modality), int(index)) == (0, 1, 1)
    assert numbers(frames[0][0]) == [0, 5, 10, 15, 20] and numbers(picture) == [23, 18, 13, 8, 3]
    assert numbers(Frames(greys, size=(32, 16), T=5, rule="linspace")[0][0]) == [0, 4, 9, 14, 19]
    draws = []
    for seed in [*range(30), *range(30)]:
        np.random.seed(len(draws))
        torch.manual_seed(len(draws))
        draws.append(tuple(numbers(frames[0, seed][0])))
    assert draws[:30] == draws[30:] and len(set(draws)) > 20
    assert all(5 * k <= i <= 5 * k + 4 for draw in draws for k, i in enumerate(draw))


def test_last_batch_of_one(greys):
    """Defects 1 and 2: 9 tracklets in batches of 4 are 9 rows in order, the last batch being of one."""
    batches = list(DataLoader(Frames((greys * 5)[:9], size=(16, 8), T=2), batch_size=4))
    assert [tuple(frames.shape) for frames, _, _ in batches] == [(4, 2, 3, 16, 8), (4, 2, 3, 16, 8), (1, 2, 3, 16, 8)]
    assert torch.cat([index for _, _, index in batches]).tolist() == list(range(9))
    assert torch.cat([modality for _, modality, _ in batches]).tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]


def test_read_frame(tmp_path):
    """Pixels as they are (channel order, height before width), grey files as three channels, resized to (H, W)."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    frame = read_frame(str(tmp_path / "a.png"), (12, 20))
    assert frame.dtype == torch.uint8 and np.array_equal(frame.permute(1, 2, 0).numpy(), pixels)
    assert np.array_equal(read_frame(str(tmp_path / "grey.png"), (12, 20)).numpy(), np.stack([pixels[..., 0]] * 3))
    assert read_frame(str(tmp_path / "a.png"), (32, 16)).shape == (3, 32, 16)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.95, None])
def test_unreadable_image_is_one_line_that_names_it(tmp_path, keep):
    """Defect 3: empty, cut in header or pixels, missing: an error at once, and one line on screen even from a worker."""
    file = tmp_path / "broken_42.jpg"
    if keep is not None:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
        content = file.read_bytes()
        file.write_bytes(content[:int(keep * len(content)) if keep < 1 else keep])
    frames = Frames([Tracklet((str(file),) * 12, 1, "D1", "visible")], size=(32, 16), T=2)
    for attempt in lambda: read_frame(str(file), (32, 16)), lambda: frames[0], lambda: frames[0, 1]:
        with pytest.raises(UserError) as caught:
            attempt()
        assert "broken_42.jpg" in str(caught.value) and "\n" not in str(caught.value)
        worker = ExceptionWrapper((caught.type, caught.value, caught.tb), "in worker 0")       # how a worker hands it on
        code, printed = printed_by(lambda: data.cli(worker.reraise))
        assert code == 2 and "broken_42.jpg" in printed and printed.strip().count("\n") == 0
