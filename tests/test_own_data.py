"""Data of one's own: folders as docs/data.md draws them, a reader in a file of one's own, several
folders trained on together, and one tested on another."""
import json
import os
import re
import shutil
import sys
from pathlib import Path

import compare
import data
import evaluate
from data import DIRECTIONS, find_reader, load_dataset, load_datasets, read_dataset
from layouts import own, pairs, picture, tracks, write_buptcampus, write_hitsz, write_own
from scripts import (
    ROOT,
    TINY,
    TINY_LSMRL,
    fails,
    here,
    log_of,
    results_of,
    run,
    same_bits,
    succeeds,
    tensors_of,
)
from support import footage
from support.files import UserError
from support.ranking import StoredGallery

import numpy as np
import pytest
import torch
from PIL import Image

TRAIN = own("train", (1, 2, 30))
TEST = own("query", (7, 8), each=1) | own("gallery", (7, 8, 9), each=1)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return write_own(tmp_path_factory.mktemp("own") / "shop", TRAIN | TEST)


@pytest.fixture(scope="module")
def on_shop(shop, tmp_path_factory):
    """The folder of a run on it."""
    folder = tmp_path_factory.mktemp("own") / "run"
    result = succeeds(here("train.py", "--data", shop, "--run", folder, *TINY_LSMRL))
    assert "lsmrl on shop: 3 training identities" in result.stdout
    assert "trained on" not in result.stdout and "trained_on" not in results_of(folder)
    return folder


@pytest.fixture(scope="module")
def on_walkers(walkers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "run"
    succeeds(here("train.py", "--data", walkers, "--run", folder, *TINY_LSMRL))
    return folder


def json_of(path):
    return json.loads(Path(path).read_text())


def sides(dataset, direction):
    """The pids of a direction's queries and of its gallery."""
    return tuple([dataset.test[i].pid for i in side] for side in dataset.directions[direction])


# --------------------------------------------------- folders of one's own ----

def test_tracklets_cameras_and_directions(tmp_path):
    """Every track once, frames in natural order, any format, animated files and links too."""
    places = own("train", ("0001", "30"), camera="door 2/", frames=11)
    places |= {"train/0001/ir/walk9": 1, "query/7/RGB/D1/a": 1, "gallery/7/infrared/D1/a": 1,
               "query/7/IR/D2/b": 1, "query/9/IR/D2/b": 1, "gallery/7/visible/c": 2}
    root = write_own(tmp_path / "shop", places)
    Image.new("L", (16, 32)).save(root / "gallery/7/visible/c/1.png")
    colours = [Image.new("RGB", (16, 32), colour) for colour in ("red", "blue")]
    colours[0].save(root / "gallery/7/infrared/D1/night.gif", save_all=True,
                    append_images=colours[1:])
    walk = root / "train/30/visible/door 2/walk1"
    (root / "gallery/7/visible/linked").symlink_to(walk, target_is_directory=True)
    (root / "train/0001/.hidden").mkdir()
    (root / "train/readme.txt").write_text("thank you")
    dataset = load_dataset(root)
    assert (dataset.name, dataset.root) == ("shop", root) and not dataset.ignore_same_camera
    assert dataset.frame_rule == "chunks" and dataset.classes == [1, 30]
    found = [(t.pid, t.modality, t.camera, len(t.frames)) for t in dataset.train]
    both = ("infrared", "visible")
    expected = [(pid, modality, "door 2", 11) for pid in (1, 30) for modality in both] * 2
    assert sorted(found) == sorted([*expected, (1, "infrared", "", 1)])
    first = next(t for t in dataset.train if t.camera)
    assert [Path(frame).name for frame in first.frames] == [f"{n}.jpg" for n in range(1, 12)]
    assert Path(first.frames[0]).parent == root / "train/0001/infrared/door 2/walk1"
    assert sides(dataset, DIRECTIONS[0]) == ([7, 9], [7, 7])
    assert sides(dataset, DIRECTIONS[1]) == ([7], [7, 7])
    [gif] = [t for t in dataset.test if t.frames[0].endswith("#0")]
    assert (gif.pid, gif.camera, len(gif.frames)) == (7, "D1", 2)
    assert any("1 queries have no tracklet of their person" in note for note in dataset.notes)
    checked = succeeds(here("data.py", root)).stdout
    counted = [re.search(f"{where}.*", checked)[0].split()[2:]
               for where in ("train +infrared", "test +infrared", "test +visible")]
    assert counted == [["2", "5", "45", "1:", "door", "2"], ["2", "4", "5", "2:", "D1", "D2"],
                       ["1", "3", "15", "1:", "D1"]]


@pytest.mark.parametrize("names, classes", [
    (["0007", "12"], [7, 12]), (["7", "12", "007x"], ["007x", "12", "7"]),
    (["7", "12", "1234567890"], ["12", "1234567890", "7"]), (["7", "007"], ["007", "7"]),
    (["-1", "\u0663"], ["-1", "\u0663"])])
def test_names_are_numbers_where_all_are(names, classes, tmp_path):
    """And two folders are never one person."""
    assert load_dataset(write_own(tmp_path, own("train", names, each=1))).classes == classes


def test_a_name_of_the_test_makes_names_of_the_test_s_people_alone(tmp_path):
    """Who is tested changes no training: a run goes on where query/ and gallery/ came later."""
    root = write_own(tmp_path, own("train", (1, 2)))
    alone = load_dataset(root)
    write_own(root, own("query", ["7"], each=1) | own("gallery", ["7", "ann"], each=1))
    dataset = load_dataset(root)
    assert dataset.classes == alone.classes == [1, 2] and dataset.train == alone.train
    assert sides(dataset, DIRECTIONS[0]) == (["7"], ["7", "ann"])
    write_own(root, own("train", ["bob"]))
    assert load_dataset(root).classes == ["1", "2", "bob"]


def test_the_folders_are_recognised_as_they_are_written(tmp_path, monkeypatch):
    """HITSZ-VCM's Train and Test are not, on a file system without case either; its lists count
    before any folder."""
    people = {"train": tracks((1, 2), each=1), "test": tracks((21, 22), each=2)}
    hitsz = write_hitsz(tmp_path / "vcm", **people)
    write_own(hitsz, own("train", (1,)))
    assert load_dataset(hitsz).name == "HITSZ-VCM"
    shutil.rmtree(hitsz / "info")
    shutil.rmtree(hitsz / "train")
    (hitsz / "Query").mkdir()
    isdir = os.path.isdir
    monkeypatch.setattr(os.path, "isdir", lambda path: isdir(path) or any(
        name.lower() == os.path.basename(path) for name in os.listdir(os.path.dirname(path))))
    with pytest.raises(UserError, match="no dataset in .*your own train/ query/ gallery/"):
        load_dataset(hitsz)
    monkeypatch.undo()
    write_own(tmp_path / "up" / "shop", own("train", (1, 2)))    # an unpacked archive
    monkeypatch.chdir(tmp_path / "up")
    assert load_dataset(".").name == "shop"
    monkeypatch.chdir("shop")
    dataset = load_dataset(".")
    assert dataset.name == "shop" and len(dataset.train) == 8 and not dataset.problems


LOOSE = "expected them in PID/MODALITY/TRACK or PID/MODALITY/CAMERA/TRACK"
FAULTS = {    # what is added to the folders, or "-" and what is taken away: words of the problem
    "train/1/thermal/walk1": "train/1/thermal is no modality; expected visible or rgb or infrared",
    "train/1/visible": "train/1/visible holds 1 loose frames beside folders of frames",
    "train/40/visible": "train/40/visible holds frames; " + LOOSE,
    "train/40": "train/40 holds frames; " + LOOSE,
    "train": "train holds 1 loose frames, such as 1.jpg; " + LOOSE,
    "train/1/visible/D1/walk1/again": "walk1/again holds frames; " + LOOSE,
    "train/1/visible/D1/walk1": "train/1/visible has tracks inside and outside of cameras' folders",
    "train/40/ir/walk1": "training identity 40 has infrared tracklets only",
    "-train/1/visible/walk1/*": "train/1/visible/walk1 holds no frames; expected a track's",
    "-train/1/*": "no frames under .*train/1;",
    "-train/[12]": "1 training identity; expected 2 or more",
    "-query": "0 query and 6 gallery tracklets; expected some of each",
    "-gallery/*": "4 query and 0 gallery tracklets; expected some of each",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_one_line(fault, shop, tmp_path):
    root = tmp_path / "shop"
    shutil.copytree(shop, root)
    if fault.startswith("-"):
        for path in root.glob(fault[1:]):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        (root / fault).mkdir(parents=True, exist_ok=True)
        (root / fault / "1.jpg").write_bytes(picture(1, "visible", 1, 1, (32, 16)))
    [problem] = read_dataset(root).problems
    assert re.search(FAULTS[fault], problem.replace(os.sep, "/")) and "\n" not in problem
    result = here("data.py", root)
    assert result.returncode == 2 and result.stdout.count("problem: ") == 1
    fails(here("train.py", "--data", root), problem[:60])


@pytest.mark.skipif(os.name == "nt", reason="no file can have such a name there")
def test_names_are_printed_escaped(tmp_path):
    odd = "ann\x1b[2J\nno problems"
    places = own("train", (odd, "bob"), camera="D\x1b1/") | {f"train/{odd}/th\nermal/walk1": 1}
    root = write_own(tmp_path / f"shop{odd}", places)
    results = here("data.py", root), here("train.py", "--data", root)
    (root / "train" / odd / "th\nermal").rename(root / "train" / odd / "ir")
    folder = tmp_path / "run"
    results += here("train.py", "--data", root, "--run", folder, *TINY_LSMRL),
    assert [result.returncode for result in results] == [2, 2, 0]
    for result in results:
        printed = result.stdout + result.stderr
        assert all(line.isprintable() for line in printed.splitlines()), printed
        assert "no problems" not in printed.splitlines() and "\\x1b[2J\\n" in printed


def test_queries_of_one_modality_have_the_roles_swapped(tmp_path):
    places = own("train", (1, 2)) | own("query", (7, 8), modalities=("ir",), each=1)
    dataset = load_dataset(write_own(tmp_path, places | own("gallery", (7, 8, 9))))
    assert sides(dataset, DIRECTIONS[0]) == ([7, 8], [7, 7, 8, 8, 9, 9])
    assert dataset.directions[DIRECTIONS[1]] == dataset.directions[DIRECTIONS[0]][::-1]
    assert any("visible->infrared: query/ has no such" in note for note in dataset.notes)


def test_training_without_a_test_set(tmp_path):
    """A line says so; no table, no results.json, and everything else."""
    root, folder = write_own(tmp_path / "shop", own("train", ("ann", "bob"))), tmp_path / "run"
    checked = succeeds(here("data.py", root)).stdout
    assert "note: nothing to test on" in checked and "no problems: usable" in checked
    options = ["--identities", 2, "--evaluate-every", 1, "--gait", "on"]
    result = succeeds(here("train.py", "--data", root, "--run", folder, *TINY, *options))
    assert result.stdout.count("nothing to test on in") == 1
    assert "infrared->visible" not in result.stdout and "\n\n" not in result.stdout
    assert f"Everything is in {folder}" in result.stdout
    assert not (folder / "results.json").exists()
    assert (folder / "curves.png").exists() and (folder / "silhouettes-1.png").exists()
    assert "rank-1" not in log_of(folder)[0] and tensors_of(folder)["classes"] == ["ann", "bob"]
    succeeds(here("train.py", "--resume", folder, "--epochs", 2))
    assert tensors_of(folder)["epoch"] == 2 and not (folder / "results.json").exists()
    fails(here("evaluate.py", "--checkpoint", folder), "nothing to test on in", "--data")


def test_comparing_without_a_test_set_is_refused(tmp_path, monkeypatch):
    root = write_own(tmp_path / "shop", own("train", (1, 2)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare.py", "--data", str(root), "a:", "b: --gait off"])
    with pytest.raises(UserError, match="nothing to test on in .*shop"):
        compare.main()


def test_a_test_set_alone(on_walkers, tmp_path):
    root = write_own(tmp_path / "yard", TEST)
    checked = succeeds(here("data.py", root)).stdout
    assert "note: nobody to train on" in checked and "no problems: usable" in checked
    fails(here("train.py", "--data", root), "nobody to train on", str(root))
    result = succeeds(here("evaluate.py", "--checkpoint", on_walkers, "--data", root))
    assert result.stdout.startswith("trained on walkers, tested on yard\n")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    fails(here("train.py", "--data", tmp_path / "empty"), "no tracklets in")


def test_people_with_names_are_trained_on_evaluated_saved_and_drawn(tmp_path):
    people = own("query", ("ann", "bob")) | own("gallery", ("ann", "bob"))
    root = write_own(tmp_path / "shop", own("train", ("cy", "di")) | people)
    folder, kept = tmp_path / "run", tmp_path / "e.npz"
    succeeds(here("train.py", "--data", root, "--run", folder, *TINY))
    assert tensors_of(folder)["classes"] == ["cy", "di"]
    words = ["evaluate.py", "--checkpoint", folder]
    succeeds(here(*words, "--save", kept, "--figure", tmp_path / "f.png", "--rerank"))
    assert set(np.load(kept)["pid"]) == {"ann", "bob"}
    assert StoredGallery(kept).rows("pid", 0, 1).tolist() == ["ann"]
    found = here(*words, "--query", root / "query/ann/infrared/walk1", "--gallery", kept)
    assert "the nearest of 16" in succeeds(found).stdout
    one = next(t for t in load_dataset(root).test if t.pid == "ann")
    assert evaluate.title_of(one) == "infrared person ann"


# -------------------------------------------------- a reader of one's own ----

EXAMPLE = re.search(r"```python\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.S)[1]
TRACE = "\nPath(__file__).with_suffix('.ran').touch()\n"    # of whoever runs the file


@pytest.fixture(scope="module")
def mars(tmp_path_factory):
    """Frames named as in docs/data.md's example."""
    folder = tmp_path_factory.mktemp("mars") / "data"
    for split, pids in ("bbox_train", (1, 2)), ("bbox_test", (7, 8)):
        for pid in pids:
            (folder / split / f"{pid:04d}").mkdir(parents=True)
            for letter, modality in ("R", "visible"), ("I", "infrared"):
                for camera, frame in ((1, 1), (1, 2), (2, 1)):
                    name = f"{pid:04d}{letter}C{camera}T0001F{frame:03d}.jpg"
                    content = picture(pid, modality, camera, frame, (32, 16))
                    (folder / split / f"{pid:04d}" / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def reader(mars):
    """What --reader says; the example of docs/data.md."""
    (mars.parent / "mine.py").write_text(EXAMPLE + TRACE)
    yield f"{mars.parent / 'mine.py'}:read"
    sys.modules.pop("mine", None)


@pytest.fixture(scope="module")
def on_mars(mars, reader):
    folder = mars.parent / "run"
    words = ["--data", mars, "--reader", reader, "--run", folder]
    result = succeeds(here("train.py", *words, *TINY_LSMRL))
    assert "lsmrl on mine: 2 training identities, 8 tracklets" in result.stdout
    return folder


def test_the_example_reads_trains_and_evaluates(mars, reader, on_mars, tmp_path):
    assert len(EXAMPLE.splitlines()) <= 25
    checked = succeeds(run("data.py", mars, "--reader", reader)).stdout    # our Dataset is its own
    assert "mine in " in checked and "no problems: usable" in checked
    assert "infrared->visible: 4 queries, 4 gallery tracklets" in checked
    assert json_of(on_mars / "config.json")["reader"] == reader
    words = ["evaluate.py", "--checkpoint", on_mars, "--reader", reader]
    succeeds(here(*words, "--json", tmp_path / "r.json"))
    found = json_of(tmp_path / "r.json")
    assert found["directions"] == results_of(on_mars)["directions"] and "trained_on" not in found
    result = results_of(on_mars)["directions"]["infrared->visible"]
    assert (result["queries"], result["gallery"]) == (4, 4)
    parts = tmp_path / "parts"
    shutil.copytree(on_mars, parts)
    succeeds(here("train.py", "--resume", parts, "--reader", reader, "--epochs", 2))
    assert tensors_of(parts)["epoch"] == 2


def test_a_reader_is_run_only_where_the_user_names_it(mars, reader, on_mars, walkers, monkeypatch):
    monkeypatch.delitem(sys.modules, "mine")
    trace = mars.parent / "mine.ran"
    trace.unlink()
    for words in (["evaluate.py", "--checkpoint", on_mars], ["train.py", "--resume", on_mars],
                  ["evaluate.py", "--checkpoint", on_mars, "--data", walkers]):
        fails(here(*words), "mine.py:read", "expected --reader FILE.py:FUNCTION", "--reader none")
    other = ["evaluate.py", "--checkpoint", on_mars, "--data", walkers, "--reader", "none"]
    assert succeeds(here(*other)).stdout.startswith("trained on mine, tested on walkers\n")
    fails(here("train.py", "--resume", on_mars, "--reader", "none"), "no dataset", "--reader")
    frames = sorted((walkers / "Test").glob("*/ir/*"))[0]
    search = here("evaluate.py", "--checkpoint", on_mars, "--query", frames, "--gallery", frames)
    assert "the nearest of 1" in succeeds(search).stdout    # which reads no dataset
    assert not trace.exists()
    succeeds(here("data.py", mars, "--reader", reader))
    assert trace.exists()


WRONG = '''
from data import Dataset, Tracklet
frames = (__file__,)
NUMBER = 7

def nothing(path):
    pass

def raises(path):
    return {}[path]

def empty(path):
    return Dataset("mine", path)

def nameless(path):
    return Dataset(None, path)

def of(path, *tracklets, **more):
    return Dataset("mine", path, list(tracklets), **more)

def visible(path):
    return of(path, *[Tracklet(frames, pid, "", "visible") for pid in (1, 2)])

def no_frames(path):
    return of(path, Tracklet((), 1, "", "visible"))

def listed(path):
    return of(path, Tracklet(list(frames), 1, "", "visible"))

def modality(path):
    return of(path, Tracklet(frames, 1, "", "RGB"))

def pid(path):
    return of(path, Tracklet(frames, 1.0, "", "visible"))

def camera(path):
    return of(path, Tracklet(frames, 1, 2, "visible"))

def dictionary(path):
    return of(path, {"pid": 1})

def mixed(path):
    return of(path, *[Tracklet(frames, pid, "", "visible") for pid in (1, "1")])

def unranked(path):
    return of(path, test=[Tracklet(frames, 1, "", "visible")])

def beyond(path):
    directions = {"infrared->visible": ([0], [1]), "visible->infrared": ([0], [0])}
    return of(path, test=[Tracklet(frames, 1, "", "visible")], directions=directions)

def gone(path):
    return of(path, *[Tracklet(("gone.jpg",), 1, "", m) for m in ("visible", "infrared")])

def untouchable(path):
    return of(path, train=None)

def untrained(path):
    return Dataset("mine", path, None)

def rule(path):
    return of(path, frame_rule="chunk5")

def large(path):
    return of(path, Tracklet(frames, 2 ** 64, "", "visible"))

def negative(path):
    return of(path, Tracklet(frames, -1, "", "visible"))

def floats(path):
    directions = {"infrared->visible": ([0.0], [0]), "visible->infrared": ([0], [0])}
    return of(path, test=[Tracklet(frames, 1, "", "visible")], directions=directions)

def triples(path):
    directions = {"infrared->visible": ([0], [0], [0]), "visible->infrared": ([0], [0])}
    return of(path, test=[Tracklet(frames, 1, "", "visible")], directions=directions)

def notes(path):
    return of(path, notes="all is well")

def problems(path):
    return of(path, problems=None)

def gone_frames(path):
    return of(path, missing=("gone.jpg",))

def no_text(path):
    return of(path, notes=[None])

def leaves(path):
    raise SystemExit("not\\ntoday")
'''
ANSWERS = {
    "missing": "has no such function", "NUMBER": "has no such function",
    "nothing": "returned NoneType; expected the Dataset", "raises": "line 10 raised KeyError",
    "empty": "no tracklets in .*; expected some", "nameless": "returned name None and root",
    "visible": r"identity 1 has visible .*\(2 problems; python data.py .* --reader .*:visible list",
    "no_frames": r"and the frames \(\);", "listed": r"the frames \[.*a tuple of paths",
    "modality": "'RGB' and .*visible or infrared", "pid": r"a tracklet of 1\.0",
    "camera": "a tracklet of 1, 2,", "dictionary": "{'pid': 1} as a tracklet",
    "mixed": "some pids as numbers and some as names", "unranked": "Dataset.set_test",
    "beyond": "Dataset.set_test", "gone": "no file gone.jpg", "untouchable": "raised TypeError",
    "untrained": "returned train None; expected a list",
    "rule": "frame_rule 'chunk5'; expected one of chunks, linspace, consecutive",
    "large": "a tracklet of 18446744073709551616, .* a natural number below 10.9 or a name",
    "negative": "a tracklet of -1, .* a natural number below 10.9 or a name",
    "floats": "Dataset.set_test", "triples": "Dataset.set_test",
    "notes": "returned notes 'all is well'; expected a list",
    "problems": "returned problems None; expected a list",
    "gone_frames": "returned missing .*; expected a list",
    "no_text": "returned None as missing, a problem or a note; expected text",
    "leaves": "wrong.py.* raised SystemExit: not today"}


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "wrong.py").write_text(WRONG)
    yield folder
    sys.modules.pop("wrong", None)


@pytest.mark.parametrize("function", ANSWERS)
def test_what_a_reader_gets_wrong_is_one_line(function, wrong):
    words = ["--reader", f"{wrong / 'wrong.py'}:{function}"]
    result = here("train.py", "--data", wrong, *words)
    fails(result, "")
    assert re.search(ANSWERS[function], result.stderr), result.stderr
    assert here("data.py", wrong, *words).returncode == 2


def test_frames_of_a_reader_may_lie_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").touch()
    monkeypatch.chdir(tmp_path)
    tracklet = data.Tracklet(("a.jpg", "b.jpg", "./a.jpg"), 1, "", "visible")
    dataset = data.Dataset("mine", ".", [tracklet])
    data.find_missing_frames(dataset)
    assert dataset.missing == ["b.jpg"]


@pytest.mark.parametrize("reader, words", [
    ("mine.py", "FILE.py:FUNCTION"), ("", "--reader  is not known"), ("no.py:read", "no file"),
    ("syntax.py:read", "raised SyntaxError"), ("top.py:read", "top.py, line 2 raised NameError"),
    ("evaluate.py:read", "called evaluate already")])
def test_a_reader_that_cannot_be_had_is_one_line(reader, words, shop, tmp_path, monkeypatch):
    (tmp_path / "syntax.py").write_text("def read(path)\n")
    (tmp_path / "top.py").write_text("\nnot_there\n")
    (tmp_path / "evaluate.py").write_text("")
    monkeypatch.chdir(tmp_path)
    fails(here("data.py", shop, "--reader", reader), words)
    fails(here("train.py", "--data", "nowhere", "--reader", reader), words)


def test_a_comparison_knows_the_reader_s_text_and_gives_it_to_each_run(mars, reader, tmp_path):
    words = ["--data", str(mars), "--reader", reader]
    variant = compare.read_variant("whole:", words)
    run_of = compare.Run(variant, 1, str(tmp_path))
    assert variant.marks[compare.READER_FILE] == EXAMPLE + TRACE
    assert run_of.command()[-4:] == words
    Path(run_of.folder).mkdir()
    Path(run_of.checkpoint).touch()    # one that was stopped
    assert run_of.command()[-2:] == ["--reader", reader] and "--resume" in run_of.command()
    file = Path(reader.rpartition(":")[0])
    before = file.read_text()
    file.write_text(before + "# another idea\n")
    with pytest.raises(UserError, match="the reader's file was changed"):
        run_of.start({})
    file.write_text(before)
    assert compare.READER_FILE not in compare.read_variant("b:", []).marks
    with pytest.raises(UserError, match='variant "c": --reader no.py:read: no file'):
        compare.read_variant("c: --reader no.py:read", words)


# ----------------------------------------------------- several together ----

def test_people_of_several_folders_are_never_mixed_up(shop, walkers, tmp_path):
    """Equal numbers, equal names of folders, colons in names."""
    more = [write_own(tmp_path / place / "shop", own("train", (1, 2))) for place in "ab"]
    odd = write_own(tmp_path / "shop:1", own("train", ("30", "x")))
    paths = [str(path) for path in (more[0], walkers, shop, more[1], odd)]
    dataset = load_datasets(paths)
    assert dataset.root == paths[1] and dataset.name == "walkers"    # the first with a test set
    names = ["shop:1", "shop:2", "shop-2:1", "shop-2:2", "shop-2:30", "shop-3:1", "shop-3:2",
             "shop-1:30", "shop-1:x"]
    assert dataset.classes == sorted(names + [f"walkers:{pid}" for pid in (1, 2, 3, 4)])
    assert len(dataset.train) == sum(len(load_dataset(path).train) for path in paths)
    alone = load_dataset(walkers)
    for name in "test", "directions", "ignore_same_camera", "frame_rule":
        assert getattr(dataset, name) == getattr(alone, name)
    assert dataset.train_name == "shop + walkers + shop + shop + shop:1"
    assert load_datasets([shop]) == load_dataset(shop)
    with pytest.raises(UserError, match="names a folder twice"):
        load_datasets([str(shop), os.path.join(shop, "..", "shop")])


def test_a_folder_and_the_dataset_in_it_are_one(shop, tmp_path):
    """Or each of its people would be two."""
    two, bupt = tmp_path / "two", tmp_path / "bupt"
    shutil.copytree(shop, two / "shop")
    write_buptcampus(bupt, **SMALL[write_buptcampus])
    (tmp_path / "link").symlink_to(two)
    for pair in ([two, two / "shop"], [bupt / "DATA", bupt], [tmp_path / "link", two / "shop"]):
        with pytest.raises(UserError, match="names a folder twice"):
            load_datasets(list(map(str, pair)))
    assert len(load_datasets([str(two), str(shop)]).classes) == 6    # copies are taken as told


def test_two_are_trained_on_together_and_the_first_is_tested_on(walkers, shop, tmp_path):
    """With a cache too; resumed to the same bits; evaluated on the same test set."""
    whole, parts, cache = tmp_path / "whole", tmp_path / "parts", tmp_path / "frames"
    words = ["--data", walkers, shop, *TINY_LSMRL, "--identities", 4]
    result = succeeds(here("train.py", *words, "--run", parts, "--cache", cache))
    assert "lsmrl on walkers + shop: 7 training identities" in result.stdout
    assert "\ntrained on walkers + shop, tested on walkers\n" in result.stdout
    assert json_of(parts / "config.json")["data"] == [str(walkers), str(shop)]
    results = results_of(parts)
    assert (results["dataset"], results["trained_on"]) == ("walkers", "walkers + shop")
    assert tensors_of(parts)["dataset"] == "walkers + shop"
    succeeds(here("train.py", "--resume", parts, "--epochs", 2))
    succeeds(here("train.py", *words, "--run", whole, "--epochs", 2, "--cache", cache))
    same_bits(tensors_of(whole), tensors_of(parts))
    words = ["evaluate.py", "--checkpoint", parts]
    result = succeeds(here(*words, "--json", tmp_path / "r.json"))
    assert result.stdout.startswith("trained on walkers + shop, tested on walkers\n")
    assert json_of(tmp_path / "r.json")["directions"] == results_of(parts)["directions"]
    result = succeeds(here(*words, "--data", shop))
    assert result.stdout.startswith("trained on walkers + shop, tested on shop\n")
    fails(here(*words, "--data", walkers, shop), "expected one folder")
    for script in ["train.py"], words:
        fails(here(*script, "--data"), "is empty")
        fails(here(*script, "--data", walkers, ""), "is empty")
    fails(here("train.py", "--resume", parts, "--data", walkers, "--epochs", 3),
          "other identities", "check --data")


def test_a_cache_of_frames_on_another_drive(monkeypatch):
    """Where no path leads from one to the other, as on Windows."""
    def raises(path, root):
        raise ValueError("path is on mount 'D:'")

    monkeypatch.setattr(os.path, "relpath", raises)
    assert footage.relative("D:/a.jpg", "C:/") == "D:/a.jpg"


@pytest.mark.parametrize("kind, name", [
    (np.uint16, "a.png"), (np.uint16, "a.tiff"), (np.int32, "a.tiff"), (np.float32, "a.tiff")])
def test_a_thermal_frame_is_no_mask_and_a_mask_as_deep_is(kind, name, tmp_path):
    """All of its values lie beyond what 8 bits hold."""
    thermal = 20_000 + np.arange(32 * 16).reshape(32, 16)
    pictures = {"frame": thermal, "mask": np.where(thermal > 20_200, 60_000, 0)}
    for what, pixels in pictures.items():
        (tmp_path / what).mkdir()
        Image.fromarray(pixels.astype(kind)).save(tmp_path / what / name)
    assert not footage.is_mask(str(tmp_path / "frame" / name))
    assert footage.is_mask(str(tmp_path / "mask" / name))


def test_an_older_run_s_one_folder_still_counts(on_shop, shop, tmp_path):
    """Its configuration holds text, and it does not say what it was trained on."""
    folder = tmp_path / "old"
    shutil.copytree(on_shop, folder)
    checkpoint = tensors_of(folder)
    checkpoint["config"]["data"] = str(shop)
    del checkpoint["config"]["reader"], checkpoint["dataset"]
    torch.save(checkpoint, folder / "last.pt")
    elsewhere = write_own(tmp_path / "yard", TEST)
    for words in [], ["--data", elsewhere]:
        result = here("evaluate.py", "--checkpoint", folder, *words)
        assert "trained on" not in succeeds(result).stdout
    succeeds(here("train.py", "--resume", folder, "--epochs", 2))
    found = tensors_of(folder)
    assert (found["config"]["data"], found["dataset"]) == ((str(shop),), "shop")


# --------------------------------------------- trained on one, tested on another ----

SMALL = {write_hitsz: {"train": tracks((1, 2), each=1), "test": tracks((21, 22), each=2)},
         write_buptcampus: {"train": pairs((1, 2), each=1, frames=1), "auxiliary": [],
                            "test": pairs((21, 22), each=2, frames=1)},
         write_own: {"tracks": TEST}}


@pytest.mark.parametrize("write, name", [
    (write_hitsz, "HITSZ-VCM"), (write_buptcampus, "BUPTCampus"), (write_own, "yard")])
def test_a_run_is_tested_on_another_dataset(write, name, on_walkers, tmp_path):
    root = write(tmp_path / "yard", **SMALL[write])
    result = succeeds(here("evaluate.py", "--checkpoint", on_walkers, "--data", root, "--rerank",
                           "--json", tmp_path / "r.json"))
    first, second, *_ = result.stdout.splitlines()
    assert first == f"trained on walkers, tested on {name}" and "re-ranked" in second
    results = json_of(tmp_path / "r.json")
    assert (results["trained_on"], results["dataset"]) == ("walkers", name)
    assert results["directions"].keys() == set(DIRECTIONS)


def test_a_run_on_one_s_own_folders_is_tested_on_walkers(on_shop, walkers):
    result = succeeds(here("evaluate.py", "--checkpoint", on_shop, "--data", walkers))
    assert result.stdout.startswith("trained on shop, tested on walkers\n")


def test_the_same_name_in_another_folder_is_said(on_shop, shop, tmp_path, monkeypatch):
    other = tmp_path / "shop"
    shutil.copytree(shop, other)
    words = ["evaluate.py", "--checkpoint", on_shop, "--data"]
    result = succeeds(here(*words, other))
    assert result.stdout.startswith(f"trained on shop in {shop}, tested on shop\n")
    monkeypatch.chdir(shop.parent)
    for same in shop, "shop", "shop/../shop":
        assert "trained on" not in succeeds(here(*words, same)).stdout


def test_a_run_s_name_is_a_name_that_a_folder_can_have(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = write_own(tmp_path / ("A b/".rstrip("/") + "*\n" + 99 * "x"), own("train", (1, 2)))
    succeeds(here("train.py", "--data", root, *TINY_LSMRL))
    [name] = os.listdir("runs")
    assert name.startswith("lsmrl-a-b-x") and name.endswith("-1") and len(name) == 62


def test_what_reads_a_known_folder_is_at_hand_for_a_reader(shop):
    assert find_reader(shop)(False) == load_dataset(shop) == data.read_own(shop, False)
