"""The scripts as a user runs them: exit codes, files, what is printed, what is refused and when."""
import importlib
import json
import os
import pickle
import re
import shutil
import sys
import zlib
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import evaluate
import train
from golden import formula, official_keys
from layouts import clone, pairs, picture, tracks, write_buptcampus, write_hitsz
from scripts import (
    OWNED,
    ROOT,
    TINY,
    TINY_LSMRL,
    Evil,
    edit,
    fails,
    here,
    log_of,
    results_of,
    run,
    run_anew,
    succeeds,
    tensors_of,
    whole_and_resumed,
)
from support import options
from support.clip import CLIP_MODELS
from test_lsmrl import official_tensors, save_archive

import numpy as np
import pytest
import torch
from PIL import Image

DIRECTIONS = {"infrared->visible", "visible->infrared"}


def one_of_each(data):
    """Leaves the first test tracklet of each identity and modality: galleries of 5."""
    first = {}
    for row in (data / "info" / "track_test_info.txt").read_text().splitlines():
        modality, _, _, pid, _ = row.split()
        first.setdefault((modality, pid), row)
    rows = list(first.values())
    queries = [str(number) for number, row in enumerate(rows, 1) if row.startswith("1 ")]
    (data / "info" / "track_test_info.txt").write_text("\n".join(rows))
    (data / "info" / "query_IDX.txt").write_text(" ".join(queries))


def spoiled(walkers, folder, spoil):
    """A copy of the walkers after spoil(copy). Its folders of frames are links: see own_frames."""
    copy = clone(walkers, folder / "copy")
    spoil(copy)
    return copy


@pytest.fixture(scope="module")
def few(walkers, tmp_path_factory):
    """The walkers with fewer to be tested on, for DinoGRL, which takes its time."""
    return spoiled(walkers, tmp_path_factory.mktemp("few"), one_of_each)


@pytest.fixture(scope="module")
def trained(few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    return folder, succeeds(run("train.py", "--data", few, "--run", folder, *TINY))


@pytest.fixture(scope="module")
def trained_lsmrl(walkers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "lsmrl"
    return folder, succeeds(run("train.py", "--data", walkers, "--run", folder, *TINY_LSMRL))


def json_of(path):
    return json.loads(Path(path).read_text())


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def save_changed(checkpoint, path, change):
    """Writes the checkpoint after change(checkpoint)."""
    change(checkpoint)
    torch.save(checkpoint, path)
    return path


# ----------------------------------------------------------------- a run ----

def test_a_run_leaves_what_it_promises(trained):
    folder, result = trained
    assert names_in(folder) == ["config.json", "curves.png", "last.pt", "lock", "log.jsonl",
                                "results.json", "silhouettes-1.png"]
    results = results_of(folder)
    assert results.keys() == {"method", "dataset", "directions", "streams", "silhouette_iou",
                              "seconds"}
    assert results["dataset"] == "walkers" and 0 <= results["silhouette_iou"] <= 1
    assert results["directions"].keys() == DIRECTIONS
    for direction, r in results["directions"].items():
        assert f"{100 * r['mAP']:.2f}" in result.stdout and direction in result.stdout
    line, = log_of(folder)
    assert line.keys() == {"epoch", "lr", "losses", "shown", "seconds", "rank-1", "mAP", "streams"}
    assert line["losses"].keys() == {
        "mask", "smooth_mask", "smooth_part", "diversity", "identity_gait", "triplet_gait",
        "identity_appearance", "triplet_appearance"}
    assert line["shown"].keys() == {"accuracy_gait", "accuracy_appearance"}
    assert line["rank-1"].keys() == line["mAP"].keys() == DIRECTIONS
    checkpoint = tensors_of(folder)
    assert checkpoint.keys() == {"model", "optimizer", "scaler", "epoch", "config", "classes",
                                 "method", "dataset", "random"}
    assert checkpoint["classes"] == [1, 2, 3, 4] and checkpoint["epoch"] == 1


def test_each_stream_alone_is_in_the_table_the_results_and_the_log(trained, trained_lsmrl):
    """Its rows stand below their direction's, with the same figures but the number of queries."""
    for (folder, result), names in (trained, ["gait", "appearance"]), (trained_lsmrl, ["z", "f"]):
        results, log = results_of(folder), log_of(folder)[-1]
        assert list(results["streams"]) == list(log["streams"]) == names
        lines = result.stdout.splitlines()
        assert max(len(line) for line in lines if " alone " in line) <= 100
        for direction, whole in results["directions"].items():
            first = next(i for i, line in enumerate(lines) if line.startswith(direction))
            for name, line in zip(names, lines[first + 1:first + 3], strict=True):
                r = results["streams"][name][direction]
                assert r.keys() == whole.keys() and r["queries"] == whole["queries"]
                ranks = [f"{100 * r[key]:.2f}" for key in r if key not in ("queries", "gallery")]
                assert line.split() == [name, "alone", *ranks]
                for key in "rank-1", "mAP":
                    assert log["streams"][name][key][direction] == r[key]


def test_lsmrl_draws_what_it_reads(trained_lsmrl):
    folder, result = trained_lsmrl
    assert "reading-1.png shows where it looks" in result.stdout
    with Image.open(folder / "reading-1.png") as sheet:
        assert sheet.width > 400


def test_a_log_gets_one_line_an_epoch(trained, trained_lsmrl):
    """Nothing else is on standard error; the line names the losses."""
    warm_up, epoch = trained[1].stderr.splitlines()
    assert warm_up.startswith("warm-up 2/2 ")
    assert re.match(r"epoch 1/1 2/2 \[.*frames/s", epoch)
    for name in ("mask", "smooth", "div", "id", "tri", "acc"):
        assert f" {name} " in epoch
    epoch, = trained_lsmrl[1].stderr.splitlines()
    assert re.match(r"epoch 1/1 2/2 \[.*frames/s", epoch)


def test_the_table_holds_the_ranks_that_the_gallery_has(trained, trained_lsmrl, few, tmp_path):
    """Those beyond it are nowhere."""
    every = ("rank-1", "rank-5", "rank-10", "rank-20")
    for (folder, result), size, ranks in (trained_lsmrl, 20, every), (trained, 5, every[:2]):
        for r in results_of(folder)["directions"].values():
            assert r.keys() == {*ranks, "mAP", "mINP", "queries", "gallery"}
            # A query whose only match its own camera took is not scored.
            assert 0 < r["queries"] <= r["gallery"] == size
            values = [r[rank] for rank in ranks]
            assert values == sorted(values) and values[0] >= 0 and values[-1] == 1
        assert [rank for rank in every if f"{rank} " in result.stdout] == list(ranks)
    evaluated = here("evaluate.py", "--checkpoint", trained_lsmrl[0], "--data", few,
                     "--json", tmp_path / "r.json")
    assert "rank-5 " in succeeds(evaluated).stdout and "rank-10" not in evaluated.stdout
    r = json_of(tmp_path / "r.json")["directions"]["infrared->visible"]
    assert "rank-5" in r and "rank-10" not in r and r["gallery"] == 5
    assert "usable" in succeeds(here("data.py", few)).stdout


def test_two_epochs_are_one_and_one_resumed_bit_for_bit(trained, few, tmp_path):
    whole, parts = whole_and_resumed(trained[0], few, tmp_path, TINY)
    assert results_of(whole)["directions"] == results_of(parts)["directions"]
    assert [line["epoch"] for line in log_of(parts)] == [1, 2]
    once_more = succeeds(here("train.py", "--resume", parts))
    assert "raise --epochs" in once_more.stdout


def test_options_given_on_resume_override_the_run_s(trained_lsmrl, tmp_path):
    folder, other = trained_lsmrl[0], tmp_path / "other"
    succeeds(here("train.py", "--resume", folder / "last.pt", "--run", other, "--epochs", 2,
                  "--lr", 1e-5, "--cosine", "off"))
    assert log_of(other)[-1]["lr"] == pytest.approx(1e-5)
    slow, _ = tensors_of(other)["optimizer"]["param_groups"]
    assert slow["lr"] == 1e-5
    fails(here("train.py", "--resume", folder, "--preset", "paper"), "--preset")
    light = save_changed(tensors_of(folder), tmp_path / "light.pt", lambda c: c.pop("optimizer"))
    fails(here("train.py", "--resume", light, "--epochs", 2), "no optimizer")


def test_an_evaluation_that_a_stop_has_cost_is_made_up_for(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    line, = log_of(folder)
    unevaluated = {key: line[key] for key in line.keys() - {"rank-1", "mAP", "streams"}}
    # The second line was of an epoch that was not saved.
    lines = [unevaluated, {**line, "epoch": 2}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "silhouettes-1.png").unlink()
    succeeds(here("train.py", "--resume", folder, "--epochs", 2, "--evaluate-every", 1))
    lines = log_of(folder)
    assert [line["epoch"] for line in lines] == [1, 2]
    assert all(line["rank-1"].keys() == DIRECTIONS for line in lines)
    assert {"silhouettes-1.png", "silhouettes-2.png", "curves.png"} <= set(names_in(folder))
    (folder / "log.jsonl").write_text("{\n")
    fails(here("train.py", "--resume", folder, "--epochs", 3), "log.jsonl", "remove that line")


def test_no_epoch_leaves_a_checkpoint_that_is_evaluated(walkers, tmp_path):
    folder = tmp_path / "run"
    none = [*TINY_LSMRL, "--epochs", 0]
    result = succeeds(here("train.py", "--data", walkers, "--run", folder, *none))
    assert "untrained" in result.stdout and tensors_of(folder)["epoch"] == 0
    assert names_in(folder) == ["config.json", "last.pt", "lock", "reading-0.png", "results.json"]
    succeeds(here("evaluate.py", "--checkpoint", folder, "--json", tmp_path / "r.json"))
    assert json_of(tmp_path / "r.json")["directions"] == results_of(folder)["directions"]


def test_a_masks_folder_of_another_kind_gives_no_iou(trained, few, tmp_path):
    def empty_masks(data):
        (data / "masks").unlink()
        (data / "masks").mkdir()

    data = spoiled(few, tmp_path, empty_masks)
    succeeds(here("evaluate.py", "--checkpoint", trained[0], "--data", data,
                  "--json", tmp_path / "r.json"))
    results = json_of(tmp_path / "r.json")
    assert results["silhouette_iou"] is None
    assert results["directions"] == results_of(trained[0])["directions"]


def test_evaluate_reproduces_the_run_and_saves_embeddings(trained, tmp_path):
    folder, _ = trained
    # A last batch of one, a first one too.
    result = here("evaluate.py", "--checkpoint", folder, "--json", tmp_path / "r.json",
                  "--save", tmp_path / "e.npz", "--test-batch", 1, "--workers", 0)
    assert succeeds(result).stderr == ""
    again = json_of(tmp_path / "r.json")
    for direction, r in results_of(folder)["directions"].items():
        # Another batch size rounds otherwise.
        assert again["directions"][direction] == pytest.approx(r, abs=0.06)
    assert again["streams"].keys() == {"gait", "appearance"}
    saved = np.load(tmp_path / "e.npz")
    assert saved["embedding"].shape == (10, 70, 8) and saved["embedding"].dtype == np.float32
    assert len(saved["pid"]) == len(saved["camera"]) == 10
    assert set(saved["modality"]) == {"visible", "infrared"}
    assert all(Path(str(frame)).is_file() for frame in saved["frame"])


def test_buptcampus_trains_evaluates_and_resumes(tmp_path):
    write_buptcampus(tmp_path / "bupt")
    data, folder = tmp_path / "bupt" / "DATA", tmp_path / "run"    # as some users will
    result = succeeds(here("train.py", "--data", data, "--run", folder, *TINY_LSMRL))
    assert "on BUPTCampus" in result.stdout and "infrared->visible" in result.stdout
    succeeds(here("train.py", "--resume", folder, "--epochs", 2))
    assert tensors_of(folder)["epoch"] == 2


@pytest.mark.parametrize("switch", ["--gait off", "--pbmge off", "--precision bfloat16"])
def test_ablations_and_precision_run(switch, few, tmp_path):
    folder = tmp_path / "run"
    succeeds(here("train.py", "--data", few, "--run", folder, *TINY, *switch.split()))
    assert (results_of(folder)["silhouette_iou"] is None) == (switch == "--gait off")
    assert (results_of(folder)["streams"] == {}) == (switch == "--gait off")


# -------------------------------------------- networks of the paper's size ----

@pytest.fixture(scope="module")
def fewer(tmp_path_factory):
    """A dataset without true masks to look at: two people, once by each of two cameras. A frame
    takes a CPU half a second."""
    def seen(*pids):
        return [row for pid in pids for row in (("infrared", pid, 1, 12), ("visible", pid, 2, 12))]

    folder = tmp_path_factory.mktemp("fewer") / "vcm"
    return write_hitsz(folder, train=seen(1, 2), test=seen(21, 22))


def test_official_end_to_end(official_files, fewer, tmp_path):
    succeeds(run("evaluate.py", "--official", official_files, "--data", fewer, "--frames", 1,
                 "--save", tmp_path / "e.npz", "--json", tmp_path / "r.json"))
    assert np.load(tmp_path / "e.npz")["embedding"].shape == (4, 70, 256)
    results = json_of(tmp_path / "r.json")
    for scores in results["directions"], *map(results["streams"].get, ("gait", "appearance")):
        assert scores["infrared->visible"]["gallery"] == 2
    for name in ("best_model.pth", "best_model2.pth"):    # of which is said later what they lack
        torch.save({}, tmp_path / name)
    shape = tmp_path / "best_shape.pth"
    shape.write_bytes((official_files / "best_shape.pth").read_bytes()[:5000])
    command = ["evaluate.py", "--official", tmp_path, "--data", fewer]
    fails(here(*command), "best_shape.pth")
    torch.save([1, 2], shape)
    fails(here(*command), "best_shape.pth", "no dict of named tensors")


def own_part(file, prefix, new_prefix="", narrower=1):
    """Formula-filled tensors of one of the authors' files, under other names."""
    return {new_prefix + key.removeprefix(prefix):
            formula(key, [n // narrower if n >= 64 else n for n in shape])
            for key, shape in official_keys()[file].items() if key.startswith(prefix)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Local files for the paper preset: DINOv2's official names, and those of torchvision's
    ResNet-50, a quarter as wide."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(own_part("best_shape.pth", "dinov2.dinov2."), folder / "dinov2.pth")
    resnet = {"conv1.weight": formula("conv1.weight", (16, 3, 7, 7)),
              "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    stem = "image_encoder1.resnet_conv.1."
    resnet |= own_part("best_model.pth", stem, "bn1.", narrower=4)
    for i in range(4):
        stage = f"share_encoder.resnet_conv.{i}."
        resnet |= own_part("best_model.pth", stage, f"layer{i + 1}.", narrower=4)
    torch.save(resnet, folder / "resnet50.pth")
    return ["--dinov2-weights", folder / "dinov2.pth", "--resnet-weights", folder / "resnet50.pth"]


def test_paper_preset_trains_evaluates_and_resumes(fewer, weights, tmp_path):
    """Narrower views and ResNets; that the whole ResNet-50 is loaded, and what the widths are, is
    tested in test_model.py."""
    little = str.split(
        "--preset paper --steps 1 --identities 2 --tracklets 1 --frames 1 --workers 0 "
        "--epochs 0 --size 256 64 --code-size 64 16 --dino-size 112 56 --width 16")
    folder = tmp_path / "run"
    result = here("train.py", "--data", fewer, "--run", folder, *little, *weights)
    assert "infrared->visible" in succeeds(result).stdout
    result = succeeds(here("train.py", "--resume", folder, "--epochs", 1))
    assert tensors_of(folder)["epoch"] == 1 and "infrared->visible" in result.stdout
    assert {"mask", "triplet_gait", "triplet_appearance"} <= log_of(folder)[0]["losses"].keys()


def test_lsmrl_s_paper_preset_on_openai_s_format(fewer, tmp_path, monkeypatch):
    """All of ViT-B/16's blocks and heads, an eighth as wide; test_lsmrl.py loads the whole one."""
    narrow = CLIP_MODELS["ViT-B-16"] | {"width": 96, "dim": 64, "text_width": 64}
    monkeypatch.setitem(CLIP_MODELS, "ViT-B-16", narrow)
    clip = tmp_path / "ViT-B-16.pt"
    save_archive(official_tensors(**CLIP_MODELS["ViT-B-16"]), clip)
    # 6 x 3 patches: a CPU.
    little = str.split(
        "--method lsmrl --preset paper --steps 1 --identities 2 --tracklets 1 "
        "--frames 1 --workers 0 --epochs 1 --size 96 48")
    folder = tmp_path / "run"
    result = here("train.py", "--data", fewer, "--run", folder, *little, "--clip-weights", clip)
    assert "infrared->visible" in succeeds(result).stdout
    model = tensors_of(folder)["model"]
    assert model["clip.visual.positional_embedding"].shape == (19, 96)


# ----------------------------------------------------------------- LSMRL ----

def test_lsmrl_leaves_the_same_files_but_silhouettes_and_evaluates_alike(trained_lsmrl, tmp_path):
    folder, result = trained_lsmrl
    assert names_in(folder) == ["config.json", "curves.png", "last.pt", "lock", "log.jsonl",
                                "reading-1.png", "results.json"]
    results = results_of(folder)
    assert results["method"] == "lsmrl" and results["silhouette_iou"] is None
    for r in results["directions"].values():
        assert (r["queries"], r["gallery"]) == (20, 20)
    assert "silhouettes" not in result.stdout
    line, = log_of(folder)
    assert {"identity_z", "identity_f", "identity_cmi", "triplet_z", "text", "contrast", "centre",
            "consistency"} <= line["losses"].keys()
    tiny = CLIP_MODELS["tiny"]
    assert tensors_of(folder)["model"]["bank"].shape == (4, tiny["dim"])
    succeeds(here("evaluate.py", "--checkpoint", folder, "--json", tmp_path / "r.json",
                  "--save", tmp_path / "e.npz", "--test-batch", 1))
    for direction, r in json_of(tmp_path / "r.json")["directions"].items():
        # Another batch size rounds otherwise.
        assert r == pytest.approx(results["directions"][direction], abs=0.06)
    embedding = np.load(tmp_path / "e.npz")["embedding"]
    assert embedding.shape == (40, 1, tiny["width"] + tiny["dim"])
    assert np.allclose((embedding ** 2).sum(2), 2, atol=1e-5)


def test_lsmrl_resumes_bit_for_bit_and_as_itself(trained_lsmrl, walkers, tmp_path):
    # Its one epoch was all warm-up: the cosine had not begun.
    _, parts = whole_and_resumed(trained_lsmrl[0], walkers, tmp_path, TINY_LSMRL)
    checkpoint = tensors_of(parts)
    slow, fast = checkpoint["optimizer"]["param_groups"]
    config = checkpoint["config"]
    assert fast["lr"] == pytest.approx(config["boost"] * slow["lr"])
    assert config["optimizer"] == "AdamW"
    fails(here("train.py", "--resume", parts, "--method", "dinogrl"), "--method dinogrl", "lsmrl")
    fails(here("train.py", "--resume", parts, "--optimizer", "Adam"), "--optimizer Adam", "AdamW")


@pytest.mark.parametrize("switches, gone", [
    ("--cmi off --precision bfloat16", {"identity_cmi", "consistency"}),
    ("--split 4 0 0 --contrast 0 --centre 0 --text 0 --groups 3", {"text", "contrast", "centre"})])
def test_lsmrl_s_parts_can_be_switched_off(switches, gone, walkers, tmp_path):
    folder = tmp_path / "run"
    succeeds(here("train.py", "--data", walkers, "--run", folder, *TINY_LSMRL, *switches.split()))
    assert not gone & log_of(folder)[0]["losses"].keys()


# --------------------------------------------------------------- the line ----

class Clock:
    """In place of the module time: a step takes as long as the test says."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def lines_of_bar(monkeypatch, capsys):
    """A bar of so many steps, each of so many seconds -> what a log gets of it."""
    def lines(steps, seconds, **how):
        clock = Clock()
        monkeypatch.setattr(options, "time", clock)
        with options.Bar("epoch 1/1", steps, **how) as bar:
            for step in range(steps):
                clock.now += seconds
                bar.update(note=f"loss {step}")
        return capsys.readouterr().err.splitlines()
    return lines


def test_a_long_epoch_gets_a_line_for_each_tenth(lines_of_bar):
    """If it comes a minute after the last line."""
    lines = lines_of_bar(200, 5, keep=True)    # a tenth takes 100 seconds
    assert [line.split()[2] for line in lines] == [f"{n}/200" for n in range(20, 220, 20)]
    assert "loss 19]" in lines[0] and "loss 199]" in lines[-1]
    lines = lines_of_bar(200, 2, keep=True)    # 40 seconds: every other one is a minute later
    assert [line.split()[2] for line in lines] == [f"{n}/200" for n in (40, 80, 120, 160, 200)]


def test_a_short_bar_gets_one_line_or_none(lines_of_bar):
    line, = lines_of_bar(200, 0.25, keep=True)
    assert re.fullmatch(r"epoch 1/1 200/200 \[00:50<00:00, loss 199\]", line)
    assert lines_of_bar(200, 0.25) == []
    assert lines_of_bar(0, 1) == []
    assert lines_of_bar(200, 100, keep=True, hidden=True) == []


class Terminal(StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_line_that_changes(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with options.Bar("epoch 1/1", 2, keep=True) as bar:
        bar.update(2, "loss 7")
    assert "\r" in sys.stderr.getvalue() and "2/2" in sys.stderr.getvalue()


def test_scripts_that_only_read_or_draw_leave_no_line_behind(walkers, tmp_path):
    """Their bars are no news to a log. (That no script writes a carriage return is asserted
    wherever one is run.)"""
    assert succeeds(here("data.py", walkers)).stderr == ""
    little = ["--test-identities", 1, "--tracklets", 1, "--frames", 12, "--height", 32]
    drawn = here("walkers.py", tmp_path / "w", "--identities", 1, *little)
    assert succeeds(drawn).stderr == "" and "identities" in drawn.stdout


# --------------------------------------------------------- refused, and when ----

@pytest.fixture
def nothing_begins(monkeypatch):
    """Whatever would decode, download, draw or embed fails the test."""
    def begun(*_, **__):
        raise AssertionError("work was begun")

    for name in ("data.read_frame", "train.load_datasets", "train.build", "walkers.make_walkers",
                 "evaluate.load_datasets", "evaluate.find_footage", "evaluate.read_frame",
                 "evaluate.load_run", "evaluate.load_authors_files", "torch.hub.load",
                 "torch.hub.load_state_dict_from_url", "torch.hub.download_url_to_file"):
        monkeypatch.setattr(name, begun)


def test_an_occupied_run_is_refused_before_anything_is_read(trained_lsmrl, walkers, tmp_path,
                                                           nothing_begins):
    folder, notes = trained_lsmrl[0], tmp_path / "notes.txt"
    before = {name: (folder / name).read_bytes() for name in names_in(folder)}
    new = ["train.py", "--data", walkers, *TINY_LSMRL, "--run"]
    fails(here(*new, folder), "not empty", f"--resume {folder}")
    notes.write_text("mine")
    fails(here("train.py", "--resume", folder, "--run", tmp_path, "--epochs", 2), "not empty")
    fails(here(*new, notes), "notes.txt")
    fails(here(*new, notes / "run"), "notes.txt")
    assert {name: (folder / name).read_bytes() for name in names_in(folder)} == before
    assert names_in(tmp_path) == ["notes.txt"] and notes.read_text() == "mine"


@pytest.mark.parametrize("option", ["--json", "--figure", "--silhouettes", "--save"])
@pytest.mark.parametrize("what", ["--checkpoint run", "--checkpoint run --query q --gallery g",
                                  "--official files --data d"])
def test_an_unwritable_file_is_refused_before_anything_is_read(option, what, tmp_path,
                                                              nothing_begins):
    kind = {"--json": ".json", "--save": ".npz"}.get(option, ".png")
    taken, notes = tmp_path / f"taken{kind}", tmp_path / "notes"
    taken.mkdir()
    notes.write_text("mine")
    command = ["evaluate.py", *what.split(), option]
    fails(here(*command, tmp_path / "no" / f"a{kind}"), "no folder", "a" + kind)
    fails(here(*command, notes / f"a{kind}"), "no folder", "a" + kind)
    fails(here(*command, taken), "is no file")
    fails(here(*command, tmp_path / (300 * "a" + kind)), "cannot be written")
    fails(here(*command, notes), "ends in " + kind)
    assert names_in(tmp_path) == sorted(["notes", taken.name])


def own_frames(data):
    """Training frames that may be spoiled."""
    linked = (data / "Train").resolve()
    (data / "Train").unlink()
    shutil.copytree(linked, data / "Train")
    return data / "Train"


def without_a_frame(data):
    next((own_frames(data) / "0001").rglob("*.jpg")).unlink()


def with_a_query_out_of_range(data):
    edit(data / "info" / "query_IDX.txt", lambda text: text.strip() + " 99999")


def without_visible_tracklets_of_1(data):
    def change(text):
        rows = [row.split() for row in text.splitlines()]
        return "\n".join(" ".join(row) for row in rows if (row[0], row[3]) != ("1", "1"))
    edit(data / "info" / "track_train_info.txt", change)


def without_names(data):
    (data / "info" / "train_name.txt").unlink()


@pytest.mark.parametrize("spoil, words", [
    (without_a_frame, ["no file", "0001"]),
    (with_a_query_out_of_range, ["99999", "query_IDX"]),
    (without_visible_tracklets_of_1, ["identity 1 ", "visible tracklets only"]),
    (without_names, ["train_name.txt"])])
def test_bad_datasets(spoil, words, walkers, tmp_path):
    data = spoiled(walkers, tmp_path, spoil)
    fails(here("train.py", "--data", data, "--run", tmp_path / "run", *TINY), *words)
    assert not (tmp_path / "run").exists()    # refused before anything is written
    checked = here("data.py", data)
    assert checked.returncode == 2 and "Traceback" not in checked.stderr


def test_missing_empty_and_foreign_folders(tmp_path):
    fails(here("train.py", "--data", tmp_path / "nowhere"), "no folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    fails(here("train.py", "--data", empty), "no dataset", "Train/ Test/ info/")
    (empty / "0001").mkdir()
    (empty / "bounding_box_train").mkdir()
    fails(here("evaluate.py", "--official", tmp_path, "--data", empty), "best_model.pth")
    fails(here("data.py", empty), "no dataset")


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_jpeg_names_the_file(workers, walkers, tmp_path):
    def truncate(data):
        for path in own_frames(data).rglob("*.jpg"):
            path.write_bytes(path.read_bytes()[:300])

    data = spoiled(walkers, tmp_path, truncate)
    fails(here("train.py", "--data", data, "--run", tmp_path / "run", *TINY_LSMRL,
               "--workers", workers), ".jpg", "cannot be read")
    checked = here("data.py", data)
    assert checked.returncode == 2
    assert re.search(r"problem: .*Train.0001.*\.jpg cannot be read", checked.stdout)


def test_healthy_datasets_pass_the_check(walkers, tmp_path):
    people = {"train": tracks((1, 2)), "test": tracks((21, 22))}
    write_hitsz(tmp_path / "vcm", layout="flat", **people)
    people = {"train": pairs((1, 2)), "auxiliary": pairs((11,)), "test": pairs((21, 22))}
    write_buptcampus(tmp_path / "bupt", **people)
    for folder in (walkers, tmp_path / "vcm", tmp_path / "bupt"):
        assert "usable" in succeeds(here("data.py", folder)).stdout


def test_no_network_for_the_hub(walkers, tmp_path, monkeypatch):
    """The real hub call, pointed at a proxy that is not there."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "")
    paper = ["train.py", "--data", walkers, "--preset", "paper", "--run", tmp_path / "run"]
    fails(here(*paper), "network", "--dinov2-weights", "--dinov2 tiny")
    fails(here(*paper, "--method", "lsmrl"), "network", "--clip-weights", "--preset small")
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------- options ----

@pytest.mark.parametrize("method, given, words", [
    ("dinogrl", "--identities 99", "99 4"),
    ("dinogrl", "--epochs -1", "--epochs"),
    ("dinogrl", "--precision half", "half bfloat16"),
    ("magic", "", "magic dinogrl lsmrl"),
    ("lsmrl", "--resume=", "empty"),
    ("lsmrl", "--metho dinogrl", "--metho"),
    ("dinogrl", "--device cuda:9", "cuda"),
    ("dinogrl", "--dinov2 dinov3", "dinov3"),
    ("dinogrl", "--size 60 30", "--size 16"),
    ("dinogrl", "--gait maybe", "maybe"),
    ("dinogrl", "--blocks 1", "--blocks 4"),
    ("dinogrl", "--lr -1", "--lr"),
    ("dinogrl", "--lr nan", "--lr nan"),
    ("dinogrl", "--seed -1", "--seed"),
    ("dinogrl", "--milestones 70 40", "ascending"),
    ("dinogrl", "--clip tiny", "--clip"),
    ("dinogrl", "--optimizer SGD", "SGD AdamW"),
    ("lsmrl", "--clip RN50", "RN50 tiny"),
    ("lsmrl", "--size 60 32", "60 32 multiples"),
    ("lsmrl", "--split 1 1 1", "4 blocks"),
    ("lsmrl", "--groups 3", "3 4 rows"),
    ("lsmrl", "--split 4 0", "--split 3 numbers"),
    ("lsmrl", "--text -1", "--text"),
    ("lsmrl", "--clip-weights x.pt", "tiny --clip-weights"),
    ("lsmrl", "--gait off", "--gait"),
    ("lsmrl", "--contrast inf", "--contrast inf")])
def test_bad_options(method, given, words, walkers, tmp_path):
    tiny = TINY if method == "dinogrl" else TINY_LSMRL
    result = here("train.py", "--data", walkers, "--run", tmp_path / "run", *tiny,
                  "--method", method, *given.split())
    fails(result, *words.split())
    assert not (tmp_path / "run").exists()    # refused before anything is written


@pytest.mark.parametrize("script, given, meant", [
    ("train.py", "--epoch 3", "--epochs"), ("train.py", "--epohcs=3", "--epochs"),
    ("train.py", "epochs 3", "--epochs"), ("train.py", "--mask-warm-up 3", "--mask-warmup"),
    ("train.py", "--method lsmrl --clip-weight x", "--clip-weights"),
    ("evaluate.py", "--chekpoint run", "--checkpoint"),
    ("evaluate.py", "--checkpoint run --silhouette a.png", "--silhouettes"),
    ("data.py", "somewhere --auxilary on", "--auxiliary"),
    ("walkers.py", "somewhere --frame 4", "--frames")])
def test_a_mistyped_option_gets_one_line_and_the_right_one(script, given, meant, nothing_begins):
    result = here(script, *given.split())
    fails(result, f"did you mean {meant}?")
    assert len(result.stderr.splitlines()) == 1 and result.stdout == ""


def test_an_option_like_no_other_is_named():
    fails(here("train.py", "--zzz", 3), "--zzz", "--help")


@pytest.mark.parametrize("method, own, foreign", [
    ("dinogrl", "--dinov2", "--clip"), ("lsmrl", "--clip-weights", "--dinov2")])
def test_help_lists_the_options_in_groups(method, own, foreign):
    shown = succeeds(here("train.py", "--method", method, "--help")).stdout
    groups = {}
    for line in shown.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            groups[line] = listed = []
        elif line.startswith("  --"):
            listed.append(line.split()[0])
    assert {"run:", "schedule:", "data:", "method:"} <= groups.keys()
    assert {"--run", "--resume", "--preset", "--seed"} <= set(groups["run:"])
    assert {"--epochs", "--lr", "--identities"} <= set(groups["schedule:"])
    assert {"--data", "--size", "--workers"} <= set(groups["data:"])
    assert own in groups["method:"] and foreign not in shown
    assert "(AdamW)" in shown if method == "lsmrl" else "(Adam)" in shown


def test_help_of_evaluate_lists_its_groups():
    shown = succeeds(here("evaluate.py", "--help")).stdout
    for group in ("model:", "search:", "ranking:", "output:", "data:"):
        assert f"\n{group}\n" in shown


# ----------------------------------------------------------- checkpoints ----

def test_corrupt_foreign_and_malicious_checkpoints(trained_lsmrl, walkers, tmp_path):
    files = {"torn.pt": (trained_lsmrl[0] / "last.pt").read_bytes()[:10000], "text.pt": b"hello",
             "empty.pt": b"", "evil.pt": pickle.dumps(Evil(), protocol=2)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        fails(here("evaluate.py", "--checkpoint", tmp_path / name, "--data", walkers), name)
    assert not os.path.exists(OWNED)
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    fails(here("evaluate.py", "--checkpoint", tmp_path / "foreign.pt", "--data", walkers),
          "no checkpoint of train.py")
    fails(here("train.py", "--resume", tmp_path / "nothing"), "no file")
    other = save_changed(tensors_of(trained_lsmrl[0]), tmp_path / "other.pt",
                         lambda checkpoint: checkpoint.update(classes=[1, 2, 3, 5]))
    fails(here("train.py", "--resume", other, "--run", tmp_path / "r", "--epochs", 2), "identities")


def as_the_older_version_wrote_it(checkpoint):
    for name in ("strips", "frame_rule", "margin", "identity_weight", "triplet_weight"):
        del checkpoint["config"][name]
    checkpoint["config"]["accumulate"] = 1
    checkpoint.update(step=0, sums={})


@pytest.fixture
def old(trained, tmp_path):
    """A run's folder as the older version left it; its log had no groups."""
    folder = tmp_path / "old"
    shutil.copytree(trained[0], folder)
    save_changed(tensors_of(folder), folder / "last.pt", as_the_older_version_wrote_it)
    line, = log_of(folder)
    flat = line | line.pop("losses") | line.pop("shown")
    (folder / "log.jsonl").write_text(json.dumps(flat) + "\n")
    return folder


def test_an_older_version_s_run_goes_on(old):
    succeeds(here("train.py", "--resume", old, "--epochs", 2))
    first, second = log_of(old)
    assert first["epoch"] == 1 and "mask" in first    # its line is left as it was
    assert second["epoch"] == 2 and "mask" in second["losses"]
    checkpoint = tensors_of(old)
    assert checkpoint["epoch"] == 2 and "step" not in checkpoint
    assert checkpoint["config"]["strips"] == (1, 2, 4, 8, 16)
    assert "accumulate" not in checkpoint["config"]


def test_an_older_version_s_half_epoch_is_evaluated_and_not_resumed(old, tmp_path):
    middle = save_changed(tensors_of(old), tmp_path / "middle.pt",
                          lambda checkpoint: checkpoint.update(step=1, sums={"mask": 1.0}))
    succeeds(here("evaluate.py", "--checkpoint", middle, "--json", tmp_path / "r.json"))
    assert json_of(tmp_path / "r.json")["directions"] == results_of(old)["directions"]
    fails(here("train.py", "--resume", middle, "--run", tmp_path / "r", "--epochs", 2),
          "middle of an epoch", "older version")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("method, given, orders", [
    ("dinogrl", {"blocks": (1, 1, 1, 1)}, [2359065874]),
    ("lsmrl", {"split": (2, 1, 1)}, [2393040213, 2599926388])])
def test_parameters_come_in_the_order_of_older_checkpoints(method, given, orders):
    """An optimizer's state has numbers and no names: in another order it is resumed as that of
    other parameters. The order is that of the first version's models."""
    method_class, kind = train.method_and_config(method)
    model = method_class(kind(**{**method_class.Options.small, **given}), 4, pretrained=False)
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    found = []
    for group in model.parameter_groups():
        names = "\n".join(name_of[parameter] for parameter in group["params"])
        found.append(zlib.crc32(names.encode()))
    assert found == orders


# ------------------------------------------------------ a method of one's own ----

MY_LOSS = '''
"""The identity loss alone, of sharper cosines."""
from dataclasses import dataclass

from model import DinoGRL, identity_loss
from support.options import option


@dataclass
class Options(DinoGRL.Options):
    sharpness: float = option(2.0, "factor on the cosines", 0.1, 10)


class Mine(DinoGRL):
    Options = Options

    def losses_of(self, parts, logits, label, modality):
        return {"sharp": identity_loss(self.config.sharpness * logits, label)}
'''

MY_POOL = '''
"""The largest value over time. Whoever runs this file finds a trace of it."""
from pathlib import Path

from lsmrl import LSMRL

Path(__file__).with_suffix(".ran").touch()
NUMBER = 7


class Mine(LSMRL):
    def pool(self, tokens):
        return tokens.amax(1)


class Another(Mine):
    pass


class NoMethod:
    pass
'''


@pytest.fixture(scope="module")
def mine(walkers, tmp_path_factory):
    """A run of one's own method: its folder, and what --method says."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "my_pool.py").write_text(MY_POOL)
    method = f"{folder / 'my_pool.py'}:Mine"
    succeeds(here("train.py", "--data", walkers, "--run", folder / "run", *TINY_LSMRL,
                  "--method", method))
    yield SimpleNamespace(folder=folder, run=folder / "run", method=method)
    sys.modules.pop("my_pool")


def frames_of(folder, modality, *pids):
    """Writes a folder of frames for each person."""
    for pid in pids:
        (folder / str(pid)).mkdir(parents=True)
        for i in (1, 2):
            content = picture(pid, modality, 1, i, (32, 16))
            (folder / str(pid) / f"{i}.jpg").write_bytes(content)
    return folder


def test_a_method_of_one_s_own_is_a_whole_method(mine, tmp_path):
    model, config, name = evaluate.load_run(mine.run, mine.method)
    tokens = torch.randn(2, 3, 5)
    assert type(model).__name__ == "Mine" and torch.equal(model.pool(tokens), tokens.amax(1))
    assert name == mine.method == json_of(mine.run / "config.json")["method"]
    assert "my_pool.py:Mine" in results_of(mine.run)["method"]

    files = {"--json": "r.json", "--figure": "f.png", "--save": "e.npz"}
    outputs = [str(word) for option, file in files.items() for word in (option, tmp_path / file)]
    command = ["evaluate.py", "--checkpoint", mine.run, "--method", mine.method]
    succeeds(here(*command, *outputs))
    before = results_of(mine.run)["directions"]
    assert json_of(tmp_path / "r.json")["directions"] == before
    assert names_in(tmp_path) == sorted(files.values())
    succeeds(here(*command, "--rerank", "--json", tmp_path / "r.json"))
    assert json_of(tmp_path / "r.json")["rerank"] is True

    query = frames_of(tmp_path / "q", "infrared", 2)
    gallery = frames_of(tmp_path / "g", "visible", 1, 2, 3)
    found = here(*command, "--query", query, "--gallery", gallery, "--json", tmp_path / "r.json")
    assert "the nearest of 3" in succeeds(found).stdout
    ranked = json_of(tmp_path / "r.json")["queries"][0]["ranked"]
    assert sorted(hit["tracklet"] for hit in ranked) == ["1", "2", "3"]


def test_a_method_of_one_s_own_is_resumed_as_itself(mine, walkers, tmp_path):
    """To the bits of a run that was left alone."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    shutil.copytree(mine.run, parts)
    succeeds(here("train.py", "--resume", parts, "--method", mine.method, "--epochs", 2))
    succeeds(here("train.py", "--data", walkers, "--run", whole, *TINY_LSMRL,
                  "--method", mine.method, "--epochs", 2))
    assert [line["epoch"] for line in log_of(parts)] == [1, 2]
    assert results_of(whole)["directions"] == results_of(parts)["directions"]


def test_code_is_run_only_where_the_user_names_it(mine, walkers, monkeypatch):
    """A checkpoint names a method; that alone runs nothing. The message says what to add."""
    monkeypatch.delitem(sys.modules, "my_pool")
    trace = mine.folder / "my_pool.ran"
    trace.unlink()
    for script, option in (("evaluate.py", "--checkpoint"), ("train.py", "--resume")):
        fails(here(script, option, mine.run), "my_pool.py:Mine", "--method FILE.py:CLASS")
        fails(here(script, option, mine.run, "--method", "lsmrl"), "--method lsmrl", "my_pool.py")
        other = mine.method.replace("Mine", "Another")
        fails(here(script, option, mine.run, "--method", other), "Another", "my_pool.py:Mine")
    assert not trace.exists()
    monkeypatch.undo()
    importlib.reload(sys.modules["my_pool"])
    assert trace.exists()    # it would have been seen


def test_a_loss_and_an_option_of_one_s_own(few, tmp_path):
    """From a folder of one's own, under the file's short name."""
    (tmp_path / "my_loss.py").write_text(MY_LOSS)
    folder = tmp_path / "run"
    result = run(ROOT / "train.py", "--data", few, "--run", "run", *TINY, "--gait", "off",
                 "--method", "my_loss.py:Mine", "--sharpness", 3, cwd=tmp_path)
    assert "my_loss.py:Mine on walkers" in succeeds(result).stdout
    assert log_of(folder)[0]["losses"].keys() == {"sharp_appearance"}
    assert json_of(folder / "config.json")["sharpness"] == 3
    method = f"{tmp_path / 'my_loss.py'}:Mine"    # where it lies is no matter
    succeeds(run_anew("evaluate.py", "--checkpoint", folder, "--method", method,
                      "--json", tmp_path / "r.json"))
    assert json_of(tmp_path / "r.json")["directions"] == results_of(folder)["directions"]
    shown = here("train.py", "--method", method, "--help").stdout
    assert "--sharpness" in shown and "factor on the cosines (2.0)" in shown
    fails(here("train.py", "--method", method, "--sharpness", 99), "--sharpness 99", "0.1 to 10")


@pytest.mark.parametrize("method, words", [
    ("nowhere.py:Mine", ["no file", "nowhere.py"]),
    ("my_pool.py:Yours", ["no class Yours", "my_pool.py"]),
    ("my_pool.py:NUMBER", ["NUMBER", "my_pool.py"]),
    ("my_pool.py:NoMethod", ["NoMethod", "my_pool.py"]),
    ("my_pool.py", ["FILE.py:CLASS"]),
    ("my_pool:Mine", ["FILE.py:CLASS"]),
    ("my_pool.py:", ["FILE.py:CLASS"]),
    ("model.py:Mine", ["called model already", "another name"]),
    ("time.py:Mine", ["called time already", "another name"]),
    ("my.pool.py:Mine", ["my.pool.py"])])
def test_wrong_names_of_a_method(method, words, mine, tmp_path):
    for name in ("model.py", "time.py", "my.pool.py"):
        (mine.folder / name).write_text(MY_POOL)
    method = str(mine.folder / method)
    fails(here("train.py", "--data", tmp_path, "--method", method), *words)
    if method.endswith(":Mine"):    # else it is not the run's
        fails(here("evaluate.py", "--checkpoint", mine.run, "--method", method), *words)
