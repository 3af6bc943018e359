"""300 spoiled files: each loads, or is refused by one line. Never a traceback, never a hang, never half a run."""
import copy
import time

import numpy as np
import pytest
import torch

import evaluate
from data import UserError, read_dataset, read_frame
from layouts import write_buptcampus, write_hitsz
from test_scripts import TINY_LSMRL, here

WORDS = [b"-1", b"0", b"99999999999999999999", b"1e9", b"nan", b"\x00", b"../../x", b"/etc/passwd", "\u0663\ufeff".encode(), b"\xff\xfe",
         b"\n\n", b" ", b"{", b"]", b'"', b"\t1"]


def spoil(content, rng):
    """One to three cuts, flips, repetitions or foreign words."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        i, j = sorted(int(n) for n in rng.integers(len(content) + 1, size=2))
        match rng.integers(6):
            case 0: content = content[:i]
            case 1: content[i:min(j, i + 40)] = b""
            case 2: content[i:i] = content[i:min(j, i + 200)]
            case 3: content[i:i] = WORDS[rng.integers(len(WORDS))]
            case 4: content[i:i + 1] = bytes([rng.integers(256)])
            case 5: content[i:min(j, i + 4)] = rng.bytes(4)
    return bytes(content)


def read(load, *arguments):
    """-> 1 if it was read, 0 if it was refused in one line; anything else is an error of ours."""
    began = time.time()
    try:
        load(*arguments)
        return 1
    except UserError as error:
        assert len(str(error)) < 2000 and "\n" not in str(error), str(error)[:500]
        return 0
    finally:
        assert time.time() - began < 5


@pytest.mark.parametrize("layout, times", [("hitsz", 100), ("bupt", 80)])
def test_lists(layout, times, tmp_path):
    {"hitsz": write_hitsz, "bupt": write_buptcampus}[layout](tmp_path / "d")
    lists = sorted([*(tmp_path / "d").rglob("*.txt"), *(tmp_path / "d").rglob("*.json")])
    rng, usable = np.random.default_rng(1), 0
    assert lists and not read_dataset(tmp_path / "d").problems
    for n in range(times):
        path = lists[n % len(lists)]
        before = path.read_bytes()
        path.write_bytes(spoil(before, rng))
        problems = []
        if read(lambda: problems.extend(read_dataset(tmp_path / "d").problems)):
            usable += not problems
            assert not any("\n" in p for p in problems)
        path.write_bytes(before)
    assert usable < times    # most are noticed; a changed camera number is as good as the old one


def test_images(tmp_path):
    write_hitsz(tmp_path / "d")
    picture = next((tmp_path / "d").rglob("*.jpg"))
    content, rng = picture.read_bytes(), np.random.default_rng(2)
    loaded = 0
    for n in range(60):
        picture.write_bytes(spoil(content, rng))
        loaded += read(read_frame, str(picture), (16, 8))
    assert 0 < loaded < 60


@pytest.fixture(scope="module")
def run_folder(walkers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    result = here("train.py", "--data", walkers, "--run", folder, *TINY_LSMRL)
    assert result.returncode == 0, result.stderr
    return folder


def test_checkpoints_with_spoiled_bytes(run_folder, tmp_path):
    content, rng = (run_folder / "last.pt").read_bytes(), np.random.default_rng(3)
    head, tail = 3000, 40_000    # the structure; the middle is tensors
    for n in range(30):
        part = (spoil(content[:head], rng) + content[head:] if n % 2 else content[:-tail] + spoil(content[-tail:], rng))
        (tmp_path / "last.pt").write_bytes(part)
        read(evaluate.load_run, str(tmp_path))


def test_checkpoints_with_other_contents(run_folder, walkers, tmp_path):
    """Whole files whose values are of another kind: load_run, and a resumed run, which must leave the folder as it was."""
    state, rng = torch.load(run_folder / "last.pt", weights_only=True), np.random.default_rng(4)
    odd = [None, "x", -1, 10 ** 6, float("nan"), [], {}, (1,), [1, 2, 3, 4], torch.zeros(2), True, {"cpu": 3}]
    for n in range(30):
        other = copy.copy(state)
        other["config"] = dict(state["config"])
        where = other["config"] if n % 2 else other
        key = sorted(where)[rng.integers(len(where))]
        if rng.random() < 0.2:
            del where[key]
        else:
            where[key] = odd[rng.integers(len(odd))]
        torch.save(other, tmp_path / "last.pt")
        read(evaluate.load_run, str(tmp_path))
        content = (tmp_path / "last.pt").read_bytes()
        result = here("train.py", "--resume", tmp_path, "--device", "cpu", "--workers", 0, "--epochs", 1)
        assert result.returncode in (0, 2) and "Traceback" not in result.stderr, (key, where.get(key), result.stderr[-500:])
        assert (tmp_path / "last.pt").read_bytes() == content or result.returncode == 0
