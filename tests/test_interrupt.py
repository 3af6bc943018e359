"""A run may be stopped at any moment, and nothing is lost: resumed, it ends with the weights of the
run that was left alone. Every stop comes at an event, never at a time."""
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from scripts import (
    ROOT,
    TINY,
    TINY_LSMRL,
    fails,
    here,
    log_of,
    results_of,
    same_bits,
    tensors_of,
    together,
)
from support import files
from support.files import RunFolder, UserError, write_json

import pytest
import torch

# Two evaluations; loader processes change nothing.
LONGER = [*TINY_LSMRL, "--epochs", "4", "--steps", "3", "--evaluate-every", "2"]
DINOGRL = [*TINY, "--epochs", "2", "--dino-size", "112", "56"]
DRIVER = '''
"""Does jobs, a line of JSON on stdin each, in processes that are forked: torch is imported once.

A job is {"script", "words", "output", "moments", "limits", "reader"}; at each of its moments, the
number-th time that something happens, something is done: a signal, say. Answers on stdout, a line
each: "waiting", or the exit code."""
import json
import os
import resource
import signal
import sys

import evaluate
import support.files
import train
from support.options import cli

import torch._dynamo    # torch's optimizers import it: three seconds

requests = open(0, "rb", buffering=0, closefd=False)    # the lines that a job reads are left there
answers = os.dup(1)
readers = []


def do(what):
    if what == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "wait":
        os.write(answers, b"waiting\\n")
        requests.readline()
    elif what == "close":
        os.close(readers.pop())
    else:    # the loader processes get it too, as from a terminal
        os.killpg(0, getattr(signal, what))


class Cut:
    """A file; before its byte of that number is written, something is done."""

    def __init__(self, file, byte, what):
        self.file, self.left, self.what = file, byte, what

    def write(self, data):
        if 0 <= self.left < len(data):
            self.file.write(data[:self.left])
            self.file.flush()
            data, self.left = data[self.left:], -1
            do(self.what)
        self.left -= len(data)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def at_the_moment(function, is_meant, number, what, byte=None):
    """The function; at its number-th call that is meant, something is done first, or once so many
    bytes are written."""
    def watched(*arguments, **named):
        nonlocal number
        number -= is_meant(*arguments)
        comes = number == 0 and is_meant(*arguments)
        if comes and byte is None:
            do(what)
        result = function(*arguments, **named)
        return Cut(result, byte, what) if comes and byte is not None else result
    return watched


def watch(at, number, what, file="", byte=None):
    calls = {"step": (train, "augment"), "evaluation": (train, "evaluate"),
             "pictures": (train, "draw_pictures"), "embedding": (evaluate, "normalise")}
    if at in calls:
        where, name = calls[at]
        watched = at_the_moment(getattr(where, name), lambda *_: True, number, what)
        setattr(where, name, watched)
    elif at == "replace":
        def is_target(source, target):
            return os.path.basename(target) == file
        os.replace = at_the_moment(os.replace, is_target, number, what)
    else:
        def is_temporary(path, *_):
            return os.path.basename(path).startswith(file + ".")
        support.files.open = at_the_moment(open, is_temporary, number, what, byte)


def work(job):
    os.setsid()
    for name, stream in ("out", 1), ("err", 2):
        opened = os.open(f"{job['output']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, stream)
        os.close(opened)
    if job["reader"]:
        reader, writer = os.pipe()
        readers.append(reader)
        os.dup2(writer, 1)
    for moment in job["moments"]:
        do(moment["what"]) if moment["at"] == "start" else watch(**moment)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for name, limit in job["limits"].items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    sys.argv = [job["script"], *job["words"]]
    cli({"train.py": train.main, "evaluate.py": evaluate.main}[job["script"]])


signal.signal(signal.SIGINT, signal.default_int_handler)    # whatever the shell has left it at
while line := requests.readline():
    pid = os.fork()
    if pid == 0:
        work(json.loads(line))
    returncode = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(answers, f"{returncode}\\n".encode())
'''


class Driver:
    """A process that runs the scripts, each in a process of its own, and stops them at the moments
    that a test chooses."""

    def __init__(self, folder):
        self.output = folder / "output"
        (folder / "driver.py").write_text(DRIVER)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen([sys.executable, folder / "driver.py"], cwd=ROOT, env=env,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def send(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self):
        return self.process.stdout.readline().strip()

    def start(self, script, *words, moments=(), limits=None, reader=False):
        """limits: {"RLIMIT_...": n}. reader: stdout is a pipe, which the moment "close" breaks."""
        job = {"script": script, "words": list(map(str, words)), "output": str(self.output),
               "moments": moments, "limits": limits or {}, "reader": reader}
        self.send(json.dumps(job))

    def end(self):
        """What the script that was started has left."""
        returncode = int(self.answer())
        out, err = (Path(f"{self.output}.{name}").read_text() for name in ("out", "err"))
        assert "\r" not in out + err and "Traceback" not in err, err
        return SimpleNamespace(returncode=returncode, stdout=out, stderr=err)

    def run(self, *command, **how):
        self.start(*command, **how)
        return self.end()

    def train(self, *words, **moment):
        """A run with at most one moment -> what it has left."""
        moments = [moment] if moment else []
        result = self.run("train.py", *words, moments=moments)
        expected = {"SIGKILL": -9, "SIGINT": 130, "SIGTERM": 130}
        assert result.returncode == expected.get(moment.get("what"), 0), result.stderr
        return result

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    driver = Driver(tmp_path_factory.mktemp("driver"))
    yield driver
    driver.close()


@pytest.fixture(scope="module")
def whole(walkers, driver, tmp_path_factory):
    """The run that was left alone."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    driver.train("--data", walkers, "--run", folder, *LONGER)
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


def test_ctrl_c_and_sigterm_say_how_to_go_on(whole, walkers, driver, tmp_path):
    folder = tmp_path / "run"
    result = driver.train("--data", walkers, "--run", folder, *LONGER, "--workers", 1,
                          at="step", number=5, what="SIGINT")
    assert result.stderr.splitlines()[-1] == how_to_go_on(folder, 1)
    assert tensors_of(folder)["epoch"] == 1
    # As a job scheduler stops it, loader process and all.
    result = driver.train("--resume", folder, at="step", number=5, what="SIGTERM")
    assert result.stderr.splitlines()[-1] == how_to_go_on(folder, 2)
    # While the third epoch is being saved, the second is what there is.
    for byte in 100, 100_000:
        result = driver.train("--resume", folder, at="byte", file="last.pt", number=1, byte=byte,
                              what="SIGINT")
        assert result.stderr.splitlines()[-1] == how_to_go_on(folder, 2)
        assert tensors_of(folder)["epoch"] == 2
    driver.train("--resume", folder)
    same_run(whole, folder, epochs=4)


def test_a_stop_before_the_first_checkpoint_says_start_again(walkers, driver, tmp_path):
    command = ["--data", walkers, "--run", tmp_path / "run", *DINOGRL]
    result = driver.train(*command, at="step", number=1, what="SIGTERM")
    assert result.stderr == "interrupted before the first checkpoint; start again\n"


# Moments of a run, each of which kills it, and how many whole epochs it has then.
KILLS = [
    # In its second epoch; its loader process lives on for some seconds.
    ({"at": "step", "number": 5}, 1),
    # While the checkpoint is written: in its beginning, in its midst, and when it is whole.
    ({"at": "byte", "file": "last.pt", "number": 1, "byte": 10}, 1),
    ({"at": "byte", "file": "last.pt", "number": 1, "byte": 5_000_000}, 1),
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


def kill_lsmrl(driver, folder, walkers):
    command = ["--data", walkers, "--run", folder, *LONGER, "--workers", 1]
    # Nothing to go on with: the folder is used again.
    for name in "config.json", "last.pt":
        driver.train(*command, at="byte", file=name, number=1, byte=10, what="SIGKILL")
        assert list(folder.glob("*.tmp")) and not (folder / "last.pt").exists()
    fails(driver.run("train.py", "--resume", folder), "no file", "last.pt")
    for moment, epochs in KILLS:
        driver.train(*command, **moment, what="SIGKILL")
        assert tensors_of(folder)["epoch"] == epochs, moment    # readable, always
        command = ["--resume", folder, "--workers", 0]
    assert "raise --epochs" in driver.train(*command).stdout


def kill_dinogrl(driver, folder, walkers):
    command = ["--data", walkers, *DINOGRL]
    driver.train(*command, "--run", folder, at="step", number=2, what="SIGKILL")
    assert set(os.listdir(folder)) == {"config.json", "lock"}
    # The rest of the warm-up is two steps: this is the second one of the first epoch.
    driver.train(*command, "--run", folder, at="step", number=4, what="SIGKILL")
    assert tensors_of(folder)["epoch"] == 0
    driver.train("--resume", folder, at="byte", file="last.pt", number=1, byte=4_000_000,
                 what="SIGKILL")
    driver.train("--resume", folder, at="step", number=4, what="SIGKILL")
    driver.train("--resume", folder, at="open", file="last.pt", number=1, what="SIGKILL")
    driver.train("--resume", folder, at="byte", file="silhouettes-2.png", number=1, byte=10,
                 what="SIGKILL")
    assert tensors_of(folder)["epoch"] == 2
    driver.train("--resume", folder)


def test_two_runs_killed_many_times_end_as_those_that_were_left_alone(whole, walkers, driver,
                                                                      tmp_path):
    """LSMRL and DinoGRL, whose warm-up cannot be resumed."""
    def dinogrl(folder):
        folder.mkdir()
        second = Driver(folder)
        second.train("--data", walkers, "--run", folder / "whole", *DINOGRL)
        kill_dinogrl(second, folder / "run", walkers)
        second.close()
        same_run(folder / "whole", folder / "run", epochs=2)

    def lsmrl(folder):
        kill_lsmrl(driver, folder, walkers)
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


def test_a_full_disk_keeps_the_checkpoint_and_says_so(whole, driver, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    content = (folder / "last.pt").read_bytes()
    result = driver.run("train.py", "--resume", folder, "--epochs", 5, "--steps", 1,
                        limits={"RLIMIT_FSIZE": 100_000})
    fails(result, "last.pt cannot be written", "untouched")
    assert (folder / "last.pt").read_bytes() == content
    assert set(os.listdir(folder)) == set(os.listdir(whole))


# ---------------------------------------------------------------- locks ----

def test_two_runs_never_share_a_folder(walkers, driver, tmp_path):
    folder = tmp_path / "run"
    command = ["--data", walkers, "--run", folder, *DINOGRL]
    moments = [{"at": "step", "number": 1, "what": "wait"},
               {"at": "byte", "file": "last.pt", "number": 2, "byte": 4_000_000, "what": "wait"}]
    driver.start("train.py", *command, "--seed", 1, moments=moments)

    # The first one is in its warm-up, and has no checkpoint yet.
    assert driver.answer() == "waiting"
    before = (folder / "config.json").read_bytes()
    second = here("train.py", *command, "--seed", 2)
    fails(second, "belongs to a run that is alive", "another --run")
    assert (folder / "config.json").read_bytes() == before
    assert set(os.listdir(folder)) == {"config.json", "lock"}
    driver.send("go on")

    # It writes the checkpoint of its first epoch.
    assert driver.answer() == "waiting"
    contents = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    writing, = [name for name in contents if name.endswith(".tmp")]
    assert len(contents[writing]) == 4_000_000
    fails(here("train.py", "--resume", folder), "belongs to a run that is alive")
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == contents
    driver.send("go on")

    assert driver.end().returncode == 0
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
