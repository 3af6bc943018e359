"""The scripts as a user runs them, and what they leave.

    run("train.py", "--data", ...)     in a process of its own -> its returncode, stdout, stderr
    here("train.py", "--data", ...)    the same in this process, without the seconds of its start
    succeeds(result), fails(result, *words)    exit code 0; 2 and one line that holds the words
"""
import importlib
import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

from support.options import cli
from train import read_command_line

import torch

ROOT = Path(__file__).parent.parent
# Runs of a second: the small presets, smaller still.
TINY = str.split(
    "--preset small --epochs 1 --steps 2 --identities 2 --frames 2 --mask-warmup 2 --workers 0 "
    "--width 8 --dim 8 --dino-size 112 56 --code-size 16 8 --strides 1 1 1 1 "
    "--gait-strides 1 1 1 1 --strips 1 2 4 8 16 --test-frames 0 --size 64 32")
TINY_LSMRL = str.split(
    "--method lsmrl --preset small --epochs 1 --steps 2 --identities 2 --frames 2 --size 32 16 "
    "--groups 2 --workers 0 --test-frames 0")
OPTIONS = {"dinogrl": TINY, "lsmrl": TINY_LSMRL}


def run(*words, cwd=ROOT, env=None):
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def here(script, *words):
    main = importlib.import_module(Path(script).stem).main
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [script, *map(str, words)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            cli(main)
    except SystemExit as stop:
        return SimpleNamespace(returncode=stop.code or 0, stdout=out.getvalue(),
                               stderr=err.getvalue())
    finally:
        sys.argv = argv


def succeeds(result):
    """Its argument, whose exit code is 0."""
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    return result


def fails(result, *words):
    """Exit code 2, one line of error that holds all the words, no traceback."""
    lines = result.stderr.splitlines()
    assert result.returncode == 2 and len(lines) == 1, result.stderr
    assert all(str(word) in lines[0] for word in words), lines[0]


def tensors_of(folder):
    """A run's checkpoint."""
    return torch.load(Path(folder) / "last.pt", weights_only=True)


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def results_of(folder):
    return json.loads((Path(folder) / "results.json").read_text())


def small_step(name):
    """-> a network of six classes and a batch for it: frames, modality, label of four people, each
    twice by day and twice by night. The same at each call."""
    asked = read_command_line(OPTIONS[name])
    torch.manual_seed(0)
    model = asked.method(asked.options, 6, asked.config.size)
    for parameter in model.parameters():    # what starts at zero would hide its gradient's way
        parameter.data += 0.02 * torch.randn(parameter.shape)
    frames = torch.randn(16, 2, 3, *asked.config.size)
    return model, (frames, torch.arange(16) // 8, torch.tensor([0, 0, 1, 1, 3, 3, 5, 5] * 2))
