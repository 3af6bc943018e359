"""Silhouettes, codes and their losses against literal forms, beyond what the golden arrays fix."""
import math

import sasgl
from sasgl import SASGL, MaskBranch, choose_body, diversity_loss, refine_edges, smooth_loss
from support.dinov2 import load_dinov2

import pytest
import torch
import torch.nn.functional as F


def small_sasgl():
    torch.manual_seed(0)
    backbone = torch.nn.Conv2d(8, 8, 3, 2, 1)
    return SASGL(prior=load_dinov2("tiny-random"), backbone=backbone, width=8, dino_size=(112, 56),
                 code_size=(16, 8))


# ------------------------------------------------------------- silhouettes ----

def literal_body(mask):
    """One frame's soft mask (2, H, W) -> (H, W): the channel that is the body."""
    H, W = mask.shape[1:]
    rows = max(1, 5 * H // 64)
    at_edge = 0
    for i in [*range(rows), *range(H - rows, H)]:
        for j in range(W):
            at_edge += bool(mask[0, i, j] > 0.5)
    return mask[1] if at_edge > rows * W else mask[0]


def literal_silhouette(p):
    """One frame's body probability (H, W) -> (H, W): 3x3 dilation, 5x5 erosion."""
    H, W = p.shape

    def window(values, i, j, radius):
        return values[max(0, i - radius):i + radius + 1, max(0, j - radius):j + radius + 1]

    dilated, silhouette = torch.zeros(H, W), torch.zeros(H, W)
    for i in range(H):
        for j in range(W):
            dilated[i, j] = (window(p, i, j, 1) > 0.5).any()
    for i in range(H):
        for j in range(W):
            if window(dilated, i, j, 2).min() > 0:
                silhouette[i, j] = 1
            elif dilated[i, j] > 0:
                silhouette[i, j] = p[i, j]
    return silhouette


@pytest.mark.parametrize("size", [(64, 32), (16, 8)])
def test_choose_body_by_the_edge_rows(size):
    H, W = size
    rows = max(1, 5 * H // 64)
    torch.manual_seed(0)
    mask = torch.rand(40, 2, *size)
    mask[:, 0, rows:-rows] = 1    # what is not at the edge does not matter
    mask[0, 0] = 0
    mask[0, 0, :rows] = 1    # exactly half of the edge rows: not *more* than half
    body = choose_body(mask)
    for frame, got in zip(mask, body, strict=True):
        assert torch.equal(got, literal_body(frame))
    assert torch.equal(body[0], mask[0, 0])
    is_first = (body == mask[:, 0]).all(2).all(1)
    assert is_first.any() and not is_first.all()


def test_refine_edges_against_loops():
    torch.manual_seed(0)
    p = F.interpolate(torch.rand(2, 1, 5, 4), (17, 13), mode="bilinear")[:, 0]
    silhouette = refine_edges(p)
    for frame, got in zip(p, silhouette, strict=True):
        assert torch.equal(got, literal_silhouette(frame))
    on_edge = (silhouette > 0) & (silhouette < 1)
    assert on_edge.any() and (silhouette == 1).any() and (silhouette == 0).any()


def test_losses_by_hand():
    impulse = torch.zeros(1, 2, 5, 5)
    impulse[0, :, 2, 2] = 1    # |Sobel x| and |Sobel y| of the channels' sum, 2: 16 each
    assert smooth_loss(impulse).item() == pytest.approx(32 / 50)
    even = torch.full((1, 16, 2, 2), 1 / 16)
    assert diversity_loss(even).item() == pytest.approx(0, abs=1e-4)
    one = torch.zeros(1, 16, 2, 2)
    one[:, 3] = 1
    assert diversity_loss(one).item() == pytest.approx(4, abs=1e-4)
    assert diversity_loss(torch.cat([even, one])).item() == pytest.approx(2, abs=1e-4)


# ------------------------------------------------------- branches in training ----

def standardised(x):
    return (x - x.mean(0)) / torch.sqrt(x.var(0, unbiased=False) + 1e-5)


def test_the_mask_bottleneck_gives_back_what_was_not_dropped(monkeypatch):
    torch.manual_seed(0)
    branch, pixels = MaskBranch(6).train(), torch.randn(50, 6)
    dropped = pixels * 2 * torch.randint(2, (50, 6))
    monkeypatch.setattr(F, "dropout", lambda x, p, training: dropped if training else x)
    mask = branch(pixels)
    torch.testing.assert_close(mask, branch.down_sampling(standardised(dropped)).softmax(1))
    error = branch.up_sampling(mask) - pixels
    torch.testing.assert_close(branch.reconstruction_loss(mask, pixels), error.square().mean())


def test_codes_and_their_statistics_are_the_foreground_s_alone():
    net = small_sasgl().train()
    frames = torch.randn(4, 3, 32, 16)
    codes, _ = net.encode(frames)
    places = codes.silhouette != 0
    assert 0.02 < places.float().mean() < 0.98
    pixels = net.upsampled(net.features(frames)[1])[places]    # (M, 128)

    branch, number = net.denoising_branch, len(pixels)
    torch.testing.assert_close(branch.bn_s.running_mean, 0.1 * pixels.mean(0))
    torch.testing.assert_close(branch.bn_s.running_var, 0.9 + 0.1 * pixels.var(0))
    first, _, _, last = branch.down_sampling
    hidden = standardised(first(standardised(pixels)))
    gelu = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    denoising = last(gelu).softmax(1)
    branch = net.appearance_branch
    appearance = 1 / (1 + torch.exp(-standardised(branch.down_sampling(standardised(pixels)))))
    for code, want in ((codes.denoising, denoising), (codes.appearance, appearance)):
        code = code.permute(0, 2, 3, 1)
        torch.testing.assert_close(code[places], want, rtol=1e-4, atol=1e-5)
        assert want.shape == (number, 16) and (code[~places] == 0).all()


def test_losses_are_weighted_and_those_of_the_code_leave_the_mask_alone():
    net = small_sasgl().train()
    frames = torch.randn(2, 2, 3, 32, 16)
    _, codes, losses = net(frames)
    assert losses.keys() == {"mask", "smooth_part", "diversity"}
    smooth, diversity = smooth_loss(codes.denoising[:, :15]), diversity_loss(codes.denoising)
    torch.testing.assert_close(losses["smooth_part"], 0.01 * smooth)
    torch.testing.assert_close(losses["diversity"], 5 * diversity)
    assert not codes.body.requires_grad and not codes.silhouette.requires_grad
    (losses["diversity"] + codes.appearance.square().sum()).backward()
    assert all(p.grad is None for p in net.mask_branch.parameters())
    assert all(p.grad is not None for p in net.denoising_branch.parameters())
    losses["mask"].backward()
    assert all(p.grad is not None for p in net.mask_branch.parameters())
    assert all(p.grad is None for p in net.prior.parameters()) and not net.prior.training
    assert net.eval()(frames)[2] == {}


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_batch_with_few_foreground_pixels_trains_on(number, monkeypatch):
    net = small_sasgl().train()
    before = net.denoising_branch.bn_s.running_mean.clone()

    def nearly_empty(body):
        silhouette = torch.zeros_like(body)
        silhouette[0, 3, 2:2 + number] = 1
        return silhouette
    monkeypatch.setattr(sasgl, "refine_edges", nearly_empty)
    maps, _, losses = net(torch.randn(2, 2, 3, 32, 16))
    (maps.square().mean() + sum(losses.values())).backward()
    for name, p in net.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name
    has_learned = not torch.equal(net.denoising_branch.bn_s.running_mean, before)
    assert has_learned == (number == 2)    # a batch norm needs two
    assert net.eval()(torch.randn(2, 2, 3, 32, 16))[0].isfinite().all()


# ---------------------------------------------------------------- blanking ----

def is_blank(code):
    """(20, 16, H, W), of 10 tracklets of 2 frames -> (10,)."""
    return (code.unflatten(0, (10, 2)) == 0).flatten(1).all(1)


@pytest.mark.parametrize("training", [True, False])
def test_a_fifth_of_the_tracklets_loses_one_code_in_training_only(training):
    net, seen = small_sasgl().train(training), []
    net.gait_net.register_forward_pre_hook(lambda module, given: seen.extend(given))
    _, codes, _ = net(torch.randn(10, 2, 3, 32, 16))
    no_denoising, no_appearance = map(is_blank, seen)
    assert not (no_denoising & no_appearance).any()
    assert (no_denoising | no_appearance).sum() == (2 if training else 0)
    assert not is_blank(codes.denoising).any()    # losses see both codes
    assert not is_blank(codes.appearance).any()


def test_which_tracklets_and_which_code_is_chance():
    torch.manual_seed(0)
    drawn = [sasgl.kept_codes(10) for _ in range(50)]
    for keep in drawn:
        assert keep.shape == (2, 10) and (keep == 0).sum() == 2 and (keep.sum(0) >= 1).all()
    blanked = sum(1 - keep for keep in drawn)
    assert (blanked.sum(0) > 0).all()    # any tracklet
    assert (blanked.sum(1) > 20).all()    # either code
    assert sasgl.kept_codes(2).all()    # a fifth of two rounds to none
