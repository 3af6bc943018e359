"""Damaged files: each is read, or is one UserError of one line. No other exception."""
from data import load_dataset
from layouts import pairs, tracks, write_bupt, write_hitsz
from support.files import UserError
from support.footage import read_frame
from support.weights import read_checkpoint

import numpy as np
import pytest
import torch

WORDS = [b"-1", b"0", b"99999999999999999999", b"1e9", b"\x00", b"../../x", b"/etc/passwd", b'"',
         "\u0663\ufeff".encode(), b"\xff\xfe", b"\n\n", b" ", b"{", b"]", b"\t1"]
KEYS = ("model", "frozen", "config", "options", "classes", "method", "epoch", "dataset")


def spoil(content, rng):
    """One to three cuts, losses, repetitions, foreign words or bytes."""
    for _ in range(rng.integers(1, 4)):
        i, j = sorted(rng.integers(len(content) + 1, size=2).tolist())
        others = [b"", content[i:j][:200], WORDS[rng.integers(len(WORDS))], rng.bytes(4)]
        rest = rng.choice([len(content), j, i, i + 4])
        content = content[:i] + others[rng.integers(4)] + content[rest:]
    return content


@pytest.mark.parametrize("files, read", [
    ("hitsz/info/*", lambda file: load_dataset(file.parents[1])),
    ("bupt/*.*", lambda file: load_dataset(file.parent)),
    ("bupt/DATA/*/*/*/*", lambda file: read_frame(file, (16, 8))),
    ("last.pt", read_checkpoint)])
def test_damaged_files_are_read_or_one_error(files, read, tmp_path):
    write_hitsz(tmp_path / "hitsz", train=tracks((1, 2), each=2), test=tracks((21, 22), each=2))
    write_bupt(tmp_path / "bupt", *(pairs(pids, each=2) for pids in ((1, 2), (11,), (21, 22))))
    torch.save(dict.fromkeys(KEYS, torch.ones(9)), tmp_path / "last.pt")
    files, rng, refused = sorted(tmp_path.glob(files)), np.random.default_rng(1), 0
    for n in range(80):
        file = files[n % len(files)]
        content = file.read_bytes()
        file.write_bytes(spoil(content, rng))
        try:
            read(file)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        file.write_bytes(content)
    assert refused > 0
