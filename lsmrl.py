"""LSMRL: language-driven sequence-level modal-invariant representation learning (Yang et al., arXiv 2601.12062), and its CLIP.

Words know no wavelength: "a person in a long coat" is the same sentence by day and by night. So LSMRL learns one sentence per
identity, shared by both modalities, and lets CLIP's language pull visible and infrared video towards it:

    frames (B,T,3,288,144) -> CLIP ViT-B/16 read as STFL: 8 basic + 2 grouped + 2 patch-shift blocks -> frame tokens (B,T,768)
    prompts (C,4,512) -> "A photo of a X X X X person." -> frozen text encoder -> text features t (C,512), the bank --+
                                                                                                                     |
    frame tokens -> SD: + cross-attention over the bank <-----------------------------------------------------------+
      -> mean over T -> z (B,768) -> projection -> f (B,512)
    test:  embed()   -> (B, 1, 1280): z and f, each L2-normalised, side by side
    train: CMI: visible frame tokens attend to infrared ones and back -> c (B,768), which z is to resemble
           forward() -> named losses on z, f, c

The paper's abstract gives the modules and what each is for; its formulas and numbers are not public. So each choice is marked:
[paper] the abstract says so, [after X] it follows a public predecessor (VLD, CLIP-ReID, TPS, X-ReID), [ours] else.

- [paper] CLIP as backbone with minimal changes; STFL's three encoders; modality-shared prompts; SD before CMI; identity-level
  losses and two modality-level ones, for discrimination and for generalisation to unseen categories.
- [after VLD] ViT-B/16 at 288x144, positions resized bilinearly; heads, soft-margin weighted triplets and z with f; video-to-text
  cross-entropy times 0.08 on plain dot products; the optimizer and its schedule. [after CLIP-ReID] four words per identity.
- [after TPS] the patch shift and its table. [after X-ReID] CMI in training only.

Quick question: why does SD read a bank of all training identities' sentences, and not the person's own? (At test nobody knows
the person, so there is no sentence of theirs. The bank is a vocabulary; a stranger is described in the words of others.)

Ours, not the paper's: all that is marked [ours] below: the 8/2/2 split; the form of the grouped attention; SD's bank and its
zero-initialised output; that CMI pairs tracklets, its losses and the consistency term; both modality losses' formulas and
weights; ImageNet's mean and deviation as in the rest of the house; `tiny`, the small preset, the ablation switches.
"""
import math
import os
import re
import warnings
import zipfile
import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from data import UserError, gathered, option
from sasgl import fill, read_tensors, state_dict

# ------------------------------------------------------------------ CLIP ----

# "A photo of a X X X X person.", start and end token included. CLIP pads it to 77 with zeros, but its text transformer is
# causal: what stands after the end token cannot change the feature read there. So 12 positions do, exactly, at a sixth of the cost.
PROMPT = (49406, 320, 1125, 539, 320, 343, 343, 343, 343, 2533, 269, 49407)
SLOTS = slice(5, 9)    # the four X
CLIP_MODELS = {"ViT-B-16": dict(patch=16, grid=14, width=768, depth=12, heads=12, text_width=512, text_depth=12, text_heads=8, dim=512),
               "tiny": dict(patch=8, grid=8, width=64, depth=4, heads=2, text_width=32, text_depth=2, text_heads=1, dim=64)}
CLIP_SHA256 = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
CLIP_URL = f"https://openaipublic.azureedge.net/clip/models/{CLIP_SHA256}/ViT-B-16.pt"


class Attention(nn.Module):
    """Multi-head attention with CLIP's tensor names. x (N, L, D), context (N, M, D), x itself by default -> (N, L, D)."""
    recomputable = True    # train.recompute

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * dim, dim) * dim ** -0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x, context=None, causal=False):
        if context is None:
            q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            D = x.shape[-1]
            q = F.linear(x, self.in_proj_weight[:D], self.in_proj_bias[:D])
            k, v = F.linear(context, self.in_proj_weight[D:], self.in_proj_bias[D:]).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))    # (N, heads, L, d)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    recomputable = True    # train.recompute

    def __init__(self, dim):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.c_proj(F.silu(1.702 * self.c_fc(x)) / 1.702)    # QuickGELU, x * sigmoid(1.702 x)


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.attn, self.mlp = Attention(dim, heads), Mlp(dim)
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x, context=None, causal=False):
        x = x + self.attn(self.ln_1(x), None if context is None else self.ln_1(context), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, dim, depth, heads):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))


class VisionTransformer(nn.Module):
    """CLIP's image side: the tensors alone. STFL below says in which order they are read."""

    def __init__(self, *, patch, grid, width, depth, heads, dim):
        super().__init__()
        self.grid = (grid, grid)
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width ** -0.5)
        self.positional_embedding = nn.Parameter(torch.randn(1 + grid * grid, width) * width ** -0.5)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, depth, heads)
        self.proj = nn.Parameter(torch.randn(width, dim) * width ** -0.5)

    def resize(self, h, w):
        """Positions for an h x w grid of patches: the square grid resized bilinearly, row 0 (CLS) kept. [after VLD]"""
        cls, grid = self.positional_embedding.data.split([1, math.prod(self.grid)])
        grid = F.interpolate(grid.t().unflatten(1, self.grid)[None], (h, w), mode="bilinear", align_corners=False)
        self.positional_embedding = nn.Parameter(torch.cat([cls, grid[0].flatten(1).t()]))
        self.grid = (h, w)


class CLIP(nn.Module):
    """Both sides, tensor for tensor OpenAI's file (302 of them; logit_scale included, unused here)."""

    def __init__(self, *, patch, grid, width, depth, heads, text_width, text_depth, text_heads, dim):
        super().__init__()
        self.visual = VisionTransformer(patch=patch, grid=grid, width=width, depth=depth, heads=heads, dim=dim)
        self.transformer = Transformer(text_width, text_depth, text_heads)
        self.token_embedding = nn.Embedding(49408, text_width)
        self.positional_embedding = nn.Parameter(torch.randn(77, text_width) * 0.01)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.randn(text_width, dim) * text_width ** -0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_text(self, words, end):
        """Word vectors (C, L, text_width), L <= 77, with the end token at position `end` -> text features (C, dim)."""
        x = words + self.positional_embedding[:words.shape[1]]
        for block in self.transformer.resblocks:
            x = block(x, causal=True)
        return self.ln_final(x[:, end]) @ self.text_projection


def read_clip(path):
    """OpenAI's TorchScript archive, or a state dict saved from it -> {name: tensor}. Raises UserError.

    An archive is opened by torch.jit.load, which runs no Python; the one thing it does run, __setstate__ methods of the archive,
    is refused. Anything else is opened with weights_only=True."""
    tensors = None
    try:
        with zipfile.ZipFile(path) as archive:
            texts = [archive.read(entry) for entry in archive.infolist() if not re.fullmatch(r"[^/]+/data/\d+", entry.filename)]
            torchscript = any(name.endswith("/constants.pkl") for name in archive.namelist())
        if torchscript and any(b"__setstate__" in text for text in texts):
            raise UserError(f"{path} is a program that runs while it is read (__setstate__); expected OpenAI's ViT-B-16.pt, which is none")
        if torchscript:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")    # newer torch announces the end of TorchScript
                tensors = torch.jit.load(path, map_location="cpu").state_dict()
    except (RuntimeError, OSError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        pass    # no archive, or a torn one: read_tensors says so
    tensors = state_dict(read_tensors(path) if tensors is None else tensors, path)
    return {k: v.float() for k, v in tensors.items() if k not in ("input_resolution", "context_length", "vocab_size")}


def load_clip(name, weights=None, pretrained=True):
    """The CLIP of that name, its text side frozen.

    By default OpenAI's file, downloaded once and cached, its SHA-256 checked. weights: a local copy of it.
    pretrained=False: random tensors, to be filled by a checkpoint. `tiny` is always random. Raises UserError."""
    if name not in CLIP_MODELS:
        raise UserError(f"--clip {name} is not known; expected one of {', '.join(CLIP_MODELS)}")
    if name == "tiny" and weights:
        raise UserError("--clip tiny is random and reads no weights; drop --clip-weights, or take --clip ViT-B-16")
    clip = CLIP(**CLIP_MODELS[name])
    if name != "tiny" and pretrained:
        if not weights:
            weights = os.path.join(torch.hub.get_dir(), "checkpoints", f"CLIP-ViT-B-16-{CLIP_SHA256[:8]}.pt")    # whole or not there
            try:
                if not os.path.exists(weights):
                    os.makedirs(os.path.dirname(weights), exist_ok=True)
                    torch.hub.download_url_to_file(CLIP_URL, weights, hash_prefix=CLIP_SHA256)
            except Exception as error:
                raise UserError(f"CLIP ViT-B/16 is neither cached nor downloadable here ({type(error).__name__}: {str(error)[:80]}); "
                                "either run once with a network, or give OpenAI's file by --clip-weights FILE, or take "
                                "--preset small (a tiny random CLIP, for trying out)") from error
        fill(clip, read_clip(weights), f"{weights} (as CLIP {name})")
    for key, parameter in clip.named_parameters():
        parameter.requires_grad_(key.startswith("visual."))
    return clip


# ------------------------------------------------------------------ STFL ----

# Patch (r, c) is rolled by SHIFT[r % 3][c % 3] frames: every 3x3 neighbourhood sees nine moments. [after TPS]
SHIFT = torch.tensor([[-4, 1, 2], [-1, 0, 3], [-2, -3, 4]])


def roll_patches(patches, grid, sign=1):
    """Patches (B, T, N, D) of a grid (h, w), N = h * w: each rolled along T by its entry of SHIFT (sign=-1: back)."""
    T, (h, w) = patches.shape[1], grid
    shift = SHIFT[torch.arange(h)[:, None] % 3, torch.arange(w) % 3].flatten()    # (N,)
    time = (torch.arange(T)[:, None] - sign * shift) % T    # (T, N): where each place looks
    return patches.gather(1, time.to(patches.device)[None, :, :, None].expand_as(patches))


def attend_grouped(attention, x, groups):
    """x (B, T, 1+N, D) -> its update: each of `groups` horizontal stripes attends over its patches of all T frames and the T
    CLS tokens (6 * 27 + 6 = 168 tokens against 163 of a frame); CLS updates averaged over the stripes. [ours]"""
    B, T, L, D = x.shape
    cls, patches = x.split([1, L - 1], dim=2)
    cls = cls.transpose(1, 2).expand(B, groups, T, D)
    patches = patches.unflatten(2, (groups, -1)).transpose(1, 2).flatten(2, 3)    # rows come first: (B, G, T*n, D)
    cls, patches = attention(torch.cat([cls, patches], dim=2).flatten(0, 1)).unflatten(0, (B, groups)).split([T, patches.shape[2]], dim=2)
    patches = patches.unflatten(2, (T, -1)).transpose(1, 2).flatten(2, 3)    # (B, T, N, D)
    return torch.cat([cls.mean(1)[:, :, None], patches], dim=2)


def attend_shifted(attention, x, grid):
    """x (B, T, 1+N, D) -> its update: patches rolled in time, attention within the frame, rolled back; CLS stays."""
    rolled = torch.cat([x[:, :, :1], roll_patches(x[:, :, 1:], grid)], dim=2)
    update = attention(rolled.flatten(0, 1)).unflatten(0, x.shape[:2])
    return torch.cat([update[:, :, :1], roll_patches(update[:, :, 1:], grid, sign=-1)], dim=2)


def stfl(visual, frames, *, split=(8, 2, 2), groups=6):
    """Spatial-temporal feature learning: frames (B, T, 3, H, W) -> frame tokens (B, T, D), CLIP's CLS tokens after ln_post.

    split: how many blocks are read as basic (within a frame), as spatial-temporal grouped, and as temporal patch shift
    encoders, in this order. The blocks are CLIP's own: no new parameters. [paper; 8/2/2 ours]"""
    B, T = frames.shape[:2]
    x = visual.conv1(frames.flatten(0, 1)).flatten(2).transpose(1, 2)    # (B*T, N, D)
    x = torch.cat([visual.class_embedding.to(x.dtype).expand(B * T, 1, -1), x], dim=1) + visual.positional_embedding
    x = visual.ln_pre(x).unflatten(0, (B, T))
    kinds = ["basic"] * split[0] + ["grouped"] * split[1] + ["shifted"] * split[2]
    attend = {"basic": lambda attention, y: attention(y.flatten(0, 1)).view_as(y),
              "grouped": lambda attention, y: attend_grouped(attention, y, groups),
              "shifted": lambda attention, y: attend_shifted(attention, y, visual.grid)}
    blocks = visual.transformer.resblocks
    for kind, block in zip(kinds, blocks, strict=True):
        x = x + attend[kind](block.attn, block.ln_1(x))
        if block is blocks[-1]:
            x = x[:, :, :1]    # nobody reads the patches any more: spare them the last MLP
        x = x + block.mlp(block.ln_2(x))
    return visual.ln_post(x[:, :, 0])


# --------------------------------------------------- prompts, SD and CMI ----

class Prompts(nn.Module):
    """One sentence per training identity, of which four words are learned: -> word vectors (C, 12, width). [after CLIP-ReID]"""

    def __init__(self, *, classes, token_embedding):
        super().__init__()
        self.words = nn.Parameter(torch.randn(classes, 4, token_embedding.embedding_dim) * 0.02)
        self.register_buffer("sentence", torch.tensor(PROMPT), persistent=False)

    def forward(self, token_embedding):
        sentence = token_embedding(self.sentence).expand(len(self.words), -1, -1)
        return torch.cat([sentence[:, :SLOTS.start], self.words, sentence[:, SLOTS.stop:]], dim=1)


class SD(nn.Module):
    """Semantic diffusion: frame tokens (B, T, D), bank of text features (C, d) -> frame tokens, each with what it found in the
    bank. The output starts at zero: in the first step CLIP's features pass unchanged. [paper; this form ours]"""

    def __init__(self, *, dim, text_dim, heads):
        super().__init__()
        self.ln, self.ln_text = nn.LayerNorm(dim), nn.LayerNorm(text_dim)
        self.text = nn.Linear(text_dim, dim)
        self.attn = Attention(dim, heads)
        nn.init.zeros_(self.attn.out_proj.weight)
        nn.init.zeros_(self.attn.out_proj.bias)

    def forward(self, tokens, bank):
        text = self.text(self.ln_text(bank))[None]    # (1, C, D), the same for every token: all tokens in one row
        return tokens + self.attn(self.ln(tokens).flatten(0, 1)[None], text).view_as(tokens)


class CMI(nn.Module):
    """Cross-modal interaction: frame tokens of both modalities (B, T, D) -> c (B, D). A tracklet's frames attend to those of its
    partner, a tracklet of the same identity in the other modality; the weights are shared by both directions. [paper; pairs ours]"""

    def __init__(self, *, dim, heads):
        super().__init__()
        self.block = Block(dim, heads)

    def forward(self, tokens, partner):
        return self.block(tokens, tokens[partner]).mean(1)


def partners(modality, label):
    """modality (B,), label (B,) -> (B,): for each tracklet the index of one of its identity in the other modality, the k-th
    visible of an identity with its k-th infrared one. Every identity must come as often in either modality."""
    visible, infrared = (torch.nonzero(modality == m)[:, 0] for m in (0, 1))
    visible, infrared = (side[label[side].argsort(stable=True)] for side in (visible, infrared))
    assert torch.equal(label[visible], label[infrared]), "every identity needs as many visible as infrared tracklets in a batch"
    partner = torch.empty_like(label)
    partner[visible], partner[infrared] = infrared, visible
    return partner


# ---------------------------------------------------------------- losses ----

def weighted_triplet_loss(x, label):
    """x (B, D), label (B,) -> scalar: log(1 + exp(p - n)), p the softmax-weighted distance of the anchor's positives (itself
    included; the far ones weigh more), n that of its negatives (the near ones weigh more). [after VLD]"""
    x = x.float()
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    same = label[:, None] == label
    positive = distance.masked_fill(~same, -torch.inf).softmax(1) * distance
    negative = (-distance).masked_fill(same, -torch.inf).softmax(1) * distance
    return F.softplus(positive.sum(1) - negative.sum(1)).mean()


def contrast_loss(x, label, modality, temperature=0.1):
    """Modality level, for discrimination: x (B, D) of length 1 -> scalar, the supervised contrastive loss whose candidates are the
    other modality's tracklets alone: minus the mean log share of the same identity among them. [ours]"""
    other = modality[:, None] != modality
    logits = (x @ x.t() / temperature).masked_fill(~other, -torch.inf)
    positive = (label[:, None] == label) & other
    share = logits.log_softmax(1).masked_fill(~positive, 0)    # never 0 * -inf
    return -(share.sum(1) / positive.sum(1)).mean()


def centre_loss(x, label, modality):
    """Modality level, for generalisation to unseen categories: x (B, D) -> scalar, the squared distance of an identity's visible
    and infrared centres, mean over the identities. [ours]"""
    of = F.one_hot(label.unique(return_inverse=True)[1]).to(x.dtype)    # (B, P)
    visible, infrared = ((of * (modality == m)[:, None]).t() for m in (0, 1))    # (P, B)
    centres = [side @ x / side.sum(1, keepdim=True) for side in (visible, infrared)]
    return (centres[0] - centres[1]).square().sum(1).mean()


# ----------------------------------------------------------------- LSMRL ----

def side_by_side(z, f):
    """z (B, D), f (B, d) -> (B, D + d): each L2-normalised, as test compares them. [after VLD]"""
    return torch.cat([F.normalize(z, dim=1), F.normalize(f, dim=1)], dim=1)


class LSMRL(nn.Module):
    """The whole method. classes: training identities; clip: see load_clip, its positions already resized.

    split, groups: see stfl. sd, cmi: False removes the part (ablation). text, contrast, centre, consistency: weights of the
    losses of these names, 0 removes one. boost: factor on the learning rate of classifiers, prompts and biases."""

    warm_up_stage = None    # see model.DinoGRL

    def __init__(self, *, classes, clip, split=(8, 2, 2), groups=6, sd=True, cmi=True, text=0.08, contrast=1.0, centre=0.5,
                 consistency=1.0, boost=25.0):
        super().__init__()
        visual = clip.visual
        dim, text_dim = visual.proj.shape
        heads = visual.transformer.resblocks[0].attn.heads
        self.weights = {"text": text, "contrast": contrast, "centre": centre, "consistency": consistency}
        self.clip, self.boost = clip, boost
        self.split, self.groups = split, groups
        self.prompts = Prompts(classes=classes, token_embedding=clip.token_embedding)
        self.register_buffer("bank", torch.zeros(classes, text_dim))    # text features as SD last saw them: at test they are fixed
        self.sd = SD(dim=dim, text_dim=text_dim, heads=heads) if sd else None
        self.cmi = CMI(dim=dim, heads=heads) if cmi else None
        self.heads = nn.ModuleDict({name: nn.Sequential(nn.BatchNorm1d(d), nn.Linear(d, classes, bias=False))
                                    for name, d in {"z": dim, "f": text_dim, **({"cmi": dim} if cmi else {})}.items()})
        for head in self.heads.values():
            nn.init.normal_(head[1].weight, std=0.001)

    def text_features(self):
        """-> t (C, d), a sentence's feature per training identity."""
        return self.clip.encode_text(self.prompts(self.clip.token_embedding), len(PROMPT) - 1)

    def features(self, frames, bank):
        """frames (B, T, 3, H, W) -> frame tokens (B, T, D), sequence features z (B, D) and f (B, d), float32."""
        tokens = stfl(self.clip.visual, frames, split=self.split, groups=self.groups)
        if self.sd is not None:
            tokens = self.sd(tokens, bank)
        with torch.autocast(frames.device.type, enabled=False):
            z = self.pool(tokens.float())
            return tokens, z, z @ self.clip.visual.proj

    def pool(self, tokens):
        """Frame tokens (B, T, D) -> sequence feature z (B, D): the mean over time."""
        return tokens.mean(1)

    def embed(self, frames, modality):
        """frames (B, T, 3, H, W), modality (B,) not used: words know none -> (B, 1, D + d) float32, z and f of length 1 each."""
        return side_by_side(*self.features(frames, self.bank)[1:])[:, None]

    def forward(self, frames, modality, label):
        """Training step: -> named losses (weighted: the total is their sum), and what the progress bar shows."""
        t, modality = None, modality.to(label.device, non_blocking=True)
        if self.sd is not None or self.weights["text"]:
            t = self.text_features().float()
            self.bank.copy_(t.detach())
        tokens, z, f = self.features(frames, t)
        streams = {"z": z, "f": f}
        if self.cmi is not None:
            streams["cmi"] = self.cmi(tokens, partners(modality, label)).float()
        streams = {name: gathered(x) for name, x in streams.items()}    # tracklets are compared with those of all processes
        z, f, modality, label = streams["z"], streams["f"], gathered(modality), gathered(label)
        losses, shown = {}, {}
        with torch.autocast(frames.device.type, enabled=False):    # small, and sums of exponentials: float32
            for name, x in streams.items():
                logits = self.heads[name](x)
                losses[f"identity_{name}"] = F.cross_entropy(logits, label)
                losses[f"triplet_{name}"] = weighted_triplet_loss(x, label)
                shown[f"accuracy_{name}"] = (logits.detach().argmax(1) == label).float().mean()
            e = side_by_side(z, f) / math.sqrt(2)    # what test compares, of length 1
            further = {"text": lambda: F.cross_entropy(f @ t.t(), label),
                       "contrast": lambda: contrast_loss(e, label, modality),
                       "centre": lambda: centre_loss(e, label, modality)}
            if self.cmi is not None:    # z is drawn to c, not c to z: c exists in training only and must leave its knowledge behind
                further["consistency"] = lambda: (F.normalize(z, dim=1) - F.normalize(streams["cmi"].detach(), dim=1)).square().sum(1).mean()
            for name, loss in further.items():
                if self.weights[name]:
                    losses[name] = self.weights[name] * loss()
        return losses, shown

    def parameter_groups(self):
        """-> groups for the optimizer, each with its factor on the learning rate: `boost` for classifiers, prompts and biases."""
        groups = [{"params": [], "factor": 1}, {"params": [], "factor": self.boost}]
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                fast = name.endswith("bias") or name == "prompts.words" or name.startswith("heads.") and parameter.ndim == 2
                groups[fast]["params"].append(parameter)
        return groups


# --------------------------------------------------------- configuration ----

@dataclass
class Options:
    """LSMRL's own choices, and where its recipe differs from the common defaults (train.Config)."""
    epochs: int = option(24, "0 evaluates the untrained model", 0)
    optimizer: str = option("AdamW", "AdamW, or Adam")
    lr: float = option(2.5e-5, "learning rate of CLIP's weights; higher forgets what CLIP knows", 1e-12)
    weight_decay: float = option(1e-4, "AdamW's weight decay", 0)
    warmup_epochs: int = option(3, "linear warm-up from 0.01 of the rate", 0)
    milestones: tuple = option((), "epochs at which the rate falls tenfold, where --cosine is off")
    cosine: bool = option(True, "after the warm-up the rate follows a cosine that ends at 0.01 after the last epoch; more --epochs on resuming stretch it")
    size: tuple = option((288, 144), "height and width of the frames, multiples of the patch", 1)
    boost: float = option(25.0, "factor on the rate of classifiers, prompts and biases; less where CLIP is random too", 0)
    clip: str = option("ViT-B-16", "ViT-B-16, or tiny: random, offline")
    clip_weights: str = option("", "local copy of OpenAI's ViT-B-16.pt, instead of the download")
    split: tuple = option((8, 2, 2), "blocks read as basic, grouped, patch-shift encoders; 12 0 0 is plain CLIP", 0)
    groups: int = option(6, "stripes of the grouped encoder; must divide the rows of patches", 1)
    sd: bool = option(True, "off removes semantic diffusion")
    cmi: bool = option(True, "off removes cross-modal interaction")
    text: float = option(0.08, "weight of the video-to-text loss; 0: no gradient reaches the prompts but through SD", 0)
    contrast: float = option(1.0, "weight of the modality loss for discrimination; 0 removes it", 0)
    centre: float = option(0.5, "weight of the modality loss for generalisation; 0 removes it", 0)
    consistency: float = option(1.0, "weight of the pull of z towards CMI's c; 0 leaves CMI its own identity losses", 0)

    # A laptop's CPU, minutes: a tiny random CLIP. It has all to learn, and the modality gap last of all: a high rate, many short
    # steps of many identities, a heavier contrast.
    small = dict(epochs=20, steps=120, identities=16, tracklets=2, frames=2, lr=3e-3, boost=3.0, warmup_epochs=1, size=(64, 32),
                 workers=0, erase=0.0, clip="tiny", split=(2, 1, 1), groups=4, contrast=3.0)

    def check(self):
        """Raises UserError for a configuration that cannot work."""
        if self.clip not in CLIP_MODELS:
            raise UserError(f"--clip {self.clip} is not known; expected one of {', '.join(CLIP_MODELS)}")
        patch, depth = CLIP_MODELS[self.clip]["patch"], CLIP_MODELS[self.clip]["depth"]
        if self.size[0] % patch or self.size[1] % patch:
            raise UserError(f"--size {self.size[0]} {self.size[1]}; expected multiples of {patch}, the patch of {self.clip}")
        if sum(self.split) != depth:
            raise UserError(f"--split {' '.join(map(str, self.split))}; expected three numbers that add up to the {depth} blocks of {self.clip}")
        rows = self.size[0] // patch
        if self.split[1] and rows % self.groups:
            raise UserError(f"--groups {self.groups}; expected a divisor of the {rows} rows of patches")


def build(config, classes, pretrained=True, cls=LSMRL):
    """An LSMRL (or a subclass: cls) as the configuration (train.Config with Options) says. pretrained=False: random, bank empty,
    to be filled."""
    clip = load_clip(config.clip, config.clip_weights, pretrained)
    patch = CLIP_MODELS[config.clip]["patch"]
    clip.visual.resize(config.size[0] // patch, config.size[1] // patch)
    model = cls(classes=classes, clip=clip, split=config.split, groups=config.groups, sd=config.sd, cmi=config.cmi, text=config.text,
                contrast=config.contrast, centre=config.centre, consistency=config.consistency, boost=config.boost)
    if pretrained:
        with torch.no_grad():
            model.bank.copy_(model.text_features())    # so that an untrained model can be evaluated
    return model
