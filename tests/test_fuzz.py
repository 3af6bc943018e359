"""Damaged files: each is read, or is one UserError of one line. No other exception."""
from data import load_dataset
from layouts import write_bupt, write_hitsz
from support.files import UserError
from support.footage import read_frame
from support.weights import read_checkpoint

import numpy as np
import pytest
import torch

WORDS = [b"-1", b"0", b"9" * 20, b"1e9", b"\0", b"../x", b"\xd9\xa3", b"\xff", b"\n\n", b" ", b"{"]
KEYS = ("model", "config", "options", "classes", "method", "epoch", "dataset")


def spoil(content, rng):    # one to three times
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
    write_hitsz(tmp_path / "hitsz")
    write_bupt(tmp_path / "bupt")
    torch.save(dict.fromkeys(KEYS, torch.ones(9)), tmp_path / "last.pt")
    files, rng = sorted(tmp_path.glob(files)), np.random.default_rng(1)
    for n in range(60):
        file = files[n % len(files)]
        content = file.read_bytes()
        file.write_bytes(spoil(content, rng))
        try:
            read(file)
        except UserError as error:
            assert "\n" not in str(error)
        file.write_bytes(content)
