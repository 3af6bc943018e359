"""LSMRL (Yang et al., 2026): language-driven sequence-level modal-invariant representations.

"A person in a long coat" is the same sentence by day and by night. So LSMRL learns one sentence per
identity, shared by both modalities, and CLIP's language pulls visible and infrared video to it:

    frames (B,T,3,288,144) -> stfl: CLIP ViT-B/16, read as 8 basic, 2 grouped, 2 shifted blocks
       -> tokens (B,T,768), one a frame
    Prompts (C,4,512) -> "A photo of a X X X X person."
       -> text_features: CLIP's text side, frozen -> text (C,512), kept as the bank
    tokens -> SD: + cross-attention over text (at test: over the bank) -> tokens
       --+-- pool: mean over T -> z (B,768) -> visual.proj, CLIP's -> f (B,512)
         +-- CMI, in training: with the partner's tokens in one row -> c (B,768), streams["cmi"]
    test:  embed()   -> side_by_side(z, f) as one part (B,1,1280), each L2-normalised
    train: forward() -> named losses of z, f and c

The paper's abstract (arXiv 2601.12062) names the modules and what each is for; formulas and numbers
are not public. So each choice is marked: [paper] the abstract says so, [after X] it follows a
public predecessor, [ours] otherwise.

- [paper] CLIP with minimal changes; STFL's three encoders; modality-shared prompts; SD before CMI;
  identity-level losses and two modality-level ones, for discrimination and for generalisation to
  unseen categories.
- [after VLD] (2025) ViT-B/16 at 288x144; classifiers, soft-margin weighted triplets; z and f side
  by side at test; video-to-text cross-entropy times 0.08 on plain dot products; the recipe. [after
  CLIP-ReID] (AAAI 2023) four words per identity. [after TPS] (ECCV 2022) the patch shift. [after
  X-ReID] (AAAI 2026) CMI in training only, tokens in one row, and the consistency loss.

Quick question: why does SD read a bank of all training people's sentences, not the person's own?
(At test the person is unknown: a stranger is described in the words of others.)

Ours, not the paper's: all that is marked [ours]; ImageNet's mean and deviation; the small preset.
"""
import math
from dataclasses import dataclass
from functools import partial

from support.clip import CLIP_MODELS, Attention, Block, load_clip, prompt_of
from support.files import UserError
from support.footage import as_pixels
from support.method import Method
from support.options import option
from support.parallel import gathered

import torch
import torch.nn.functional as F
from torch import nn

# ------------------------------------------------------------------ STFL ----

# Patch (r, c) is rolled by SHIFT[r % 3][c % 3] frames, modulo T. [after TPS]
SHIFT = torch.tensor([[-4, 1, 2], [-1, 0, 3], [-2, -3, 4]])


def roll_patches(patches, grid, sign=1):
    """Patches (B, T, N, D) of a grid (h, w), N = h * w: each rolled along T by its entry of SHIFT
    (sign=-1: back)."""
    T, (h, w) = patches.shape[1], grid
    row, column = torch.arange(h)[:, None], torch.arange(w)
    shift = SHIFT[row % 3, column % 3].flatten()    # (N,)
    time = torch.arange(T)[:, None]
    source = (time - sign * shift) % T    # (T, N): the frame that each patch comes from
    source = source.to(patches.device, non_blocking=True)[None, :, :, None]
    return patches.gather(1, source.expand_as(patches))


def attend_basic(attention, x):
    """x (B, T, 1+N, D) -> its update: attention within each frame, as in CLIP."""
    return attention(x.flatten(0, 1)).view_as(x)


def attend_grouped(attention, x, groups):
    """x (B, T, 1+N, D) -> its update: each of `groups` horizontal stripes attends over its patches
    of all T frames and the T CLS tokens; CLS tokens attend over everything. [ours] At T = 6, 18x9
    patches, 6 stripes: 6 * 27 patches + 6 CLS = 168 tokens, as many as the 163 of a frame alone."""
    B, T, _, D = x.shape
    cls, patches = x[:, :, 0], x[:, :, 1:]
    patches = patches.unflatten(2, (groups, -1))    # (B, T, G, n, D): a stripe's rows lie together
    patches = patches.transpose(1, 2).reshape(B * groups, -1, D)    # (B*G, T*n, D)
    every_cls = cls.repeat_interleave(groups, dim=0)    # (B*G, T, D)
    # attention(queries, keys and values)
    patches = attention(patches, torch.cat([every_cls, patches], dim=1))
    patches = patches.view(B, groups, T, -1, D).transpose(1, 2).flatten(2, 3)    # (B, T, N, D)
    cls = attention(cls, x.flatten(1, 2))[:, :, None]    # (B, T, 1, D)
    return torch.cat([cls, patches], dim=2)


def attend_shifted(attention, x, grid):
    """x (B, T, 1+N, D) -> its update: patches rolled in time, attention within the frame, rolled
    back; CLS stays. [after TPS]"""
    def rolled(x, sign):
        return torch.cat([x[:, :, :1], roll_patches(x[:, :, 1:], grid, sign)], dim=2)

    return rolled(attend_basic(attention, rolled(x, 1)), -1)


def stfl(visual, frames, *, split, groups):
    """Spatial-temporal feature learning: frames (B, T, 3, H, W) -> tokens (B, T, D), one a frame:
    CLIP's CLS tokens after ln_post. visual: CLIP's image side, whose blocks are used as they are.
    split: how many of them as basic, as spatial-temporal grouped and as temporal patch shift
    encoders. [paper; 8/2/2 ours]"""
    kinds = [attend_basic, partial(attend_grouped, groups=groups),
             partial(attend_shifted, grid=visual.grid)]
    kinds = [kind for kind, number in zip(kinds, split, strict=True) for _ in range(number)]
    x = visual.embed(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])    # (B, T, 1+N, D)
    blocks = visual.transformer.resblocks
    for attend, block in zip(kinds, blocks, strict=True):
        x = x + attend(block.attn, block.ln_1(x))
        if block is blocks[-1]:
            x = x[:, :, :1]    # the patches are no longer used
        x = x + block.mlp(block.ln_2(x))
    return visual.ln_post(x[:, :, 0])


# --------------------------------------------------- prompts, SD and CMI ----

SLOTS = slice(5, 9)    # the four X of "<start> A photo of a X X X X person. <end>"


class Prompts(nn.Module):
    """A sentence per training identity, with four learned words: -> word vectors (C, 12, width).
    [after CLIP-ReID]"""

    def __init__(self, *, classes, width, sentence):
        super().__init__()
        self.words = nn.Parameter(torch.randn(classes, 4, width) * 0.02)
        self.register_buffer("sentence", sentence, persistent=False)    # (12,), see prompt_of

    def forward(self, token_embedding):
        sentence = token_embedding(self.sentence).expand(len(self.words), -1, -1)
        before, after = sentence[:, :SLOTS.start], sentence[:, SLOTS.stop:]
        return torch.cat([before, self.words, after], dim=1)


class SD(nn.Module):
    """Semantic diffusion: tokens (B, T, D), bank of text features (C, d) -> tokens, each with what
    it found in the bank. The output starts at zero: in the first step CLIP's features pass
    unchanged. [paper; this form ours]"""

    def __init__(self, *, dim, text_dim, heads):
        super().__init__()
        self.ln = nn.LayerNorm(dim)
        self.ln_text = nn.LayerNorm(text_dim)
        self.text = nn.Linear(text_dim, dim)
        self.attn = Attention(dim, heads)
        nn.init.zeros_(self.attn.out_proj.weight)
        nn.init.zeros_(self.attn.out_proj.bias)

    def row_and_text(self, tokens, bank):
        """-> for attn: its queries, all tokens in one row (1, B*T, D), and its keys (1, C, D)."""
        text = self.text(self.ln_text(bank))[None]
        return self.ln(tokens).flatten(0, 1)[None], text

    def forward(self, tokens, bank):
        return tokens + self.attn(*self.row_and_text(tokens, bank)).view_as(tokens)

    def reads(self, tokens, bank):
        """-> how much each token reads of each sentence: (B, T, C), shares. For pictures."""
        shares = self.attn.weights(*self.row_and_text(tokens, bank))    # (1, B*T, C)
        return shares.view(*tokens.shape[:2], -1)


class CMI(nn.Module):
    """Cross-modal interaction: tokens of both modalities (B, T, D) -> c (B, D). A tracklet's tokens
    and its partner's (same identity, other modality) attend to one another in one row; c is the
    mean of the tracklet's own. [paper: bidirectional cross-modal self-attention; one row of both,
    mean over the frames: after X-ReID]"""

    def __init__(self, *, dim, heads):
        super().__init__()
        self.block = Block(dim, heads)

    def forward(self, tokens, partner):
        T = tokens.shape[1]
        row = torch.cat([tokens, tokens[partner]], dim=1)    # (B, 2T, D)
        return self.block(row)[:, :T].mean(1)


def partners(modality, label):
    """modality (B,), label (B,) -> (B,): each tracklet's partner, the k-th visible of an identity
    with its k-th infrared one. An identity needs as many of the one as of the other."""
    # Visible tracklets first, each half by identity.
    order = (modality * (label.max() + 1) + label).argsort(stable=True)
    other = order.roll(len(order) // 2)
    pair = torch.stack([label, modality])
    assert torch.equal(pair[:, order], torch.stack([label, 1 - modality])[:, other]), \
        "every identity needs as many visible as infrared tracklets in a batch"
    partner = torch.empty_like(label)
    partner[order] = other
    return partner


def side_by_side(z, f):
    """z (B, D), f (B, d) -> (B, D + d): each L2-normalised, as test compares them. [after VLD]"""
    return torch.cat([F.normalize(z, dim=1), F.normalize(f, dim=1)], dim=1)


# ---------------------------------------------------------------- losses ----

def weighted_triplet_loss(x, label):
    """x (B, D), label (B,) -> scalar: log(1 + exp(p - n)), p the softmax-weighted distance of the
    positives (the anchor included; far ones weigh more), n of the negatives (near ones weigh more).
    [after VLD]"""
    x = x.float()
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    same = label[:, None] == label
    far_weight = distance.masked_fill(~same, -torch.inf).softmax(1)
    near_weight = (-distance).masked_fill(same, -torch.inf).softmax(1)
    positive = (far_weight * distance).sum(1)
    negative = (near_weight * distance).sum(1)
    return F.softplus(positive - negative).mean()


def text_loss(f, text, label):
    """f (B, d), text (C, d) -> scalar: which sentence is the video's? Cross-entropy of plain dot
    products. [after VLD]"""
    return F.cross_entropy(f @ text.t(), label)


def contrast_loss(x, label, modality, temperature=0.1):
    """Modality level, for discrimination: x (B, D) of length 1 -> scalar, the supervised
    contrastive loss; candidates are the other modality's tracklets alone. [ours]"""
    other = modality[:, None] != modality
    logits = (x @ x.t() / temperature).masked_fill(~other, -torch.inf)
    positive = (label[:, None] == label) & other
    share = logits.log_softmax(1).masked_fill(~positive, 0)    # 0 * -inf would be NaN
    return -(share.sum(1) / positive.sum(1)).mean()


def centre_loss(x, label, modality):
    """Modality level, for generalisation to unseen categories: x (B, D) -> scalar, the squared
    distance of an identity's visible and infrared centres, mean over the identities. [ours]"""
    same = label[:, None] == label

    def centres(m):    # of each tracklet's identity in one modality
        side = (same & (modality == m)).to(x.dtype)    # (B, B)
        return side @ x / side.sum(1, keepdim=True)    # (B, D)

    apart = (centres(0) - centres(1)).square().sum(1)
    weight = 1 / same.sum(1)    # each identity counts once, however many its tracklets
    return (weight * apart).sum() / weight.sum()


def consistency_loss(z, c):
    """z (B, D), c (B, D) -> scalar: their squared distance, each of length 1. z is pulled to c, not
    c to z: c exists in training only. [after X-ReID]"""
    apart = F.normalize(z, dim=1) - F.normalize(c.detach(), dim=1)
    return apart.square().sum(1).mean()


# ----------------------------------------------------------------- LSMRL ----

@dataclass
class Options:
    """LSMRL's own choices. LSMRL.recipe: its defaults of train.Config's."""
    boost: float = option(25.0, "factor on the rate of classifiers, prompts and biases")
    clip: str = option("ViT-B-16", "ViT-B-16; tiny: offline, for walkers; tiny-random: not trained")
    clip_weights: str = option("", "local copy of OpenAI's ViT-B-16.pt, instead of the download")
    split: tuple = option((8, 2, 2), "basic, grouped, patch-shift encoders; 12 0 0 is plain CLIP")
    groups: int = option(6, "stripes of the grouped encoder; must divide the rows of patches")
    sd: bool = option(True, "off removes semantic diffusion")
    cmi: bool = option(True, "off removes cross-modal interaction")
    text: float = option(0.08, "weight of the video-to-text loss")
    contrast: float = option(1.0, "weight of the modality loss for discrimination")
    centre: float = option(0.5, "weight of the modality loss for generalisation")
    consistency: float = option(1.0, "weight of the pull of z towards CMI's c")


class LSMRL(Method):
    """The whole method, see Method. Replace `pool` or what `losses_of` returns in a subclass."""
    Options = Options
    recipe = {"epochs": 24, "optimizer": "AdamW", "lr": 2.5e-5, "weight_decay": 1e-4,
              "warmup_epochs": 3, "cosine": True, "size": (288, 144)}
    # Many people, each seen a few times: it should learn what night is, not memorise people.
    small = {"people": 320, "epochs": 12, "steps": 30, "identities": 32, "tracklets": 1,
             "frames": 2, "test_frames": 8, "evaluate_every": 4, "evaluate_first": True, "lr": 1e-3,
             "boost": 5.0, "warmup_epochs": 0, "size": (128, 64), "workers": 0, "erase": 0.0,
             "clip": "tiny", "split": (2, 1, 1), "groups": 4, "contrast": 3.0}
    whole_batch = ("heads",)
    of_identities = "heads", "prompts", "bank"

    def __init__(self, options, classes, size, pretrained=True):
        super().__init__()
        self.options = o = options
        self.clip = load_clip(o.clip, o.clip_weights, pretrained)    # its text side is frozen
        patch, depth = CLIP_MODELS[o.clip]["patch"], CLIP_MODELS[o.clip]["depth"]
        rows, columns = size[0] // patch, size[1] // patch
        is_split = len(o.split) == 3 and sum(o.split) == depth and min(o.split) >= 0
        if not is_split or size[0] % patch or size[1] % patch or (o.split[1] and rows % o.groups):
            raise UserError(f"size {size}, split {o.split}, {o.groups} groups; expected multiples "
                            f"of the patch, {patch}, three numbers that add up to {depth} blocks, "
                            f"and a divisor of the {rows} rows of patches")
        visual = self.clip.visual
        visual.resize(rows, columns)

        dim, text_dim = visual.proj.shape
        attention_heads = visual.transformer.resblocks[0].attn.heads
        self.prompts = Prompts(classes=classes, width=self.clip.token_embedding.embedding_dim,
                               sentence=prompt_of(o.clip))
        # The text features as SD last saw them: at test they are fixed.
        self.register_buffer("bank", torch.zeros(classes, text_dim))
        self.sd = SD(dim=dim, text_dim=text_dim, heads=attention_heads) if o.sd else None
        self.cmi = CMI(dim=dim, heads=attention_heads) if o.cmi else None
        dims = {"z": dim, "f": text_dim} | ({"cmi": dim} if o.cmi else {})
        self.heads = nn.ModuleDict(
            {name: nn.Sequential(nn.BatchNorm1d(d), nn.Linear(d, classes, bias=False))
             for name, d in dims.items()})
        for head in self.heads.values():
            nn.init.normal_(head[1].weight, std=0.001)
        if pretrained:    # fill the bank, in case it is evaluated before its first step
            with torch.no_grad():
                self.bank.copy_(self.text_features())

    def text_features(self):
        """-> text (C, d): the feature of each training identity's sentence."""
        words = self.prompts(self.clip.token_embedding)
        return self.clip.encode_text(words, end=words.shape[1] - 1)

    def tokens(self, frames):
        """frames (B, T, 3, H, W) -> tokens (B, T, D)."""
        split, groups = self.options.split, self.options.groups
        return stfl(self.clip.visual, frames, split=split, groups=groups)

    def features(self, frames, bank):
        """frames, bank (C, d) -> tokens (B, T, D), z (B, D) and f (B, d), float32."""
        tokens = self.tokens(frames)
        if self.sd is not None:
            tokens = self.sd(tokens, bank)
        with torch.autocast(frames.device.type, enabled=False):
            z = self.pool(tokens.float())
            f = z @ self.clip.visual.proj
        return tokens, z, f

    def pool(self, tokens):
        """Tokens (B, T, D) -> sequence feature z (B, D), the mean over time."""
        return tokens.mean(1)

    def embed(self, frames, modality):
        """-> (B, 1, D + d) float32: z and f, of length 1 each. modality: not used."""
        _, z, f = self.features(frames, self.bank)
        return side_by_side(z, f)[:, None]

    def seen(self, frames):
        """See Method.seen: patches as the shift encoders roll them, a frame bright where its token
        looks, the sentences that are read most (#7: the eighth training identity's). [ours]"""
        (B, T, _, *size), grid = frames.shape, self.clip.visual.grid
        patch, pixels = size[0] // grid[0], as_pixels(frames).flatten(0, 1)    # (B*T, 3, H, W)
        patches = F.unfold(pixels, patch, stride=patch).mT.unflatten(0, (B, T))    # (B, T, N, _)
        rolled = roll_patches(patches, grid).flatten(0, 1).mT
        rows = {"shifted": F.fold(rolled, size, patch, stride=patch)}
        look, reads = self.reading(frames)
        if look is not None:
            light = look / look.amax((2, 3), True)
            light = F.interpolate(light, size, mode="bilinear").flatten(0, 1)[:, None]
            rows["looks at"] = pixels * (0.15 + 0.85 * light)
        captions = []
        for own in () if reads is None else reads:
            most = own.argsort(descending=True)[:4].tolist()
            captions.append([f"#{i} {100 * own[i]:.1f}" for i in most])    # per cent
        return rows, captions

    def reading(self, frames):
        """-> where the last block's tokens look (B, T, h, w), None if it is a grouped one; what
        share of each sentence they read (B, C), None without SD. [ours]"""
        grid, inputs = self.clip.visual.grid, []
        attention = self.clip.visual.transformer.resblocks[-1].attn
        hook = attention.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        tokens = self.tokens(frames)
        hook.remove()
        reads = None if self.sd is None else self.sd.reads(tokens, self.bank).mean(1)
        _, grouped, shifted = self.options.split
        if grouped and not shifted:    # its tokens look into all frames
            return None, reads
        [x] = inputs    # (B*T, 1+N, D)
        look = attention.weights(x[:, :1], x)[:, 0, 1:]    # (B*T, N)
        look = look.unflatten(0, frames.shape[:2])
        if shifted:    # rolled back: each share to the frame that its patch comes from
            look = roll_patches(look[..., None], grid, sign=-1)[..., 0]
        return look.unflatten(2, grid), reads

    def streams_of(self, embeddings):
        """Embeddings (N, 1, D + d) -> {"z": (N, 1, D), "f": (N, 1, d)}."""
        sizes = list(self.clip.visual.proj.shape)
        if embeddings.shape[2] != sum(sizes):    # a subclass's own
            return {}
        return dict(zip("zf", embeddings.split(sizes, dim=2), strict=True))

    def forward(self, frames, modality, label):
        modality = modality.to(label.device, non_blocking=True)
        text = None    # not needed if SD is off and the text loss too
        if self.sd is not None or self.options.text:
            text = self.text_features().float()
            self.bank.copy_(text.detach())
        tokens, z, f = self.features(frames, text)
        streams = {"z": z, "f": f}
        if self.cmi is not None:    # c, under the name of the module that gives it
            streams["cmi"] = self.cmi(tokens, partners(modality, label)).float()

        # Tracklets are compared with those of all processes.
        streams = {name: gathered(x) for name, x in streams.items()}
        modality, label = gathered(modality), gathered(label)
        # Cheap, and softmaxes lose too much in bfloat16.
        with torch.autocast(frames.device.type, enabled=False):
            losses, shown = self.identity_losses(streams, label)
            losses |= self.losses_of(streams, text, label, modality)
        return losses, shown

    def identity_losses(self, streams, label):
        """-> the cross-entropy of each stream's classifier, and its accuracy."""
        losses, shown = {}, {}
        for name, x in streams.items():
            logits = self.heads[name](x)
            losses[f"identity_{name}"] = F.cross_entropy(logits, label)
            shown[f"accuracy_{name}"] = (logits.detach().argmax(1) == label).float().mean()
        return losses, shown

    def losses_of(self, streams, text, label, modality):
        """-> all other losses by name, weighted. streams: {"z": (B, D), "f": (B, d), "cmi": c
        (B, D)}; text (C, d), or None if nothing reads it; label (B,); modality (B,), 0 visible, 1
        infrared. Float32, and the tracklets of all processes."""
        o = self.options
        z, f = streams["z"], streams["f"]
        losses = {f"triplet_{name}": weighted_triplet_loss(x, label) for name, x in streams.items()}
        compared = side_by_side(z, f) / math.sqrt(2)    # what test compares, of length 1
        if o.text:
            losses["text"] = o.text * text_loss(f, text, label)
        if o.contrast:
            losses["contrast"] = o.contrast * contrast_loss(compared, label, modality)
        if o.centre:
            losses["centre"] = o.centre * centre_loss(compared, label, modality)
        if o.consistency and "cmi" in streams:
            losses["consistency"] = o.consistency * consistency_loss(z, streams["cmi"])
        return losses

    def parameter_groups(self):
        """-> groups for the optimizer, each with its factor on the learning rate: `boost` for
        classifiers, prompts and biases."""
        slow, fast = [], []
        for name, parameter in self.named_parameters():
            # As in VLD. SD's and CMI's weights, though new, learn at CLIP's rate.
            is_classifier = name.startswith("heads.") and parameter.ndim == 2
            is_fast = is_classifier or name == "prompts.words" or name.endswith("bias")
            if parameter.requires_grad:
                (fast if is_fast else slow).append(parameter)
        return [{"params": slow, "factor": 1}, {"params": fast, "factor": self.options.boost}]


if __name__ == "__main__":    # the losses on a few walkers, untrained
    from walkers import show_losses

    show_losses(LSMRL)
