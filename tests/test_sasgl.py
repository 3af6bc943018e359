"""Silhouettes, codes and their losses against a literal form in loops, beyond what the golden
arrays fix."""
import math
from types import SimpleNamespace

import sasgl
from sasgl import SASGL, choose_body, diversity_loss, kept_codes, refine_edges, smooth_loss
from support.dinov2 import load_dinov2

import pytest
import torch
import torch.nn.functional as F


def small_sasgl():
    torch.manual_seed(0)
    backbone = torch.nn.Conv2d(8, 8, 3, 2, 1)
    return SASGL(dinov2=load_dinov2("tiny-random"), backbone=backbone, width=8, dino_size=(112, 56),
                 code_size=(16, 8))


# ----------------------------------------------- the literal form, in loops ----

def literal_body(mask):
    """One frame's soft mask (2, H, W) -> (H, W): the channel that is the body."""
    H, W = mask.shape[1:]
    rows = max(1, 5 * H // 64)
    at_edge = 0
    for i in [*range(rows), *range(H - rows, H)]:
        for j in range(W):
            at_edge += bool(mask[0, i, j] > 0.5)
    return mask[1] if at_edge > rows * W else mask[0]


def literal_closing(p):
    """One frame's body probability (H, W) -> silhouette (H, W): 3x3 dilation, 5x5 erosion."""
    H, W = p.shape

    def window(values, i, j, radius):
        return values[max(0, i - radius):i + radius + 1, max(0, j - radius):j + radius + 1]

    is_body = p > 0.5
    dilated, silhouette = torch.zeros(H, W), torch.zeros(H, W)
    for i in range(H):
        for j in range(W):
            dilated[i, j] = window(is_body, i, j, 1).any()
    for i in range(H):
        for j in range(W):
            if window(dilated, i, j, 2).min() > 0:
                silhouette[i, j] = 1
            elif dilated[i, j] > 0:
                silhouette[i, j] = p[i, j]
    return silhouette


def literal_smoothness(maps):
    """Maps (N, C, H, W) -> |Sobel x| + |Sobel y| of the channels' sum, per value."""
    H, W = maps.shape[2:]
    padded = F.pad(maps.sum(1), (1, 1, 1, 1))

    def moved(down, right):
        return padded[:, 1 + down:1 + down + H, 1 + right:1 + right + W]

    left = moved(-1, -1) + 2 * moved(0, -1) + moved(1, -1)
    right = moved(-1, 1) + 2 * moved(0, 1) + moved(1, 1)
    above = moved(-1, -1) + 2 * moved(-1, 0) + moved(-1, 1)
    below = moved(1, -1) + 2 * moved(1, 0) + moved(1, 1)
    edges = (left - right).abs() + (above - below).abs()
    return edges.sum() / maps.numel()


def literal_diversity(code):
    """Denoising code (N, C, H, W) -> log2(C) minus each frame's entropy, their mean."""
    differences = []
    for frame in code:
        entropy = 0
        for channel in frame:
            share = channel.sum() / (frame.sum() + 1e-6)
            entropy = entropy - share * torch.log2(share + 1e-6)
        differences.append(math.log2(len(frame)) - entropy)
    return sum(differences) / len(differences)


class Literal:
    """SASGL.encode as one would do it on paper: frame by frame and pixel by pixel, batch norms by
    their formula. The tensors are net's own, which is left as it is."""

    def __init__(self, net, dropped=None):
        self.net, self.dropped = net, dropped
        self.buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}

    def batch_norm(self, name, x):
        """x (M, C), normalised by its own statistics in training, else by the running ones."""
        mean = self.buffers[f"{name}.running_mean"]
        variance = self.buffers[f"{name}.running_var"]
        if self.net.training:
            M = len(x)
            old_mean, old_variance = mean, variance
            mean = x.mean(0)
            variance = (x - mean).square().mean(0)
            unbiased = variance * M / (M - 1)
            new = {"running_mean": 0.9 * old_mean + 0.1 * mean,
                   "running_var": 0.9 * old_variance + 0.1 * unbiased}
            for statistic, value in new.items():
                self.buffers[f"{name}.{statistic}"] = value.detach()
            self.buffers[f"{name}.num_batches_tracked"] += 1
        return (x - mean) / torch.sqrt(variance + 1e-5)

    def linear(self, name, x):
        weight, bias = (self.net.get_parameter(f"{name}.{kind}") for kind in ("weight", "bias"))
        return x @ weight.t() + bias

    def mask(self, last):
        """Features (N, D, H, W) -> soft mask (N, 2, H, W), reconstruction loss."""
        N, _, H, W = last.shape
        places = [(n, i, j) for n in range(N) for i in range(H) for j in range(W)]
        pixels = torch.stack([last[n, :, i, j] for n, i, j in places])
        seen = pixels * self.dropped if self.net.training else pixels
        score = self.linear("mask_branch.down_sampling", self.batch_norm("mask_branch.bn_s", seen))
        share = score.exp() / score.exp().sum(1, keepdim=True)
        wrong = self.linear("mask_branch.up_sampling", share) - pixels
        mask = share.reshape(N, H, W, 2).permute(0, 3, 1, 2)
        return mask, wrong.square().mean()

    def denoising_code(self, pixels):
        """(M, 4D) -> (M, 16)."""
        name = "denoising_branch.down_sampling"
        x = self.linear(f"{name}.0", self.batch_norm("denoising_branch.bn_s", pixels))
        x = self.batch_norm(f"{name}.1", x)
        gelu = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        score = self.linear(f"{name}.3", gelu)
        return score.exp() / score.exp().sum(1, keepdim=True)

    def appearance_code(self, pixels):
        """(M, 4D) -> (M, 16)."""
        x = self.batch_norm("appearance_branch.bn_s", pixels)
        x = self.linear("appearance_branch.down_sampling", x)
        return 1 / (1 + torch.exp(-self.batch_norm("appearance_branch.bn_t", x)))

    def encode(self, frames):
        maps = [x.permute(0, 3, 1, 2) for x in self.net.features(frames)]
        last, mid4 = (F.interpolate(x, self.net.code_size, mode="bilinear") for x in maps)
        mask, reconstruction = self.mask(last)
        body = torch.stack([literal_body(frame) for frame in mask.detach()])
        silhouette = torch.stack([literal_closing(frame) for frame in body])
        places = silhouette.nonzero().tolist()
        pixels = torch.stack([mid4[n, :, i, j] for n, i, j in places])
        codes = []
        for values in (self.denoising_code(pixels), self.appearance_code(pixels)):
            code = torch.zeros(len(frames), 16, *self.net.code_size)
            for (n, i, j), value in zip(places, values, strict=True):
                code[n, :, i, j] = value
            codes.append(code)
        losses = {"mask": reconstruction,
                  "smooth_mask": 0.02 * literal_smoothness(mask),
                  "smooth_part": 0.01 * literal_smoothness(codes[0][:, :15]),
                  "diversity": 5 * literal_diversity(codes[0])}
        return SimpleNamespace(mask=mask, body=body, silhouette=silhouette, denoising=codes[0],
                               appearance=codes[1], losses=losses)


def gradients_of(net, codes):
    """Of the losses and of a random weighing of the codes -> {name of a parameter: gradient}."""
    net.zero_grad()
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, *codes.denoising.shape, generator=generator)
    weighed = weights[0] * codes.denoising + weights[1] * codes.appearance
    (sum(codes.losses.values()) + weighed.sum()).backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [True, False])
def test_values_gradients_and_statistics_equal_the_literal_form(training, monkeypatch):
    net = small_sasgl().train(training)
    for name, buffer in net.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer += torch.rand_like(buffer)
    frames = torch.randn(4, 3, 32, 16)
    dropped = 2 * torch.randint(2, (4 * 16 * 8, 32)).float()    # what dropout multiplies with

    def dropout(x, p, training):
        assert p == 0.5
        return x * dropped if training else x
    literal = Literal(net, dropped)
    want = literal.encode(frames)
    want_gradients = gradients_of(net, want)
    monkeypatch.setattr(F, "dropout", dropout)
    got = net.encode(frames)
    got_gradients = gradients_of(net, got)

    assert 0.02 < (got.silhouette != 0).float().mean() < 0.98
    assert len(want_gradients) == 10    # all of the three branches'
    for name, value in vars(want).items():
        torch.testing.assert_close(getattr(got, name), value, rtol=1e-4, atol=1e-5)
    # A bias in front of a batch norm has no gradient but the rounding of larger terms.
    bias = "appearance_branch.down_sampling.bias"
    got_bias, want_bias = got_gradients.pop(bias), want_gradients.pop(bias)
    torch.testing.assert_close(got_bias, want_bias, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got_gradients, want_gradients, rtol=1e-4, atol=1e-5)
    buffers = dict(net.named_buffers())
    assert training == (buffers["appearance_branch.bn_t.num_batches_tracked"] == 1)
    torch.testing.assert_close(buffers, literal.buffers, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------- silhouettes ----

def test_choose_body_by_the_edge_rows():
    mask = torch.zeros(2, 2, 64, 32)
    mask[0, 0] = 0.9    # frame 0: channel 0 fills the borders: it is the background
    mask[1, 0, 20:40, 10:20] = 0.8    # frame 1: channel 0 is in the middle: it is the body
    mask[:, 1] = 1 - mask[:, 0]
    body = choose_body(mask)
    assert torch.equal(body[0], mask[0, 1]) and torch.equal(body[1], mask[1, 0])
    exactly_half = torch.zeros(1, 2, 64, 32)
    exactly_half[0, 0, :5] = 1    # 5 * W ones: not *more* than half
    assert torch.equal(choose_body(exactly_half), exactly_half[:, 0])


def test_refine_edges_against_loops():
    torch.manual_seed(0)
    p = F.interpolate(torch.rand(2, 1, 5, 4), (17, 13), mode="bilinear")[:, 0]
    silhouette = refine_edges(p)
    for frame, got in zip(p, silhouette, strict=True):
        assert torch.equal(got, literal_closing(frame))
    on_edge = (silhouette > 0) & (silhouette < 1)
    assert on_edge.any() and (silhouette == 1).any() and (silhouette == 0).any()


def test_losses_by_hand():
    assert smooth_loss(torch.zeros(2, 3, 8, 4)) == 0
    impulse = torch.zeros(1, 1, 5, 5)
    impulse[0, 0, 2, 2] = 1    # |Sobel x| and |Sobel y| of an impulse sum to 8 each
    assert smooth_loss(impulse).item() == pytest.approx(16 / 25)
    even = torch.full((1, 16, 2, 2), 1 / 16)
    assert diversity_loss(even).item() == pytest.approx(0, abs=1e-4)
    one = torch.zeros(1, 16, 2, 2)
    one[:, 3] = 1
    assert diversity_loss(one).item() == pytest.approx(math.log2(16), abs=1e-4)


# -------------------------------------------------------------------- codes ----

def test_background_is_zero_and_statistics_are_the_foreground_s_alone():
    net = small_sasgl().train()
    frames = torch.randn(4, 3, 32, 16)
    codes = net.encode(frames)
    outside = (codes.silhouette == 0)[:, None].expand(-1, 16, -1, -1)
    assert outside.any() and not outside.all()
    assert (codes.denoising[outside] == 0).all() and (codes.appearance[outside] == 0).all()
    pixels = net.upsampled(net.features(frames)[1])[codes.silhouette != 0]
    running_mean = net.denoising_branch.bn_s.running_mean
    torch.testing.assert_close(running_mean, 0.1 * pixels.mean(0))


def test_mask_gets_no_gradient_from_the_codes():
    net = small_sasgl().train()
    codes = net.encode(torch.randn(4, 3, 32, 16))
    assert not codes.body.requires_grad and not codes.silhouette.requires_grad
    of_codes = codes.denoising.sum() + codes.appearance.square().sum() + codes.losses["diversity"]
    of_codes.backward()
    assert all(p.grad is None for p in net.mask_branch.parameters())
    assert any(p.grad is not None for p in net.denoising_branch.parameters())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_batch_of_two_foreground_pixels_or_fewer_trains_on(number, training, monkeypatch):
    net = small_sasgl().train(training)
    before = {name: buffer.clone() for name, buffer in net.denoising_branch.named_buffers()}

    def nearly_empty(body):
        silhouette = torch.zeros_like(body)
        silhouette[0, 3, 2:2 + number] = 1
        return silhouette
    monkeypatch.setattr(sasgl, "refine_edges", nearly_empty)
    maps, codes = net(torch.randn(2, 2, 3, 32, 16))
    assert maps.isfinite().all() and all(v.isfinite() for v in codes.losses.values())
    assert (codes.silhouette != 0).sum() == number
    (maps.square().mean() + sum(codes.losses.values())).backward()
    for name, p in net.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name
    after = dict(net.denoising_branch.named_buffers())
    has_learned = not all(torch.equal(after[name], before[name]) for name in after)
    assert has_learned == (training and number == 2)    # a batch norm needs two


# ------------------------------------------------------------------ blanking ----

def is_blank(code):
    """(20, 16, H, W), of 10 tracklets of 2 frames -> (10,)."""
    return (code.unflatten(0, (10, 2)) == 0).flatten(1).all(1)


@pytest.mark.parametrize("training", [True, False])
def test_a_fifth_of_the_tracklets_loses_one_code_in_training_only(training, monkeypatch):
    net, seen = small_sasgl().train(training), []

    def watched(denoising, appearance):
        seen.extend([denoising, appearance])
        return denoising
    monkeypatch.setattr(net.gait_net, "forward", watched)
    _, codes = net(torch.randn(10, 2, 3, 32, 16))
    no_denoising, no_appearance = map(is_blank, seen)
    assert not (no_denoising & no_appearance).any()
    assert (no_denoising | no_appearance).sum() == (2 if training else 0)
    assert not is_blank(codes.denoising).any()    # losses see both codes
    assert not is_blank(codes.appearance).any()


def test_which_tracklets_and_which_code_is_chance():
    torch.manual_seed(0)
    drawn = [kept_codes(10) for _ in range(50)]
    for keep in drawn:
        assert keep.shape == (2, 10) and (keep == 0).sum() == 2 and (keep.sum(0) >= 1).all()
    blanked = sum(1 - keep for keep in drawn)
    assert (blanked.sum(0) > 0).all()    # any tracklet
    assert (blanked.sum(1) > 20).all()    # either code
    assert kept_codes(2).all()    # a fifth of two rounds to none


def test_dinov2_stays_frozen_in_training():
    net = small_sasgl().train()
    assert not net.dinov2.training and not any(p.requires_grad for p in net.dinov2.parameters())
