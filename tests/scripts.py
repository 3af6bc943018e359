"""How tests run the scripts: as a user does, in processes of their own, or here, where it proves
the same and is seconds sooner.

    run("train.py", "--data", ...)     a process -> its returncode, stdout, stderr
    here("train.py", "--data", ...)    main() through cli in this process -> the same three
    fails(result, *words)              exit code 2 and one line of error that holds the words
"""
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

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
    "--size 32 16 --groups 2")

# For networks of the paper's size; tiny ones gain nothing by it, and disturb each other.
BOTH_CORES = {"OMP_NUM_THREADS": "2"}
# What hangs is to end some day; a busy machine is no reason to end.
HOUR = 3600


def finished(returncode, stdout, stderr):
    """What a script has left. Nothing here is a terminal: no line of it may change afterwards."""
    assert "\r" not in stdout + stderr, stderr[-2000:]
    return SimpleNamespace(returncode=returncode, stdout=stdout, stderr=stderr)


def run(*command, cwd=ROOT, env=None):
    """A script in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    ended = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=env, timeout=HOUR,
                           capture_output=True, stdin=subprocess.DEVNULL)
    # Decoded here: subprocess would make line breaks of carriage returns.
    texts = [text.decode(errors="backslashreplace") for text in (ended.stdout, ended.stderr)]
    return finished(ended.returncode, *texts)


def together(function, *arguments):
    """function(argument) of each, all at once, for what waits for processes: most of a short one
    is spent on one core, importing torch."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(function, arguments))


def here(script, *arguments):
    """run() in this process, without its start."""
    main = {"train.py": train.main, "evaluate.py": evaluate.main, "data.py": data.main,
            "walkers.py": walkers.main}[script]
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [script, *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            cli(main)
    except SystemExit as stop:
        returncode = stop.code or 0
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
