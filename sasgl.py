"""SASGL: semantic-aware silhouette and gait learning (DinoGRL, section 3.2), and the DINOv2 it looks through.

A walk is the same walk by day and by night; a coat's colour is not. So DinoGRL reads gait from soft silhouettes that a
frozen DINOv2 sees in either modality, without a single silhouette label:

    frames (N,3,256,128), N = B*T
      -> resize (N,3,448,224) -> frozen DINOv2 -> grid 32x16 --+-- last (N,384,32,16)
                                                               +-- mid4 (N,1536,32,16), both upsampled to 64x32 where read
    last -> mask bottleneck 384 -> 2 -> 384 -> mask p -> body channel -> edge refinement -> silhouette (N,64,32)
    mid4, on the silhouette's pixels alone -+-- denoising code   (N,16,64,32)  softmax: which part of the body
                                            +-- appearance code  (N,16,64,32)  sigmoid: what it is like there
    codes -> gait net: two stems -> attention fusion -> ResNet layer1..layer4 -> gait maps (N,2048,16,8)

The mask bottleneck is the trick: through two softmax channels only the strongest contrast of the features can be
reconstructed, and for DINOv2 on a pedestrian crop that contrast is body against background.

Quick question: why is the mask detached before the codes are cut out? (Else identity losses would grow or shrink the
silhouette until it tells identities apart, by its errors.)

Ours, not the paper's: our own DinoVisionTransformer (for the official tensors), `tiny`; the warm-up of the
mask bottleneck (mask_losses) where no trained one is given; the body test's 5 edge rows scale with the map's height;
a batch without a foreground pixel gives empty codes instead of an error. And the order of the same arithmetic: nothing is cut
out, so that no shape depends on the data and a GPU never waits for the CPU to learn it; the codes' first Linear runs on
DINOv2's grid, a quarter of the pixels, as a Linear and bilinear upsampling (whose weights sum to 1) may change places.
"""
import math
import warnings
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from data import UserError, constant, processes

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


class Linear(nn.Linear):
    """nn.Linear on tokens (N, L, D) or maps with channels last (N, h, w, D). On a CPU it is called as the 1x1 convolution that it is:
    oneDNN's float32 convolutions use AVX-512 everywhere, MKL's products not on AMD's processors (2.2 times slower there)."""

    def forward(self, x):
        if x.is_cuda or x.ndim < 3:
            return super().forward(x)
        maps = x if x.ndim == 4 else x[:, :, None]
        y = F.conv2d(maps.permute(0, 3, 1, 2), self.weight[:, :, None, None], self.bias).permute(0, 2, 3, 1)
        return y if x.ndim == 4 else y.squeeze(2)


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
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x):
        N, L, D = x.shape
        q, k, v = self.qkv(x).view(N, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)    # (N, heads, L, d)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, L, D))


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = Linear(dim, 4 * dim)
        self.fc2 = Linear(4 * dim, dim)

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

    By default its tensors come from torch.hub, downloaded once and cached; weights: from a local file of the official tensors;
    pretrained=False: random, to be filled by a checkpoint. `tiny` is always random. The network is our DinoVisionTransformer in each
    case: the hub's, without xFormers, forms every attention matrix. Raises UserError where nothing can be had.
    """
    if name not in DINOV2:
        raise UserError(f"--dinov2 {name} is not known; expected one of {', '.join(DINOV2)}")
    dim, depth, heads, registers = DINOV2[name]
    if name == "tiny" and weights:
        raise UserError("--dinov2 tiny is random and reads no weights; drop --dinov2-weights, or name the model the "
                        "file belongs to, such as --dinov2 dinov2_vits14")
    with torch.random.fork_rng(devices=[]):    # `tiny` is the same network in every run, as a pre-trained one would be
        torch.default_generator.manual_seed(TINY_SEED)    # not the GPUs': nobody would set them back
        dinov2 = DinoVisionTransformer(dim=dim, depth=depth, heads=heads, registers=registers)
    if weights and pretrained:
        fill(dinov2, read_tensors(weights), f"{weights} (as {name})")
    elif pretrained and name != "tiny":
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")    # three warnings about xFormers, harmless
                tensors = torch.hub.load(DINOV2_HUB, name, trust_repo=True, skip_validation=True).state_dict()
        except Exception as error:
            raise UserError(f"DINOv2 ({name}) is neither cached nor downloadable here ({type(error).__name__}); either "
                            "run once with a network, or give its official file by --dinov2-weights FILE, or take "
                            "--dinov2 tiny (random, for trying out)") from error
        fill(dinov2, tensors, f"torch.hub's {name}")
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
    sobel = constant(((1.0, 0.0, -1.0), (2.0, 0.0, -2.0), (1.0, 0.0, -1.0)), maps.device).to(maps.dtype)
    edges = F.conv2d(maps.sum(1, keepdim=True), torch.stack([sobel, sobel.t()])[:, None], padding=1)
    return edges.abs().sum() / (N * C * H * W)


def diversity_loss(code):
    """(N, C, H, W) denoising code -> scalar: log2(C) minus the entropy of the channels' shares. All parts get used."""
    share = code.sum((2, 3)) / (code.sum((1, 2, 3)) + 1e-6)[:, None]
    entropy = -(share * torch.log2(share + 1e-6)).sum(1)
    return (math.log2(code.shape[1]) - entropy).mean()


def drop_half(x):
    """F.dropout(x, 0.5), from one random bit per value: a CPU would spend a quarter of SASGL's time on drawing a float for each."""
    bits = torch.empty(math.ceil(x.numel() / 64), dtype=torch.int64, device=x.device).random_(-2 ** 63, None).view(torch.uint8)
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=x.device)
    return x * (bits & powers[:, None]).ne(0).flatten()[:x.numel()].view_as(x) * 2


class MaskBranch(nn.Module):
    """The mask bottleneck: pixels (M, D) -> soft mask (M, 2) and its reconstruction loss."""

    def __init__(self, dim):
        super().__init__()
        self.bn_s = nn.BatchNorm1d(dim, affine=False)
        self.down_sampling = nn.Linear(dim, 2)
        self.up_sampling = nn.Linear(2, dim)

    def forward(self, x):
        mask = self.down_sampling(self.bn_s(drop_half(x) if self.training else x)).float().softmax(1)
        return mask, F.mse_loss(self.up_sampling(mask).float(), x.float())


def upsampled(maps, size):
    """(N, h, w, C) -> (N, H, W, C), bilinear."""
    return F.interpolate(maps.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)


@torch.no_grad()
def foreground_statistics(maps, foreground):
    """maps (N, h, w, C), foreground (N, H, W) -> number of its pixels (1,), mean and variance (C,) of the maps, upsampled to (H, W), over
    the foreground of all processes: what a batch norm that is given those pixels alone would compute."""
    C, coarse = maps.shape[3], maps.shape[1:3] != foreground.shape[1:]
    centre, sums, piece = 0, 0, len(maps)
    if coarse:
        piece = 16 if maps.is_cuda else 1    # frames that are upsampled at a time: one stays in a CPU's cache
        centre = maps.float().mean((0, 1, 2))    # or squares would lose digits; a Linear's output lies near zero already
        if processes()[1] > 1:    # the same for all
            dist.all_reduce(centre)
            centre /= processes()[1]
    with torch.autocast(maps.device.type, enabled=False):
        for piece, weight in zip(maps.split(piece), foreground.float().split(piece)):
            if coarse:
                piece = upsampled(piece.float() - centre, foreground.shape[1:])
            pixels, weight = piece.float().flatten(0, 2), weight.flatten()
            sums = sums + torch.cat([weight.sum()[None], weight @ pixels, weight @ pixels.square()])
    if processes()[1] > 1:
        dist.all_reduce(sums)
    number, first, second = sums.split([1, C, C])
    first, second = first / number.clamp(min=1), second / number.clamp(min=1)
    return number, first + centre, (second - first.square()).clamp(min=0)


class Normalise(torch.autograd.Function):
    """maps (N, H, W, C) -> (maps - mean) / sqrt(var + eps), mean and var (C,) being maps' own: means with the weights share (N, H, W),
    which sum to 1 over all processes. Its gradient is batch norm's; written out, it keeps the output alone, which GELU keeps anyway."""

    @staticmethod
    def forward(ctx, maps, mean, var, share):
        scale = (var + 1e-5).rsqrt()
        y = torch.addcmul(-mean * scale, maps, scale).to(maps.dtype)
        ctx.save_for_backward(y, scale, share)
        return y

    @staticmethod
    def backward(ctx, gradient):
        y, scale, share = ctx.saved_tensors
        sums = torch.stack([gradient.float().sum((0, 1, 2)), (gradient.float() * y).sum((0, 1, 2))])
        if processes()[1] > 1:
            dist.all_reduce(sums)
        through_statistics = torch.addcmul(sums[0], y, sums[1]).mul_(share[..., None])
        return (gradient - through_statistics).mul_(scale).to(y.dtype), None, None, None


class ForegroundNorm(nn.Module):
    """BatchNorm1d(affine=False), its tensors and its arithmetic, whose statistics in training are foreground_statistics."""

    def __init__(self, channels):
        super().__init__()
        self.momentum = 0.1
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, maps, foreground, statistics=None):
        """maps (N, h, w, C), foreground (N, H, W), statistics: foreground_statistics(maps, foreground), if they are known already
        -> normalised maps, of the same type."""
        if not self.training:
            return Normalise.apply(maps, self.running_mean, self.running_var, foreground * 0)
        assert not maps.requires_grad or maps.shape[:3] == foreground.shape, "no gradient passes the statistics of coarser maps"
        number, mean, var = foreground_statistics(maps, foreground) if statistics is None else statistics
        with torch.no_grad():
            momentum = self.momentum * (number > 1)    # of fewer pixels there is nothing to learn
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(var * number / (number - 1).clamp(min=1), momentum)
            self.num_batches_tracked += 1
        return Normalise.apply(maps, mean, var, foreground / number.clamp(min=1))


class DenoisingBranch(nn.Module):
    """mid4 (N, h, w, 4D) on DINOv2's grid -> denoising code (N, H, W, 16), a softmax: it can only say which part of the body this is."""
    recomputable = True    # train.recompute

    def __init__(self, dim, codes):
        super().__init__()
        self.bn_s = ForegroundNorm(dim)
        self.down_sampling = nn.Sequential(Linear(dim, dim // 2), ForegroundNorm(dim // 2), nn.GELU(), Linear(dim // 2, codes))

    def forward(self, x, foreground, statistics):
        """foreground (N, H, W), statistics: see ForegroundNorm."""
        linear, norm, gelu, last = self.down_sampling
        x = upsampled(linear(self.bn_s(x, foreground, statistics)), foreground.shape[1:])
        return last(gelu(norm(x, foreground))).float().softmax(-1)


class AppearanceBranch(nn.Module):
    """mid4 (N, h, w, 4D) on DINOv2's grid -> appearance code (N, H, W, 16), a sigmoid each."""

    def __init__(self, dim, codes):
        super().__init__()
        self.bn_s = ForegroundNorm(dim)
        self.down_sampling = Linear(dim, codes)
        self.bn_t = ForegroundNorm(codes)

    def forward(self, x, foreground, statistics):
        """foreground (N, H, W), statistics: see ForegroundNorm."""
        x = upsampled(self.down_sampling(self.bn_s(x, foreground, statistics)), foreground.shape[1:])
        return self.bn_t(x, foreground).float().sigmoid()


# ---------------------------------------------------------------- gait net ----

def conv_norm(x, conv, bn):
    """bn(conv(x)). Where nothing is trained a batch norm is a fixed scale and shift per channel: both are folded into the convolution,
    a multiplication per weight in place of two passes over the maps."""
    if bn.training or torch.is_grad_enabled():
        return bn(conv(x))
    scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
    return F.conv2d(x, conv.weight * scale[:, None, None, None], bn.bias - bn.running_mean * scale, conv.stride, conv.padding)


class BasicBlock(nn.Module):
    """ResNet's two-convolution block, same width in and out."""
    recomputable = True    # train.recompute

    def __init__(self, width):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x):
        y = F.relu(conv_norm(x, self.conv1, self.bn1), inplace=True)
        return F.relu(x + conv_norm(y, self.conv2, self.bn2), inplace=True)


class CodeStem(nn.Module):
    def __init__(self, codes, width):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(codes, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.block = BasicBlock(width)

    def forward(self, code):
        return self.block(F.relu(conv_norm(code, self.conv, self.bn), inplace=True))


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
        self.dino_size, self.code_size = dino_size, code_size
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
        """(N, 3, H, W) -> last (N, h, w, D), mid4 (N, h, w, 4D), on DINOv2's grid."""
        x = F.interpolate(frames, self.dino_size, mode="bilinear", align_corners=False)
        layers = self.dinov2.get_intermediate_layers(x, n=self.blocks, norm=False)
        mid4 = torch.cat(layers, dim=2)
        grid = self.dino_size[0] // 14, self.dino_size[1] // 14
        return tuple(tokens.unflatten(1, grid) for tokens in (self.dinov2.norm(layers[-1]), F.layer_norm(mid4, mid4.shape[2:], eps=1e-6)))

    def mask_losses(self, last):
        """last (N, h, w, D) -> soft mask (N, 2, H, W), reconstruction and smoothness losses, weighted."""
        mask, loss_mask = self.mask_branch(upsampled(last, self.code_size).flatten(0, 2))
        mask = mask.unflatten(0, (-1, *self.code_size)).permute(0, 3, 1, 2)
        with torch.autocast(last.device.type, enabled=False):
            return mask, {"mask": loss_mask, "smooth_mask": 0.02 * smooth_loss(mask)}

    def look(self, frames):
        """frames (N, 3, H, W) -> View."""
        last, mid4 = self.features(frames)
        mask, losses = self.mask_losses(last)
        silhouette = refine_edges(choose_body(mask.detach()))
        foreground = silhouette != 0    # batch-norm statistics are over these pixels alone, and the codes are zero elsewhere
        statistics = foreground_statistics(mid4, foreground) if self.training else None
        denoising, appearance = ((branch(mid4, foreground, statistics) * foreground[..., None]).permute(0, 3, 1, 2)
                                 for branch in (self.denoising_branch, self.appearance_branch))
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
            keep = keep.to(frames.device, non_blocking=True).repeat_interleave(T, dim=1)[:, :, None, None, None]
            denoising, appearance = denoising * keep[0], appearance * keep[1]
        return self.gait_net(denoising, appearance).unflatten(0, (B, T)), view
