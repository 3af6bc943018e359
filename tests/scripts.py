"""How tests run the scripts: as a user does, in processes of their own, or here, where it proves
the same and is seconds sooner.

    run("train.py", "--data", ...)     a process -> its returncode, stdout, stderr
    run_anew("train.py", ...)          the same without help, as a user starts it; seconds more
    here("train.py", "--data", ...)    main() through cli in this process -> the same three
    fails(result, *words)              exit code 2 and one line of error that holds the words
"""
import atexit
import functools
import gc
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryFile
from types import SimpleNamespace
from unittest.mock import patch

import data
import evaluate
import train
import walkers
from support.options import cli

import torch

ROOT = Path(__file__).parent.parent
# Runs of seconds: the small presets, smaller still.
TINY = str.split(
    "--preset small --epochs 1 --steps 2 --identities 2 --frames 2 --mask-warmup 2 --workers 0 "
    "--width 8 --dim 8 --dino-size 224 112 --code-size 16 8 --strides 1 1 1 1 "
    "--gait-strides 1 1 1 1 --strips 1 2 4 8 16 --test-frames 0")
TINY_LSMRL = str.split(
    "--method lsmrl --preset small --epochs 1 --steps 2 --identities 2 --frames 2 "
    "--size 32 16 --groups 2 --test-frames 0")

def small_network(name, **changes):
    """A network of six classes, smaller than the small preset's, the same at each call, wholly in
    training mode."""
    method, config_class = train.method_and_config(name)
    small = {**method.Options.small, **changes}
    if name == "dinogrl":
        small |= {"width": 8, "dim": 8, "dino_size": (112, 56), "code_size": (16, 8),
                  "gait_strides": (1, 1, 1, 1)}
    else:
        small["size"] = (64, 32)
    torch.manual_seed(0)
    return method(config_class(**small), 6).train()


# What hangs is to end some day; a busy machine is no reason to end.
HOUR = 3600


def finished(returncode, stdout, stderr):
    """What a script has left. Nothing here is a terminal: no line of it may change afterwards."""
    assert "\r" not in stdout + stderr, stderr[-2000:]
    return SimpleNamespace(returncode=returncode, stdout=stdout, stderr=stderr)


def run_anew(*command, cwd=ROOT, env=None):
    """run() in a process that begins from nothing, as a user's does."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    ended = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=env, timeout=HOUR,
                           capture_output=True, stdin=subprocess.DEVNULL)
    # Decoded here: subprocess would make line breaks of carriage returns.
    texts = [text.decode(errors="backslashreplace") for text in (ended.stdout, ended.stderr)]
    return finished(ended.returncode, *texts)


@functools.cache
def driver():
    """tests/driver.py's process, and the socket that takes its jobs. It ends when we do."""
    ours, theirs = socket.socketpair()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # stdout: no file, or Python would seek in what takes its place.
    process = subprocess.Popen([sys.executable, ROOT / "tests" / "driver.py"], cwd=ROOT, env=env,
                               stdin=theirs, stdout=theirs)
    theirs.close()

    def close():
        ours.close()
        process.wait()

    atexit.register(close)
    return ours


class Job:
    """A script that runs. out, err: files for what it prints."""

    def __init__(self, out, err, job):
        self.out, self.err = out, err
        ours, theirs = socket.socketpair()
        with theirs:
            files = [theirs.fileno(), out.fileno(), err.fileno()]
            socket.send_fds(driver(), [b"."], files)
        self.channel = ours.makefile("rw")
        ours.close()
        self.send(json.dumps(job))

    def send(self, line):
        self.channel.write(line + "\n")
        self.channel.flush()

    def answer(self):
        """"waiting", or the exit code."""
        return self.channel.readline().strip()

    def end(self):
        """What it has left."""
        returncode, texts = int(self.answer()), []
        self.channel.close()
        for file in self.out, self.err:
            file.seek(0)
            texts.append(file.read().decode(errors="backslashreplace"))
            file.close()
        return finished(returncode, *texts)


def start(script, *words, cwd=ROOT, env=None, moments=(), limits=None, reader=False, files=()):
    """A script in a process of its own -> its Job.

    moments: see tests/driver.py. limits: {"RLIMIT_...": n}. reader: stdout is a pipe, which the
    moment "close" breaks. files: where its output goes, if it matters."""
    job = {"script": str(script), "words": list(map(str, words)), "cwd": str(cwd),
           "env": env or {}, "moments": moments, "limits": limits or {}, "reader": reader}
    return Job(*(files or [TemporaryFile(), TemporaryFile()]), job)


def run(*command, **how):
    """A script in a process of its own, which has torch from the beginning: seconds sooner."""
    return start(*command, **how).end()


def trained(*words, **moment):
    """A run with at most one moment -> what it has left."""
    result = run("train.py", *words, moments=[moment] if moment else [])
    expected = {"SIGKILL": -9, "SIGINT": 130, "SIGTERM": 130}
    assert result.returncode == expected.get(moment.get("what"), 0), result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    return result


def together(function, *arguments):
    """function(argument) of each, all at once, for what waits for processes: most of a short one
    is spent on one core, importing torch."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(function, arguments))


def forget(error):
    """Clears the frames that an error and what led to it hold. A loader among them ends its
    processes now: found by the garbage collector, it would wait for each of them, five seconds."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def here(script, *arguments):
    """run() in this process, without its start."""
    main = {"train.py": train.main, "evaluate.py": evaluate.main, "data.py": data.main,
            "walkers.py": walkers.main}[script]
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [script, *map(str, arguments)]
    try:
        # What is alive here now may be garbage later.
        with redirect_stdout(out), redirect_stderr(err), patch.object(gc, "freeze"):
            cli(main)
    except SystemExit as stop:
        returncode = stop.code or 0
        forget(stop)
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return finished(returncode, out.getvalue(), err.getvalue())


def fails(result, *words):
    """Exit code 2, one line of error on stderr that holds all the words, no traceback."""
    assert result.returncode == 2, (result.returncode, result.stderr[-2000:])
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.stderr and len(errors) == 1, result.stderr[-2000:]
    assert all(word in errors[0] for word in words), errors[0]


def succeeds(result):
    """Its argument, whose exit code is 0."""
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr[-2000:]
    return result


def tensors_of(run_folder):
    """A run's checkpoint."""
    return torch.load(Path(run_folder) / "last.pt", weights_only=True)


def log_of(run_folder):
    """A run's log.jsonl, a dict an epoch."""
    lines = (Path(run_folder) / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def results_of(run_folder):
    return json.loads((Path(run_folder) / "results.json").read_text())


def same_bits(a, b):
    """Two checkpoints: the same weights and optimizer state, bit for bit."""
    for name, tensor in a["model"].items():
        assert torch.equal(tensor, b["model"][name]), name
    for number, state in a["optimizer"]["state"].items():
        other = b["optimizer"]["state"][number]
        assert all(torch.equal(tensor, other[name]) for name, tensor in state.items()), number


def whole_and_resumed(one_epoch, walkers, tmp_path, options):
    """-> the folders of two epochs at once and of a resumed run's one and one, which have the same
    bits."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    shutil.copytree(one_epoch, parts)
    # Workers change nothing.
    commands = [["--data", walkers, "--run", whole, *options], ["--resume", parts, "--workers", 1]]
    for result in together(lambda command: run("train.py", *command, "--epochs", 2), *commands):
        succeeds(result)
    a, b = tensors_of(whole), tensors_of(parts)
    assert a["epoch"] == b["epoch"] == 2
    same_bits(a, b)
    return whole, parts


def edit(path, change):
    """Replaces a text file's contents by change(contents)."""
    path.write_text(change(path.read_text()))


OWNED = "/tmp/owned-by-a-pickle"


class Evil:
    """Unpickled, it leaves a file."""

    def __reduce__(self):
        return os.system, (f"touch {OWNED}",)
