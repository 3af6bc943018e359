"""DINOv2 (Oquab et al., 2023): the frozen vision transformer that DinoGRL looks through.

    frames (N,3,448,224) -> patches of 14x14 -> 32x16 tokens of D, and CLS -> 12 blocks -> tokens

Tensor for tensor the official state dict, register variants included, and bit for bit its tokens:
only the classes below are ours. What SASGL asks of it: get_intermediate_layers and norm.

Quick question: why does a change of 0.1 stand in the interpolation of the positions? (The official
code adds it so that rounding never gives one row too few. It shifts the grid a little, and the
network was evaluated so everywhere: leave it out and every token differs.)

Ours, not the paper's: TokenLinear, the same product called in another way; the two tiny ones.
"""
import os
import re
import warnings

from support.files import ROOT, UserError
from support.weights import download, load_strictly, named_tensors, read_tensors

import torch
import torch.nn.functional as F
from torch import nn

PATCH = 14
# name: (width D, blocks, heads, register tokens). The tiny ones are for the offline demo and tests:
# `tiny` distilled from DINOv2 by support/priors.py, `tiny-random` as it says.
DINOV2 = {"dinov2_vits14": (384, 12, 6, 0), "dinov2_vits14_reg": (384, 12, 6, 4),
          "dinov2_vitb14": (768, 12, 12, 0), "dinov2_vitb14_reg": (768, 12, 12, 4),
          "dinov2_vitl14": (1024, 24, 16, 0), "dinov2_vitl14_reg": (1024, 24, 16, 4),
          "tiny": (32, 4, 1, 0), "tiny-random": (32, 4, 1, 0)}
TINY, RANDOM = "tiny", "tiny-random"
TINY_FILE = os.path.join(ROOT, "assets", "tiny_dinov2.pt")
RANDOM_SEED = 1002
# Pinned: the code that will run.
DINOV2_HUB = "facebookresearch/dinov2:b8931f7bf91576930313be2c6d6af376033b35f0"


class TokenLinear(nn.Linear):
    """nn.Linear on tokens (N, L, D). On a CPU it is called as the 1x1 convolution that it is:
    oneDNN's float32 convolutions use AVX-512 everywhere, MKL's products not on AMD's processors,
    where they are 2.2 times slower."""

    def forward(self, x):
        if x.is_cuda:
            return super().forward(x)
        maps = x[:, :, None].permute(0, 3, 1, 2)    # (N, D, L, 1)
        maps = F.conv2d(maps, self.weight[:, :, None, None], self.bias)
        return maps.permute(0, 2, 3, 1).squeeze(2)


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
        self.qkv = TokenLinear(dim, 3 * dim)
        self.proj = TokenLinear(dim, dim)

    def forward(self, x):
        N, L, D = x.shape
        qkv = self.qkv(x).view(N, L, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)    # (N, heads, L, d) each
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(N, L, D))


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = TokenLinear(dim, 4 * dim)
        self.fc2 = TokenLinear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.ls2 = LayerScale(dim)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, PATCH)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)    # (N, L, D)


class DinoVisionTransformer(nn.Module):
    """DINOv2's ViT, tensor for tensor the official state dict (its mask_token included, unused)."""

    def __init__(self, *, dim, depth, heads, registers=0):
        super().__init__()
        self.embed_dim, self.n_blocks = dim, depth
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        # Pre-trained at 518x518 pixels: 37x37 patches.
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + 37 * 37, dim))
        self.register_tokens = None
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.patch_embed = PatchEmbed(dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)

    def positions(self, h, w):
        """Position embeddings of an h x w grid of patches, (1, 1 + h*w, D), interpolated as the
        official code does: by a scale factor with its 0.1 (register models: to the size,
        antialiased)."""
        if h == w == 37:
            return self.pos_embed
        cls, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        grid = grid.float().transpose(1, 2).unflatten(2, (37, 37))    # (1, D, 37, 37)
        if self.register_tokens is None:
            scale = (h + 0.1) / 37, (w + 0.1) / 37
            grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        else:
            grid = F.interpolate(grid, size=(h, w), mode="bicubic", antialias=True)
        return torch.cat([cls, grid.flatten(2).transpose(1, 2).to(cls.dtype)], dim=1)

    def get_intermediate_layers(self, x, n, norm=True):
        """x (N, 3, H, W), H and W multiples of 14 -> for each block index in n its patch tokens
        (N, H*W/196, D)."""
        N, _, H, W = x.shape
        x = torch.cat([self.cls_token.expand(N, -1, -1), self.patch_embed(x)], dim=1)
        x = x + self.positions(H // PATCH, W // PATCH)
        extra = 1
        if self.register_tokens is not None:    # after the CLS token, and without a position
            x = torch.cat([x[:, :1], self.register_tokens.expand(N, -1, -1), x[:, 1:]], dim=1)
            extra += self.register_tokens.shape[1]
        layers = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in n:
                layers.append((self.norm(x) if norm else x)[:, extra:])
        return tuple(layers)


# --------------------------------------------------------------- weights ----

# Hugging Face's names of the same tensors, as patterns, and the official ones.
HUGGING_FACE = [
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.(cls_token|mask_token|register_tokens)", r"\1"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.(norm\d|mlp\.fc\d)\.", r"blocks.\1.\2."),
    (r"layernorm\.", "norm.")]


def with_official_names(tensors):
    """A state dict, be it with the official names or with Hugging Face's -> with the official ones,
    in which query, key and value are one tensor."""
    tensors = {name.removeprefix("dinov2."): tensor for name, tensor in tensors.items()}
    if "embeddings.cls_token" not in tensors:
        return tensors
    official = {}
    for name, tensor in tensors.items():
        query = re.fullmatch(r"encoder\.layer\.(\d+)\.attention\.attention\.query\.(\w+)", name)
        if query:
            three = [tensors.get(name.replace("query", part)) for part in ("query", "key", "value")]
            if not any(part is None for part in three):
                official[f"blocks.{query[1]}.attn.qkv.{query[2]}"] = torch.cat(three)
        elif ".attention.attention." not in name:
            for theirs, ours in HUGGING_FACE:
                name = re.sub(f"^{theirs}", ours, name)
            official[name] = tensor
    return official


def levels_of(dinov2):
    """The blocks whose tokens SASGL reads: 1/4, 2/4, 3/4, 4/4 of them."""
    return [dinov2.n_blocks * k // 4 - 1 for k in (1, 2, 3, 4)]


def check_dino_size(size):
    """size: height and width that DINOv2 sees. Raises UserError."""
    if any(side < PATCH or side % PATCH for side in size):
        raise UserError(f"--dino-size {size}; expected multiples of 14, DINOv2's patch")


def load_dinov2(name, weights=None, pretrained=True):
    """The frozen DINOv2 of that name, in eval mode.

    By default its tensors come from torch.hub, downloaded once and cached; `tiny` lies in assets/.
    weights: from a local file, with the official names or Hugging Face's; pretrained=False: random,
    to be filled by a checkpoint. Raises UserError where nothing can be had."""
    if name not in DINOV2:
        raise UserError(f"--dinov2 {name} is not known; expected one of {', '.join(DINOV2)}")
    if name in (TINY, RANDOM) and weights:
        raise UserError(f"--dinov2 {name} reads no weights; drop --dinov2-weights, or name the "
                        "model the file belongs to, such as --dinov2 dinov2_vits14")
    dim, depth, heads, registers = DINOV2[name]
    # What is drawn in here (torch.hub draws too) moves no other weights of a seed.
    with torch.random.fork_rng(devices=[]):
        # `tiny-random` is the same network in every run, as a pre-trained one would be. The CPU's
        # generator alone: nobody would set the GPUs' back.
        torch.default_generator.manual_seed(RANDOM_SEED)
        dinov2 = DinoVisionTransformer(dim=dim, depth=depth, heads=heads, registers=registers)
        if pretrained and name != RANDOM:
            file = TINY_FILE if name == TINY else weights
            if file:
                tensors = with_official_names(named_tensors(read_tensors(file), file))
            else:
                tensors = fetch_official(name)
            load_strictly(dinov2, tensors, f"{file or 'torch.hub'} (as {name})")
    return dinov2.requires_grad_(False).eval()


def fetch_official(name):
    """The official tensors of that name by torch.hub. Raises UserError."""
    ways_out = ("give its official file by --dinov2-weights FILE, or take --dinov2 tiny (small, "
                "for trying out)")

    def fetch():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")    # three of them about xFormers, harmless
            hub = torch.hub.load(DINOV2_HUB, name, trust_repo=True, skip_validation=True)
        return hub.state_dict()

    return download(f"DINOv2 ({name})", fetch, ways_out)
