r"""The two small priors of the offline demo: networks that a laptop can train and run.

    python walkers.py runs/prior --seed 77 --identities 300 --tracklets 1 --cameras 99
    python -m support.priors dinov2 --data runs/prior/Train --dinov2-weights FILE

    python walkers.py runs/people --seed 78 --identities 2400 --test-identities 24 --tracklets 1 \
        --cameras 99
    python -m support.priors clip --data runs/people

**dinov2: distillation** (Hinton et al., 2015). A small network, the student, learns to reproduce
the outputs of a large one, the teacher. This needs no labels, and a few hundred synthetic people
are enough. Both networks see the frames (N,3,128,64), enlarged to 336x168:

    clean frames -> teacher, 12 blocks of 384 -> tokens after 1/4, 2/4, 3/4 and all of the blocks
                      -> layer norm -> 48 principal components ----------------------------+
    half of them spoiled -> student, 4 blocks of 32 -> a linear map for each of 4 levels --+-> loss

The student's 32 numbers cannot hold the teacher's 384. The 48 directions in which the teacher's
tokens vary most hold 77 to 96 % of their variance. Spoiled frames have another brightness, contrast
or blur, noise, a single channel, or inverted values. The target stays that of the clean frame, so
that the features become similar by day and by night.

**clip: contrastive language-image training** (Radford et al., 2021). There are no classes: each
picture has a sentence, and the network learns which belongs to which. In a step with P people:

    visible frames (P,3,128,64) -> image side -> image (P,64) --+-> a table (P,P) of cosines,
    sentences (P,L) -------------> text side  -> text  (P,64) --+   rows and columns

The cosine on the diagonal must be the largest of its row and of its column: cross-entropy both
ways, with a learned temperature. To tell P people apart, the network must find in the picture what
the sentences name (a striped coat, a backpack). As with the real CLIP, all pictures are daytime
photographs: only spoiled frames prepare it for the night.

Quick question: why not use the teacher itself in the demo? (It takes a hundred times as long. The
whole student costs less than the teacher's first layer.)
"""
import json
import os
from argparse import Namespace
from functools import partial

from support import clip
from support.dinov2 import DINOV2, TINY, DinoVisionTransformer, levels_of, load_dinov2
from support.files import UserError, read_lines, write_atomic
from support.footage import find_footage, read_frame
from support.options import Parser, cli, progress

import torch
import torch.nn.functional as F
from torch import nn

FRAME = (128, 64)    # size of the frames
COMPONENTS = 48    # principal components of a level (dinov2)
EACH = 6    # frames of a person in each modality (clip)
DAY, NIGHT = 0, 1    # indices of the modalities (clip)
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]    # ImageNet's
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
RECIPES = {    # the defaults of the options
    "dinov2": {"out": "tiny_dinov2.pt", "steps": 12000, "batch": 16, "seed": 1, "frames": 4800,
               "dinov2": "dinov2_vits14", "dinov2_weights": "", "dino_size": (336, 168)},
    "clip": {"out": "tiny_clip.pt", "steps": 8000, "batch": 64, "seed": 1}}

# ---------------------------------------------------------------- frames ----

def load_frames(path, number, generator):
    """-> `number` frames of a folder, evenly taken and randomly cropped, (N, 3, H, W) in 0..1; no
    masks of walkers. Raises UserError."""
    paths = [frame for name, frames in find_footage(path).items() if "masks/" not in name
             for frame in frames]
    if len(paths) < number:
        raise UserError(f"{len(paths)} frames under {path}; expected {number}: draw more walkers, "
                        "or lower --frames")
    chosen = [paths[i * len(paths) // number] for i in range(number)]
    return torch.stack([cropped(read_frame(frame, FRAME), generator)
                        for frame in progress(chosen, "reading")])


def cropped(frame, generator):
    """uint8 frame (3, H, W) -> a random piece of it, as a detector's boxes vary, resized to
    (3, H, W), in 0..1."""
    _, H, W = frame.shape
    down, across, tall, wide = torch.rand(4, generator=generator).tolist()
    rows = round(H * (0.85 + 0.15 * tall))
    columns = round(W * (0.85 + 0.15 * wide))
    top = round(down * (H - rows))
    left = round(across * (W - columns))
    piece = frame[None, :, top:top + rows, left:left + columns] / 255
    return F.interpolate(piece, (H, W), mode="bilinear", align_corners=False)[0]


def spoiled(frames, generator):
    """Frames (N, 3, H, W) in 0..1 -> each as another random camera might show it."""
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
    """Frames (N, 3, H, W) in 0..1, enlarged to size -> the tokens that SASGL reads, (4, N, L, D):
    after 1/4, 2/4, 3/4 and all of the blocks, each layer-normalised."""
    enlarged = F.interpolate((frames - MEAN) / STD, size, mode="bilinear", align_corners=False)
    layers = dinov2.get_intermediate_layers(enlarged, n=levels_of(dinov2), norm=False)
    normalised = [F.layer_norm(tokens, tokens.shape[2:]) for tokens in layers[:-1]]
    return torch.stack([*normalised, dinov2.norm(layers[-1])])


def principal_components(tokens):
    """A sample of tokens (4, M, D) -> for each level their mean (4, 1, D), the COMPONENTS axes
    along which they vary most (4, D, COMPONENTS), and the variance along these (4,)."""
    mean = tokens.mean(1, keepdim=True)
    centred = tokens - mean
    covariance = centred.transpose(1, 2) @ centred / tokens.shape[1]
    values, vectors = torch.linalg.eigh(covariance)    # ascending
    return mean, vectors[:, :, -COMPONENTS:], values[:, -COMPONENTS:].sum(1)


@torch.no_grad()
def targets_of(teacher, frames, size):
    """-> the student's targets (4, N, L, COMPONENTS) in half precision, and their variance (4,)."""
    sample = torch.cat([levels(teacher, some, size) for some in frames[::16].split(16)], dim=1)
    mean, axes, variance = principal_components(sample.flatten(1, 2))
    targets = []
    for batch in progress(frames.split(16), "teacher"):
        centred = levels(teacher, batch, size) - mean[:, None]
        targets.append((centred @ axes[:, None]).half())
    return torch.cat(targets, dim=1), variance


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


def unexplained(output, target, variance):
    """-> (4,): the share of each level's variance that the student does not explain."""
    return (output - target).square().sum(-1).mean((1, 2)) / variance


def make_dinov2(args, generator):
    """-> the student's tensors, and a line about its quality on frames that it has not seen."""
    if any(side % 14 for side in args.dino_size):
        raise UserError(f"--dino-size {args.dino_size}; expected multiples of 14, DINOv2's patch; "
                        "give another size")
    held_out = max(16, args.frames // 20)
    teacher = load_dinov2(args.dinov2, args.dinov2_weights)
    frames = load_frames(args.data, args.frames + held_out, generator)
    frames = frames[torch.randperm(len(frames), generator=generator)]
    target, variance = targets_of(teacher, frames, args.dino_size)
    student = Student(args.dino_size)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    bar = progress(range(args.steps), "distilling")
    for _ in bar:
        index = torch.randint(args.frames, (args.batch,), generator=generator) + held_out
        is_spoiled = torch.rand(args.batch, 1, 1, 1, generator=generator) < 0.5
        views = torch.where(is_spoiled, spoiled(frames[index], generator), frames[index])
        loss = unexplained(student(views), target[:, index].float(), variance).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(explained=f"{1 - loss.item():.2f}")
    with torch.no_grad():
        output = torch.cat([student(batch) for batch in frames[:held_out].split(16)], dim=1)
        shares = 1 - unexplained(output, target[:, :held_out].float(), variance)
    words = " ".join(f"{share:.2f}" for share in shares.tolist())
    return student.vit.state_dict(), f"variance explained on other frames, by level: {words}"


# ----------------------------------------------------- language and image ----

def load_people(path):
    """A folder of walkers -> of N people their frames by day and by night, uint8 (N, 2, EACH, 3, H,
    W), the numbers of their sentences' words (N, L), and the index of the end token (N,). Raises
    UserError."""
    sentences = json.loads("\n".join(read_lines(os.path.join(path, "sentences.json"))))
    paths = {}    # (pid, rgb or ir) -> frames
    for name, found in find_footage(os.path.join(path, "Train")).items():
        pid, folder, _ = name.split("/")    # 0001/rgb/D3
        paths.setdefault((int(pid), folder), []).extend(found)
    pids = sorted({pid for pid, _ in paths})
    words, end = clip.tokenized([sentences[str(pid)] for pid in pids])
    frames = torch.empty(len(pids), 2, EACH, 3, *FRAME, dtype=torch.uint8)
    for i, pid in enumerate(progress(pids, "reading")):
        for modality, folder in (DAY, "rgb"), (NIGHT, "ir"):
            found = paths[pid, folder]
            for k in range(EACH):
                frames[i, modality, k] = read_frame(found[k * len(found) // EACH], FRAME)
    return frames, words, end


def image_features(model, frames):
    """Frames (N, 3, H, W) in 0..1 -> (N, dim), of length 1."""
    return F.normalize(model.encode_image((frames - MEAN) / STD), dim=1)


def text_features(model, words, end):
    """words (N, L), end (N,) -> (N, dim), of length 1."""
    return F.normalize(model.encode_text(model.token_embedding(words), end), dim=1)


def contrastive_loss(a, b, scale):
    """a, b (N, dim) of length 1, scale: 1 / temperature -> scalar. Cross-entropy: which b belongs
    to each a, and which a to each b?"""
    table = scale * a @ b.t()
    own = torch.arange(len(table))
    return (F.cross_entropy(table, own) + F.cross_entropy(table.t(), own)) / 2


@torch.no_grad()
def found_by_sentence(model, people, words, end):
    """-> the share of people whose own sentence is the nearest of all, by day and by night."""
    text, shares = text_features(model, words, end), []
    for modality in DAY, NIGHT:
        image = image_features(model, people[:, modality, 0] / 255)
        nearest = (image @ text.t()).argmax(1)
        shares.append((nearest == torch.arange(len(text))).float().mean().item())
    return shares


def make_clip(args, generator):
    """-> CLIP's tensors, and a line about its quality on people that it has not seen."""
    people, words, end = load_people(args.data)
    held_out = max(1, round(len(people) / 20))
    model = clip.CLIP(**clip.TINY_SIZES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    # The learning rate rises for a tenth of the steps, then falls along a cosine.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, args.steps, pct_start=0.1)
    bar = progress(range(args.steps), "contrasting")
    for _ in bar:
        order = torch.randperm(len(people) - held_out, generator=generator)
        chosen = order[:args.batch] + held_out
        which = torch.randint(EACH, (len(chosen),), generator=generator)
        frames = people[chosen, DAY, which]
        frames = torch.stack([cropped(frame, generator) for frame in frames])
        mirrored = torch.rand(len(frames), 1, 1, 1, generator=generator) < 0.5
        frames = spoiled(torch.where(mirrored, frames.flip(3), frames), generator)
        image = image_features(model, frames)
        text = text_features(model, words[chosen], end[chosen])
        loss = contrastive_loss(image, text, model.logit_scale.exp().clamp(max=100))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}")
    shares = found_by_sentence(model, people[:held_out], words[:held_out], end[:held_out])
    return model.state_dict(), (f"of {held_out} other people, the own sentence is the nearest for "
                                "{:.0%} by day, {:.0%} by night".format(*shares))


# ----------------------------------------------------------- command line ----

def main():
    parser = Parser(description="Make the small priors of the offline demo.")
    parser.usage = "%(prog)s dinov2|clip --data DIR [options]"
    option, number = parser.add_argument, partial(parser.add_argument, type=int)
    option("prior", choices=list(RECIPES))
    option("--data", required=True, help="folder of frames (dinov2) or of walkers (clip)")
    option("--out", help="the file to write (tiny_PRIOR.pt)")
    number("--steps", help="(dinov2: 12000, clip: 8000)")
    number("--batch", help="(dinov2: 16 frames, clip: 64 people)")
    number("--seed", help="of the weights and the views (1)")
    option("--dinov2", help="name of the teacher (dinov2_vits14)")
    option("--dinov2-weights", help="file of the teacher's tensors (downloaded)")
    number("--frames", help="dinov2: to train on; a twentieth more is held out (4800)")
    number("--dino-size", nargs=2, help="dinov2: size that both networks see (336 168)")
    given = vars(parser.parse_args())
    args = Namespace(**RECIPES[given["prior"]] | given)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    make = make_dinov2 if args.prior == "dinov2" else make_clip
    tensors, words = make(args, generator)
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    write_atomic(args.out, lambda file: torch.save(tensors, file))
    print(f"{args.out}: {os.path.getsize(args.out) / 1000:.0f} KB; {words}")


if __name__ == "__main__":
    cli(main)
