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


def test_a_ranked_list_shows_who_is_right():
    """Borders by colour, the frames inside."""
    colours = pictures.BLACK, pictures.GREEN, pictures.RED, pictures.GREY
    levels = 90, 10, 20, 30
    cells = []
    for level, colour in zip(levels, colours, strict=True):
        frame = np.full((16, 8), level, np.uint8)
        cells.append(pictures.Found("words", [frame] * 5, colour, 0.5))

    image = pictures.draw_ranking([cells, cells[:2]], (16, 8))
    assert image.size == (850, 392)
    line = np.asarray(image)[94]    # through the middle of the first row
    borders = [tuple(line[x]) for x in (10, 220, 430, 640)]
    assert borders == list(map(ImageColor.getrgb, colours))
    inside = line[[14, 224, 434, 644], 0]
    assert tuple(inside) == levels


def test_a_sheet_of_frames_maps_and_codes():
    """The body is the left half of each frame, in all maps but the silhouette."""
    body = torch.zeros(4, 16, 8)
    body[..., :4] = 1
    code = body[:, None].repeat(1, 16, 1, 1)
    rows = {"frames": plain(100).repeat(2, 1, 1, 1), "body": body, "silhouette": 1 - body,
            "code": code, "mask": body > 0}
    image = pictures.in_columns(["a", "b"], rows, [["60%", ""], []])
    assert image.size == (402, 720)
    lines = np.asarray(image)[88::136, 266:, 0]    # through the middle of each row
    assert lines[:, 8].tolist() == [100, 255, 0, 38, 255]
    assert lines[:, 56].tolist() == [100, 0, 255, 0, 0]
    words = np.asarray(image)[698:]
    assert words[:, 130:194].min() < 128 and words[:, 194:].min() == 255    # below one frame alone


def test_iou_by_hand():
    """The left half; none of it, all of it, or half of it and as much beside it, is found."""
    mask = torch.zeros(3, 16, 8)
    mask[..., :4] = 1
    found = torch.stack([1 - mask[0], mask[0], mask[0].roll(2, 1)])
    assert pictures.iou(found, mask > 0).tolist() == pytest.approx([0, 1, 1 / 3])


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
