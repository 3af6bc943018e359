"""compare.py: the table's arithmetic by hand, what is run, what is refused before it is run."""
import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import compare
import train
from scripts import TINY_LSMRL, fails, here, log_of, results_of, succeeds, tensors_of

import pytest

DIRECTIONS = "infrared->visible", "visible->infrared"


@pytest.fixture
def compared(walkers, tmp_path, monkeypatch):
    """A function: the words of compare.py, beside --data -> what it leaves, in tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return lambda *words: here("compare.py", "--data", walkers, *words)


def config_of(words):
    """What train.py writes into config.json."""
    asked = train.read_command_line(words)
    return {"config": asdict(asked.config), "options": asdict(asked.options)}


def directions(*ranks):
    """Rank-1 in per cent, of both directions or of each."""
    return {direction: {"rank-1": rank / 100, "mAP": rank / 200}
            for direction, rank in zip(DIRECTIONS, ranks, strict=True)}


def leave(walkers, name, words, ranks, **more):
    """Runs of a variant as if they had been done, one for each Rank-1. more: of results.json, a
    list with a value for each seed."""
    for seed, rank in enumerate(ranks, 1):
        folder = Path("runs", "compare", f"{name}-seed{seed}")
        folder.mkdir(parents=True)
        config = config_of(["--data", str(walkers), *words.split()])
        line = {"epoch": config["config"]["epochs"], "rank-1": {}}
        results = {"dataset": "walkers", "directions": directions(rank - 1, rank + 1),
                   "streams": {}, "silhouette_iou": None, "seconds": 1.0}
        results |= {key: values[seed - 1] for key, values in more.items()}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "log.jsonl").write_text(json.dumps(line) + "\n")
        (folder / "results.json").write_text(json.dumps(results))


def cells(result):
    """The table that was printed, a list of cells for each of its lines."""
    rows = [line for line in succeeds(result).stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


# ----------------------------------------------------------------- table ----

def test_table_and_interval_by_hand(compared, walkers):
    streams = [{"gait": directions(r, r + 2), "appearance": directions(50, 50)}
               for r in (39, 49, 59)]
    leave(walkers, "whole", "", [70, 72, 74], streams=streams, silhouette_iou=[0.7, 0.8, 0.75])
    leave(walkers, "mine", "--lr 0.1", [73, 74, 78])
    leave(walkers, "same", "--lr 0.2", [69, 74, 73])
    result = compared("whole:", "mine: --lr 0.1", "same: --lr 0.2")
    # mine: the differences are 3, 2, 4; 4.303 * 1 / sqrt(3) = 2.48. same: -1, 2, -1 with the
    # deviation sqrt(3), so 4.303. Over the better stream: 20, 22, 14 with the deviation 4.163.
    assert cells(result) == [
        ["", "Rank-1", "mAP", "IoU", "gait alone", "appearance alone",
         "both minus the better stream", "Rank-1 minus that of whole"], ["---"] * 8,
        ["whole", "72.0 ± 2.0", "36.0 ± 1.0", "75.0 ± 5.0", "50.0 ± 10.0", "50.0 ± 0.0",
         "+18.7 (+8.3 to +29.0)", ""],
        ["mine", "75.0 ± 2.6", "37.5 ± 1.3", "", "", "", "", "+3.0 (+0.5 to +5.5)"],
        ["same", "72.0 ± 2.6", "36.0 ± 1.3", "", "", "", "", "+0.0 (-4.3 to +4.3)"]]


def test_one_seed_has_no_spread_and_no_interval(compared, walkers):
    leave(walkers, "a", "", [70])
    leave(walkers, "b", "--lr 0.1", [80])
    result = compared("--seeds", 1, "a:", "b: --lr 0.1")
    assert cells(result)[2:] == [["a", "70.0", "35.0", ""], ["b", "80.0", "40.0", "+10.0"]]


def test_quantiles_hold_95_per_cent_of_student_s_t():
    for n, t in enumerate(compare.T_QUANTILES, 1):
        factor = math.gamma((n + 1) / 2) / math.gamma(n / 2) / math.sqrt(n * math.pi)
        middles = [t * (i + 0.5) / 2000 for i in range(2000)]
        density = [factor * (1 + x * x / n) ** (-(n + 1) / 2) for x in middles]
        assert abs(2 * sum(density) * t / 2000 - 0.95) < 1e-4


# ------------------------------------------------------------------ runs ----

@pytest.mark.parametrize("words, answer", [
    ([], ["no variant"]),
    (["a:", "b: --pbmg off"], ['"b"', "--pbmg"]),
    (["--epoch", "3", "a:"], ["--epoch"]),
    (["a:", "b: --method no.py:B"], ['"b"', "no.py"]),
    (["a:", "b: 'open"], ['"b"', "quotation"]),
    (["a:", "a: --gait off"], ["same name"]),
    (["--data", "no/where", "a:"], ["no/where"])])
def test_refused_before_anything_is_trained(compared, words, answer):
    fails(compared(*words), *answer)
    assert not os.path.exists("runs/compare") or not os.listdir("runs/compare")


def test_a_run_with_other_options_is_refused_and_an_equal_one_is_not_repeated(compared, walkers):
    leave(walkers, "a", "--lr 0.1", [70])
    assert cells(compared("--seeds", 1, "--workers", 3, "a: --lr 0.1"))[2][1] == "70.0"
    fails(compared("--seeds", 1, "a:"), "a-seed1", "lr differ", "--out")


# In place of train.py. Seed 3 fails while a file is there.
FAKE = """
import os, shutil, sys
how = "--resume" if "--resume" in sys.argv else "--run"
folder = sys.argv[sys.argv.index(how) + 1]
name = os.path.basename(folder)
if name == "a-seed3" and os.path.exists("failing"):
    sys.exit("error: no luck")
print(how, name, file=open("ran.txt", "a"))
shutil.copytree(os.path.join("made", "runs", "compare", name), folder, dirs_exist_ok=True)
"""


def test_goes_on_after_a_stop_and_ends_with_the_same_table(
        compared, walkers, tmp_path, monkeypatch):
    """Seed 2 was stopped between its last epoch and the evaluation: its results are of an earlier
    one. Seed 3 fails at first."""
    (tmp_path / "made").mkdir()
    monkeypatch.chdir(tmp_path / "made")
    leave(walkers, "a", "", [70, 72, 74])
    expected = cells(compared("a:"))
    stopped = tmp_path / "runs" / "compare" / "a-seed2"
    shutil.copytree("runs/compare/a-seed2", stopped)
    [last] = log_of(stopped)
    del last["rank-1"]
    (stopped / "log.jsonl").write_text(json.dumps(last) + "\n")
    (stopped / "results.json").write_text("{}")
    (stopped / "last.pt").touch()

    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "failing").touch()
    monkeypatch.setattr(train, "__file__", str(tmp_path / "fake.py"))
    failed = compared("--jobs", 2, "a:")
    assert failed.returncode == 2 and "no luck" in failed.stderr
    (tmp_path / "failing").unlink()
    assert cells(compared("a:")) == expected
    assert sorted((tmp_path / "ran.txt").read_text().splitlines()) == [
        "--resume a-seed2", "--run a-seed1", "--run a-seed3"]


def test_a_real_run_is_trained_once(compared, monkeypatch):
    words = [*TINY_LSMRL, "--seeds", 1, "a:"]
    expected = cells(compared(*words))
    [folder] = Path("runs", "compare").glob("*/")
    assert tensors_of(folder)["epoch"] == 1 and results_of(folder)["dataset"] == "walkers"
    monkeypatch.setattr(train, "__file__", "nowhere")
    assert cells(compared(*words)) == expected
