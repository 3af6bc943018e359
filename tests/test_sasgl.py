"""Silhouettes, codes and their losses against literal forms, beyond what the golden arrays fix."""
import sasgl
from sasgl import SASGL, choose_body, diversity_loss, refine_edges, smooth_loss
from support.dinov2 import load_dinov2

import pytest
import torch
import torch.nn.functional as F

FRAMES = torch.randn(20, 3, 32, 16, generator=torch.Generator().manual_seed(1))


def small_sasgl():
    torch.manual_seed(0)
    backbone = torch.nn.Conv2d(8, 8, 3, 2, 1)
    return SASGL(prior=load_dinov2("tiny-random"), backbone=backbone, width=8, dino_size=(112, 56),
                 code_size=(16, 8))


def test_choose_body_by_the_edge_rows():
    mask = torch.zeros(3, 2, 64, 32)
    mask[0, 0] = 0.9    # channel 0 fills the edge rows: it is the background
    mask[1, 0, 20:40, 10:20] = 0.8    # it is in the middle: it is the body
    mask[2, 0, :5] = 1    # it has exactly half of the edge rows, not *more* than half
    mask[:, 1] = 1 - mask[:, 0]
    body = choose_body(mask)
    assert torch.equal(body[0], mask[0, 1])
    assert torch.equal(body[1:], mask[1:, 0])


def literal_silhouette(p):
    """One frame's body probability (H, W) -> (H, W): 3x3 dilation, 5x5 erosion."""
    def window(values, i, j, radius):
        return values[max(0, i - radius):i + radius + 1, max(0, j - radius):j + radius + 1]

    places = [(i, j) for i in range(p.shape[0]) for j in range(p.shape[1])]
    dilated, silhouette = torch.zeros_like(p), torch.zeros_like(p)
    for i, j in places:
        dilated[i, j] = (window(p, i, j, 1) > 0.5).any()
    for i, j in places:
        if window(dilated, i, j, 2).min() > 0:
            silhouette[i, j] = 1
        elif dilated[i, j] > 0:
            silhouette[i, j] = p[i, j]
    return silhouette


def test_refine_edges_against_loops():
    torch.manual_seed(0)
    p = F.interpolate(torch.rand(2, 1, 5, 4), (17, 13), mode="bilinear")[:, 0]
    silhouette = refine_edges(p)
    for frame, got in zip(p, silhouette, strict=True):
        assert torch.equal(got, literal_silhouette(frame))
    assert (silhouette == 0).any() and (silhouette == 1).any()
    assert (silhouette % 1 > 0).any()    # edges


def test_the_mask_bottleneck_gives_back_what_was_not_dropped():
    net = small_sasgl().train()
    codes, losses = net.encode(FRAMES)
    given, _ = net.features(FRAMES)
    returned = net.mask_branch.up_sampling(codes.mask.permute(0, 2, 3, 1))
    error = returned - net.upsampled(given)
    torch.testing.assert_close(losses["mask"], error.square().mean())
    assert not torch.equal(net.encode(FRAMES)[0].mask, codes.mask)    # by chance half is dropped
    assert not codes.body.requires_grad


def test_codes_and_their_statistics_are_the_foreground_s_alone():
    net = small_sasgl().train()
    codes, _ = net.encode(FRAMES)
    places = codes.silhouette != 0
    assert 0.02 < places.float().mean() < 0.98
    _, mid4 = net.features(FRAMES)
    pixels = net.upsampled(mid4)[places]    # (M, 4D)
    branch = net.denoising_branch
    torch.testing.assert_close(branch.bn_s.running_mean, 0.1 * pixels.mean(0))
    torch.testing.assert_close(branch.bn_s.running_var, 0.9 + 0.1 * pixels.var(0))
    for code, branch in ((codes.denoising, net.denoising_branch),
                         (codes.appearance, net.appearance_branch)):
        code = code.permute(0, 2, 3, 1)
        torch.testing.assert_close(code[places], branch(pixels))
        assert (code[~places] == 0).all()


def test_losses_are_weighted_and_those_of_the_code_leave_the_mask_alone(monkeypatch):
    net = small_sasgl().train()
    codes, of_mask = net.encode(FRAMES)
    monkeypatch.setattr(net, "encode", lambda frames: (codes, of_mask))
    _, losses = net(FRAMES.unflatten(0, (10, 2)))
    assert losses.keys() == {"mask", "smooth_part", "diversity"}
    smooth = smooth_loss(codes.denoising[:, :15])
    torch.testing.assert_close(losses["smooth_part"], 0.01 * smooth)
    diversity = diversity_loss(codes.denoising)
    torch.testing.assert_close(losses["diversity"], 5 * diversity)
    (losses["diversity"] + codes.appearance.square().sum()).backward()
    assert all(p.grad is None for p in net.mask_branch.parameters())
    losses["mask"].backward()
    assert all(p.grad is not None for p in net.mask_branch.parameters())
    assert small_sasgl().eval().encode(FRAMES)[1] == {}


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_batch_with_few_foreground_pixels_trains_on(number, monkeypatch):
    net = small_sasgl().train()
    before = net.denoising_branch.bn_s.running_mean.clone()
    silhouette = torch.zeros(4, 16, 8)
    silhouette[0, 3, 2:2 + number] = 1
    monkeypatch.setattr(sasgl, "refine_edges", lambda body: silhouette)
    maps, losses = net(FRAMES[:4].unflatten(0, (2, 2)))
    (maps.square().mean() + sum(losses.values())).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    has_learned = not torch.equal(net.denoising_branch.bn_s.running_mean, before)
    assert has_learned == (number == 2)    # a batch norm needs two


@pytest.mark.parametrize("training", [True, False])
def test_a_fifth_of_the_tracklets_loses_one_code_in_training_only(training):
    net, seen = small_sasgl().train(training), []
    net.gait_net.register_forward_pre_hook(lambda module, given: seen.extend(given))
    net(FRAMES.unflatten(0, (10, 2)))
    blanked = torch.stack(seen).unflatten(1, (10, 2)).sum((2, 3, 4, 5)) == 0    # (2, 10)
    assert blanked.sum() == (2 if training else 0)
    assert not blanked.all(0).any()


def test_which_tracklets_and_which_code_is_chance():
    torch.manual_seed(0)
    blanked = sum(1 - sasgl.kept_codes(10) for _ in range(50))    # (2, 10)
    assert blanked.sum() == 100
    assert (blanked.sum(0) > 0).all()    # any tracklet
    assert (blanked.sum(1) > 20).all()    # either code
