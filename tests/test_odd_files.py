"""Odd pictures, folders, frames and names that people bring: read rightly, or a UserError."""
import io
import re
import struct
import zlib
from pathlib import Path

from layouts import picture
from scripts import here, run, succeeds
from search import embed_images
from support.files import UserError
from support.footage import find_footage, natural, read_frame
from support.pictures import BLACK, Sheet
from support.weights import load_run

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.TiffImagePlugin import AppendingTiffWriter

SIZE = 16, 8
JPEG = picture(1, "visible", 1, 1)
GOOD = np.asarray(Image.open(io.BytesIO(JPEG)))
HUGE = zlib.compress(bytes(2**21))    # more than pillow unpacks
tags = Image.Exif()
tags[0x0112], tags[0x011A] = 6, 1.5    # turn by 90 degrees; the resolution, broken below
TEXT, CUT = tags.tobytes().replace(b"\x01\x1a\0\5", b"\x01\x1a\0\2"), tags.tobytes()[:-8]


@pytest.mark.parametrize("file, kind, bright, dark", [
    ("a.png", "u2", 65535, 0), ("a.tif", "i4", 2**31 - 1, -2**31),
    ("a.tif", "f4", np.inf, -np.inf), ("a.tif", "f4", np.inf, np.nan)])
def test_two_pixels_do_not_decide_over_all(file, kind, bright, dark, tmp_path):
    """0 to 255 is percentile 1 to percentile 99 of the finite values."""
    ramp = np.linspace(0, 1, 800).reshape(40, 20)
    pixels = (1000 + 1000 * ramp).astype(kind)
    expected = np.interp(ramp, (0.01, 0.99), (0, 255))
    pixels[10, 10], pixels[30, 10] = bright, dark
    expected[10, 10], expected[30, 10] = 255, 0
    Image.fromarray(pixels).save(tmp_path / file)
    for channel in read_frame(tmp_path / file, ramp.shape).numpy():
        assert channel == pytest.approx(expected, abs=2)


def chunk(kind, data):    # of a PNG
    return struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("file, mode", [
    ("a.png", "LA"), ("a.png", "RGB"), ("a.png", "RGBA"), ("a.tif", "RGB"), ("a.tif", "RGBA"),
    ("65535.ppm", "RGB"), ("16383.ppm", "RGB")])
def test_deep_colour_is_refused(file, mode, tmp_path):
    """Two pixels of 8 bits, of which another header makes one of 16 bits."""
    path, n = tmp_path / file, len(mode)
    Image.new(mode, (2, 1)).save(path)
    content = path.read_bytes()
    if path.suffix == ".png":
        header = struct.pack(">2IB", 1, 1, 16) + content[25:29]
        content = content[:8] + chunk(b"IHDR", header) + content[33:]
    elif path.suffix == ".ppm":
        content = content.replace(b"2 1\n255", f"1 1\n{path.stem}".encode())
    else:
        tag = struct.pack("<2HI", 256, 4, 1)    # of the width; then the depths
        content = content.replace(tag + b"\2", tag + b"\1").replace(b"\x08\0" * n, b"\x10\0" * n)
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{file}.*16 bits"):
        read_frame(path, SIZE)


@pytest.mark.parametrize("odd", [
    chunk(b"eXIf", b"nonsense"), chunk(b"zTXt", b"a\0\0" + HUGE), chunk(b"gAMA", b""),
    chunk(b"iTXt", b"a\0\1\0\0\0" + HUGE), chunk(b"tEXt", b"a\0b")[:-1] + b"?",    # a wrong sum
    chunk(b"pHYs", b"b")])
def test_odd_chunks_do_not_hide_the_pixels(odd, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(GOOD).save(path)
    content, expected = path.read_bytes(), read_frame(path, SIZE)
    content = content[:33] + odd + content[33:]    # after the header
    path.write_bytes(content)
    assert torch.equal(read_frame(path, SIZE), expected)
    path.write_bytes(content[:-99])
    with pytest.raises(UserError, match="a.png cannot be read"):
        read_frame(path, SIZE)


@pytest.mark.parametrize("file", ["a.jpg", "a.png", "a.webp"])
@pytest.mark.parametrize("exif, bright", [
    (TEXT, np.s_[:7]), (CUT, np.s_[:7]), (b"Exif\0\0nonsense", np.s_[:, :3])])
def test_a_picture_is_turned_if_its_metadata_say_so(file, exif, bright, tmp_path):
    bright_left = Image.fromarray(np.uint8([[240] * 8 + [0] * 8] * 8))
    bright_left.save(tmp_path / file, exif=exif, lossless=True)
    frame = read_frame(tmp_path / file, SIZE)[0]
    assert frame[bright].min() > 200 and frame[-1, -1] < 40


def test_no_warning_reaches_the_terminal(tmp_path):
    Image.new("L", SIZE).save(tmp_path / "a.jpg", exif=CUT)
    Image.new("L", SIZE).convert("P").save(tmp_path / "b.png", transparency=b"\0\x80")
    code = "import sys; from support.footage import read_frames; read_frames(sys.argv[1:], (9, 9))"
    assert succeeds(run("-c", code, tmp_path / "a.jpg", tmp_path / "b.png")).stderr == ""


def test_reduced_pages_are_skipped(tmp_path):
    page, second, thumbnail = [Image.new("L", SIZE, level) for level in (200, 100, 10)]
    files = [f"{tmp_path}/{name}.tif" for name in ("a/1", "a/2", "b/1", "c/1")]
    pages = [[page, thumbnail]] * 2 + [[thumbnail, page], [thumbnail, page, thumbnail, second]]
    for path, images in zip(files, pages, strict=True):
        Path(path).parent.mkdir(exist_ok=True)
        with AppendingTiffWriter(path, new=True) as file:
            for image in images:
                image.save(file, "TIFF", tiffinfo={254: int(image is thumbnail)})
                file.newFrame()
    found = find_footage(tmp_path)
    assert found == {"a": tuple(files[:2]), "b": (files[2],),
                     "c/1.tif": (f"{files[3]}#1", f"{files[3]}#3")}
    frames = [read_frame(frame, SIZE) for own in found.values() for frame in own]
    assert [frame.unique().item() for frame in frames] == [200] * 4 + [100]


@pytest.mark.parametrize("file, kind", [("a.png", "PNG"), ("a.jpg", "GIF"), ("a.gif", "GIF")])
def test_an_animated_file_is_no_frame(file, kind, tmp_path):
    first, *others = [Image.new("L", SIZE, level) for level in (200, 100, 10)]
    first.save(tmp_path / file, kind, save_all=True, append_images=others)
    with pytest.raises(UserError, match=rf"{file}.*\b3\b"):
        read_frame(tmp_path / file, SIZE)
    first.save(tmp_path / "b.jpg", "MPO", save_all=True, append_images=others)    # previews
    assert read_frame(tmp_path / "b.jpg", SIZE).unique() == 200


@pytest.mark.parametrize("names", [
    "im.jpg,im.png,im2.jpg,im2.png", "frame.png,frame (1).png,frame (2).png", "walk.9,walk.10",
    "walk/1.png,walk/1 (1).png,walk2/1.png", "walk/1,walk2/1", "2.png,10.png,a.png,a2.png"])
def test_natural_order(names):
    assert ",".join(sorted(names.split(","), key=natural)) == names


def test_frames_in_lists_tuples_generators(run_of):
    model, config, _ = load_run(run_of("lsmrl"))
    tracklets = [[GOOD, GOOD[::-1]], [GOOD[8:]]]
    expected = embed_images(model, config, tracklets, "visible")
    for kind in tuple, iter:
        found = embed_images(model, config, kind(map(kind, tracklets)), "visible")
        assert torch.equal(found, expected)


@pytest.mark.parametrize("frames", [
    [GOOD[None, None]], [GOOD[:0]], [Image.new("RGB", (0, 9))], [],
    [Image.open(io.BytesIO(JPEG[:-60]))]])
def test_what_is_no_frame_is_refused(frames, run_of):
    model, config, _ = load_run(run_of("lsmrl"))
    with pytest.raises(UserError):
        embed_images(model, config, [[GOOD], frames], "visible")


@pytest.mark.parametrize("more, named", [(0, 3), (19, 20)])
def test_a_search_names_torn_frames_or_leaves_them_out(more, named, run_of, tmp_path):
    torn = ["q/gone/0", "q/half/0", "g/b/0", *(f"g/{n}/0" for n in range(more))]
    for name in [*torn, "q/half/1", "g/a/2", "g/b/1"]:
        file = tmp_path / f"{name}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(1, "visible", 1, file.stem)[:-60 if name in torn else None])
    call = ["search.py", "--checkpoint", run_of("lsmrl"), *str.split(
        f"--query {tmp_path}/q --gallery {tmp_path}/g --workers 0 --query-modality visible")]
    result = here(*call)
    *lines, last = result.stderr.splitlines()
    assert result.returncode == 2 and len(lines) == named, result.stderr
    assert sum(f"{tmp_path}/{name}.jpg" in result.stderr for name in torn) == named
    assert re.search(rf"\b{len(torn)}\b", last) and "--skip-unreadable" in last
    assert "data.py" not in result.stderr
    *_, query, first, second = succeeds(here(*call, "--skip-unreadable")).stdout.splitlines()
    assert query.startswith("half (visible, 1 frames)")    # q/half/1 and g/b/1 are the same picture
    assert (first.split()[-1], second.split()[-1]) == ("b", "a")


def drawn(words):
    sheet = Sheet(300, 40)
    sheet.text(8, 8, words)
    return sheet.image


def test_names_in_any_script():
    sheet = Sheet(300, 40)
    sheet.pen.text((8, 8), r"walk 1_\u~", BLACK, sheet.font)
    assert drawn(r"walk 1_\u~") == sheet.image
    assert drawn("张伟 1") == drawn(r"\u5f20\u4f1f 1") != drawn("王芳 1")
