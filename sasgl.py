"""SASGL: semantic-aware silhouette and gait learning (DinoGRL, section 3.2).

A walk is the same walk by day and by night; a coat's colour is not. So DinoGRL reads gait from soft
silhouettes that a frozen DINOv2 sees in either modality, without a single silhouette label.
Semantic-aware: what is kept of a pixel is not its colour but what DINOv2's features say it is.

    frames (N,3,256,128), N = B*T
      -> features: resized to 448x224, frozen DINOv2, a grid of 32x16 --+-- last (N,32,16,384)
                                                                        +-- mid4 (N,32,16,1536)
    last (the last block's tokens), upsampled to 64x32 -> mask_branch: 384 -> 2 -> mask (N,2,64,32)
      -> choose_body -> body (N,64,32) -> refine_edges -> silhouette (N,64,32)
    mid4 (four blocks' tokens side by side), upsampled too, on the silhouette's pixels alone
      --+-- denoising_branch -> denoising code (N,16,64,32), a softmax: which part of the body?
        +-- appearance_branch -> appearance code (N,16,64,32), sigmoids: what is it like?
    both codes -> gait_net: two CodeStems -> AttentionFusion -> backbone -> (N,2048,16,8)

The codes' names are BigGait's, from which the release takes them: "denoising", since a softmax over
16 channels can say one of 16 words, which leaves no room for texture. The appearance code is a code
of gait; the appearance *stream*, from pixels, is model.py's.

The mask bottleneck is the trick: through two softmax channels only the strongest contrast of the
features can be reconstructed, and for DINOv2 on a pedestrian crop that is body against background.

What trains what: the mask is detached (in the released code too) before the codes are cut out on
it, so mask_branch learns from its own reconstruction alone, and the re-identification losses train
the codes' branches and the gait net. The paper's "jointly" is one sum of losses, not one path of
gradients. Until the mask is good, the codes are cut out of the wrong pixels: where no trained
mask_branch is given, train.py trains it alone for some steps first (DinoGRL.warm_up_losses).

Quick question: why detach it at all? (Else identity losses would grow or shrink the silhouette
until it tells identities apart, by its errors.)

Ours, not the paper's: that warm-up; choose_body's 5 edge rows scale with the map's height; a
batch without two foreground pixels gives empty codes instead of an error.
"""
import math
from typing import NamedTuple

from support.dinov2 import PATCH, levels_of
from support.resnet import BasicBlock

import torch
import torch.nn.functional as F
from torch import nn

SOBEL = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])


# ------------------------------------------------------------- silhouette ----

class MaskBranch(nn.Module):
    """The mask bottleneck: features of pixels (M, D) -> soft mask (M, 2), reconstruction loss."""

    def __init__(self, dim):
        super().__init__()
        # BigGait's names: bn_s stands before down_sampling; bn_t, in AppearanceBranch, after it.
        self.bn_s = nn.BatchNorm1d(dim, affine=False)
        self.down_sampling = nn.Linear(dim, 2)
        self.up_sampling = nn.Linear(2, dim)

    def forward(self, pixels):
        dropped = F.dropout(pixels, 0.5, self.training)
        mask = self.down_sampling(self.bn_s(dropped)).float().softmax(1)
        reconstructed = self.up_sampling(mask)
        return mask, F.mse_loss(reconstructed.float(), pixels.float())


def choose_body(mask):
    """Soft mask (N, 2, H, W) -> (N, H, W): the channel that is the body, per frame.

    A person stands in the middle of the crop: if more than half of the top and bottom 5 rows (of
    64) belongs to channel 0, channel 0 is the background."""
    H, W = mask.shape[2:]
    rows = max(1, 5 * H // 64)
    is_first = mask[:, 0].round()
    at_edge = is_first[:, :rows].sum((1, 2)) + is_first[:, -rows:].sum((1, 2))
    first_is_background = at_edge > rows * W    # half of the 2 * rows * W pixels
    return torch.where(first_is_background[:, None, None], mask[:, 1], mask[:, 0])


def refine_edges(body):
    """Body probability (N, H, W) -> silhouette: 1 inside, the probability on the edge, 0 outside.
    Inside: dilated by one pixel, which closes holes, then eroded by two; the band that the erosion
    takes is the edge."""
    dilated = F.max_pool2d(body.round()[:, None], 3, 1, 1)
    # max_pool2d pads with minus infinity: what is outside the image neither dilates nor erodes.
    eroded = -F.max_pool2d(-dilated, 5, 1, 2)
    inside, edge = eroded[:, 0] > 0.5, (dilated != eroded)[:, 0]
    on_edge = torch.where(edge, body, torch.zeros_like(body))
    return torch.where(inside, torch.ones_like(body), on_edge)


def smooth_loss(maps):
    """Maps (N, C, H, W) -> scalar: |Sobel x| + |Sobel y| of the channels' sum, per value. Few,
    closed regions are cheap. Of the denoising code all channels but the last are summed (see
    encode): what costs is the border of the last one's region, and the body's outline.

    The mask's two channels sum to 1 everywhere. Its only edges are those of the zero padding: a
    constant, without a gradient. (The release reads pixel-major memory as channel-major there, so
    its term does have a gradient, though not the intended one.)"""
    sobel = SOBEL.to(maps)
    both = torch.stack([sobel, sobel.t()])[:, None]    # (2, 1, 3, 3)
    edges = F.conv2d(maps.sum(1, keepdim=True), both, padding=1)
    return edges.abs().sum() / maps.numel()


# ------------------------------------------------------------------ codes ----

class DenoisingBranch(nn.Module):
    """Features of pixels (M, 4D) -> denoising code (M, 16), a softmax: it can only say which part
    of the body this is."""
    recomputable = True    # train.py may compute its activations again: --checkpoint-activations

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
    """Denoising code (N, C, H, W) -> scalar: log2(C) minus the entropy of the channels' shares. Low
    where all channels are in use."""
    total = code.sum((1, 2, 3)) + 1e-6
    share = code.sum((2, 3)) / total[:, None]
    entropy = -(share * torch.log2(share + 1e-6)).sum(1)
    return (math.log2(code.shape[1]) - entropy).mean()


# --------------------------------------------------------------- gait net ----

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
    """Two maps (N, C, H, W) -> one: per place and channel a softmax over the two decides the
    mixture."""

    def __init__(self, width, hidden=4):
        super().__init__()
        self.score = nn.Sequential(
            nn.Conv2d(2 * width, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(),
            nn.Conv2d(hidden, 2 * width, 1, bias=False))

    def forward(self, denoising, appearance):
        score = self.score(torch.cat([denoising, appearance], dim=1))
        share = score.unflatten(1, (-1, 2)).softmax(2)    # (N, C, 2, H, W)
        return share[:, :, 0] * denoising + share[:, :, 1] * appearance


class GaitNet(nn.Module):
    """Denoising and appearance code (N, 16, H, W) -> gait maps (N, 32 * width, h, w). backbone:
    ResNet's layer1..layer4, its own copy."""

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
    """What SASGL sees in N frames: soft mask (N,2,h,w), body probability and silhouette (N,h,w),
    the two codes (N,16,h,w), named losses, weighted."""
    mask: torch.Tensor
    body: torch.Tensor
    silhouette: torch.Tensor
    denoising: torch.Tensor
    appearance: torch.Tensor
    losses: dict


class SASGL(nn.Module):
    """Frames (B, T, 3, H, W), normalised -> gait maps (B, T, C, h, w) and the Codes they were read
    from.

    dinov2: anything with get_intermediate_layers, norm, embed_dim and n_blocks. dino_size: what
    DINOv2 sees, multiples of 14. code_size: height and width of mask, silhouette and codes."""

    def __init__(self, *, dinov2, backbone, width=64, channels=16, dino_size=(448, 224),
                 code_size=(64, 32)):
        super().__init__()
        self.dino_size, self.code_size, self.channels = dino_size, code_size, channels
        self.dinov2 = dinov2
        self.blocks = levels_of(dinov2)    # the last of each quarter: 2, 5, 8, 11 of 12
        self.mask_branch = MaskBranch(dinov2.embed_dim)
        self.denoising_branch = DenoisingBranch(4 * dinov2.embed_dim, channels)
        self.appearance_branch = AppearanceBranch(4 * dinov2.embed_dim, channels)
        self.gait_net = GaitNet(channels=channels, width=width, backbone=backbone)

    def train(self, mode=True):
        super().train(mode)
        self.dinov2.eval()    # frozen, whatever the rest does
        return self

    @torch.no_grad()
    def features(self, frames):
        """Frames (N, 3, H, W) -> last (N, h, w, D), mid4 (N, h, w, 4D), on DINOv2's grid."""
        frames = F.interpolate(frames, self.dino_size, mode="bilinear", align_corners=False)
        layers = self.dinov2.get_intermediate_layers(frames, n=self.blocks, norm=False)
        last = self.dinov2.norm(layers[-1])
        mid4 = torch.cat(layers, dim=2)
        mid4 = F.layer_norm(mid4, mid4.shape[2:], eps=1e-6)
        grid = self.dino_size[0] // PATCH, self.dino_size[1] // PATCH
        return last.unflatten(1, grid), mid4.unflatten(1, grid)

    def upsampled(self, maps):
        """(N, h, w, C) on DINOv2's grid -> (N, H, W, C), as large as the codes, bilinear."""
        maps = F.interpolate(maps.permute(0, 3, 1, 2), self.code_size, mode="bilinear",
                             align_corners=False)
        return maps.permute(0, 2, 3, 1)

    def mask_and_losses(self, last):
        """last (N, h, w, D) -> soft mask (N, 2, H, W), its losses, weighted."""
        pixels = self.upsampled(last).flatten(0, 2)
        mask, reconstruction = self.mask_branch(pixels)
        mask = mask.unflatten(0, (-1, *self.code_size)).permute(0, 3, 1, 2)
        # smooth_mask moves nothing (see smooth_loss): kept for the release's sum of losses.
        with torch.autocast(last.device.type, enabled=False):
            return mask, {"mask": reconstruction, "smooth_mask": 0.02 * smooth_loss(mask)}

    def code_of(self, branch, pixels, where, N):
        """Pixels (M, 4D) -> their code by `branch`, put back at `where`: (N, 16, H, W), 0
        elsewhere. where: three index tensors (M,), of frame, row and column."""
        is_enough = len(pixels) > 1 or not self.training    # a batch norm needs two
        values = branch(pixels) if is_enough else pixels.new_zeros(len(pixels), self.channels)
        code = values.new_zeros(N, *self.code_size, self.channels)
        return code.index_put(where, values).permute(0, 3, 1, 2)

    def codes_of(self, mid4, silhouette):
        """mid4 (N, h, w, 4D), silhouette (N, H, W) -> denoising and appearance code (N, 16, H, W).
        The branches see the foreground alone: their batch norms' statistics are the body's."""
        where = silhouette.nonzero(as_tuple=True)
        pixels = self.upsampled(mid4)[where]    # (M, 4D)
        return [self.code_of(branch, pixels, where, len(silhouette))
                for branch in (self.denoising_branch, self.appearance_branch)]

    def encode(self, frames):
        """Frames (N, 3, H, W), normalised -> Codes."""
        last, mid4 = self.features(frames)
        mask, losses = self.mask_and_losses(last)
        body = choose_body(mask.detach())
        silhouette = refine_edges(body)
        denoising, appearance = self.codes_of(mid4, silhouette)
        with torch.autocast(frames.device.type, enabled=False):
            # Without the last channel: the sum over all 16 would be 1 all over the body.
            losses["smooth_part"] = 0.01 * smooth_loss(denoising[:, :-1])
            losses["diversity"] = 5 * diversity_loss(denoising)
        return Codes(mask, body, silhouette, denoising, appearance, losses)

    def forward(self, frames):
        """In training the maps are read from codes of which some are blanked, see kept_codes. The
        Codes that are returned are whole: their losses see every code."""
        B, T = frames.shape[:2]
        codes = self.encode(frames.flatten(0, 1))
        denoising, appearance = codes.denoising, codes.appearance
        if self.training:
            # (2, B*T): denoising, appearance.
            keep = kept_codes(B).repeat_interleave(T, dim=1).to(frames.device, non_blocking=True)
            denoising = denoising * keep[0, :, None, None, None]
            appearance = appearance * keep[1, :, None, None, None]
        return self.gait_net(denoising, appearance).unflatten(0, (B, T)), codes


def kept_codes(B):
    """-> (2, B), for denoising and appearance: 0 where a tracklet's code is blanked, else 1. A
    fifth of the tracklets lose one of the two, by chance: neither may be relied on alone."""
    loses_one = torch.randperm(B) < round(0.2 * B)    # the first fifth, in a random order
    which = torch.randint(2, (B,))    # the code that each tracklet would lose
    keep = torch.ones(2, B)
    keep[which, torch.arange(B)] = 1 - loses_one.float()
    return keep
