"""SASGL: semantic-aware silhouette and gait learning (DinoGRL, section 3.2), and the DINOv2 it looks through.

A walk is the same walk by day and by night; a coat's colour is not. So DinoGRL reads gait from soft silhouettes that a
frozen DINOv2 sees in either modality, without a single silhouette label:

    frames (N,3,256,128), N = B*T
      -> resize (N,3,448,224) -> frozen DINOv2 -> grid 32x16 -> upsample 64x32 --+-- last (N,384,64,32)
                                                                                 +-- mid4 (N,1536,64,32)
    last -> mask bottleneck 384 -> 2 -> 384 -> mask p -> body channel -> edge refinement -> silhouette (N,64,32)
    mid4, on the silhouette's pixels alone -+-- denoising code   (N,16,64,32)  softmax: which part of the body
                                            +-- appearance code  (N,16,64,32)  sigmoid: what it is like there
    codes -> gait net: two stems -> attention fusion -> ResNet layer1..layer4 -> gait maps (N,2048,16,8)

The mask bottleneck is the trick: through two softmax channels only the strongest contrast of the features can be
reconstructed, and for DINOv2 on a pedestrian crop that contrast is body against background.

Quick question: why is the mask detached before the codes are cut out? (Else identity losses would grow or shrink the
silhouette until it tells identities apart, by its errors.)

Ours, not the paper's: our own DinoVisionTransformer (official tensors, no hub needed), `tiny`; the warm-up of the
mask bottleneck (mask_losses) where no trained one is given; the body test's 5 edge rows scale with the map's height;
a batch without a foreground pixel, or with one, gives empty codes instead of an error.
"""
import math
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from data import UserError

# --------------------------------------------------------------- weights ----

def read_tensors(path):
    """The contents of a torch file, opened with weights_only=True (nothing in it can run). Raises UserError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no file {path}; expected a torch file of tensors; check the path") from None
    except Exception as error:    # a torn zip, a foreign pickle, a folder: torch raises a dozen types
        raise UserError(f"{path} cannot be read as a torch file of tensors ({type(error).__name__}); "
                        "it may be torn or of another kind: download or save it again") from error


def state_dict(tensors, what):
    """Its argument, if it is a dict of named tensors; else raises UserError."""
    if not (isinstance(tensors, dict) and all(isinstance(k, str) and torch.is_tensor(t) for k, t in tensors.items())):
        raise UserError(f"{what} holds no dict of named tensors; expected a state dict: is it the right file?")
    return tensors


def misfits(tensors, shapes):
    """What keeps a state dict from being {name: shape} (None: any shape), a line each."""
    return ([f"{k} is missing" for k in shapes if k not in tensors] + [f"{k} is surplus" for k in tensors if k not in shapes]
            + [f"{k} is {tuple(tensors[k].shape)}, expected {tuple(shape)}" for k, shape in shapes.items()
               if k in tensors and shape is not None and tensors[k].shape != shape])


def fill(module, tensors, what):
    """Loads a state dict strictly. Raises UserError that names missing, surplus and misshapen tensors, nine at most."""
    wrong = misfits(state_dict(tensors, what), {k: t.shape for k, t in module.state_dict().items()})
    if wrong:
        more = f"; and {len(wrong) - 9} more: is it the right file?" if len(wrong) > 9 else ""
        raise UserError(f"{what} does not fit: {'; '.join(wrong[:9])}{more}")
    module.load_state_dict(tensors)


# ---------------------------------------------------------------- DINOv2 ----

# name: (width D, blocks, heads, register tokens). `tiny` is random, for the offline demo and the tests.
DINOV2 = {"dinov2_vits14": (384, 12, 6, 0), "dinov2_vits14_reg": (384, 12, 6, 4),
          "dinov2_vitb14": (768, 12, 12, 0), "dinov2_vitb14_reg": (768, 12, 12, 4),
          "dinov2_vitl14": (1024, 24, 16, 0), "dinov2_vitl14_reg": (1024, 24, 16, 4),
          "tiny": (32, 4, 1, 0)}
TINY_SEED = 1002
DINOV2_HUB = "facebookresearch/dinov2:b8931f7bf91576930313be2c6d6af376033b35f0"    # pinned: the code that will run


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        N, L, D = x.shape
        q, k, v = self.qkv(x).view(N, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)    # (N, heads, L, d)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, L, D))


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads), Mlp(dim)
        self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 14, 14)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)    # (N, L, D)


class DinoVisionTransformer(nn.Module):
    """DINOv2's ViT with patch 14, tensor for tensor the official state dict (its mask_token included, unused here)."""

    def __init__(self, *, dim, depth, heads, registers=0):
        super().__init__()
        self.embed_dim, self.n_blocks = dim, depth
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + 37 * 37, dim))    # pre-trained at 518 = 37 * 14
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.patch_embed = PatchEmbed(dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for p in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(p, std=0.02)

    def positions(self, h, w):
        """Position embeddings for an h x w grid of patches, (1, 1 + h*w, D), interpolated as the official code does:
        by a scale factor with its 0.1 offset (register models: to the size, antialiased)."""
        if h == w == 37:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].float().transpose(1, 2).unflatten(2, (37, 37))
        if self.register_tokens is None:
            grid = F.interpolate(grid, scale_factor=((h + 0.1) / 37, (w + 0.1) / 37), mode="bicubic")
        else:
            grid = F.interpolate(grid, size=(h, w), mode="bicubic", antialias=True)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)], dim=1)

    def get_intermediate_layers(self, x, n, norm=True):
        """x (N, 3, H, W), H and W multiples of 14 -> for each block index in n its patch tokens (N, H*W/196, D)."""
        N, _, H, W = x.shape
        x = torch.cat([self.cls_token.expand(N, -1, -1), self.patch_embed(x)], dim=1) + self.positions(H // 14, W // 14)
        extra = 1
        if self.register_tokens is not None:    # registers come after the CLS token and have no position
            x = torch.cat([x[:, :1], self.register_tokens.expand(N, -1, -1), x[:, 1:]], dim=1)
            extra += self.register_tokens.shape[1]
        layers = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in n:
                layers.append((self.norm(x) if norm else x)[:, extra:])
        return tuple(layers)


def load_dinov2(name, weights=None, pretrained=True):
    """The frozen DINOv2 of that name, in eval mode.

    By default torch.hub's, downloaded once and cached. weights: a local file of the official tensors, read into our
    own DinoVisionTransformer. pretrained=False: ours with random tensors, to be filled by a checkpoint. `tiny` is
    always random. Raises UserError where nothing can be had.
    """
    if name not in DINOV2:
        raise UserError(f"--dinov2 {name} is not known; expected one of {', '.join(DINOV2)}")
    dim, depth, heads, registers = DINOV2[name]
    if name == "tiny" or weights or not pretrained:
        if name == "tiny" and weights:
            raise UserError("--dinov2 tiny is random and reads no weights; drop --dinov2-weights, or name the model the "
                            "file belongs to, such as --dinov2 dinov2_vits14")
        with torch.random.fork_rng(devices=[]):    # `tiny` is the same network in every run, as a pre-trained one would be
            torch.manual_seed(TINY_SEED)
            dinov2 = DinoVisionTransformer(dim=dim, depth=depth, heads=heads, registers=registers)
        if weights and pretrained:
            fill(dinov2, read_tensors(weights), f"{weights} (as {name})")
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")    # three warnings about xFormers, harmless
                dinov2 = torch.hub.load(DINOV2_HUB, name, trust_repo=True, skip_validation=True)
        except Exception as error:
            raise UserError(f"DINOv2 ({name}) is neither cached nor downloadable here ({type(error).__name__}); either "
                            "run once with a network, or give its official file by --dinov2-weights FILE, or take "
                            "--dinov2 tiny (random, for trying out)") from error
    return dinov2.requires_grad_(False).eval()


# ----------------------------------------------------- silhouettes, losses ----

def choose_body(mask):
    """(N, 2, H, W) soft mask -> (N, H, W): the channel that is the body, per frame.

    A person stands in the middle of the crop: if more than half of the top and bottom 5 rows (of 64) belongs to
    channel 0, channel 0 is the background."""
    H, W = mask.shape[2:]
    rows = max(1, 5 * H // 64)
    edge = mask[:, 0].round()
    ones = edge[:, :rows].sum((1, 2)) + edge[:, -rows:].sum((1, 2))
    return torch.where((ones > rows * W)[:, None, None], mask[:, 1], mask[:, 0])


def refine_edges(p):
    """(N, H, W) body probability -> silhouette: 1 inside, p on the edge band, 0 outside (closing, section 3.2)."""
    dilated = F.max_pool2d(p.round()[:, None], 3, 1, 1)
    eroded = -F.max_pool2d(-dilated, 5, 1, 2)    # max_pool2d pads with -inf: outside the image counts for neither
    inside, edge = eroded[:, 0] > 0.5, (dilated != eroded)[:, 0]
    return torch.where(inside, torch.ones_like(p), torch.where(edge, p, torch.zeros_like(p)))


def smooth_loss(maps):
    """(N, C, H, W) -> scalar: |Sobel x| + |Sobel y| of the channels' sum, per value. Few, closed regions are cheap.

    On the mask, whose two channels sum to 1, this is the constant of the image's border and has no gradient. (The release
    reads pixel-major memory as channel-major there, so its term does have one, though not the intended one.)"""
    N, C, H, W = maps.shape
    sobel = maps.new_tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    edges = F.conv2d(maps.sum(1, keepdim=True), torch.stack([sobel, sobel.t()])[:, None], padding=1)
    return edges.abs().sum() / (N * C * H * W)


def diversity_loss(code):
    """(N, C, H, W) denoising code -> scalar: log2(C) minus the entropy of the channels' shares. All parts get used."""
    share = code.sum((2, 3)) / (code.sum((1, 2, 3)) + 1e-6)[:, None]
    entropy = -(share * torch.log2(share + 1e-6)).sum(1)
    return (math.log2(code.shape[1]) - entropy).mean()


class MaskBranch(nn.Module):
    """The mask bottleneck: pixels (M, D) -> soft mask (M, 2) and its reconstruction loss."""

    def __init__(self, dim):
        super().__init__()
        self.bn_s = nn.BatchNorm1d(dim, affine=False)
        self.down_sampling = nn.Linear(dim, 2)
        self.up_sampling = nn.Linear(2, dim)

    def forward(self, x):
        mask = self.down_sampling(self.bn_s(F.dropout(x, 0.5, self.training))).float().softmax(1)
        return mask, F.mse_loss(self.up_sampling(mask).float(), x.float())


class DenoisingBranch(nn.Module):
    """Foreground pixels (M, 4D) -> denoising code (M, 16), a softmax: it can only say which part this is."""

    def __init__(self, dim, codes):
        super().__init__()
        self.bn_s = nn.BatchNorm1d(dim, affine=False)
        self.down_sampling = nn.Sequential(nn.Linear(dim, dim // 2), nn.BatchNorm1d(dim // 2, affine=False), nn.GELU(),
                                           nn.Linear(dim // 2, codes))

    def forward(self, x):
        return self.down_sampling(self.bn_s(x)).float().softmax(1)


class AppearanceBranch(nn.Module):
    """Foreground pixels (M, 4D) -> appearance code (M, 16), a sigmoid each."""

    def __init__(self, dim, codes):
        super().__init__()
        self.bn_s = nn.BatchNorm1d(dim, affine=False)
        self.down_sampling = nn.Linear(dim, codes)
        self.bn_t = nn.BatchNorm1d(codes, affine=False)

    def forward(self, x):
        return self.bn_t(self.down_sampling(self.bn_s(x))).float().sigmoid()


# ---------------------------------------------------------------- gait net ----

class BasicBlock(nn.Module):
    """ResNet's two-convolution block, same width in and out."""

    def __init__(self, width):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class CodeStem(nn.Module):
    def __init__(self, codes, width):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(codes, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.block = BasicBlock(width)

    def forward(self, code):
        return self.block(F.relu(self.bn(self.conv(code))))


class AttentionFusion(nn.Module):
    """Two maps (N, C, H, W) -> one: per place and channel a softmax over the two decides the mixture."""

    def __init__(self, width, hidden=4):
        super().__init__()
        self.score = nn.Sequential(nn.Conv2d(2 * width, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(),
                                   nn.Conv2d(hidden, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(),
                                   nn.Conv2d(hidden, 2 * width, 1, bias=False))

    def forward(self, a, b):
        score = self.score(torch.cat([a, b], dim=1)).unflatten(1, (-1, 2)).softmax(2)    # (N, C, 2, H, W)
        return score[:, :, 0] * a + score[:, :, 1] * b


class GaitNet(nn.Module):
    """Denoising and appearance code (N, 16, H, W) each -> gait maps. backbone: ResNet's layer1..layer4, its own copy."""

    def __init__(self, *, codes, width, backbone):
        super().__init__()
        self.denoising_stem, self.appearance_stem = CodeStem(codes, width), CodeStem(codes, width)
        self.fusion = AttentionFusion(width)
        self.backbone = backbone

    def forward(self, denoising, appearance):
        return self.backbone(self.fusion(self.denoising_stem(denoising), self.appearance_stem(appearance)))


# ------------------------------------------------------------------- SASGL ----

class View(NamedTuple):
    """What SASGL sees in N frames: soft mask (N,2,h,w), silhouette (N,h,w), the two codes (N,16,h,w), named losses."""
    mask: torch.Tensor
    silhouette: torch.Tensor
    denoising: torch.Tensor
    appearance: torch.Tensor
    losses: dict


class SASGL(nn.Module):
    """frames (B, T, 3, H, W), normalised -> gait maps (B, T, C, h, w) and the View they were read from.

    dinov2: anything with get_intermediate_layers, norm, embed_dim and n_blocks. dino_size: what DINOv2 sees, multiples
    of 14. code_size: height and width of mask, silhouette and codes.
    """

    def __init__(self, *, dinov2, backbone, width=64, codes=16, dino_size=(448, 224), code_size=(64, 32)):
        super().__init__()
        assert dino_size[0] % 14 == 0 == dino_size[1] % 14, f"dino_size {dino_size} must be multiples of 14"
        self.dino_size, self.code_size, self.codes = dino_size, code_size, codes
        self.dinov2 = dinov2
        self.blocks = [dinov2.n_blocks * k // 4 - 1 for k in (1, 2, 3, 4)]    # 1/4, 2/4, 3/4, 4/4
        self.mask_branch = MaskBranch(dinov2.embed_dim)
        self.denoising_branch = DenoisingBranch(4 * dinov2.embed_dim, codes)
        self.appearance_branch = AppearanceBranch(4 * dinov2.embed_dim, codes)
        self.gait_net = GaitNet(codes=codes, width=width, backbone=backbone)

    def train(self, mode=True):
        super().train(mode)
        self.dinov2.eval()    # frozen, whatever the rest does
        return self

    @torch.no_grad()
    def features(self, frames):
        """(N, 3, H, W) -> last (N, D, h, w), mid4 (N, 4D, h, w)."""
        x = F.interpolate(frames, self.dino_size, mode="bilinear", align_corners=False)
        layers = self.dinov2.get_intermediate_layers(x, n=self.blocks, norm=False)
        mid4 = torch.cat(layers, dim=2)
        grid = self.dino_size[0] // 14, self.dino_size[1] // 14
        return tuple(F.interpolate(tokens.transpose(1, 2).unflatten(2, grid), self.code_size, mode="bilinear",
                                   align_corners=False)
                     for tokens in (self.dinov2.norm(layers[-1]), F.layer_norm(mid4, mid4.shape[2:], eps=1e-6)))

    def mask_losses(self, last):
        """last (N, D, h, w) -> soft mask (N, 2, h, w), reconstruction and smoothness losses, weighted."""
        N, D, h, w = last.shape
        mask, loss_mask = self.mask_branch(last.permute(0, 2, 3, 1).reshape(-1, D))
        mask = mask.view(N, h, w, 2).permute(0, 3, 1, 2)
        with torch.autocast(last.device.type, enabled=False):
            return mask, {"mask": loss_mask, "smooth_mask": 0.02 * smooth_loss(mask)}

    def look(self, frames):
        """frames (N, 3, H, W) -> View."""
        last, mid4 = self.features(frames)
        mask, losses = self.mask_losses(last)
        silhouette = refine_edges(choose_body(mask.detach()))
        foreground = silhouette != 0
        pixels = mid4.permute(0, 2, 3, 1)[foreground]    # (M, 4D): batch-norm statistics are over these alone

        def encode(branch):
            code = torch.zeros(*foreground.shape, self.codes, device=frames.device)
            # A batch norm in training needs two; a synchronised one waits for every process, whatever this one sees.
            if len(pixels) > 1 or self.training and isinstance(branch.bn_s, nn.SyncBatchNorm):
                code[foreground] = branch(pixels)
            return code.permute(0, 3, 1, 2)

        denoising, appearance = encode(self.denoising_branch), encode(self.appearance_branch)
        with torch.autocast(frames.device.type, enabled=False):
            losses["smooth_part"] = 0.01 * smooth_loss(denoising[:, :-1])
            losses["diversity"] = 5 * diversity_loss(denoising)
        return View(mask, silhouette, denoising, appearance, losses)

    def forward(self, frames):
        B, T = frames.shape[:2]
        view = self.look(frames.flatten(0, 1))
        denoising, appearance = view.denoising, view.appearance
        if self.training:    # neither code may be relied on alone: for a fifth of the tracklets one of them is blanked
            keep = torch.ones(2, B)
            keep[torch.randint(2, (B,)), torch.arange(B)] = (torch.randperm(B) >= round(0.2 * B)).float()
            keep = keep.to(frames.device).repeat_interleave(T, dim=1)[:, :, None, None, None]
            denoising, appearance = denoising * keep[0], appearance * keep[1]
        return self.gait_net(denoising, appearance).unflatten(0, (B, T)), view
