"""Pictures: the colours say what they should, curves go where the values are, odd inputs are drawn
too."""
from types import SimpleNamespace

from support.pictures import (
    COLOURS,
    GREEN,
    GREY,
    RED,
    SCALE,
    Found,
    Panel,
    RankingSheet,
    Reading,
    Row,
    draw_curves,
    draw_ranking,
    draw_reading,
    draw_silhouettes,
    evenly,
    principal_colours,
)

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor


@pytest.fixture
def frames(tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(5)]
    for i, path in enumerate(paths):
        Image.new("RGB", (8, 16), (0, 0, 40 + 40 * i)).save(path)
    return paths


def is_colour(pixels, colour):
    return (pixels == np.array(colour)).all(-1)


def runs_of(row, colour):
    """How often a row of pixels enters the colour."""
    hit = is_colour(row, colour)
    return int((hit[1:] & ~hit[:-1]).sum() + hit[0])


# ---------------------------------------------------------- ranked lists ----


def ranked_tracklets(frames):
    return [("right", frames, 0.5, True),
            ("wrong", frames[:1], 1.25, False),
            ("unknown " + "x" * 200, frames, 2.0, None),
            ("gone", ["/nowhere/1.png"] * 4, 3.0, False)]


def test_a_ranked_list_says_who_is_right(frames):
    """Query in black, then green, red, grey in their order; three frames of each, the first and the
    last among them; a lost frame is said to be lost."""
    ranked = ranked_tracklets(frames)
    rows = [("title", frames, ranked), ("second", frames, ranked[:1])]
    sheet = np.asarray(draw_ranking(rows, (16, 8), height=64))
    frame_row = sheet[10 + 18 + 1]    # inside the upper edge of the first row's frames
    colours = (0, 0, 0), GREEN, RED, GREY
    edges = [int(is_colour(frame_row, colour).argmax()) for colour in colours]
    assert edges == sorted(edges)
    assert [runs_of(frame_row, colour) for colour in (GREEN, RED, GREY)] == [1, 2, 1]
    middle = sheet[10 + 18 + 4 + 32]
    blues = [tuple(middle[edges[1] + 4 + 16 + k * 32]) for k in range(3)]    # of each frame
    assert blues == [(0, 0, 40), (0, 0, 120), (0, 0, 200)]
    assert sheet.shape[0] == 10 + 2 * (64 + 8 + 58)
    assert draw_ranking([], (16, 8)).size[0] > 0


def test_rows_are_the_same_with_names_and_without(frames):
    ranked = ranked_tracklets(frames)
    named = [Row("title", frames, [Found(*found) for found in ranked])]
    plain = [("title", frames, ranked)]
    pictures = [np.asarray(draw_ranking(rows, (16, 8))) for rows in (named, plain)]
    assert np.array_equal(*pictures)


def test_a_bar_for_each_strip_of_each_stream(frames):
    """As long as the strip's distance, the longest of its stream at full length; top strip first.
    Where there are none, no place is kept for them."""
    near = {"gait": torch.tensor([1.0, 0.0]), "appearance": torch.tensor([5.0, 5.0])}
    far = {"gait": torch.tensor([2.0, 4.0]), "appearance": torch.tensor([10.0, 0.0])}
    ranked = [Found("near", frames, 0.5, None, near), Found("far", frames, 0.7, None, far)]
    barless = [found[:4] for found in ranked]
    sheet, plain = (np.asarray(draw_ranking([Row("title", frames, row)], (16, 8), height=64))
                    for row in (ranked, barless))
    assert sheet.shape[1] - plain.shape[1] == 3 * 2 * RankingSheet.BARS
    # The upper and the lower strip's bars, as shares of the full length, tracklet by tracklet.
    y = 10 + 18 + 4
    full = RankingSheet.BARS - 4
    gait, appearance = COLOURS[:2]
    wanted = {y + 8: {gait: (1 / 4, 2 / 4), appearance: (5 / 10, 1)},
              y + 40: {gait: (0, 1), appearance: (5 / 10, 0)}}
    for row, streams in wanted.items():
        for colour, shares in streams.items():
            is_bar = is_colour(sheet[row], ImageColor.getrgb(colour))
            starts = np.flatnonzero(is_bar[1:] & ~is_bar[:-1])
            ends = np.flatnonzero(is_bar[:-1] & ~is_bar[1:])
            # A bar of no length is a line of one pixel.
            lengths = ends - starts - 1
            assert lengths.tolist() == [full * share for share in shares]


ODD_BARS = {
    "the query itself": {"gait": torch.zeros(2), "appearance": torch.zeros(2)},
    "thinner than a pixel": {"gait": torch.rand(200)},
    "more streams than colours": {str(i): torch.rand(3) for i in range(15)}}


@pytest.mark.parametrize("strips", ODD_BARS.values(), ids=ODD_BARS)
def test_odd_bars_are_drawn(strips, frames):
    rows = [Row("title", frames, [Found("one", frames, 0.0, None, strips)])]
    assert draw_ranking(rows, (16, 8)).size[0] > 0


def test_where_a_tracklet_looks_is_lit_and_whose_words_it_reads_is_shown(frames):
    """The patch that is looked at most keeps its brightness; a face that nobody knows is said to
    be no file."""
    grey = torch.full((2, 3, 16, 8), 200, dtype=torch.uint8)
    look = torch.tensor([[[0.0, 0.0], [0.0, 0.6]], [[0.3, 0.3], [0.3, 0.3]]])
    sentences = [("60% 7", frames[0]), ("40% no. 3", None)]
    night = Reading("night", grey, look, sentences)
    day = Reading("day", grey, None, [])
    sheet = np.asarray(draw_reading([night, day], height=64))
    assert sheet.shape[1] == 110 + 2 * (2 * 32 + 16)

    # The first tracklet's two frames, lit.
    top, left = 24 + 64 + 8, 110
    lit = sheet[top:top + 64, left:left + 64, 0]
    first, second = lit[:, :32], lit[:, 32:]
    assert first[-2, -2] == 200
    assert first[1, 1] == int(0.15 * 200)
    assert (second == 200).all()

    # The face of the one whose sentence it reads most.
    top += 64 + 8
    face = sheet[top:top + 64, left:left + 32]
    assert (face == (0, 0, 40)).all()


def test_any_name_of_a_file_is_drawn(frames):
    """A line break, an escape and bytes that are no text: what a gallery's file may hold."""
    for name in "two\nlines", "\x1b[31mred", "no\udcfftext":
        ranked = [(name, [f"/nowhere/{name}"], 1.0, None), (name, ["nul\0"], 2.0, None)]
        assert draw_ranking([(name, frames, ranked)], (16, 8)).size[0] > 0


# ----------------------------------------------------------- silhouettes ----


def test_a_colour_is_a_code():
    """The same code has the same colour in every tracklet, other codes other colours, the
    background none."""
    words = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
    orders = [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]
    codes = [words[list(order)].view(2, 3, 1, 16).permute(0, 3, 1, 2).clone() for order in orders]
    codes[0][0, :, 0] = 0
    a, b = (colour.permute(0, 2, 3, 1).reshape(6, 3) for colour in principal_colours(codes))
    assert (a[0] == 0).all() and torch.equal(a[1:], b.flip(0)[1:])
    assert len({tuple(colour) for colour in b.tolist()}) == 6
    assert b.min() >= 0.15 and b.max() <= 1
    nobody = principal_colours([torch.zeros(2, 16, 4, 3)])
    assert all((colour == 0).all() for colour in nobody)


def column(T=2, H=16, W=8, masks=None, **changes):
    """A tracklet as draw_silhouettes wants it: grey frames, the body on the left."""
    body = torch.zeros(T, H, W)
    body[..., :W // 2] = 1
    code = body[:, None].repeat(1, 16, 1, 1)
    whole = {"title": "visible D1, person 3", "frames": torch.full((T, 3, H, W), 100).byte(),
             "body": body, "silhouette": 1 - body, "denoising": code, "appearance": code,
             "masks": masks, "iou": None if masks is None else torch.full((T,), 0.5)}
    return SimpleNamespace(**{**whole, **changes})


def test_a_sheet_has_a_row_more_where_one_has_true_masks():
    masks = torch.ones(2, 16, 8, dtype=torch.bool)
    plain, known = column(), column(masks=masks, title="a name\n" + "x" * 200)
    short = draw_silhouettes([plain], height=64)
    long = draw_silhouettes([plain, known], height=64)
    strip, row = 2 * 32 + 8, 64 + 8
    assert short.size == (130 + strip, 24 + 5 * row)
    assert long.size == (130 + 2 * strip, 24 + 6 * row + 16)
    is_dark = np.asarray(long)[-22:].max(-1) < 128    # where the IoU stands
    assert is_dark[:, 130 + strip:].any()
    assert not is_dark[:, 130:130 + strip].any()


def test_a_sheet_shows_what_it_is_given():
    """In each row the frames side by side, the body on the left of each."""
    masks = torch.ones(2, 16, 8, dtype=torch.bool)
    sheet = np.asarray(draw_silhouettes([column(masks=masks)], height=64))
    black, white, grey = (0, 0, 0), (255, 255, 255), (100, 100, 100)
    middles = [24 + row * (64 + 8) + 32 for row in range(6)]
    frames, body, silhouette, denoising, appearance, true_mask = middles
    for left in 130, 130 + 32:
        inside, outside = left + 4, left + 28
        assert tuple(sheet[frames, inside]) == grey
        assert tuple(sheet[body, inside]) == white
        assert tuple(sheet[body, outside]) == black
        assert tuple(sheet[silhouette, inside]) == black
        assert tuple(sheet[silhouette, outside]) == white
        for code in denoising, appearance:
            assert min(sheet[code, inside]) > 0
            assert tuple(sheet[code, outside]) == black
        assert tuple(sheet[true_mask, outside]) == white


# ---------------------------------------------------------------- curves ----


def test_a_curve_goes_through_its_values():
    sheet = Image.new("RGB", (SCALE * 500, SCALE * 300), "white")
    panel = Panel(sheet, (100, 50, 400, 250), 5, 0.01, 100, log=True)
    panel.draw_axes("title", "label")
    panel.line("loss", [(1, 100), (3, 1), (5, 0.01)])
    for x, y in (100, 50), (250, 150), (400, 250):    # a decade is as high as another
        assert sheet.getpixel((SCALE * x, SCALE * y)) == ImageColor.getrgb(COLOURS[0])


@pytest.mark.parametrize("epochs, losses", [
    (1, {"only": 0.5}),
    (1, {"zero": 0.0}),
    (2, {"diverged": float("inf"), "lost": float("nan"), "sound": 1.0}),
    (3, {f"loss_{i}": 10.0 ** -i for i in range(14)}),
    (300, {"a": 1.0, "b": 1e-9})])
def test_odd_logs_are_drawn(epochs, losses):
    log = [{"epoch": e + 1, "lr": 1.0, "losses": losses, "shown": {"accuracy": 0.5}, "seconds": 1.0}
           for e in range(epochs)]
    log[-1]["rank-1"] = {"infrared->visible": 0.5, "visible->infrared": 1.0}
    drawn = sum(0 < value < float("inf") for value in losses.values())
    assert draw_curves(log, "a title").size == (2480, 2 * max(420, 100 + 20 * drawn))


def test_losses_are_drawn_and_what_is_shown_is_not():
    def drawn(**more):
        log = [{"epoch": epoch, "losses": {"loss": 2.0 / epoch}, **more} for epoch in (1, 2, 3)]
        return np.asarray(draw_curves(log, "a title"))

    assert np.array_equal(drawn(), drawn(shown={"accuracy": 0.5}, seconds=3.0, lr=0.1))
    assert not np.array_equal(drawn(), drawn(losses={"loss": 1.0, "other": 0.1}))


def test_each_stream_alone_is_a_thin_line():
    """In a colour of its own, the next after its direction's; an evaluation without streams, as an
    older version's, has no point of it."""
    def drawn(*streams):
        log = [{"epoch": epoch, "rank-1": {"there": 0.5, "back": 0.9}} for epoch in (1, 2, 3)]
        for line in log[1:]:
            line["streams"] = {name: {"rank-1": {"there": 0.1 * i, "back": 0.1 * i + 0.6}}
                               for i, name in enumerate(streams, start=1)}
        return np.asarray(draw_curves(log, "a title"))[:, 1240:]

    def pixels(sheet):    # of each colour
        return [is_colour(sheet, ImageColor.getrgb(colour)).sum() for colour in COLOURS[:6]]

    sheet, plain = drawn("gait", "appearance"), drawn()
    first, second = pixels(sheet[:, 420:440]), pixels(sheet[:, 720:740])    # between two points
    assert min(second[0], second[3]) > max(second[1], second[2], second[4], second[5])
    assert all(second) and all(pixels(sheet))
    assert [number > 0 for number in first] == [True, False, False, True, False, False]
    assert [number > 0 for number in pixels(plain)] == [True, True, False, False, False, False]


def test_a_log_of_an_older_run_is_drawn_without_what_it_lacks():
    """Its losses stood beside the epoch: axes without them, and its Rank-1."""
    direction = "infrared->visible"
    old = [{"epoch": epoch, "lr": 0.1, "triplet": 1.0, "seconds": 2.0} for epoch in (1, 2)]
    old[-1] |= {"rank-1": {direction: 0.5}, "mAP": {direction: 0.4}}
    new = [{"epoch": 1}, {"epoch": 2, "rank-1": {direction: 0.5}}]
    pictures = [np.asarray(draw_curves(log, "a title")) for log in (old, new)]
    assert np.array_equal(*pictures)
    first = ImageColor.getrgb(COLOURS[0])
    assert is_colour(pictures[0][:, 1240:], first).any()    # Rank-1
    assert not is_colour(pictures[0][:, :1240], first).any()


def test_what_is_shown_is_evenly_taken():
    assert evenly(list(range(10)), 4) == [0, 3, 6, 9]
    assert evenly([1, 2], 4) == [1, 2]
    assert evenly([], 4) == []
