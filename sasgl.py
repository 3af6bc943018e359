"""SASGL: semantic-aware silhouette and gait learning (DinoGRL, section 3.2).

A walk is the same by day and by night; the colour of a coat is not. So DinoGRL reads gait from soft
silhouettes that a frozen DINOv2 finds in either modality, without one silhouette label.
Semantic-aware: of a pixel, what DINOv2's features say it is, not its colour.

    frames (N,3,256,128), N = B*T
      -> features: resized to 448x224, frozen DINOv2, a grid of 32x16 --+-- last (N,32,16,384)
                                                                        +-- mid4 (N,32,16,1536)
    last (the last block's tokens), upsampled to 64x32 -> mask_branch: 384 -> 2 -> mask (N,2,64,32)
      -> choose_body -> body (N,64,32) -> refine_edges -> silhouette (N,64,32)
    mid4 (four blocks' tokens side by side), upsampled too, on the silhouette's pixels alone
      --+-- denoising_branch -> denoising code (N,16,64,32), a softmax: which part of the body?
        +-- appearance_branch -> appearance code (N,16,64,32), sigmoids: what is it like?
    both codes -> gait_net: two CodeStems -> AttentionFusion -> backbone -> (N,2048,16,8)

The mask bottleneck: through two softmax channels only the strongest contrast of the features can be
reconstructed. On a pedestrian crop, that is body against background. "Denoising" code: a softmax
picks one of 16 labels per pixel, so texture cannot pass through.

What trains what: the mask is detached before the codes are cut out (in the release too). So its own
reconstruction alone trains mask_branch, and the re-identification losses train the codes' branches
and the gait net; the paper's "jointly" means that the losses are summed. train.py first trains
mask_branch alone, so that no code is cut out of the wrong pixels.

Quick question: why detach the mask? (Or its errors would learn to tell people apart.)

Ours, not the paper's: that warm-up; edge rows that scale with the map's height; empty codes if a
batch has no two foreground pixels. The mask's smoothness loss is not computed (see smooth_loss).
"""
import math
from typing import NamedTuple

from support.dinov2 import levels_of
from support.files import UserError
from support.footage import normalise, sent
from support.parallel import total
from support.resnet import BasicBlock

import torch
import torch.nn.functional as F
from torch import nn

SOBEL = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])

# ------------------------------------------------------------- silhouette ----

class MaskBranch(nn.Module):
    """The mask bottleneck: features of pixels (M, D) -> soft mask (M, 2)."""

    def __init__(self, dim):
        super().__init__()
        # BigGait's names: bn_s stands before down_sampling; bn_t, in AppearanceBranch, after it.
        self.bn_s = nn.BatchNorm1d(dim, affine=False)
        self.down_sampling = nn.Linear(dim, 2)
        self.up_sampling = nn.Linear(2, dim)

    def forward(self, pixels):
        dropped = F.dropout(pixels, 0.5, self.training)
        return self.down_sampling(self.bn_s(dropped)).float().softmax(1)

    def reconstruction_loss(self, mask, pixels):
        """How well do the mask's two numbers give back the features of its pixels?"""
        return F.mse_loss(self.up_sampling(mask).float(), pixels.float())


def choose_body(mask):
    """Soft mask (N, 2, H, W) -> (N, H, W): the channel that is the body, per frame. If more than
    half of the top and bottom 5 rows (of 64) belongs to channel 0, that is the background."""
    H, W = mask.shape[2:]
    rows = max(1, 5 * H // 64)
    is_first = mask[:, 0].round()
    at_edge = is_first[:, :rows].sum((1, 2)) + is_first[:, -rows:].sum((1, 2))
    first_is_background = at_edge > rows * W    # half of the 2 * rows * W pixels
    return torch.where(first_is_background[:, None, None], mask[:, 1], mask[:, 0])


def refine_edges(body):
    """Body probability (N, H, W) -> silhouette: 1 inside, the probability on the edge, 0 outside.
    Dilated by one pixel, which closes holes, then eroded by two, which gives the edge."""
    dilated = F.max_pool2d(body.round()[:, None], 3, 1, 1)
    # max_pool2d pads with minus infinity: what is outside the image neither dilates nor erodes.
    eroded = -F.max_pool2d(-dilated, 5, 1, 2)
    inside, edge = eroded[:, 0] > 0.5, (dilated != eroded)[:, 0]
    return torch.where(inside, 1.0, torch.where(edge, body, 0.0))


def smooth_loss(maps):
    """Maps (N, C, H, W) -> scalar: |Sobel x| + |Sobel y| of the channels' sum, per value: borders
    cost. Of the denoising code all channels but the last: the sum of all is 1 on the body.

    The paper applies it to the mask too, whose two channels sum to 1 everywhere: that loss is
    constant, has no gradient, and is not computed here. (The release reads pixel-major memory as
    channel-major there: its term has a gradient, though not the intended one.)"""
    sobel = sent(SOBEL, maps.device)
    both = torch.stack([sobel, sobel.t()])[:, None]    # (2, 1, 3, 3)
    edges = F.conv2d(maps.sum(1, keepdim=True), both, padding=1)
    return edges.abs().sum() / maps.numel()


# ------------------------------------------------- codes and the gait net ----

class DenoisingBranch(nn.Module):
    """Features of pixels (M, 4D) -> denoising code (M, 16), a softmax: one of 16 labels."""

    def __init__(self, dim, channels):
        super().__init__()
        self.bn_s = nn.BatchNorm1d(dim, affine=False)
        self.down_sampling = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.BatchNorm1d(dim // 2, affine=False), nn.GELU(),
            nn.Linear(dim // 2, channels))

    def forward(self, pixels):
        return self.down_sampling(self.bn_s(pixels)).float().softmax(1)


class AppearanceBranch(nn.Module):
    """Features of pixels (M, 4D) -> appearance code (M, 16), a sigmoid each."""

    def __init__(self, dim, channels):
        super().__init__()
        self.bn_s = nn.BatchNorm1d(dim, affine=False)
        self.down_sampling = nn.Linear(dim, channels)
        self.bn_t = nn.BatchNorm1d(channels, affine=False)

    def forward(self, pixels):
        return self.bn_t(self.down_sampling(self.bn_s(pixels))).float().sigmoid()


def diversity_loss(code):
    """Denoising code (N, C, H, W) -> scalar: log2(C) minus the entropy of the channels' shares."""
    total = code.sum((1, 2, 3)) + 1e-6
    share = code.sum((2, 3)) / total[:, None]
    entropy = -(share * torch.log2(share + 1e-6)).sum(1)
    return (math.log2(code.shape[1]) - entropy).mean()


class CodeStem(nn.Module):
    """A code (N, 16, H, W) -> (N, width, H, W)."""

    def __init__(self, channels, width):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.block = BasicBlock(width)

    def forward(self, code):
        return self.block(F.relu(self.bn(self.conv(code)), inplace=True))


class AttentionFusion(nn.Module):
    """Two maps (N, C, H, W) -> one: per place and channel a softmax decides the mixture."""

    def __init__(self, width, hidden=4):
        super().__init__()
        self.score = nn.Sequential(
            nn.Conv2d(2 * width, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(),
            nn.Conv2d(hidden, 2 * width, 1, bias=False))

    def forward(self, denoising, appearance):
        score = self.score(torch.cat([denoising, appearance], dim=1))
        share = score.unflatten(1, (-1, 2)).softmax(2)    # (N, C, 2, H, W)
        # In this order the result keeps the memory format of the maps, channels last.
        return denoising * share[:, :, 0] + appearance * share[:, :, 1]


class GaitNet(nn.Module):
    """Both codes (N, 16, H, W) -> gait maps (N, 32 * width, h, w)."""

    def __init__(self, *, channels, width, backbone):
        super().__init__()
        self.denoising_stem = CodeStem(channels, width)
        self.appearance_stem = CodeStem(channels, width)
        self.fusion = AttentionFusion(width)
        self.backbone = backbone

    def forward(self, denoising, appearance):
        fused = self.fusion(self.denoising_stem(denoising), self.appearance_stem(appearance))
        return self.backbone(fused)


# ------------------------------------------------------------------ SASGL ----

class Codes(NamedTuple):
    """What SASGL sees in N frames."""
    last: torch.Tensor          # DINOv2's tokens, on its grid, (N, rows, columns, D)
    mask: torch.Tensor          # soft, (N, 2, h, w)
    body: torch.Tensor          # its probability, (N, h, w)
    silhouette: torch.Tensor    # (N, h, w)
    denoising: torch.Tensor     # (N, 16, h, w)
    appearance: torch.Tensor    # (N, 16, h, w)


class SASGL(nn.Module):
    """Frames (B, T, 3, H, W), normalised -> gait maps (B, T, C, h, w), named losses, weighted (in
    training; otherwise {}). prior: DINOv2, or a network with get_intermediate_layers, norm,
    embed_dim, blocks and patch_size (if not 14); frozen here. dino_size: what it sees; code_size:
    of mask, silhouette and codes. Raises UserError."""

    def __init__(self, *, prior, backbone, width=64, channels=16, dino_size=(448, 224),
                 code_size=(64, 32)):
        super().__init__()
        patch = getattr(prior, "patch_size", 14)
        if any(side % patch for side in dino_size):
            raise UserError(f"dino_size {dino_size}; expected multiples of the patch, {patch}")
        self.grid = dino_size[0] // patch, dino_size[1] // patch
        self.dino_size, self.code_size, self.channels = dino_size, code_size, channels
        self.prior = prior.requires_grad_(False).eval()
        self.blocks = levels_of(prior)    # the last of each quarter: 2, 5, 8, 11 of 12
        self.mask_branch = MaskBranch(prior.embed_dim)
        self.denoising_branch = DenoisingBranch(4 * prior.embed_dim, channels)
        self.appearance_branch = AppearanceBranch(4 * prior.embed_dim, channels)
        self.gait_net = GaitNet(channels=channels, width=width, backbone=backbone)

    def train(self, mode=True):
        super().train(mode)
        self.prior.eval()    # frozen, whatever the rest does
        return self

    @torch.no_grad()
    def features(self, frames):
        """Frames (N, 3, H, W) -> last (N, h, w, D), mid4 (N, h, w, 4D), on the prior's grid."""
        # As one picture of 3N channels: with 3, torch is eight times slower on one thread.
        frames = F.interpolate(frames.flatten(0, 1)[None], self.dino_size, mode="bilinear")
        frames = frames.unflatten(1, (-1, 3))[0]
        layers = self.prior.get_intermediate_layers(frames, n=self.blocks, norm=False)
        last = self.prior.norm(layers[-1])
        mid4 = F.layer_norm(torch.cat(layers, dim=2), (4 * self.prior.embed_dim,), eps=1e-6)
        return last.unflatten(1, self.grid), mid4.unflatten(1, self.grid)

    def upsampled(self, maps):
        """(N, h, w, C) on the prior's grid -> (N, H, W, C), as large as the codes."""
        maps = F.interpolate(maps.permute(0, 3, 1, 2), self.code_size, mode="bilinear",
                             align_corners=False)
        return maps.permute(0, 2, 3, 1)

    def mask_and_loss(self, last):
        """last (N, h, w, D) -> soft mask (N, 2, H, W), {"mask": its loss} (in training)."""
        pixels = self.upsampled(last).flatten(0, 2)
        mask = self.mask_branch(pixels)
        losses = {}
        if self.training:
            losses["mask"] = self.mask_branch.reconstruction_loss(mask, pixels)
        return mask.unflatten(0, (-1, *self.code_size)).permute(0, 3, 1, 2), losses

    def code_of(self, branch, pixels, where, N):
        """Pixels (M, 4D), `where` (three index tensors (M,)) -> code (N, 16, H, W), 0 elsewhere."""
        is_enough = not self.training or total(len(pixels), pixels.device) > 1    # for a batch norm
        values = branch(pixels) if is_enough else pixels.new_zeros(len(pixels), self.channels)
        code = values.new_zeros(N, *self.code_size, self.channels)
        return code.index_put(where, values).permute(0, 3, 1, 2)

    def codes_of(self, mid4, silhouette):
        """mid4 (N, h, w, 4D), silhouette (N, H, W) -> both codes. The branches see the foreground
        alone: their batch norms' statistics are the body's."""
        where = silhouette.nonzero(as_tuple=True)
        pixels = self.upsampled(mid4)[where]    # (M, 4D)
        return [self.code_of(branch, pixels, where, len(silhouette))
                for branch in (self.denoising_branch, self.appearance_branch)]

    def encode(self, frames):
        """Frames (N, 3, H, W), normalised -> Codes, the mask's loss."""
        last, mid4 = self.features(frames)
        mask, losses = self.mask_and_loss(last)
        body = choose_body(mask.detach())
        silhouette = refine_edges(body)
        denoising, appearance = self.codes_of(mid4, silhouette)
        return Codes(last, mask, body, silhouette, denoising, appearance), losses

    def forward(self, frames):
        """In training some codes are blanked before the gait net, see kept_codes."""
        B, T = frames.shape[:2]
        codes, losses = self.encode(frames.flatten(0, 1))
        denoising, appearance = codes.denoising, codes.appearance
        if self.training:
            with torch.autocast(frames.device.type, enabled=False):
                # Without the last channel: the sum over all 16 would be 1 all over the body.
                losses["smooth_part"] = 0.01 * smooth_loss(denoising[:, :-1])
                losses["diversity"] = 5 * diversity_loss(denoising)
            keep = kept_codes(B).repeat_interleave(T, dim=1).to(frames.device, non_blocking=True)
            denoising = denoising * keep[0, :, None, None, None]
            appearance = appearance * keep[1, :, None, None, None]
        return self.gait_net(denoising, appearance).unflatten(0, (B, T)), losses


def kept_codes(B):
    """-> (2, B), for denoising and appearance: 0 where a tracklet's code is blanked, else 1. A
    fifth of the tracklets lose one of the two, so that both are learned."""
    loses_one = torch.randperm(B) < round(0.2 * B)    # the first fifth, in a random order
    which = torch.randint(2, (B,))    # the code that each tracklet would lose
    keep = torch.ones(2, B)
    keep[which, torch.arange(B)] = 1 - loses_one.float()
    return keep


def main():
    """Train the mask bottleneck alone on a few walkers, and print two silhouettes it then finds."""
    from support.dinov2 import load_dinov2
    from walkers import sample

    frames, _, _ = sample(people=8, T=4)
    frames = normalise(frames).flatten(0, 1)    # (64, 3, 128, 64)
    torch.manual_seed(1)
    sasgl = SASGL(prior=load_dinov2("tiny"), backbone=nn.Identity(), width=8, dino_size=(336, 168),
                  code_size=(32, 16))
    optimizer = torch.optim.Adam(sasgl.mask_branch.parameters(), lr=5e-2)
    for _ in range(60):
        last, _ = sasgl.features(frames[torch.randperm(len(frames))[:16]])
        _, losses = sasgl.mask_and_loss(last)
        optimizer.zero_grad()
        losses["mask"].backward()
        optimizer.step()
    codes, _ = sasgl.eval().encode(frames[[0, -1]])
    for rows in zip(*codes.silhouette, strict=True):    # by day, by night
        print("    ".join("".join(".:#"[int(2 * p)] for p in row) for row in rows))


if __name__ == "__main__":
    main()
