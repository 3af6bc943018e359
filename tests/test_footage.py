"""support/footage.py: frames from image files, folders of frames, true silhouettes."""
from support.files import UserError
from support.footage import find_footage, normalise, read_frame, true_masks

import numpy as np
import pytest
import torch
from PIL import Image


def gray(path, *levels):
    """A plain picture, or an animated file of several."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = [Image.new("L", (8, 16), level) for level in levels]
    animated = {"save_all": True, "append_images": rest} if rest else {}
    first.save(path, lossless=True, **animated)


def levels(frames):
    return [round(read_frame(frame, (16, 8)).float().mean().item()) for frame in frames]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_file_a_picture_and_an_array_are_the_same_frame(mode, tmp_path):
    """Channel order and sides as they are; gray becomes three channels; resized to (H, W)."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    image.save(tmp_path / "a.png")
    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    for source in str(tmp_path / "a.png"), image, np.asarray(image):
        frame = read_frame(source, (12, 20))
        assert frame.dtype == torch.uint8 and np.array_equal(frame, expected)
        assert read_frame(source, (32, 16)).shape == (3, 32, 16)


def test_a_picture_is_upright_and_opaque(tmp_path):
    picture = Image.fromarray(np.array([[0, 0], [250, 250]], np.uint8))
    exif = picture.getexif()
    exif[0x0112] = 3    # the camera was upside down
    picture.save(tmp_path / "a.png", exif=exif)
    assert read_frame(tmp_path / "a.png", (2, 2))[0, :, 0].tolist() == [250, 0]
    picture.convert("P").save(tmp_path / "p.png", transparency=250)
    assert read_frame(tmp_path / "p.png", (2, 2))[0, :, 0].tolist() == [0, 250]


@pytest.mark.parametrize("file, kind, values", [
    ("a.png", "<u2", [300, 1000, 1700]), ("a.tif", ">u2", [255, 256, 257]),
    ("a.tif", "i4", [-2**31, 0, 2**31 - 1]), ("a.tif", "f4", [1e-3, 2e-3, 3e-3])])
def test_deep_pictures_are_stretched(file, kind, values, tmp_path):
    """Darkest to 0, brightest to 255, linear between; a constant picture stays constant."""
    for row, expected in (values, [0, 127, 255]), (values[:1] * 3, [0, 0, 0]):
        Image.fromarray(np.array([row] * 4, kind)).save(tmp_path / file)
        frame = read_frame(tmp_path / file, (4, 3))
        assert (frame == frame[:1, :1]).all()
        assert frame[0, 0].tolist() == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("name", ["a.jpg", "walk.gif", "walk.webp"])
def test_an_unreadable_file_is_named(name, tmp_path):
    """By the listing, or by who reads a frame of it."""
    gray(tmp_path / name, *([9] if name == "a.jpg" else range(0, 250, 5)))
    content = (tmp_path / name).read_bytes()
    for keep in 0, 10, len(content) // 2:
        (tmp_path / name).write_bytes(content[:keep])
        with pytest.raises(UserError, match=f"{name}.* cannot be read"):
            list(map(levels, find_footage(tmp_path).values()))


def test_footage_is_found_in_natural_order(tmp_path):
    """At any depth; an animated file is a tracklet; what is hidden or not a picture is left out."""
    root, ramp = tmp_path / "my footage", range(0, 240, 20)
    for i, level in enumerate(ramp):
        gray(root / "cam10/1" / f"frame{i + 1}.png", level)
        gray(root / "cam2/x y" / f"f{i + 1}.{('jpg', 'BMP', 'tiff', 'gif')[i % 4]}", level)
    for name in "cam2/walk.gif", "cam3/pages.TIFF", "cam3/turn.webp":
        gray(root / name, *ramp)
    gray(root / "cam2/x y/._f3.png", 0)
    (root / "cam2/plan.pdf").touch()
    found = find_footage(root)
    assert " ".join(found) == "cam2/walk.gif cam2/x y cam3/pages.TIFF cam3/turn.webp cam10/1"
    for frames in found.values():
        assert levels(frames) == pytest.approx(ramp, abs=2)    # JPEG rounds
    assert found["cam2/walk.gif"][3] == f"{root}/cam2/walk.gif#3"
    assert find_footage(root / "cam10/1") == {"1": found["cam10/1"]}


@pytest.mark.parametrize("files, words", [
    ("", "no folder"), ("a/notes.txt clip.mpg", "no frames"), ("1.png a/1.png", "loose frames"),
    ("cam/1.png cam/a/b/1.png", "cam holds loose frames")])
def test_footage_that_is_refused(files, words, tmp_path):
    for file in files.split():
        (tmp_path / "own" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / file).touch()
    with pytest.raises(UserError, match=words):
        find_footage(tmp_path / "own")


def test_true_masks(tmp_path):
    gray(tmp_path / "masks/Train/1.png", 255)
    frames = [str(tmp_path / "Train/1.jpg")]
    assert true_masks(tmp_path, frames, (4, 2)).tolist() == [[[True] * 2] * 4]
    assert true_masks(tmp_path, [*frames, str(tmp_path / "Train/2.jpg")], (4, 2)) is None


def test_normalise():
    """ImageNet's mean and deviation by hand; the input stays as it is."""
    white = torch.full((2, 3, 4, 5), 255, dtype=torch.uint8)
    found = normalise(white)[1, :, 3, 4].tolist()
    assert found == pytest.approx([2.2489, 2.4286, 2.6400], abs=1e-4)
    assert (white == 255).all()
