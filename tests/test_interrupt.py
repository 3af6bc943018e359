"""A run may be stopped at any moment, and nothing is lost: resumed, it ends with the weights of the
run that was left alone. Every stop comes at an event, never at a time."""
import errno
import json
import os
import shutil

from scripts import (
    TINY,
    TINY_LSMRL,
    fails,
    here,
    log_of,
    results_of,
    run,
    same_bits,
    start,
    tensors_of,
    together,
    trained,
)
from support import files
from support.files import RunFolder, UserError, write_json

import pytest
import torch

# Two evaluations; loader processes change nothing.
LONGER = [*TINY_LSMRL, "--epochs", "4", "--steps", "3", "--evaluate-every", "2"]
DINOGRL = [*TINY, "--epochs", "2", "--dino-size", "112", "56"]


@pytest.fixture(scope="module")
def whole(walkers, tmp_path_factory):
    """The run that was left alone."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    trained("--data", walkers, "--run", folder, *LONGER)
    return folder


def same_run(a, b, epochs):
    """The same weights, bit for bit, the same optimizer, the same log but for the seconds."""
    same_bits(tensors_of(a), tensors_of(b))
    logs = [log_of(a), log_of(b)]
    for line in logs[0] + logs[1]:
        del line["seconds"]
    assert logs[0] == logs[1] and len(logs[0]) == epochs
    assert results_of(a)["directions"] == results_of(b)["directions"]
    assert set(os.listdir(a)) == set(os.listdir(b))    # nothing half-written is left


# ------------------------------------------------------------- stopped ----

def how_to_go_on(folder, epochs):
    return (f"interrupted; {folder / 'last.pt'} holds {epochs} whole epochs; go on: python "
            f"train.py --resume {folder}")


def test_ctrl_c_and_sigterm_say_how_to_go_on(whole, walkers, tmp_path):
    folder = tmp_path / "run"
    result = trained("--data", walkers, "--run", folder, *LONGER, "--workers", 1,
                     at="step", number=5, what="SIGINT")
    assert result.stderr.splitlines()[-1] == how_to_go_on(folder, 1)
    assert tensors_of(folder)["epoch"] == 1
    # As a job scheduler stops it, loader process and all.
    result = trained("--resume", folder, at="step", number=5, what="SIGTERM")
    assert result.stderr.splitlines()[-1] == how_to_go_on(folder, 2)
    # While the third epoch is being saved, the second is what there is.
    for byte in 100, 100_000:
        result = trained("--resume", folder, at="byte", file="last.pt", number=1, byte=byte,
                         what="SIGINT")
        assert result.stderr.splitlines()[-1] == how_to_go_on(folder, 2)
        assert tensors_of(folder)["epoch"] == 2
    trained("--resume", folder)
    same_run(whole, folder, epochs=4)


def test_a_stop_before_the_first_checkpoint_says_start_again(walkers, tmp_path):
    command = ["--data", walkers, "--run", tmp_path / "run", *DINOGRL]
    result = trained(*command, at="step", number=1, what="SIGTERM")
    assert result.stderr == "interrupted before the first checkpoint; start again\n"


# Moments of a run, each of which kills it, and how many whole epochs it has then.
KILLS = [
    # In its second epoch; its loader process lives on for some seconds.
    ({"at": "step", "number": 5}, 1),
    # While the checkpoint is written: in its beginning, in its midst, and when it is whole.
    ({"at": "byte", "file": "last.pt", "number": 1, "byte": 10}, 1),
    ({"at": "byte", "file": "last.pt", "number": 1, "byte": 2_000_000}, 1),
    ({"at": "replace", "file": "last.pt", "number": 1}, 1),
    # The log already has the second epoch, the checkpoint not.
    ({"at": "open", "file": "last.pt", "number": 1}, 1),
    ({"at": "evaluation", "number": 1}, 2),
    # The evaluation is made up for, and killed again.
    ({"at": "pictures", "number": 1}, 2),
    ({"at": "byte", "file": "curves.png", "number": 1, "byte": 10}, 2),
    ({"at": "byte", "file": "log.jsonl", "number": 1, "byte": 10}, 2),
    # The third epoch, the fourth and its evaluation.
    ({"at": "replace", "file": "last.pt", "number": 2}, 3),
    ({"at": "byte", "file": "results.json", "number": 1, "byte": 10}, 4)]


def kill_lsmrl(folder, walkers):
    command = ["--data", walkers, "--run", folder, *LONGER, "--workers", 1]
    # Nothing to go on with: the folder is used again.
    for name in "config.json", "last.pt":
        trained(*command, at="byte", file=name, number=1, byte=10, what="SIGKILL")
        assert list(folder.glob("*.tmp")) and not (folder / "last.pt").exists()
    fails(run("train.py", "--resume", folder), "no file", "last.pt")
    for moment, epochs in KILLS:
        trained(*command, **moment, what="SIGKILL")
        assert tensors_of(folder)["epoch"] == epochs, moment    # readable, always
        command = ["--resume", folder, "--workers", 0]
    assert "raise --epochs" in trained(*command).stdout


def kill_dinogrl(folder, walkers):
    command = ["--data", walkers, *DINOGRL]
    trained(*command, "--run", folder, at="step", number=2, what="SIGKILL")
    assert set(os.listdir(folder)) == {"config.json", "lock"}
    # The rest of the warm-up is two steps: this is the second one of the first epoch.
    trained(*command, "--run", folder, at="step", number=4, what="SIGKILL")
    assert tensors_of(folder)["epoch"] == 0
    trained("--resume", folder, at="byte", file="last.pt", number=1, byte=4_000_000,
            what="SIGKILL")
    trained("--resume", folder, at="step", number=4, what="SIGKILL")
    trained("--resume", folder, at="open", file="last.pt", number=1, what="SIGKILL")
    trained("--resume", folder, at="byte", file="silhouettes-2.png", number=1, byte=10,
            what="SIGKILL")
    assert tensors_of(folder)["epoch"] == 2
    trained("--resume", folder)


def test_two_runs_killed_many_times_end_as_those_that_were_left_alone(whole, walkers, tmp_path):
    """LSMRL and DinoGRL, whose warm-up cannot be resumed."""
    def dinogrl(folder):
        trained("--data", walkers, "--run", folder / "whole", *DINOGRL)
        kill_dinogrl(folder / "run", walkers)
        same_run(folder / "whole", folder / "run", epochs=2)

    def lsmrl(folder):
        kill_lsmrl(folder, walkers)
        same_run(whole, folder, epochs=4)

    together(lambda follow: follow(tmp_path / follow.__name__), dinogrl, lsmrl)


# ------------------------------------------------------- numbers, disks ----

def test_a_loss_that_is_not_finite_is_named_with_its_tracklets(whole, tmp_path):
    checkpoint = tensors_of(whole)
    checkpoint["model"]["bank"].fill_(0)
    checkpoint["model"]["prompts.words"].fill_(float("nan"))
    (tmp_path / "run").mkdir()
    torch.save(checkpoint, tmp_path / "run" / "last.pt")
    content = (tmp_path / "run" / "last.pt").read_bytes()
    result = here("train.py", "--resume", tmp_path / "run", "--epochs", 5)
    tracklet = os.path.join("Train", "000")
    fails(result, "is nan in epoch 5, step 1;", tracklet, "older and good")
    assert (tmp_path / "run" / "last.pt").read_bytes() == content


def test_a_read_only_folder_keeps_the_old_file_and_says_so(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    path = tmp_path / "results.json"
    path.write_text("before")
    expected = "results.json cannot be written .*Read-only file system.* untouched"
    # Refused at once, or at the last moment.
    for where, name in (files, "open"), (os, "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, refuse, raising=False)
            with pytest.raises(UserError, match=expected):
                write_json(path, {})
        assert path.read_text() == "before" and os.listdir(tmp_path) == ["results.json"]


def test_a_full_disk_keeps_the_checkpoint_and_says_so(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    content = (folder / "last.pt").read_bytes()
    result = run("train.py", "--resume", folder, "--epochs", 5, "--steps", 1,
                 limits={"RLIMIT_FSIZE": 100_000})
    fails(result, "last.pt cannot be written", "untouched")
    assert (folder / "last.pt").read_bytes() == content
    assert set(os.listdir(folder)) == set(os.listdir(whole))


# ---------------------------------------------------------------- locks ----

def test_two_runs_never_share_a_folder(walkers, tmp_path):
    folder = tmp_path / "run"
    command = ["--data", walkers, "--run", folder, *DINOGRL]
    moments = [{"at": "step", "number": 1, "what": "wait"},
               {"at": "byte", "file": "last.pt", "number": 2, "byte": 4_000_000, "what": "wait"}]
    job = start("train.py", *command, "--seed", 1, moments=moments)

    # The first one is in its warm-up, and has no checkpoint yet.
    assert job.answer() == "waiting"
    before = (folder / "config.json").read_bytes()
    second = here("train.py", *command, "--seed", 2)
    fails(second, "belongs to a run that is alive", "another --run")
    assert (folder / "config.json").read_bytes() == before
    assert set(os.listdir(folder)) == {"config.json", "lock"}
    job.send("go on")

    # It writes the checkpoint of its first epoch.
    assert job.answer() == "waiting"
    contents = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    writing, = [name for name in contents if name.endswith(".tmp")]
    assert len(contents[writing]) == 4_000_000
    fails(here("train.py", "--resume", folder), "belongs to a run that is alive")
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == contents
    job.send("go on")

    assert job.end().returncode == 0
    assert json.loads((folder / "config.json").read_text())["seed"] == 1
    assert tensors_of(folder)["epoch"] == 2 and tensors_of(folder)["config"]["seed"] == 1
    assert len(log_of(folder)) == 2 and results_of(folder)["directions"]
    # A dead run's lock is no obstacle.
    assert (folder / "lock").exists()
    assert here("train.py", "--resume", folder).returncode == 0


def test_what_a_dead_run_has_left_is_taken_over_and_nothing_else_is(tmp_path):
    for name in "config.json", "lock", "last.pt.123.tmp", "config.json.7.tmp":
        (tmp_path / name).write_text("left")
    run = RunFolder(str(tmp_path))
    run.check()
    assert len(os.listdir(tmp_path)) == 4    # it only looks
    run.claim("stem", 0)
    assert set(os.listdir(tmp_path)) == {"config.json", "lock"}
    for name in "last.pt", "notes.txt", "notes.txt.7.tmp", "log.jsonl":
        (tmp_path / name).write_text("mine")
        for refused in run.check, RunFolder(str(tmp_path)).check:
            with pytest.raises(UserError, match="is not empty; choose another --run"):
                refused()
        (tmp_path / name).unlink()


def test_two_runs_without_a_name_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = RunFolder(None), RunFolder(None)
    make = os.mkdir

    def late(path, *mode):
        # Between the first one's choice of a name and its folder comes the second one.
        if second.path is None and os.path.basename(path) == "stem-1":
            monkeypatch.setattr(os, "mkdir", make)
            second.claim("stem", 0)
        make(path, *mode)

    monkeypatch.setattr(os, "mkdir", late)
    first.claim("stem", 0)
    assert second.path == os.path.join("runs", "stem-1")
    assert first.path == os.path.join("runs", "stem-2")
    assert set(os.listdir("runs")) == {"stem-1", "stem-2"}


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    for number, is_free in (errno.ENOLCK, True), (errno.ENOSYS, True), (errno.EAGAIN, False):
        def refuse(*_, number=number):
            raise OSError(number, os.strerror(number))
        monkeypatch.setattr(fcntl, "lockf", refuse)
        with open(tmp_path / "lock", "a") as file:
            assert files.try_lock(file) == is_free
