"""Pictures: sizes, some pixels by value, the same picture for the same input, logs of any form."""
from support import pictures

import numpy as np
import pytest
import torch
from PIL import ImageColor

FIRST = ImageColor.getrgb(pictures.COLOURS[0])


def plain(level):
    """A tracklet of two frames."""
    return torch.full((2, 3, 16, 8), level).byte()


def runs(line, colour):
    """The lengths of a line's runs of pixels of a colour."""
    text = "".join("x" if tuple(pixel) == colour else " " for pixel in line)
    return [len(run) for run in text.split()]


def test_a_ranked_list_shows_who_is_right_and_why():
    """Borders by colour; a bar for each strip of each stream, as long as the distance there."""
    near = {"gait": [1, 0], "appearance": [5, 5]}
    far = {"gait": [2, 4], "appearance": [10, 0]}
    ranked = [pictures.Found("a", plain(10), 0.5, True, near),
              pictures.Found("b", plain(20), 1.2, False, far),
              pictures.Found("c", plain(30), 2.0, None, near)]
    query = pictures.Row("query", plain(90), ranked)
    image = pictures.draw_ranking([query], height=64)
    assert image.size == (530, 168)
    upper, lower = np.asarray(image)[[38, 70]]    # through the two strips of the first row
    borders = [tuple(upper[x]) for x in (10, 140, 270, 400)]
    assert borders == [pictures.BLACK, pictures.GREEN, pictures.RED, pictures.GREY]
    assert runs(upper, FIRST) == [6, 11, 6]
    assert runs(lower, FIRST) == [1, 21, 1]


def test_a_sheet_of_silhouettes():
    """The body is the left half of each frame; the second one has true masks."""
    body = torch.zeros(2, 16, 8)
    body[..., :4] = 1
    code = body[:, None].repeat(1, 16, 1, 1)
    seen = pictures.Seen("title", plain(100), body, 1 - body, code, code, None, None)
    known = seen._replace(masks=body > 0, iou=torch.ones(2))
    image = pictures.draw_silhouettes([seen, known], height=64)
    assert image.size == (274, 472)
    lines = np.asarray(image)[56::72, 202:, 0]    # through the middle of each row
    assert lines[:, 4].tolist() == [100, 255, 0, 38, 38, 255]
    assert lines[:, 28].tolist() == [100, 0, 255, 0, 0, 0]


def test_a_sheet_of_readings():
    """The patch that is looked at most keeps its brightness, the others are darkened."""
    look = torch.tensor([[0.0, 0.0], [0.0, 0.6]]).expand(2, 2, 2)
    reading = pictures.Reading("title", plain(200), look, [("60%", plain(40)[0])])
    image = pictures.draw_reading([reading])
    first = np.asarray(image)[[161, 300], 131, 0]    # down, at the left of the first frame
    assert first.tolist() == [30, 40]
    assert image.getpixel((192, 286)) == (200, 200, 200)


def test_a_curve_goes_through_its_values():
    sheet = pictures.Sheet(1000, 800)
    chart = pictures.Chart(sheet, 100, 900, "title", range(5), range(0, 101, 20))
    chart.curve([(0, 0), (2, 100), (4, 50)], "first")
    for place in (1, 50), (3, 75):
        x, y = chart.at(*place)
        assert sheet.image.getpixel((int(x), int(y))) == FIRST
    assert chart.at(4, 100) == (900, 176)


RANK_1 = {"rank-1": {"there": 0.5, "back": 1.0}}


@pytest.mark.parametrize("line", [
    {"losses": {"a": 0.5}}, RANK_1, RANK_1 | {"streams": {"gait": RANK_1}}])
def test_logs_of_one_line_or_without_some_keys(line):
    """Only losses and Rank-1 are drawn, and losses only if they are finite."""
    log = [{"epoch": 1, **line}, {"epoch": 80}]
    image = pictures.draw_curves(log, "title")
    assert image.size == pictures.draw_curves(log[:1], "title").size == (2480, 840)
    log[1] |= {"shown": {"b": 1.0}, "losses": {"lost": float("nan")}}
    assert pictures.draw_curves(log, "title") == image
    assert pictures.draw_curves([{"epoch": 1}, log[1]], "title") != image
