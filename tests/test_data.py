"""data.py: both benchmarks read whole and in the same order every time, every fault named, one draw
per tracklet.

"Defect n" is the n-th of the list of what existing loaders get wrong: 1 samples dropped, 2 a last
batch of one, 3 unreadable images, 4 augmentation drawn per frame, 5 labels that move, 7 galleries
under 20, 8 test tracklets doubled.
"""
import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import data
import evaluate
from data import Frames, Tracklet, chunks, consecutive, linspace, load_dataset, read_dataset
from layouts import bupt_rows, clone, hitsz_rows, pairs, tracks, write_buptcampus, write_hitsz
from scripts import edit, fails, here
from support.files import UserError, printable
from support.footage import read_frame
from support.options import cli

import numpy as np
import pytest
import torch
from PIL import Image
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

SCRIPT = Path(data.__file__)
TRAIN = tracks((1, 2, 3, 77), each=2) + [("visible", 1, 5, 14)]
# The last row: a row "0" would be infrared.
TEST = tracks((21, 22, 23), each=2) + [("visible", 22, 12, 13), ("infrared", 22, 12, 12)]
# A dataset of one's own, as small as it gets: two identities, two cameras, galleries of 4.
SMALL = {"train": tracks((1, 2), each=2), "test": tracks((21, 22), each=2)}


@pytest.fixture(scope="module")
def hitsz(tmp_path_factory):
    return write_hitsz(tmp_path_factory.mktemp("hitsz") / "VCM", train=TRAIN, test=TEST)


@pytest.fixture(scope="module")
def bupt(tmp_path_factory):
    root = tmp_path_factory.mktemp("bupt") / "BUPT"
    splits = (1, 2, 3, 4), (11, 12), (21, 22, 23, 24, 25, 26)
    write_buptcampus(root, *(pairs(pids, frames=3) for pids in splits))
    (root / "outside.jpg").write_bytes(next(root.rglob("*.jpg")).read_bytes())
    return root


def refusal(path):
    """-> the one line with which load_dataset refuses `path`."""
    with pytest.raises(UserError) as caught:
        load_dataset(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check(path):
    """`python data.py path`, in this process -> exit code, all that was printed."""
    result = here("data.py", path)
    printed = result.stdout + result.stderr
    assert "Traceback" not in printed
    return result.returncode, printed


# --------------------------------------------------------------- datasets ----

@pytest.mark.parametrize("layout, digits", [
    ("standard", (4, 1, 1, 1)), ("doubled", (4, 1, 1, 1)), ("beside", (1, 1, 1, 1)),
    ("flat", (4, 2, 4, 5))])
def test_hitsz_layouts_and_zero_padding(tmp_path, layout, digits):
    """Names are split at their letters: camera 12, track 2, file 24 and identity 105 are read,
    padded or not."""
    train, test = tracks((1, 30), each=2, cameras=(12,)), tracks((4, 105), each=10, cameras=(3, 12))
    dataset = load_dataset(write_hitsz(tmp_path, layout, train, test, digits))
    assert (dataset.name, dataset.ignore_same_camera) == ("HITSZ-VCM", True)
    assert dataset.frame_rule == "chunks"
    assert hitsz_rows(dataset.train) == train and hitsz_rows(dataset.test) == test
    assert dataset.classes == [1, 30]
    for split, tracklets in ("Train", dataset.train), ("Test", dataset.test):
        depth = {"standard": 1, "doubled": 2}.get(layout, 0)
        top, files = tmp_path.joinpath(*[split] * depth), Counter()
        for t in tracklets:
            camera = int(t.camera[1:])
            assert t.camera == f"D{camera}"
            inner = {"infrared": "ir", "visible": "rgb"}[t.modality]
            folder = top / f"{t.pid:0{digits[0]}d}" / inner / f"D{camera:0{digits[1]}d}"
            for frame in t.frames:
                files[folder] += 1
                assert Path(frame).samefile(folder / f"{files[folder]:0{digits[3]}d}.jpg")


def test_hitsz_directions_use_each_tracklet_once(hitsz):
    """Defects 1 and 8: no test row is missing or doubled; the same tracklets serve both directions,
    roles swapped."""
    dataset = load_dataset(str(hitsz))
    assert hitsz_rows(dataset.test) == TEST and len(set(dataset.test)) == len(TEST)
    infrared, visible = ([i for i, row in enumerate(TEST) if row[0] == modality]
                         for modality in ("infrared", "visible"))
    directions = {name: tuple(sorted(map(int, part)) for part in parts)
                  for name, parts in dataset.directions.items()}
    assert directions == {"infrared->visible": (infrared, visible),
                          "visible->infrared": (visible, infrared)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset.test[0].pid = 5


def test_short_tracks_go_after_query_IDX_is_applied(tmp_path):
    """11 frames are dropped, 12 kept; dropping before query_IDX is read would move every row after
    the first."""
    whole = tracks((21, 22, 23, 24, 25))
    test = [("visible", 21, 9, 11), ("infrared", 21, 9, 5), *whole, ("infrared", 25, 1, 11)]
    train = [("infrared", 1, 1, 11), ("visible", 1, 1, 1)] + tracks((1, 2))
    dataset = load_dataset(write_hitsz(tmp_path, train=train, test=test, one_line=False))
    assert hitsz_rows(dataset.train) == train[2:] and hitsz_rows(dataset.test) == whole
    query, gallery = dataset.directions["infrared->visible"]
    for part, modality in (query, "infrared"), (gallery, "visible"):
        rows = hitsz_rows(dataset.test[i] for i in part)
        assert rows == [row for row in whole if row[0] == modality]


@pytest.mark.parametrize("apart", [False, True])
def test_bupt_tracklets_and_directions(tmp_path, apart):
    """Defects 1 and 8: a query that is in gallery.txt too is one test tracklet, not two; each
    direction has just its rows."""
    test = pairs((21, 22, 23, 24, 25, 26), frames=2)
    root = write_buptcampus(tmp_path, train=pairs((3, 1), frames=1), test=test, apart=apart)
    dataset = load_dataset(root)
    assert (dataset.name, dataset.ignore_same_camera) == ("BUPTCampus", False)
    assert dataset.frame_rule == "linspace"
    assert dataset.classes == [1, 3]    # tracklets of one frame stay, unlike in HITSZ-VCM
    expected = [f"{pid} {mode} {camera} {tracklet}"
                for pid, camera, tracklet, _ in pairs((1, 3)) for mode in ("RGB", "IR")]
    assert bupt_rows(dataset.train) == sorted(expected)
    query, gallery = ((root / f"{name}.txt").read_text().splitlines()
                      for name in ("query", "gallery"))
    roles = {"infrared->visible": (" IR ", " RGB "), "visible->infrared": (" RGB ", " IR ")}
    for direction, (mine, other) in roles.items():
        queries, others = (bupt_rows([dataset.test[i] for i in part])
                           for part in dataset.directions[direction])
        assert queries == sorted(row for row in query if mine in row)
        assert others == sorted(row for row in gallery if other in row)
    assert bupt_rows(dataset.test) == sorted({*query, *gallery})


@pytest.mark.parametrize("file", ["train_auxiliary.txt", "train_aux.txt"])
def test_bupt_from_its_DATA_folder_with_and_without_the_auxiliary_set(bupt, tmp_path, file):
    root = clone(bupt, tmp_path / "d")
    (root / "train_auxiliary.txt").rename(root / file)
    plain, more = load_dataset(root), load_dataset(str(root), auxiliary=True)
    inside = load_dataset(bupt / "DATA")
    assert bupt_rows(plain.train) == bupt_rows(inside.train)
    assert bupt_rows(plain.test) == bupt_rows(inside.test)
    for here_, there in zip(plain.test, inside.test, strict=True):
        frames = zip(here_.frames, there.frames, strict=True)
        assert all(Path(one).samefile(other) for one, other in frames)
    assert plain.classes == [1, 2, 3, 4] and more.classes == [1, 2, 3, 4, 11, 12]
    assert len(plain.train) == 16 * 2 and len(more.train) == 16 * 2 + 8 * 2


@pytest.mark.parametrize("name", ["hitsz", "bupt"])
def test_one_folder_further_down(request, tmp_path, name):
    """An unpacked archive: a folder around the dataset, and what archives leave beside it."""
    clone(request.getfixturevalue(name), tmp_path / "VCM (1)")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "readme.txt").write_text("thank you")
    dataset = load_dataset(tmp_path)
    assert dataset == load_dataset(str(tmp_path / "VCM (1)")) and len(dataset.train) > 16
    code, printed = check(tmp_path)
    assert code == 0 and "VCM (1)" in printed


def test_two_datasets_side_by_side_are_refused_by_name(hitsz, bupt, tmp_path):
    clone(hitsz, tmp_path / "first")
    clone(bupt, tmp_path / "second")
    code, printed = check(tmp_path)
    assert code == 2 and printed == f"error: {refusal(tmp_path)}\n"
    assert all(word in printed for word in ("several", str(tmp_path), "first", "second"))
    assert load_dataset(tmp_path / "first").classes == [1, 2, 3, 77]


# ------------------------------------------------------- small galleries ----

class MeanColour(torch.nn.Module):
    """A method that needs no training: (B, T, 3, H, W) -> (B, 1, 3)."""

    def embed(self, frames, modality):
        return frames.mean((1, 3, 4))[:, None]


@pytest.mark.parametrize("people, ranks", [
    (2, ["rank-1"]), (3, ["rank-1", "rank-5"]), (9, ["rank-1", "rank-5", "rank-10"])])
def test_a_gallery_under_20_loads_and_evaluates(tmp_path, people, ranks):
    """Defect 7. Ranks beyond the gallery, of 4, 6 and 18 tracklets, are in no result and no
    table."""
    test = tracks(range(20, 20 + people), each=2)
    dataset = load_dataset(write_hitsz(tmp_path, train=SMALL["train"], test=test))
    assert dataset.classes == [1, 2]
    for query, gallery in dataset.directions.values():
        assert len(query) == len(gallery) == 2 * people
    config = evaluate.EvaluationOptions(size=(32, 16), frames=2, workers=0, test_batch=3)
    results, _, _ = evaluate.evaluate(MeanColour(), dataset, config, torch.device("cpu"))
    table = evaluate.table(results)
    for result in results["directions"].values():
        assert [name for name in result if name.startswith("rank")] == ranks
        assert 0 <= result["rank-1"] <= result[ranks[-1]] <= 1 and result["gallery"] == 2 * people
    assert re.findall(r"rank-\d+", table) == ranks and "mAP" in table


def test_a_table_has_the_ranks_that_both_directions_have():
    result = {"rank-1": 0.5, "rank-5": 0.75, "mAP": 0.25, "mINP": 0.125, "queries": 8, "gallery": 9}
    more = {**result, "rank-10": 1.0, "rank-20": 1.0, "gallery": 2000}
    results = {"directions": {"infrared->visible": result, "visible->infrared": more}}
    head, one, other = evaluate.table(results).splitlines()
    assert head.split() == ["rank-1", "rank-5", "mAP", "mINP", "queries", "gallery"]
    figures = ["50.00", "75.00", "25.00", "12.50", "8"]
    assert one.split() == ["infrared->visible", *figures, "9"]
    assert other.split() == ["visible->infrared", *figures, "2,000"]


def test_dropped_tracks_leave_no_hole_in_the_indices(hitsz, tmp_path):
    root = clone(hitsz, tmp_path / "d")
    edit(root / "info/track_test_info.txt", shorten("21 1|22 [12]"))
    dataset = load_dataset(root)
    query, gallery = dataset.directions["visible->infrared"]
    assert len(query) == 7 and len(gallery) == 4
    assert sorted([*query, *gallery]) == list(range(len(dataset.test)))


# ----------------------------------------------------------------- faults ----

def shorten(rows):
    """Infrared rows of a track_*_info.txt that match `pid camera` become tracks of 11 frames, to be
    dropped."""
    row = re.compile(f"^1 (\\d+) \\d+ ({rows})$", re.MULTILINE)
    return lambda text: row.sub(lambda m: f"1 {m[1]} {int(m[1]) + 10} {m[2]}", text)


def replace(old, new):
    return lambda text: text.replace(old, new, 1)


def regex(old, new):
    return lambda text: re.sub(f"(?m){old}", new, text)


def append(row):
    return lambda text: text.strip() + f"{row}\n"


def in_json(change):
    def edited(text):
        change(paths := json.loads(text))
        return json.dumps(paths)
    return edited


def first_path(path):
    return in_json(lambda paths: paths["1"]["IR"]["LS3"]["1"].__setitem__(0, path))


INFO, TEST_INFO = "info/track_train_info.txt", "info/track_test_info.txt"
NAMES, TEST_NAMES = "info/train_name.txt", "info/test_name.txt"
QUERY, JSON = "info/query_IDX.txt", "data_paths.json"
TRAIN_INFO = "track_train_info.txt"
# Dataset and what is wrong: the file, the damage, a word that the message must hold.
FAULTS = {
    "hitsz, row starts at 0": (INFO, replace("1 1 12 1 1", "1 0 12 1 1"), TRAIN_INFO),
    "hitsz, row ends after the names": (INFO, replace("1 1 12 1 1", "1 1 9999 1 1"), TRAIN_INFO),
    "hitsz, row ends before it starts": (INFO, replace("1 1 12 1 1", "1 12 1 1 1"), TRAIN_INFO),
    "hitsz, row of 4 numbers": (INFO, replace("1 1 12 1 1", "1 1 12 1"), TRAIN_INFO),
    "hitsz, row with a word": (INFO, replace("1 1 12 1 1", "1 1 x 1 1"), TRAIN_INFO),
    "hitsz, row of modality 3": (INFO, replace("1 1 12 1 1", "3 1 12 1 1"), TRAIN_INFO),
    "hitsz, test row out of range": (
        TEST_INFO, replace("1 1 12", "1 1 9999"), "track_test_info.txt"),
    "hitsz, no frame name": (NAMES, replace("0001M1D1T1F3.jpg", "notes.txt"), "notes.txt"),
    "hitsz, no F in a name": (
        TEST_NAMES, replace("0021M1D1T1F3.jpg", "0021M1D1T1.jpg"), "0021M1D1T1.jpg"),
    "hitsz, no such file": (NAMES, replace("0001M1D1T1F3.jpg", "0001M1D1T1F345.jpg"), "345.jpg"),
    "hitsz, query 0": (QUERY, append(" 0"), "query_IDX.txt"),
    "hitsz, query after the last row": (QUERY, append(f" {len(TEST) + 1}"), "query_IDX.txt"),
    "hitsz, visible query": (QUERY, append(" 3"), "query_IDX.txt"),
    "hitsz, query is a word": (QUERY, append(" five"), "query_IDX.txt"),
    # Defect 5.
    "hitsz, identity without infrared": (INFO, regex(r"^1 .* 77 \d+\n", ""), "77"),
    "hitsz, identity without visible": (INFO, regex(r"^2 .* 77 \d+\n", ""), "77"),
    "hitsz, identity with short visible tracks": (
        INFO, regex(r"^2 (\d+) .* (77 .)$", r"2 \1 \1 \2"), "77"),
    "hitsz, no infrared gallery": (TEST_INFO, shorten(r"2\d \d+"), "0 queries"),
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
    "bupt, tracklet without frames": (
        JSON, in_json(lambda paths: paths["1"]["IR"]["LS3"]["1"].clear()), "LS3"),
    "bupt, JSON of another shape": (JSON, lambda text: "[]", "data_paths.json"),
    "bupt, invalid JSON": (JSON, lambda text: text[:-9], "data_paths.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_refused_and_printed(request, tmp_path, fault):
    """load_dataset and `python data.py` name what is at fault, the latter exits 2; image folders
    are links, as users have."""
    file, damage, word = FAULTS[fault]
    root = clone(request.getfixturevalue(fault.split(",")[0]), tmp_path / "d")
    before = (root / file).read_text()
    edit(root / file, damage)
    assert (root / file).read_text() != before
    assert word in refusal(root)
    code, printed = check(root)
    assert code == 2 and word in printed
    if "invalid JSON" in fault:
        with pytest.raises(UserError, match=word):
            read_dataset(root)
    else:
        assert word in " ".join(read_dataset(root).problems)


def test_a_wrong_row_is_not_counted_among_the_short_tracks(hitsz, tmp_path):
    root = clone(hitsz, tmp_path / "d")
    edit(root / INFO, replace("1 1 12 1 1", "1 1 x 1 1"))
    dataset = read_dataset(root)
    assert dataset.problems and not any("have under" in note for note in dataset.notes)


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


def test_unknown_folder_says_what_was_expected(tmp_path):
    words = refusal(tmp_path)
    assert str(tmp_path) in words and "info" in words and "train.txt" in words
    assert str(tmp_path / "nowhere") in refusal(tmp_path / "nowhere")
    assert [check(path)[0] for path in (tmp_path, tmp_path / "nowhere")] == [2, 2]


def test_a_folder_of_footage_is_told_where_it_goes(greys, tmp_path):
    """Frames of one's own, at any depth, are no dataset, but evaluate.py takes them."""
    folder = tmp_path / "camera 1" / "007"
    folder.mkdir(parents=True)
    shutil.copy(greys[0].frames[0], folder / "frame1.JPG")
    code, printed = check(tmp_path)
    assert code == 2 and printed == f"error: {refusal(tmp_path)}\n"
    assert all(word in printed for word in ("images", "evaluate.py", "--query", "--gallery"))
    fails(here("train.py", "--data", tmp_path), "evaluate.py", "--query")


@pytest.mark.parametrize("name, pick", [("hitsz", 5), ("bupt", -1)])
def test_missing_and_broken_images_are_named(request, name, pick):
    """Defect 3: a file that is not there is found by load_dataset, one cut short by `python
    data.py`, each by its name."""
    root = request.getfixturevalue(name)
    victim = sorted(root.rglob("*/*/*/*.jpg"))[pick]
    content = victim.read_bytes()
    try:
        victim.unlink()
        assert victim.name in refusal(root)
        for cut in content[:-150], content[:10], b"":
            victim.write_bytes(cut)
            load_dataset(root)    # opening a million images is left to the script
            code, printed = check(root)
            assert code == 2 and os.path.join(*victim.parts[-4:]) in printed
    finally:
        victim.write_bytes(content)
    assert check(root)[0] == 0


def test_names_that_differ_in_case_alone_are_one_problem(tmp_path):
    """1.JPG where the lists say 1.jpg, as cards and archives like to have it: one problem, with the
    number and an example."""
    root = write_hitsz(tmp_path / "d", **SMALL)
    folder = root / "Train" / "0002" / "ir" / "D1"
    for file in folder.iterdir():
        file.rename(file.with_suffix(".JPG"))
    problems = read_dataset(root).problems
    assert len(problems) == 1 and len(read_dataset(root).missing) == 12
    assert problems[0].startswith("12 files differ") and "case alone" in problems[0]
    assert f"1.JPG instead of {folder / '1.jpg'}" in problems[0]
    code, printed = check(root)
    assert code == 2 and printed.count(".JPG") == 1 and "\n1 problems" in printed

    # A file that is not there at all is a problem of its own.
    (folder / "2.JPG").unlink()
    problems = read_dataset(root).problems
    assert len(problems) == 2 and any("11 files" in problem for problem in problems)
    assert any(f"no file {folder / '2.jpg'}" in problem for problem in problems)


# Clears the screen, forges a line, rings the bell.
ESCAPE = "\x1b[2J\nno problems: usable\n\x07"


@pytest.mark.skipif(os.name == "nt", reason="no file can have such a name there")
@pytest.mark.parametrize("name", ["hitsz", "bupt"])
def test_control_characters_of_names_are_never_printed_raw(request, tmp_path, name):
    """In the folder's name, in listed files, in a camera: statistics, problems and error lines show
    them escaped."""
    root = clone(request.getfixturevalue(name), tmp_path / f"d{ESCAPE}")
    if name == "hitsz":
        edit(root / NAMES, replace("D1T1F3.jpg", "D1T1F3\x1b[2J.jpg"))
        edit(root / QUERY, append(" \x1b[2J"))
    else:
        edit(root / JSON, first_path(f"1/{ESCAPE}.jpg"))
        edit(root / JSON, in_json(rename_camera))
        edit(root / "train.txt", replace("2 RGB/IR LS3", "2 RGB/IR LS3\x1b[2J"))
    result = here("data.py", root)
    lines = (result.stdout + result.stderr).splitlines()
    assert result.returncode == 2 and all(line.isprintable() for line in lines), lines
    assert "no problems: usable" not in lines
    assert printable(root) in lines[0] and result.stdout.count("\\x1b[2J") >= 4
    for result in here("train.py", "--data", root), here("data.py", root / "nowhere"):
        fails(result, "\\x1b[2J\\nno problems: usable\\n\\x07")
        assert all(line.isprintable() for line in result.stderr.splitlines())


def rename_camera(paths):
    """Identity 2's camera LS3 gets an escape code in its name."""
    for cameras in paths["2"].values():
        cameras["LS3\x1b[2J"] = cameras.pop("LS3")


def test_the_script_counts_and_exits_0(hitsz):
    """`python data.py PATH` itself, from another folder: identities, tracklets, frames, cameras per
    split and modality."""
    command = [sys.executable, SCRIPT, hitsz]
    done = subprocess.run(command, capture_output=True, text=True, cwd=hitsz)
    assert done.returncode == 0 and "HITSZ-VCM" in done.stdout, done.stderr
    table = {}
    for line in done.stdout.lower().splitlines():
        table[tuple(line.split()[:2])] = re.findall(r"\d+", line)[:4]
    counts = {("train", "visible"): "4 9 110 3", ("train", "infrared"): "4 8 96 2",
              ("test", "visible"): "3 7 85 3", ("test", "infrared"): "3 7 84 3"}
    assert {key: " ".join(table[key]) for key in counts} == counts, done.stdout


def test_labels_and_batches_do_not_depend_on_hash_seed(hitsz, bupt, monkeypatch, capsys):
    """Defect 5: classes, order of tracklets, directions and batches are equal in every run."""
    program = ("import data, sys\n"
               "for path in sys.argv[1:]:\n"
               "    d = data.load_dataset(path)\n"
               "    print(d.classes, d.train, d.test, d.directions)\n"
               "    print(list(data.IdentitySampler(d.train, P=2, K=2, steps=3, seed=0)))\n")
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"    # another than here
    command = [sys.executable, "-c", program, str(hitsz), str(bupt)]
    done = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True,
                          env={**os.environ, "PYTHONHASHSEED": seed})
    monkeypatch.setattr(sys, "argv", command[2:])
    exec(program)
    here_ = capsys.readouterr().out
    assert done.stdout == here_ and here_.startswith("[1, 2, 3, 77]") and here_.count("\n") == 4


# ----------------------------------------------------------------- frames ----

@pytest.mark.parametrize("n, T, by_chunks, by_linspace", [
    (12, 6, [0, 2, 4, 6, 8, 10], [0, 2, 4, 6, 8, 10]),
    (13, 6, [0, 3, 6, 9, 12, 12], [0, 2, 4, 6, 8, 10]),
    (100, 6, [0, 17, 34, 51, 68, 85], [0, 16, 33, 50, 66, 83]),
    (3, 6, [0, 1, 2, 2, 2, 2], [0, 0, 1, 1, 2, 2]), (1, 2, [0, 0], [0, 0])])
def test_chunks_and_linspace(n, T, by_chunks, by_linspace):
    """By hand: first frame of each chunk of ceil(n/T), or linspace; with rng every frame of every
    chunk is drawn, no other."""
    assert chunks(n, T).tolist() == by_chunks and linspace(n, T).tolist() == by_linspace
    size = -(-n // T)
    for rule in chunks, linspace:
        rng = np.random.default_rng(0)
        drawn = np.stack([rule(n, T, rng) for _ in range(400)])
        for k in range(T):
            of_chunk = {min(i, n - 1) for i in range(k * size, (k + 1) * size)}
            assert set(drawn[:, k].tolist()) == of_chunk


@pytest.mark.parametrize("T", [1, 2, 3, 6, 10])
def test_consecutive_frames(T):
    """For every number of frames: T successive ones, the middle ones in test and any in training;
    of fewer than T all, and the last again."""
    for n in range(1, 2 * T + 8):
        middle, rng = consecutive(n, T).tolist(), np.random.default_rng(0)
        before, after = middle[0], n - 1 - middle[-1]
        assert abs(before - after) <= 1 if n >= T else before == after == 0
        drawn = {tuple(consecutive(n, T, rng).tolist()) for _ in range(400)}
        starts = range(max(1, n - T + 1))
        expected = {tuple(min(start + k, n - 1) for k in range(T)) for start in starts}
        assert drawn == expected and tuple(middle) in expected, (n, T)


def test_an_unknown_frame_rule_is_refused(hitsz, tmp_path):
    dataset = load_dataset(hitsz)
    assert data.chosen_rule(SimpleNamespace(frame_rule=""), dataset) == "chunks"
    assert data.chosen_rule(SimpleNamespace(frame_rule="consecutive"), dataset) == "consecutive"
    with pytest.raises(UserError, match="chunk5.*chunks, linspace, consecutive"):
        data.chosen_rule(SimpleNamespace(frame_rule="chunk5"), dataset)
    command = ["--data", hitsz, "--run", tmp_path / "r", "--preset", "small", "--identities", 2]
    result = here("train.py", *command, "--frame-rule", "chunk5")
    fails(result, "--frame-rule chunk5", "consecutive")
    assert not (tmp_path / "r").exists()


@pytest.fixture(scope="module")
def greys(tmp_path_factory):
    """24 plain frames, frame i of grey level 10 i: forward as a visible tracklet, backward as an
    infrared one."""
    folder = tmp_path_factory.mktemp("greys")
    files = tuple(str(folder / f"grey{i}.jpg") for i in range(24))
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
    for rule, first in ("linspace", [0, 4, 9, 14, 19]), ("consecutive", [10, 11, 12, 13, 14]):
        assert numbers(Frames(greys, size=(32, 16), T=5, rule=rule)[0][0]) == first
    draws = []
    for seed in [*range(30), *range(30)]:
        np.random.seed(len(draws))
        torch.manual_seed(len(draws))
        draws.append(tuple(numbers(frames[0, seed][0])))
    assert draws[:30] == draws[30:] and len(set(draws)) > 20
    assert all(5 * k <= i <= 5 * k + 4 for draw in draws for k, i in enumerate(draw))


def test_last_batch_of_one(greys):
    """Defects 1 and 2: 9 tracklets in batches of 4 are 9 rows in order, the last batch being of
    one."""
    frames = Frames((greys * 5)[:9], size=(16, 8), T=2)
    shapes, modalities, indices = [], [], []
    for batch, modality, index in DataLoader(frames, batch_size=4):
        shapes.append(tuple(batch.shape))
        modalities += modality.tolist()
        indices += index.tolist()
    assert shapes == [(4, 2, 3, 16, 8), (4, 2, 3, 16, 8), (1, 2, 3, 16, 8)]
    assert indices == list(range(9)) and modalities == [0, 1, 0, 1, 0, 1, 0, 1, 0]


def test_read_frame(tmp_path):
    """Pixels as they are (channel order, height before width), grey files as three channels,
    resized to (H, W)."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    frame = read_frame(str(tmp_path / "a.png"), (12, 20))
    assert frame.dtype == torch.uint8
    assert np.array_equal(frame.permute(1, 2, 0).numpy(), pixels)
    grey = read_frame(str(tmp_path / "grey.png"), (12, 20))
    assert np.array_equal(grey.numpy(), np.stack([pixels[..., 0]] * 3))
    assert read_frame(str(tmp_path / "a.png"), (32, 16)).shape == (3, 32, 16)


def printed_by(act):
    """cli(act) in this process -> exit code, all that was printed."""
    out, handler, hook = io.StringIO(), signal.getsignal(signal.SIGTERM), sys.unraisablehook
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            cli(act)
    except SystemExit as stop:
        code = stop.code
    finally:
        signal.signal(signal.SIGTERM, handler)
        sys.unraisablehook = hook
    return code, out.getvalue()


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.95, None])
@pytest.mark.parametrize("name", ["broken_42.jpg", "broken_42\x1b[2J\nUserError.jpg"])
def test_unreadable_image_is_one_line_that_names_it(tmp_path, keep, name):
    """Defect 3: empty, cut in header or pixels, missing: an error at once, and one line on screen
    even from a worker, whatever the file's name."""
    file = tmp_path / name
    if keep is not None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file)
        content = file.read_bytes()
        file.write_bytes(content[:int(keep * len(content)) if keep < 1 else keep])
    frames = Frames([Tracklet((str(file),) * 12, 1, "D1", "visible")], size=(32, 16), T=2)
    for key in 0, (0, 1):
        with pytest.raises(UserError, match="broken_42") as caught:
            frames[key]
        # How a worker hands it on:
        worker = ExceptionWrapper((caught.type, caught.value, caught.tb), "in worker 0")
        for act in worker.reraise, partial(frames.__getitem__, key):
            code, printed = printed_by(act)
            assert code == 2 and printed.startswith(f"error: {tmp_path}"), printed
            assert f"/{printable(name)} cannot be read" in printed and printed[:-1].isprintable()
