"""The small prior of the offline demo: DINOv2, distilled into a network a laptop can run.

    python walkers.py runs/prior --seed 77 --identities 300 --tracklets 1 --cameras 99
    python -m support.priors dinov2 --data runs/prior/Train --dinov2-weights FILE

Distillation (Hinton et al., 2015) trains a small network, the student, to say what a large one, the
teacher, says, on pictures that need no labels. What the teacher has learned from 142 million
pictures - here: which patches of an image belong together, and to what - is far more than the
student could find out from a few hundred synthetic people; but that it can be *imitated* on such
people by a network a two-hundredth of its size is quite another thing, and true.

    frames (N,3,128,64)-> enlarged to 280x140 -+-> teacher, 12 blocks of 384 -> tokens of 4 levels
                                               |     -> layer norm -> 48 principal components --+
                       -> a spoiled view ------+-> student, 4 blocks of 32 -> tokens            loss
                                                     -> a linear map of each level -------------+

Three choices make it work in minutes:
- *Principal components.* 32 numbers cannot carry 384. The 48 directions in which the teacher's
  tokens differ most hold nearly all of what tells one patch from another; the rest is dropped.
- *Four levels.* SASGL reads tokens after 1/4, 2/4, 3/4 and all of the blocks: each has its target.
- *Spoiled views.* The teacher sees the clean frame; the student one with another brightness,
  contrast, blur, noise, a single channel, or inverted. What it learns to say holds for all of them,
  and so by day and by night.

Each level's loss is the share of the variance that is not explained; the last line says, on frames
that it has not trained on, what share is. They are of the same people and places, though: what
counts is the share on walkers of another seed (tests/test_priors.py). Many places (--cameras 99) do
more for that than more frames of a few.

Quick question: why not simply use the teacher in the demo? (It takes a hundred times as long. The
student's whole forward pass costs less than the teacher's first layer.)

Ours, not the papers': all of it.
"""
import os

from support.dinov2 import DINOV2, TINY, DinoVisionTransformer, levels_of, load_dinov2
from support.files import UserError, check_writable, write_atomic
from support.footage import find_footage, read_frame
from support.options import Bar, Parser, cli, progress, say

import torch
import torch.nn.functional as F
from torch import nn

COMPONENTS = 48    # principal components of a level that the student is to give
FRAME, SEEN = (128, 64), (280, 140)    # the frames' size, and what both networks see
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]    # ImageNet's
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def load_frames(path, number, generator):
    """`number` frames of a folder (not the masks/ beside them), evenly taken, each cropped in its
    own way -> (N, 3, H, W) in 0..1. Raises UserError."""
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


def enlarged(frames):
    """Frames (N, 3, H, W) in 0..1 -> normalised, as large as both networks see them."""
    return F.interpolate((frames - MEAN) / STD, SEEN, mode="bilinear", align_corners=False)


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


def levels(dinov2, frames):
    """What SASGL reads: frames (N, 3, H, W), enlarged -> tokens (4, N, L, D) after 1/4, 2/4, 3/4
    and all of the blocks, each layer-normalised."""
    layers = dinov2.get_intermediate_layers(frames, n=levels_of(dinov2), norm=False)
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
def targets_of(teacher, frames):
    """-> Components, and what the student is to say: (4, N, L, COMPONENTS), in half precision."""
    some = [levels(teacher, enlarged(batch)) for batch in frames[::16].split(16)]
    sample = torch.cat(some, dim=1)
    components = Components(sample.flatten(1, 2))
    batches = [components(levels(teacher, enlarged(batch))).half()
               for batch in progress(frames.split(16), "teacher")]
    return components, torch.cat(batches, dim=1)


class Student(nn.Module):
    """The tiny ViT, and for each level a linear map to the teacher's components."""

    def __init__(self):
        super().__init__()
        dim, depth, heads, registers = DINOV2[TINY]
        self.vit = DinoVisionTransformer(dim=dim, depth=depth, heads=heads, registers=registers)
        self.maps = nn.ModuleList(nn.Linear(dim, COMPONENTS) for _ in range(4))

    def forward(self, frames):
        """Frames (N, 3, H, W), enlarged -> (4, N, L, COMPONENTS)."""
        tokens = levels(self.vit, frames)
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
            said = student(enlarged(spoiled(frames[index], generator)))
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
    said = [student(enlarged(batch)) for batch in frames.split(16)]
    return (1 - unexplained(torch.cat(said, dim=1), target.float(), variance)).tolist()


def command_line():
    parser = Parser(description="Distils DINOv2 into the tiny prior of the offline demo.")
    parser.add_argument("prior", choices=["dinov2"], help="what is distilled")
    parser.add_argument("--data", metavar="DIR", required=True, help="a folder of frames")
    parser.add_argument("--dinov2", metavar="NAME", help="the teacher (dinov2_vits14)")
    parser.add_argument("--dinov2-weights", metavar="FILE", help="its tensors, not the download")
    parser.add_argument("--out", metavar="FILE", help="where the student goes (tiny_dinov2.pt)")
    for name, default, text in (("frames", 3200, "to learn from; a twentieth more is held out"),
                                ("steps", 8000, "of training"), ("batch", 16, "frames of a step"),
                                ("seed", 1, "of the student and of what it sees")):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{text} ({default})")
        parser.set_defaults(**{name: default})
    parser.set_defaults(dinov2="dinov2_vits14", dinov2_weights=None, out="tiny_dinov2.pt")
    return parser.parse_args()


def main():
    args = command_line()
    check_writable(args.out)
    held_out = max(16, args.frames // 20)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    frames = load_frames(args.data, args.frames + held_out, generator)
    teacher = load_dinov2(args.dinov2, args.dinov2_weights)
    order = torch.randperm(len(frames), generator=generator)
    frames = frames[order]
    components, target = targets_of(teacher, frames)
    student = Student()
    distil(student, frames[held_out:], target[:, held_out:], components.variance, args.steps,
           args.batch, lr=3e-3, generator=generator)
    shares = explained(student, frames[:held_out], target[:, :held_out], components.variance)
    tensors = {name: tensor.half() for name, tensor in student.vit.state_dict().items()}
    write_atomic(args.out, lambda file: torch.save(tensors, file))
    say(f"{args.out}: {os.path.getsize(args.out) / 1000:.0f} KB; variance explained on {held_out} "
        "frames it has not seen, by level: " + " ".join(f"{share:.2f}" for share in shares))


if __name__ == "__main__":
    cli(main)
