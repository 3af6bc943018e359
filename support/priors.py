r"""The two small priors of the offline demo: networks that a laptop can train and run.

    python walkers.py runs/prior --seed 77 --identities 300 --tracklets 1 --cameras 99
    python -m support.priors dinov2 --data runs/prior/Train --dinov2-weights FILE

    python walkers.py runs/people --seed 78 --identities 2400 --test-identities 24 --tracklets 1 \
        --cameras 99
    python -m support.priors clip --data runs/people

**dinov2: distillation** (Hinton et al., 2015). A small network, the student, learns to say what a
large one, the teacher, says, on pictures that need no labels. What the teacher has learned from 142
million pictures - here: which patches of an image belong together, and to what - is far more than
the student could find out from a few hundred synthetic people; but that it can be *imitated* on
such people by a network a two-hundredth of its size is quite another thing, and true.

    frames (N,3,128,64) -+-> enlarged to 336x168 -> teacher, 12 blocks of 384 -> tokens of 4 levels
                         |     -> layer norm -> 48 principal components ------------------+
                         +-> every other one spoiled, enlarged to 336x168                 |
                               -> student, 4 blocks of 32 -> a linear map of each level --+-> loss

Three choices make it work in minutes:
- *Principal components.* 32 numbers cannot carry 384. The 48 directions in which the teacher's
  tokens differ most hold 77 to 96 % of what tells one patch from another; the rest is dropped.
- *Four levels.* SASGL reads tokens after 1/4, 2/4, 3/4 and all of the blocks: each has its target.
- *Spoiled views.* The teacher sees the clean frame; the student, every other time, one with another
  brightness, contrast, blur, noise, a single channel, or inverted. What it learns to say holds for
  all of them, and so by day and by night. Never to show it a clean one would cost it three points
  of what it explains of clean frames, and win it one on spoiled ones.

Each level's loss is the share of those components' variance that is not explained. The command's
last line has it for other frames of the same people; what counts is that of strangers
(tests/test_priors.py), and many places (--cameras 99) do more for it than more frames of a few.

**clip: contrastive language-image training** (Radford et al., 2021). Nobody says which class a
picture is of; it comes with a sentence, and the two are to find one another. A step takes P people,
each by day and in words (walkers.py writes what everyone wears):

    visible frames (P,3,128,64) -> image side -> image (P,64) --+-> a table (P,P) of cosines,
    sentences (P,L) -------------> text side  -> text  (P,64) --+   row against column

The cosine in the diagonal, of what belongs together, is to be the largest of its row and of its
column: cross-entropy, both ways, with a temperature that is learned. The other P - 1 are what it is
told from; so the more people in a step, the more must be told. What no sentence says (a colour, a
place) is of no use; what it says (a striped coat, a backpack) must be found in the picture.

CLIP's pictures are photographs, and so are ours: it sees no infrared frame. What it makes of the
night it owes to the spoiled views, and to words, which name nothing that the night takes away. The
rest of the way is LSMRL's to learn.

The last line of either says how well it does on frames it has not trained on.

Quick question: why not simply use the teacher in the demo? (It takes a hundred times as long. The
student's whole forward pass costs less than the teacher's first layer.)

Ours, not the papers': all else.
"""
import json
import os
from pathlib import PurePosixPath
from typing import NamedTuple

from support import clip
from support.dinov2 import (
    DINOV2,
    TINY,
    DinoVisionTransformer,
    check_dino_size,
    levels_of,
    load_dinov2,
)
from support.files import UserError, check_writable, in_short, write_atomic
from support.footage import find_footage, read_frame
from support.options import Bar, Parser, cli, progress, say

import torch
import torch.nn.functional as F
from torch import nn

EACH = 6    # frames of a person in a modality, for clip
DAY, NIGHT = 0, 1    # places in People.frames
HELD_OUT = 1 / 20    # a share of the people, to look at in the end
COMPONENTS = 48    # principal components of a level that the student is to give
FRAME = (128, 64)    # the frames' size
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]    # ImageNet's
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

# ---------------------------------------------------------------- frames ----

def load_frames(path, number, generator):
    """`number` frames of a folder, evenly taken, each cropped in its own way -> (N, 3, H, W) in
    0..1. Raises UserError."""
    if os.path.isdir(os.path.join(path, "masks")):
        raise UserError(f"{path} has masks/, which are no frames; expected a folder of frames "
                        f"alone: of walkers --data {os.path.join(path, 'Train')}")
    paths = [frame for frames in find_footage(path).values() for frame in frames]
    if len(paths) < number:
        raise UserError(f"{len(paths)} frames under {path}; expected {number}: draw more walkers, "
                        "or lower --frames")
    chosen = [paths[i * len(paths) // number] for i in range(number)]
    return torch.stack([cropped(read_frame(frame, FRAME), generator)
                        for frame in progress(chosen, "reading")])


def cropped(frame, generator):
    """uint8 frame (3, H, W) -> a piece of it, as boxes of detectors vary: (3, H, W) in 0..1."""
    _, H, W = frame.shape
    down, across, tall, wide = torch.rand(4, generator=generator).tolist()
    rows, columns = round(H * (0.85 + 0.15 * tall)), round(W * (0.85 + 0.15 * wide))
    top, left = round(down * (H - rows)), round(across * (W - columns))
    piece = frame[None, :, top:top + rows, left:left + columns] / 255
    return F.interpolate(piece, (H, W), mode="bilinear", align_corners=False)[0]


def spoiled(frames, generator):
    """Frames (N, 3, H, W) in 0..1 -> as another camera might see them, each in its own way."""
    N = len(frames)

    def drawn(low, high):
        return low + (high - low) * torch.rand(N, 1, 1, 1, generator=generator)

    def for_a_share(share, changed, unchanged):
        return torch.where(drawn(0, 1) < share, changed, unchanged)

    channel = torch.randint(3, (N,), generator=generator)
    single = frames[torch.arange(N), channel][:, None].expand_as(frames)
    frames = for_a_share(0.4, single, frames)
    frames = for_a_share(0.1, 1 - frames, frames)
    frames = (frames - 0.5) * drawn(0.7, 1.3) + 0.5 + drawn(-0.1, 0.1)
    blurred = F.avg_pool2d(frames, 3, 1, 1, count_include_pad=False)
    frames = for_a_share(0.3, blurred, frames)
    noise = torch.randn(frames.shape, generator=generator)
    return (frames + drawn(0, 0.03) * noise).clamp(0, 1)


# ---------------------------------------------------------- distillation ----

def levels(dinov2, frames, size):
    """Where SASGL reads: frames (N, 3, H, W) in 0..1, enlarged to size -> tokens (4, N, L, D) after
    1/4, 2/4, 3/4 and all of the blocks, each layer-normalised."""
    enlarged = F.interpolate((frames - MEAN) / STD, size, mode="bilinear", align_corners=False)
    layers = dinov2.get_intermediate_layers(enlarged, n=levels_of(dinov2), norm=False)
    normalised = [F.layer_norm(tokens, tokens.shape[2:]) for tokens in layers[:-1]]
    return torch.stack([*normalised, dinov2.norm(layers[-1])])


class Components:
    """The principal components of the teacher's tokens, level by level: mean (4, 1, D), axes
    (4, D, COMPONENTS), and the variance that they hold."""

    def __init__(self, tokens):
        """tokens: (4, M, D), a sample of them."""
        self.mean = tokens.mean(1, keepdim=True)
        centred = tokens - self.mean
        covariance = centred.transpose(1, 2) @ centred / tokens.shape[1]
        values, vectors = torch.linalg.eigh(covariance)    # ascending
        self.axes = vectors[:, :, -COMPONENTS:]
        self.variance = values[:, -COMPONENTS:].sum(1)    # (4,)

    def __call__(self, tokens):
        """tokens (4, N, L, D) -> (4, N, L, COMPONENTS)."""
        return (tokens - self.mean[:, None]) @ self.axes[:, None]


@torch.no_grad()
def targets_of(teacher, frames, size):
    """-> Components, and what the student is to say: (4, N, L, COMPONENTS), in half precision."""
    some = [levels(teacher, batch, size) for batch in frames[::16].split(16)]
    sample = torch.cat(some, dim=1)
    components = Components(sample.flatten(1, 2))
    batches = [components(levels(teacher, batch, size)).half()
               for batch in progress(frames.split(16), "teacher")]
    return components, torch.cat(batches, dim=1)


class Student(nn.Module):
    """The tiny ViT, and for each level a linear map to the teacher's components."""

    def __init__(self, size):
        super().__init__()
        self.size = size
        dim, depth, heads, registers = DINOV2[TINY]
        self.vit = DinoVisionTransformer(dim=dim, depth=depth, heads=heads, registers=registers)
        self.maps = nn.ModuleList(nn.Linear(dim, COMPONENTS) for _ in range(4))

    def forward(self, frames):
        """Frames (N, 3, H, W) in 0..1 -> (4, N, L, COMPONENTS)."""
        tokens = levels(self.vit, frames, self.size)
        return torch.stack([linear(t) for linear, t in zip(self.maps, tokens, strict=True)])


def unexplained(said, target, variance):
    """-> (4,): the share of each level's variance that the student does not explain."""
    return (said - target).square().sum(-1).mean((1, 2)) / variance


def distil(student, frames, target, variance, steps, batch, lr, generator):
    """Trains the student: AdamW, the rate falling along a cosine."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with Bar("distilling", steps, keep=True) as bar:
        for _ in range(steps):
            index = torch.randint(len(frames), (batch,), generator=generator)
            is_spoiled = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
            clean = frames[index]
            said = student(torch.where(is_spoiled, spoiled(clean, generator), clean))
            shares = unexplained(said, target[:, index].float(), variance)
            optimizer.zero_grad()
            shares.mean().backward()
            optimizer.step()
            schedule.step()
            words = " ".join(f"{1 - share:.2f}" for share in shares.tolist())
            bar.update(note=f"explained {words}")


@torch.no_grad()
def explained(student, frames, target, variance):
    """-> a share for each level, on frames as they are."""
    said = [student(batch) for batch in frames.split(16)]
    return (1 - unexplained(torch.cat(said, dim=1), target.float(), variance)).tolist()


def make_dinov2(args, generator):
    """-> the student's tensors, and how good it is."""
    held_out = max(16, args.frames // 20)
    teacher = load_dinov2(args.dinov2, args.dinov2_weights)
    frames = load_frames(args.data, args.frames + held_out, generator)
    frames = frames[torch.randperm(len(frames), generator=generator)]
    components, target = targets_of(teacher, frames, args.dino_size)
    student = Student(args.dino_size)
    distil(student, frames[held_out:], target[:, held_out:], components.variance, args.steps,
           args.batch, lr=3e-3, generator=generator)
    shares = explained(student, frames[:held_out], target[:, :held_out], components.variance)
    words = f"variance explained on {held_out} other frames, by level: "
    return student.vit.state_dict(), words + " ".join(f"{share:.2f}" for share in shares)


# ----------------------------------------------------- language and image ----

class People(NamedTuple):
    """N people. frames: uint8 (N, 2, EACH, 3, H, W), by day and by night; words: the numbers of
    their sentences' words (N, L); end: the places of the end tokens (N,)."""
    frames: torch.Tensor
    words: torch.Tensor
    end: torch.Tensor


def load_people(path):
    """A folder of walkers -> People. Raises UserError."""
    try:
        with open(os.path.join(path, "sentences.json"), encoding="utf-8") as file:
            sentences = json.load(file)
    except (OSError, ValueError):
        raise UserError(f"{path} has no sentences.json; expected a folder of walkers as walkers.py "
                        "draws it now: draw walkers anew, into another folder") from None
    found, paths = find_footage(os.path.join(path, "Train")), {}
    try:
        for name, frames in found.items():
            pid, modality, _ = PurePosixPath(name).parts    # 0001/rgb/D3
            paths.setdefault((int(pid), modality), []).extend(frames)
        pids = sorted({pid for pid, _ in paths})
        of_people = [[paths[pid, modality] for modality in ("rgb", "ir")] for pid in pids]
        words, end = clip.tokenized([sentences[str(pid)] for pid in pids])
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"sentences.json and Train/ of {path} do not fit together "
                        f"({type(error).__name__}: {in_short(error)}); expected both as walkers.py "
                        "draws them: draw walkers anew, into another folder") from None
    if len(pids) < 3:
        raise UserError(f"{len(pids)} people in {path}; expected 3 or more: draw more walkers")
    frames = torch.empty(len(pids), 2, EACH, 3, *FRAME, dtype=torch.uint8)
    for i, own in enumerate(progress(of_people, "reading")):
        for m, taken in enumerate(own):
            for k in range(EACH):
                frames[i, m, k] = read_frame(taken[k * len(taken) // EACH], FRAME)
    return People(frames, words, end)


def views(frames, generator):
    """uint8 frames (N, 3, H, W) -> as other cameras might see them, (N, 3, H, W) in 0..1."""
    frames = torch.stack([cropped(frame, generator) for frame in frames])
    mirrored = torch.rand(len(frames), 1, 1, 1, generator=generator) < 0.5
    return spoiled(torch.where(mirrored, frames.flip(3), frames), generator)


def image_features(model, frames):
    """Frames (N, 3, H, W) in 0..1 -> (N, dim), of length 1."""
    return F.normalize(model.encode_image((frames - MEAN) / STD), dim=1)


def text_features(model, words, end):
    """words (N, L), end (N,) -> (N, dim), of length 1."""
    return F.normalize(model.encode_text(model.token_embedding(words), end), dim=1)


def contrastive_loss(a, b, scale):
    """a, b (N, dim) of length 1 -> scalar: which b is each a's own, and the other way round? scale:
    one over the temperature."""
    table = scale * a @ b.t()
    own = torch.arange(len(table))
    return (F.cross_entropy(table, own) + F.cross_entropy(table.t(), own)) / 2


def train_clip(model, people, steps, batch, lr, generator):
    """Trains both sides: AdamW, the rate rising for a tenth of the steps, then falling along a
    cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    with Bar("contrasting", steps, keep=True) as bar:
        for _ in range(steps):
            chosen = torch.randperm(len(people.words), generator=generator)[:batch]
            which = torch.randint(EACH, (len(chosen),), generator=generator)
            frames = people.frames[chosen, DAY, which]
            image = image_features(model, views(frames, generator))
            text = text_features(model, people.words[chosen], people.end[chosen])
            scale = model.logit_scale.exp().clamp(max=100)
            loss = contrastive_loss(image, text, scale)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update(note=f"loss {loss.item():.2f}")


@torch.no_grad()
def found_by_sentence(model, people):
    """-> the share of people whose own sentence is the nearest of all, by day and by night."""
    text = text_features(model, people.words, people.end)
    shares = []
    for modality in (DAY, NIGHT):
        image = image_features(model, people.frames[:, modality, 0] / 255)
        nearest = (image @ text.t()).argmax(1)
        shares.append((nearest == torch.arange(len(text))).float().mean().item())
    return shares


def make_clip(args, generator):
    """-> CLIP's tensors, and how good it is."""
    people = load_people(args.data)
    held_out = max(1, round(HELD_OUT * len(people.words)))
    model = clip.CLIP(**clip.TINY_SIZES)
    train_clip(model, People(*(part[held_out:] for part in people)), args.steps, args.batch,
               lr=1e-3, generator=generator)
    day, night = found_by_sentence(model, People(*(part[:held_out] for part in people)))
    return model.state_dict(), (f"of {held_out} people it has not seen, the own sentence is the "
                                f"nearest for {day:.0%} by day, {night:.0%} by night")


# ----------------------------------------------------------- command line ----

DEFAULTS = {"dinov2": {"out": "tiny_dinov2.pt", "steps": 12000, "batch": 16},
            "clip": {"out": "tiny_clip.pt", "steps": 8000, "batch": 64}}


def command_line():
    parser = Parser(description="Makes the small priors of the offline demo.")
    parser.add_argument("prior", choices=list(DEFAULTS), help="which one")
    parser.add_argument("--data", metavar="DIR", required=True,
                        help="dinov2: a folder of frames; clip: a folder of walkers")
    parser.add_argument("--dinov2", metavar="NAME", help="the teacher (dinov2_vits14)")
    parser.add_argument("--dinov2-weights", metavar="FILE", help="its tensors, not the download")
    parser.add_argument("--frames", type=int, metavar="N",
                        help="dinov2: to learn from; a twentieth more is held out (4800)")
    parser.add_argument("--dino-size", type=int, nargs=2, metavar=("H", "W"),
                        help="dinov2: what both networks see, multiples of 14 (336 168)")
    parser.add_argument("--out", metavar="FILE", help="where it goes (tiny_PRIOR.pt)")
    for name, text in (("steps", "of training (dinov2: 12000, clip: 8000)"),
                       ("batch", "dinov2: frames of a step (16); clip: people (64)"),
                       ("seed", "of the weights and of what they see (1)")):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text)
    parser.set_defaults(dinov2="dinov2_vits14", dinov2_weights=None, frames=4800,
                        dino_size=(336, 168), seed=1)
    args = parser.parse_args()
    for name, default in DEFAULTS[args.prior].items():
        setattr(args, name, getattr(args, name, default))    # absent where nobody typed it
    for name in ("frames", "steps", "batch"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}; expected 1 or more")
    if not 0 <= args.seed < 2 ** 63:
        raise UserError(f"--seed {args.seed}; expected 0 to 2**63 - 1")
    width, *_ = DINOV2.get(args.dinov2, (COMPONENTS,))    # load_dinov2 refuses an unknown one
    if width < COMPONENTS:
        raise UserError(f"--dinov2 {args.dinov2} is no teacher; expected a large one, such as "
                        "dinov2_vits14")
    check_dino_size(args.dino_size)
    return args


def main():
    args = command_line()
    check_writable(args.out)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    make = make_dinov2 if args.prior == "dinov2" else make_clip
    tensors, words = make(args, generator)
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    write_atomic(args.out, lambda file: torch.save(tensors, file))
    say(f"{args.out}: {os.path.getsize(args.out) / 1000:.0f} KB; {words}")


if __name__ == "__main__":
    cli(main)
