"""Pictures: sizes, some pixels by value, the same picture for the same input, logs of any form."""
from support import pictures

import numpy as np
import pytest
import torch
from PIL import ImageColor

FIRST, SECOND = map(ImageColor.getrgb, pictures.COLOURS[:2])


def plain(level):
    """A tracklet of two frames."""
    return torch.full((2, 3, 16, 8), level, dtype=torch.uint8)


def runs(line, colour):
    """The lengths of a line's runs of pixels of a colour."""
    text = "".join("x" if tuple(pixel) == colour else " " for pixel in line)
    return [len(run) for run in text.split()]


def test_a_ranked_list_shows_who_is_right_and_why():
    """Borders by colour; a bar for each strip of each stream, as long as the distance there."""
    near = {"gait": [1.0, 0.0], "appearance": [5.0, 5.0]}
    far = {"gait": [2.0, 4.0], "appearance": [10.0, 0.0]}
    ranked = [pictures.Found("a", plain(10), 0.5, True, near),
              pictures.Found("b", plain(20), 1.2, False, far),
              pictures.Found("c", plain(30), 2.0, None, near)]
    query = pictures.Row("query", plain(90), ranked)
    image = pictures.draw_ranking([query, query], height=64)
    assert image.size == (10 + 4 * (8 + 2 * 32 + 2 * 24 + 10), 30 + 2 * (64 + 74))
    upper, lower = np.asarray(image)[[30 + 8, 30 + 40]]    # of the first row, through its strips
    for colour in pictures.BLACK, pictures.GREEN, pictures.RED, pictures.GREY:
        assert runs(upper, colour) == [4, 4]
    for level in 90, 10, 20, 30:
        assert runs(upper, (level,) * 3) == [64]
    assert runs(upper, FIRST) == [6, 11, 6] and runs(lower, FIRST) == [1, 21, 1]
    assert runs(upper, SECOND) == [11, 21, 11] and runs(lower, SECOND) == [11, 1, 11]


def test_a_sheet_of_silhouettes():
    """The body is the left half of each frame; a row more where there are true masks."""
    body = torch.zeros(2, 16, 8)
    body[..., :4] = 1
    code = body[:, None].repeat(1, 16, 1, 1)
    seen = pictures.Seen("title", plain(100), body, 1 - body, code, code, None, None)
    assert pictures.draw_silhouettes([seen], height=64).size == (130 + 72, 24 + 5 * 72 + 16)
    known = seen._replace(masks=body > 0, iou=torch.ones(2))
    image = pictures.draw_silhouettes([seen, known], height=64)
    assert image.size == (130 + 2 * 72, 24 + 6 * 72 + 16)
    lines = np.asarray(image)[56::72, 130 + 72:, 0]    # through the middle of each row
    assert lines[[0, 1, 2, 5], 4].tolist() == [100, 255, 0, 255]
    assert lines[:, 28].tolist() == [100, 0, 255, 0, 0, 0]


def test_the_same_code_has_the_same_colour():
    words = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
    codes = [x.t().view(1, 16, 6, 1) for x in (words, words.flip(0))]
    first, second = pictures.principal_colours(codes)
    assert torch.equal(first, second.flip(2))
    assert len(first.unique(dim=2).flatten(2)[0, 0]) == 6
    assert (pictures.principal_colours([torch.zeros(2, 16, 4, 3)]) == 0).all()


def test_a_sheet_of_readings():
    """The patch that is looked at most keeps its brightness, the others are darkened."""
    look = torch.tensor([[[0.0, 0.0], [0.0, 0.6]], [[0.3, 0.3], [0.3, 0.3]]])
    reading = pictures.Reading("title", plain(200), look, [("60%", plain(40)[0]), ("40%", None)])
    blind = pictures.Reading("title", plain(200), None, [])
    image = pictures.draw_reading([reading, blind], height=64)
    assert image.size == (130 + 2 * 72, 24 + 3 * 72 + 16)
    lit, faces = np.asarray(image)[[96 + 1, 96 + 72], 130:, 0]
    assert lit[[1, 33]].tolist() == [30, 200] and faces[[1, 33]].tolist() == [40, 255]


def test_a_curve_goes_through_its_values():
    sheet = pictures.Sheet(1000, 800)
    chart = pictures.Chart(sheet, 100, 900, "title", range(5), range(0, 101, 20))
    chart.curve([(0, 0), (2, 100), (4, 50)], "first")
    chart.curve([(0, 90), (4, 90)], "second")
    for place, colour in ((1, 50), FIRST), ((3, 75), FIRST), ((1, 90), SECOND):
        x, y = chart.at(*place)
        assert sheet.image.getpixel((int(x), int(y))) == colour
    assert chart.at(0, 100) == (100, 176) and chart.at(4, 0) == (900, 640)


RANK_1 = {"rank-1": {"there": 0.5, "back": 1.0}}


@pytest.mark.parametrize("line", [
    {}, {"losses": {"a": 0.5}}, RANK_1, {**RANK_1, "streams": {"gait": RANK_1}},
    {"losses": {"lost": float("nan"), "zero": 0.0}}])
def test_logs_of_one_line_or_without_some_keys(line):
    """Twice the same picture. Only a loss and Rank-1 are drawn, and a loss that is finite."""
    log = [{"epoch": 1, **line}, {"epoch": 80, "shown": {"b": 1.0}}]
    image = pictures.draw_curves(log, "title")
    assert image.size == pictures.draw_curves(log[:1], "title").size == (2480, 840)
    assert image.tobytes() == pictures.draw_curves(log, "title").tobytes()
    empty = pictures.draw_curves([{"epoch": 1}, {"epoch": 80}], "title").tobytes()
    assert (image.tobytes() == empty) == (not line or "lost" in line.get("losses", {}))
