"""Pictures: the colours say what they should, curves go where the values are, odd inputs are drawn too."""
import numpy as np
import pytest
import torch
from PIL import Image

from pictures import COLOURS, GREEN, GREY, RED, SCALE, Panel, draw_curves, draw_ranking, evenly, principal_colours


@pytest.fixture
def frames(tmp_path):
    for i in range(5):
        Image.new("RGB", (8, 16), (0, 0, 40 + 40 * i)).save(tmp_path / f"{i}.png")
    return [str(tmp_path / f"{i}.png") for i in range(5)]


def runs_of(row, colour):
    """How often a row of pixels enters the colour."""
    hit = (row == np.array(colour)).all(-1)
    return int((hit[1:] & ~hit[:-1]).sum() + hit[0])


def test_a_ranked_list_says_who_is_right(frames):
    """Query in black, then green, red, grey in their order; three frames of each, the first and the last among them; a lost frame is said to be lost."""
    ranked = [("right", frames, 0.5, True), ("wrong", frames[:1], 1.25, False), ("unknown " + "x" * 200, frames, 2.0, None), ("gone", ["/nowhere/1.png"] * 4, 3.0, False)]
    sheet = np.asarray(draw_ranking([("title", frames, ranked), ("second", frames, ranked[:1])], (16, 8), height=64))
    frame_row = sheet[10 + 18 + 1]    # inside the upper edge of the first row's frames
    edges = [int(np.where((frame_row == np.array(colour)).all(-1))[0][0]) for colour in ((0, 0, 0), GREEN, RED, GREY)]
    assert edges == sorted(edges) and [runs_of(frame_row, colour) for colour in (GREEN, RED, GREY)] == [1, 2, 1]
    middle = sheet[10 + 18 + 4 + 32]
    blues = [tuple(middle[edges[1] + 4 + 16 + k * 32]) for k in range(3)]    # the middle of each of the three frames
    assert blues == [(0, 0, 40), (0, 0, 120), (0, 0, 200)]
    assert sheet.shape[0] == 10 + 2 * (64 + 8 + 58) and draw_ranking([], (16, 8)).size[0] > 0


def test_a_colour_is_a_code():
    """The same code has the same colour in every tracklet, other codes other colours, the background none."""
    words = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
    codes = [words[torch.tensor(order)].view(2, 3, 1, 16).permute(0, 3, 1, 2).clone() for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0])]
    codes[0][0, :, 0] = 0
    a, b = (colour.permute(0, 2, 3, 1).reshape(6, 3) for colour in principal_colours(codes))
    assert (a[0] == 0).all() and torch.equal(a[1:], b.flip(0)[1:]) and len({tuple(c) for c in b.tolist()}) == 6 and b.min() >= 0.15 and b.max() <= 1
    assert all((colour == 0).all() for colour in principal_colours([torch.zeros(2, 16, 4, 3)]))    # no body anywhere


def test_a_curve_goes_through_its_values():
    sheet = Image.new("RGB", (SCALE * 500, SCALE * 300), "white")
    panel = Panel(sheet, (100, 50, 400, 250), "title", "label", 5, 0.01, 100, True)
    panel.line("loss", [(1, 100), (3, 1), (5, 0.01)])
    for x, y in ((100, 50), (250, 150), (400, 250)):    # a decade is as high as another
        assert sheet.getpixel((SCALE * x, SCALE * y)) == COLOURS[0]


@pytest.mark.parametrize("epochs, losses", [(1, {"only": 0.5}), (1, {"zero": 0.0}), (3, {f"loss_{i}": 10.0 ** -i for i in range(14)}), (300, {"a": 1.0, "b": 1e-9})])
def test_odd_logs_are_drawn(epochs, losses):
    log = [{"epoch": e + 1, "lr": 1.0, **losses, "seconds": 1.0} for e in range(epochs)]
    log[-1]["rank-1"] = {"infrared->visible": 0.5, "visible->infrared": 1.0}
    assert draw_curves(log, "a title").size == (2480, 2 * max(420, 100 + 20 * sum(v > 0 for v in losses.values())))


def test_what_is_shown_is_evenly_taken():
    assert evenly(list(range(10)), 4) == [0, 3, 6, 9] and evenly([1, 2], 4) == [1, 2] and evenly([], 4) == []
