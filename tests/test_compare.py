"""compare.py: what is run, what is not run again, what is refused before anything is trained, and
the table's arithmetic, by hand."""
import json
import math
import os
import shutil
import subprocess
import sys

import compare
import train
from scripts import ROOT, TINY_LSMRL, fails, run, same_bits, succeeds, tensors_of
from support.files import UserError
from support.pictures import COLOURS, GREY

import pytest
from PIL import Image, ImageColor

# A method of one's own. In the first step of epoch 2 it ends the comparison, if it is told to.
METHOD = """
import os, signal, time
from lsmrl import LSMRL

class Mine(LSMRL):
    steps = 0

    def forward(self, frames, modality, label):
        self.steps += 1
        if "STOP" in os.environ and self.steps == 3:
            os.kill(os.getppid(), signal.SIGTERM)
            while True:
                time.sleep(0.1)    # until the comparison stops this
        return super().forward(frames, modality, label)
"""
# In place of train.py: seeds 1 and 2 wait for each other; seed 3 fails while the file is there.
FAKE = """
import json, os, signal, sys
from pathlib import Path
signal.alarm(3600)    # what hangs is to end some day
folder, seed = Path(sys.argv[2]), int(sys.argv[4])
print("says", os.environ["OMP_NUM_THREADS"], flush=True)
if seed < 3:
    open("meeting", "rw"[seed - 1]).close()
elif os.path.exists("failing"):
    sys.exit("error: no luck")
folder.mkdir()
record = {"rank-1": 0.01 * seed, "mAP": 0.5}
results = {"dataset": "fake", "directions": {"there": record, "back": record}, "seconds": seed}
(folder / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture
def compared(tmp_path, monkeypatch, capsys):
    """-> a function: the words of compare.py -> what it prints on stdout and stderr, in
    tmp_path."""
    monkeypatch.chdir(tmp_path)

    def main(*words):
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, words)])
        compare.main()
        return capsys.readouterr()
    return main


def leave(text, ranks, for_all=(), **more):
    """Runs of a variant as if they had been done, one for each Rank-1 in per cent. for_all: options
    of all variants. more: of results.json, a list with a value for each seed."""
    for seed, rank in enumerate(ranks, 1):
        one = compare.Run(compare.read_variant(text, list(for_all)), seed, "runs/compare")
        os.makedirs(one.folder)
        records = [{"rank-1": (rank + off) / 100, "mAP": rank / 200} for off in (-1, 1)]
        results = {"dataset": "walkers", "directions": both(*records), "seconds": 1.0}
        results |= {name: values[seed - 1] for name, values in more.items()}
        with open(one.results_file, "w") as file:
            json.dump(results, file)
        with open(one.folder + ".json", "w") as file:
            json.dump({**one.variant.marks, compare.DONE: True}, file)


def both(there, back):
    return {"infrared->visible": there, "visible->infrared": back}


def cells(printed):
    """The table of what was printed, a list of cells for each of its lines."""
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


# ----------------------------------------------------------------- table ----

def test_table_and_interval_by_hand(compared):
    streams = [{"gait": both({"rank-1": r}, {"rank-1": r + 0.02}), "appearance": both(
        {"rank-1": 0.5}, {"rank-1": 0.5})} for r in (0.39, 0.49, 0.59)]
    leave("whole:", [70, 72, 74], streams=streams, silhouette_iou=[0.7, 0.8, 0.75])
    leave("mine: --lr 0.1", [73, 74, 78], streams=[{}] * 3, silhouette_iou=[None] * 3)
    leave("same: --lr 0.2", [69, 74, 73])
    printed = compared("whole:", "mine: --lr 0.1", "same: --lr 0.2", "--figure", "a.png").out
    # mine: the differences are 3, 2, 4; 4.303 * 1 / sqrt(3) = 2.48. same: -1, 2, -1 with the
    # deviation sqrt(3), so 4.303. Over the better stream: 20, 22, 14 with the deviation 4.163.
    assert cells(printed) == [
        ["", "Rank-1", "mAP", "IoU", "gait alone", "appearance alone",
         "both minus the better stream", "Rank-1 minus that of whole"], ["---"] * 8,
        ["whole", "72.0 ± 2.0", "36.0 ± 1.0", "0.750 ± 0.050", "50.0 ± 10.0", "50.0 ± 0.0",
         "+18.7 (+8.3 to +29.0)", ""],
        ["mine", "75.0 ± 2.6", "37.5 ± 1.3", "", "", "", "", "+3.0 (+0.5 to +5.5)"],
        ["same", "72.0 ± 2.6", "36.0 ± 1.3", "", "", "", "", "+0.0 (-4.3 to +4.3)"]]
    assert "Seeds 1 to 3, walkers: `python compare.py whole: 'mine: --lr 0.1' 'same" in printed
    assert "holds 0 cannot be told from none" in printed
    drawn = {colour for _, colour in Image.open("a.png").getcolors(10 ** 6)}
    assert {ImageColor.getrgb(COLOURS[0]), ImageColor.getrgb(COLOURS[1]), GREY} <= drawn


def test_one_seed_has_no_spread_and_one_variant_no_difference(compared):
    leave("a|b:", [70])
    leave("other: --lr 0.1", [80])
    printed = compared("--seeds", 1, "a|b:", "other: --lr 0.1", "--figure", "a.png").out
    assert "| a\\|b | 70.0 | 35.0 |  |\n| other | 80.0 | 40.0 | +10.0 |" in printed
    assert "One seed has no deviation and no interval" in printed and "±" not in printed
    drawn = {colour for _, colour in Image.open("a.png").getcolors(10 ** 6)}
    assert ImageColor.getrgb(COLOURS[1]) not in drawn    # nothing looks as if it were certain
    assert cells(compared("--seeds", 1, "other: --lr 0.1", "--figure", "a.png").out)[1:] == [
        ["---"] * 3, ["other", "80.0", "40.0"]]


def test_quantiles_hold_95_per_cent_of_student_s_t():
    known = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 30: 2.042}
    assert all(compare.T_QUANTILES[n - 1] == value for n, value in known.items())
    for n, t in enumerate(compare.T_QUANTILES, 1):
        factor = math.gamma((n + 1) / 2) / math.gamma(n / 2) / math.sqrt(n * math.pi)
        middles = [t * (i + 0.5) / 2000 for i in range(2000)]
        density = [factor * (1 + x * x / n) ** (-(n + 1) / 2) for x in middles]
        assert abs(2 * sum(density) * t / 2000 - 0.95) < 1e-4
    assert len(compare.T_QUANTILES) == 30


# --------------------------------------------------------------- refused ----

@pytest.mark.parametrize("words, answer", [
    ([], "no variant; expected .NAME: OPTIONS"),
    (["whole", "b: --gait off"], "whole is neither an option nor a variant"),
    (["a:", "b: --pbmg off"], 'variant "b": --pbmg is not known; did you mean --pbmge'),
    (["--epoch", "3", "a:"], "did you mean --epochs"),
    (["a:", "b: --pbmge maybe"], "expected on or off"),
    (["a:", "b: --epochs -1"], "--epochs -1; expected 0 to"),
    (["a:", "b: --method no.py:B"], 'variant "b": .*no file'),
    (["a:", "b: 'open"], "No closing quotation"),
    (["a:", ": --gait off"], "without letters"),
    (["No gait:", "no-gait: --gait off"], "two variants of the same name"),
    (["--seed", "4", "a:"], "--seed is for compare.py"),
    (["a: --resume=runs/x"], "--resume=runs/x is for compare.py"),
    (["--seeds", "0", "a:"], "--seeds 0; expected 1 to 31"),
    (["--jobs", "0", "a:"], "--jobs 0; expected"),
    (["--out", "", "a:"], "--out is empty"),
    (["--figure", "a.jpg", "a:"], "ends in .png"),
    (["--figure", "no/a.png", "a:"], "no folder no"),
    (["--data", "no/where", "a:"], "no/where")])
def test_refused_before_anything_is_trained(compared, words, answer):
    with pytest.raises(UserError, match=answer):
        compared(*words)
    assert not os.path.exists("runs/compare") or not os.listdir("runs/compare")


def test_a_run_of_other_options_or_of_a_changed_method_is_refused(compared, tmp_path):
    (tmp_path / "idea.py").write_text(METHOD)
    own = f"mine: --method {tmp_path / 'idea.py'}:Mine"
    leave("whole: --lr 0.1", [70])
    leave(own, [70])
    assert "done before" in compared("--seeds", 1, "--workers", 3, "whole: --lr 0.1", own).err
    with pytest.raises(UserError, match=r"whole-seed1 holds another run \(lr differ\).*--out"):
        compared("--seeds", 1, "whole:")
    (tmp_path / "idea.py").write_text(METHOD + "# another idea\n")
    with pytest.raises(UserError, match=r"mine-seed1 holds another run \(the method's file"):
        compared("--seeds", 1, own)
    os.remove("runs/compare/whole-seed1.json")    # whose run is it?
    with pytest.raises(UserError, match="whole-seed1 holds another run"):
        compared("--seeds", 1, "whole: --lr 0.1")


# ------------------------------------------------------------------ runs ----

def test_runs_at_once_and_one_that_fails(compared, walkers, tmp_path, monkeypatch):
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "failing").touch()
    os.mkfifo(tmp_path / "meeting")
    monkeypatch.setattr(train, "__file__", str(tmp_path / "fake.py"))
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    words = ["--jobs", 2, "a:", "--data", walkers, "--out", "made/here"]
    with pytest.raises(UserError, match="a, seed 3 ended with exit code 1: no luck; .*seed3.log"):
        compared(*words)
    (tmp_path / "failing").unlink()
    printed = compared(*words)    # seeds 1 and 2 would wait for each other
    assert printed.err.splitlines()[-3:] == [
        "a, seed 1: done before, Rank-1 1.0", "a, seed 2: done before, Rank-1 2.0",
        "a, seed 3: 3 s, Rank-1 3.0"]
    assert cells(printed.out)[2][1] == "2.0 ± 1.0"
    assert (tmp_path / "made/here/a-seed1.log").read_text() == "says 3\n"


def test_a_run_that_is_killed_is_not_told_by_what_was_said_before_it(compared, walkers, tmp_path,
                                                                     monkeypatch):
    (tmp_path / "fake.py").write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.setattr(train, "__file__", str(tmp_path / "fake.py"))
    os.makedirs("runs/compare")
    (tmp_path / "runs/compare/a-seed1.log").write_text("epoch 3/6\n")
    with pytest.raises(UserError, match="a, seed 1 ended with exit code -9: without a word; "):
        compared("--seeds", 1, "a:", "--data", walkers)


def test_a_run_that_is_alive_keeps_its_marks(compared, walkers, tmp_path):
    """Another comparison's, say, of other options under the same name."""
    folder = tmp_path / "runs" / "compare" / "a-seed1"
    folder.mkdir(parents=True)
    holder = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from support.files import try_lock
file = open({str(folder / "lock")!r}, "a")
print(try_lock(file), flush=True)
sys.stdin.read()"""
    with subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as alive:
        assert alive.stdout.readline().strip() == b"True"
        with pytest.raises(UserError, match="a-seed1 belongs to a run that is alive; wait"):
            compared("--seeds", 1, "a:", "--data", walkers)
        alive.stdin.close()
    assert os.listdir(folder.parent) == ["a-seed1"] and os.listdir(folder) == ["lock"]


def test_goes_on_after_a_stop_and_ends_with_the_same_table(walkers, tmp_path, monkeypatch):
    (tmp_path / "idea.py").write_text(METHOD)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    parts.mkdir()
    monkeypatch.chdir(parts)
    for_all = [*TINY_LSMRL, "--epochs", "2", "--data", str(walkers)]
    leave("first:", [70], for_all)
    command = [ROOT / "compare.py", "--seeds", 1, *for_all, "first:",
               f"mine: --method {tmp_path / 'idea.py'}:Mine"]
    stopped = run(*command, cwd=parts, env={"STOP": "1"})
    assert stopped.returncode == 130 and "go on by the same command" in stopped.stderr
    done, begun = (parts / "runs" / "compare" / f"{name}-seed1" for name in ("first", "mine"))
    assert tensors_of(begun)["epoch"] == 1 and not (begun / "results.json").exists()
    assert "--resume" in (begun.parent / "mine-seed1.log").read_text()
    before = (done / "results.json").stat().st_mtime_ns
    shutil.copytree(parts, whole, ignore=shutil.ignore_patterns("mine*"))

    once, resumed = (succeeds(run(*command, cwd=folder)) for folder in (whole, parts))
    assert once.stdout == resumed.stdout and len(cells(once.stdout)) == 4
    same_bits(tensors_of(whole / "runs" / "compare" / "mine-seed1"), tensors_of(begun))
    assert (done / "results.json").stat().st_mtime_ns == before
    assert os.listdir(done) == ["results.json"]
    first, second = resumed.stderr.splitlines()    # a line for each run
    assert "first, seed 1: done before, Rank-1 " in first and "mine, seed 1: " in second


def test_what_a_user_can_cause_is_one_line(tmp_path):
    fails(run(ROOT / "compare.py", "whole:", "b: --gat off", cwd=tmp_path), "--gat", "--gait")
    assert not list(tmp_path.iterdir())
