"""data.py: datasets read from disk, what is wrong with one, frames in batches.

"Defect n" is one that existing loaders have: 1 samples dropped, 2 a last batch of one, 3 unreadable
images, 5 labels that move, 8 test tracklets doubled."""
import os
import re
import sys
from pathlib import Path

from data import DIRECTIONS, Frames, Tracklet, load_dataset
from layouts import bupt_rows, hitsz_rows, own, tracks, write_bupt, write_hitsz, write_own
from scripts import run, succeeds
from support.check import main_of
from support.files import UserError
from support.options import cli

import pytest
import torch
from PIL import Image
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader


@pytest.fixture
def look(monkeypatch, capsys):
    """`python data.py WORDS` in this process: -> its exit code and what it prints."""
    def looked(*words):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, words)])
        return main_of(load_dataset, None), capsys.readouterr().out
    return looked


def sides(dataset, direction):
    """The pids of a direction's queries and of its gallery."""
    return tuple([dataset.test[i].pid for i in side] for side in dataset.directions[direction])


# ------------------------------------------------------------- benchmarks ----

@pytest.mark.parametrize("layout, digits", [
    ("standard", (4, 1, 1, 1)), ("doubled", (4, 1, 1, 1)), ("beside", (1, 1, 1, 1)),
    ("flat", (4, 2, 4, 5))])
def test_hitsz_layouts(layout, digits, tmp_path):
    """Names are split at their letters: identity 105, camera 12 and file 24 are read, padded or
    not. Defects 1 and 8: each file is in one track, in order; both directions use all tracks."""
    train, test = tracks((1, 30), each=1, cameras=(12,)), tracks((4, 105), each=2, cameras=(3, 12))
    dataset = load_dataset(write_hitsz(tmp_path, layout, train, test, digits))
    assert (dataset.name, dataset.frame_rule) == ("HITSZ-VCM", "chunks")
    assert dataset.ignore_same_camera and dataset.classes == [1, 30]
    assert hitsz_rows(dataset.train) == train and sorted(hitsz_rows(dataset.test)) == sorted(test)
    used = [frame for t in dataset.train + dataset.test for frame in t.frames]
    assert sorted(used) == sorted(map(str, tmp_path.rglob("*.jpg")))
    for t in dataset.train + dataset.test:
        pid, modality, camera, _ = Path(t.frames[0]).parts[-4:]
        assert (int(pid), int(camera[1:])) == (t.pid, int(t.camera[1:]))
        assert modality == {"infrared": "ir", "visible": "rgb"}[t.modality]
        numbers = [int(Path(frame).stem) for frame in t.frames]
        assert numbers == list(range(numbers[0], numbers[0] + 12))
    infrared, visible = ([i for i, t in enumerate(dataset.test) if t.modality == modality]
                         for modality in ("infrared", "visible"))
    assert dataset.directions[DIRECTIONS[0]] == (infrared, visible)
    assert dataset.directions[DIRECTIONS[1]] == (visible, infrared)


def test_short_tracks_go_after_query_IDX_is_applied(tmp_path):
    """11 frames are dropped, 12 kept. Dropped before, they would move the rows after them."""
    kept = tracks((21, 22), each=2)
    test = [("visible", 21, 9, 11), ("infrared", 21, 9, 5), *kept, ("infrared", 22, 1, 11)]
    train = [("infrared", 1, 1, 11), ("visible", 1, 1, 1), *tracks((1, 2), each=1)]
    dataset = load_dataset(write_hitsz(tmp_path, train=train, test=test))
    assert hitsz_rows(dataset.train) == train[2:]
    query, gallery = dataset.directions[DIRECTIONS[0]]
    for part, modality in (query, "infrared"), (gallery, "visible"):
        assert hitsz_rows(dataset.test[i] for i in part) == [t for t in kept if t[0] == modality]


def test_lists_of_floats_and_a_query_on_each_line(tmp_path):
    before = load_dataset(write_hitsz(tmp_path))
    for name in "track_train_info.txt", "track_test_info.txt", "query_IDX.txt":
        path = tmp_path / "info" / name
        path.write_text(re.sub(r"(\d+)", r"\1.0", path.read_text()))
    path.write_text(path.read_text().replace(" ", "\n"))
    assert load_dataset(tmp_path) == before


def test_bupt_tracklets_and_directions(tmp_path):
    """Defects 1 and 8: a query that is in gallery.txt too is one test tracklet."""
    dataset = load_dataset(write_bupt(tmp_path))
    assert (dataset.name, dataset.frame_rule) == ("BUPTCampus", "linspace")
    assert not dataset.ignore_same_camera and dataset.classes == [1, 2]
    train, query, gallery = ((tmp_path / f"{name}.txt").read_text().splitlines()
                             for name in ("train", "query", "gallery"))
    aligned = [row.replace("RGB/IR", mode) for row in train for mode in ("RGB", "IR")]
    assert bupt_rows(dataset.train) == sorted(aligned)
    assert bupt_rows(dataset.test) == sorted({*query, *gallery})
    for t in dataset.train + dataset.test:
        mode = {"infrared": "IR", "visible": "RGB"}[t.modality]
        assert bupt_rows([t]) == [f"{t.pid} {mode} {t.camera} 1"]
    for direction, asked, other in (DIRECTIONS[0], "IR", "RGB"), (DIRECTIONS[1], "RGB", "IR"):
        queries, answers = (bupt_rows(dataset.test[i] for i in part)
                            for part in dataset.directions[direction])
        assert queries == sorted(row for row in query if f" {asked} " in row)
        assert answers == sorted(row for row in gallery if f" {other} " in row)


def test_bupt_auxiliary_set_and_DATA(tmp_path, look):
    plain = load_dataset(write_bupt(tmp_path))
    more, inside = load_dataset(tmp_path, auxiliary=True), load_dataset(tmp_path / "DATA")
    assert more.classes == [1, 2, 11] and len(more.train) == len(plain.train) + 4
    assert inside.train == plain.train and inside.test == more.test == plain.test
    (tmp_path / "train_auxiliary.txt").rename(tmp_path / "train_aux.txt")
    assert load_dataset(tmp_path, auxiliary=True) == more
    code, printed = look(tmp_path, "--auxiliary", "on")
    assert code == 0 and re.search("train +infrared +3 +6 +18 ", printed)


# ------------------------------------------- your own folders and readers ----

def test_your_own_folders(tmp_path):
    """With cameras and without, frames in natural order, an animated file."""
    places = own("train", ("0001", "30"), camera="door 2/", frames=11) | {
        "train/0001/ir/walk9": 1, "query/7/RGB/D1/a": 1, "query/7/IR/D2/b": 1, "query/9/IR/D2/b": 1,
        "gallery/7/visible/c": 2, "gallery/7/infrared/D1/a": 1}
    root = write_own(tmp_path / "shop", places)
    night = [Image.new("RGB", (16, 32), colour) for colour in ("red", "blue")]
    night[0].save(root / "gallery/7/visible/night.gif", save_all=True, append_images=night[1:])
    dataset = load_dataset(root)
    assert dataset.name == "shop" and dataset.classes == ["0001", "30"]
    last, *train = sorted(dataset.train, key=lambda t: len(t.frames))
    assert (last.pid, last.modality, last.camera) == ("0001", "infrared", None)
    both = [(pid, modality, "door 2")
            for pid in ("0001", "30") for modality in ("infrared", "visible")]
    assert sorted((t.pid, t.modality, t.camera) for t in train) == sorted(both * 2)
    assert [Path(frame).name for frame in train[0].frames] == [f"{n}.jpg" for n in range(1, 12)]
    assert sides(dataset, DIRECTIONS[0]) == (["7", "9"], ["7", "7"])
    assert sides(dataset, DIRECTIONS[1]) == (["7"], ["7"])
    [gif] = [t for t in dataset.test if t.frames[0].endswith("night.gif#0")]
    assert (gif.modality, gif.camera, len(gif.frames)) == ("visible", None, 2)


def test_your_own_queries_of_one_modality_have_the_roles_swapped(tmp_path):
    places = own("query", ("ann", "bob"), modalities=("ir",), each=1) | own("gallery", ["ann"])
    dataset = load_dataset(write_own(tmp_path, places))
    assert sides(dataset, DIRECTIONS[0]) == (["ann", "bob"], ["ann", "ann"])
    assert sides(dataset, DIRECTIONS[1]) == (["ann", "ann"], ["ann", "bob"])


@pytest.mark.parametrize("place", ["train/1/thermal/walk1", "train/1/visible", "train/1",
                                   "train/1/visible/D1/walk1/again"])
def test_your_own_frames_in_another_place_are_named(place, tmp_path):
    root = write_own(tmp_path, own("train", (2, 3)))
    (root / place).mkdir(parents=True)
    Image.new("L", (16, 32)).save(root / place / "1.jpg")
    with pytest.raises(UserError, match=f"{place} holds frames.*PID/MODALITY/TRACK"):
        load_dataset(root)


READER = '''
from pathlib import Path
from data import Dataset, Tracklet

def read(path):
    found = []
    for file in sorted(Path(path).glob("*/*.jpg")):
        pid, letter, camera = file.name[:4], file.name[4], file.name[5:7]
        modality = {"R": "visible", "I": "infrared"}[letter]
        found.append(Tracklet((str(file),), int(pid), camera, modality))
    dataset = Dataset("mine", path, [t for t in found if t.pid < 5], ignore_same_camera=True)
    test = [t for t in found if t.pid > 5]
    dataset.set_test(query=test, gallery=test)
    return dataset
'''


def test_a_reader_of_your_own(tmp_path, look):
    """Frames named as in MARS. Its dataset meets the same checks as every other."""
    for pid in 1, 2, 7, 8:
        (tmp_path / str(pid)).mkdir()
        for name in "RC1T0001F001", "IC2T0001F001":
            Image.new("L", (8, 16), 9 * pid).save(tmp_path / str(pid) / f"{pid:04}{name}.jpg")
    (tmp_path / "mars_reader.py").write_text(READER)
    reader = f"{tmp_path}/mars_reader.py:read"
    dataset = load_dataset(tmp_path, reader)
    assert dataset.name == "mine" and dataset.classes == [1, 2]
    assert sides(dataset, DIRECTIONS[0]) == ([7, 8], [7, 8])
    assert look(tmp_path, "--reader", reader)[0] == 0
    (tmp_path / "1/0001IC2T0001F001.jpg").unlink()
    with pytest.raises(UserError, match="1 has only .*visible"):
        load_dataset(tmp_path, reader)
    code, printed = look(tmp_path, "--reader", reader)
    assert code == 2 and "problem: training identity 1 has only" in printed


# ---------------------------------------------------------- what is wrong ----

FEW = [tracks(pids, each=2, frames=2) for pids in ((1, 2), (21, 22))]
INFO = "info/track_train_info.txt"
FAULTS = [    # a list, its text, what is there instead, what the error names
    (INFO, "1 1 2 1 1", "1 0 2 1 1", "line 1"), (INFO, "1 1 2 1 1", "1 1 999 1 1", "line 1"),
    (INFO, "1 3 4 1 2", "1 4 3 1 2", "line 2"), (INFO, "1 3 4 1 2", "1 3 x 1", "line 2"),
    (INFO, "1 1 2 1 1", "3 1 2 1 1", "line 1"),
    ("info/train_name.txt", "0001M1D2T2F3.jpg", "notes.txt", "line 3"),
    ("info/query_IDX.txt", "1 2", "1 0", "line 1"), ("info/query_IDX.txt", "1 2", "1 3", "line 1"),
    ("info/query_IDX.txt", "1 2", "1 two", "line 1"), ("info/query_IDX.txt", "6", "9", "line 1"),
    ("train.txt", "1 RGB/IR G25 1", "1 RGB/IR G25", "line 2"),
    ("query.txt", "21 RGB LS3 1", "21 RGB LS3 7", "line 1"),
    ("gallery.txt", "21 RGB LS3 1", "21 UV LS3 1", "line 1"), ("data_paths.json", "{", "[", "JSON")]


@pytest.mark.parametrize("file, old, new, words", FAULTS)
def test_a_wrong_line_is_named(file, old, new, words, tmp_path):
    root = write_hitsz(tmp_path, "standard", *FEW) if "info" in file else write_bupt(tmp_path)
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=f"{file}.*{words}"):
        load_dataset(root)


def test_a_missing_list_is_named(tmp_path):
    for root in write_hitsz(tmp_path / "VCM"), write_bupt(tmp_path / "BUPT"):
        for file in [*root.rglob("*.txt"), *root.rglob("*.json")]:
            content = file.read_text()
            file.unlink()
            with pytest.raises(UserError, match=f"{file.name}|no dataset in {root}"):
                load_dataset(root, auxiliary=True)
            file.write_text(content)


@pytest.mark.parametrize("rows, words", [
    ({"train": tracks((1, 2), each=1) + [("visible", 77, 1, 12)]}, "77 has only .*visible"),
    ({"train": tracks((1, 2), each=1) + [("infrared", 77, 1, 12)]}, "77 has only .*infrared"),
    ({"train": tracks((1,), each=1)}, "1 training identity"),
    # All from one camera, which is ignored:
    ({"test": tracks((21, 22), each=1, cameras=(3,))}, "not one query has")])
def test_a_dataset_that_cannot_be_used_is_refused(rows, words, tmp_path):
    """Defect 5 among them: an identity of one modality would move the labels."""
    with pytest.raises(UserError, match=words):
        load_dataset(write_hitsz(tmp_path, **rows))


def test_what_is_missing_or_torn_is_listed(tmp_path, look):
    """Defect 3. At most 20 lines of a kind; all are counted."""
    hitsz = write_hitsz(tmp_path)
    first, *files = sorted((hitsz / "Test").rglob("*.jpg"))
    content = first.read_bytes()
    for torn in content[:-150], content[:10], b"":
        first.write_bytes(torn)
        code, printed = look(hitsz)
        assert code == 2 and f"problem: {first} cannot be read" in printed
    for file in files[:25]:
        file.unlink()
    with pytest.raises(UserError, match=f"no file {files[0].parent}"):
        load_dataset(hitsz)
    code, printed = look(hitsz)
    assert code == 2 and printed.count("problem: no file") == 20
    assert "5 more of this kind" in printed and printed.endswith("\n26 problems\n")


def test_an_unpacked_archive_has_a_folder_of_its_own(tmp_path):
    write_hitsz(tmp_path / "VCM")
    (tmp_path / "__MACOSX").mkdir()
    assert load_dataset(tmp_path).classes == [1, 2]
    for path in tmp_path / "__MACOSX", tmp_path / "nowhere":
        with pytest.raises(UserError, match=f"no dataset in {path}.*HITSZ-VCM"):
            load_dataset(path)


ORDERS = """
import sys
from data import IdentitySampler, load_dataset
for path in sys.argv[1:]:
    d = load_dataset(path)
    print(d.classes, d.train, d.test, d.directions)
    print(list(IdentitySampler(d.train, P=2, K=2, steps=3, seed=0)))
"""
SCRIPT = "\nimport runpy\nsys.argv[2:] = []\nrunpy.run_path('data.py', run_name='__main__')\n"


def test_another_process_with_another_hash_seed(tmp_path, monkeypatch, capsys):
    """Defect 5: labels and batches are the same. And the script: it counts, and ends with 0."""
    shop = write_own(tmp_path / "shop", own("train", "abcdefgh"))
    paths = [str(write_hitsz(tmp_path / "VCM")), str(write_bupt(tmp_path / "BUPT")), str(shop)]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    printed = succeeds(run("-c", ORDERS + SCRIPT, *paths, env=environment)).stdout
    monkeypatch.setattr(sys, "argv", ["", *paths])
    exec(ORDERS, {})
    orders = capsys.readouterr().out
    assert printed.startswith(orders) and orders.count("\n") == 6
    assert re.search("(?s)train +infrared +2 +2 +24 .*: 4 queries.*no problems", printed)


# ----------------------------------------------------------------- frames ----

@pytest.fixture
def grays(tmp_path):
    """24 frames of rising gray level, a visible tracklet; and backward, an infrared one."""
    files = tuple(str(tmp_path / f"{i}.jpg") for i in range(24))
    for i, file in enumerate(files):
        Image.new("L", (20, 40), 10 * i).save(file)
    return [Tracklet(files, 1, "D1", "visible"), Tracklet(files[::-1], 1, "D1", "infrared")]


def test_frames_of_a_tracklet(grays):
    """frames[i] follows the rule; frames[i, seed] the seed and nothing else."""
    def numbers(key):
        pixels = Frames(grays, size=(32, 16), T=5)[key][0]
        assert pixels.shape == (5, 3, 32, 16) and pixels.dtype == torch.uint8
        return (pixels.float().mean((1, 2, 3)) / 10).round().int().tolist()

    assert numbers(0) == [0, 5, 10, 15, 20] and numbers(1) == [23, 18, 13, 8, 3]
    draws = [numbers((0, seed)) for seed in [*range(20), *range(20)]]
    assert draws[:20] == draws[20:] and len(set(map(tuple, draws))) > 10
    assert all(5 * k <= i < 5 * k + 5 for draw in draws for k, i in enumerate(draw))


def test_a_last_batch_of_one(grays):
    """Defects 1 and 2: 5 tracklets in batches of 4 are 5 rows, in order."""
    frames = Frames([*grays, *grays, grays[0]], size=(16, 8), T=2)
    batches, modalities, indices = zip(*DataLoader(frames, batch_size=4), strict=True)
    assert [tuple(batch.shape) for batch in batches] == [(4, 2, 3, 16, 8), (1, 2, 3, 16, 8)]
    assert torch.cat(modalities).tolist() == [0, 1, 0, 1, 0]
    assert torch.cat(indices).tolist() == [0, 1, 2, 3, 4]


def test_an_unreadable_image_is_one_line_from_a_loader_process_too(tmp_path, capsys):
    """Defect 3: an error at once that names it. A loader process hands on a whole traceback."""
    (tmp_path / "torn.jpg").write_bytes(b"no picture")
    frames = Frames([Tracklet((str(tmp_path / "torn.jpg"),), 1, None, "visible")], size=(8, 4), T=2)
    with pytest.raises(UserError) as caught:
        frames[0]
    handed_on = ExceptionWrapper((caught.type, caught.value, caught.tb), "in a loader process")
    for act in handed_on.reraise, lambda: frames[0]:
        with pytest.raises(SystemExit) as stop:
            cli(act)
        [line] = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and line.startswith(f"error: {tmp_path}/torn.jpg cannot be")
