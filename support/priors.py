"""The tiny CLIP of the offline demo, and how it was made.

    python walkers.py runs/people --seed 78 --train-identities 3600 --tracklets 1 --cameras 99
    python -m support.priors --data runs/people

Contrastive language-image training (Radford et al., 2021). In a step with P people:

    visible frames (P,3,128,64) -> image side -> image (P,64) --+-> a table (P,P) of cosines,
    sentences (P,L) -------------> text side  -> text  (P,64) --+   rows and columns

The cosine on the diagonal must be the largest of its row and of its column. As with the real CLIP,
all pictures are colour photographs of the day: nothing prepares it for the night.

The demo's tiny DINOv2 was distilled from a DINOv2 ViT-S/14 by tests/distil.py.
"""
import os

from support import clip, footage
from support.files import UserError, read_json, write_atomic
from support.footage import find_footage, read_frames
from support.options import Parser, cli, progress
from support.pictures import evenly

import torch
import torch.nn.functional as F
from torch import optim

FRAME = (128, 64)    # size of the frames
EACH = 12    # frames of a person in each modality
HELD_OUT = 120    # people to measure with
MEAN = footage.MEAN[:, None, None]    # ImageNet's
STD = footage.STD[:, None, None]


def frames_of(path, number):
    """-> the paths of `number` frames of a folder, evenly taken. Raises UserError."""
    paths = [frame for frames in find_footage(path).values() for frame in frames]
    if len(paths) < number:
        raise UserError(f"{len(paths)} frames under {path}; expected {number}: lower --frames")
    return evenly(paths, number)


def cropped(frames, generator):
    """uint8 frames (3, H, W) of size FRAME -> a random piece of each, resized, (N, 3, H, W) in
    0..1: a detector's boxes vary."""
    pieces, (H, W) = [], FRAME
    for frame in frames:
        down, across, tall, wide = torch.rand(4, generator=generator).tolist()
        rows, columns = round(H * (0.85 + 0.15 * tall)), round(W * (0.85 + 0.15 * wide))
        top, left = round(down * (H - rows)), round(across * (W - columns))
        piece = frame[None, :, top:top + rows, left:left + columns] / 255
        pieces.append(F.interpolate(piece, FRAME, mode="bilinear"))
    return torch.cat(pieces)


def photographed(frames, generator):
    """Frames (N, 3, H, W) in 0..1 -> each as another photograph of that day: mirrored or not, other
    colours (their channels change places), other light, blurred or not. Always in colour."""
    N = len(frames)

    def drawn(low, high, channels=1):
        return low + (high - low) * torch.rand(N, channels, 1, 1, generator=generator)

    frames = torch.where(drawn(0, 1) < 0.5, frames.flip(3), frames)
    order = torch.rand(N, 3, generator=generator).argsort(1)
    frames = frames[torch.arange(N)[:, None], order] * drawn(0.7, 1.3, 3)
    frames = (frames - 0.5) * drawn(0.7, 1.3) + 0.5 + drawn(-0.1, 0.1)
    blurred = F.avg_pool2d(frames, 3, 1, 1, count_include_pad=False)
    return torch.where(drawn(0, 1) < 0.3, blurred, frames).clamp(0, 1)


def fit(optimizer, schedule, steps, loss_of_step):
    """Take so many steps along the gradient of the loss that loss_of_step() returns."""
    bar = progress(range(steps), "training")
    for _ in bar:
        loss = loss_of_step()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}")


def load_people(path):
    """A folder of walkers -> frames of N people by day and by night, uint8 (N, 2, EACH, 3, H, W),
    their sentences' words (N, L), and the index of the end token (N,). Raises UserError."""
    sentences = read_json(f"{path}/sentences.json")
    pids = sorted(os.listdir(f"{path}/Train"))
    paths = [frame for pid in pids for modality in ("rgb", "ir")
             for frame in frames_of(f"{path}/Train/{pid}/{modality}", EACH)]
    frames = read_frames(progress(paths, "reading"), FRAME).view(-1, 2, EACH, 3, *FRAME)
    return frames, *clip.tokenized([sentences[str(int(pid))] for pid in pids])


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


def make_clip(path, steps, generator):
    """-> CLIP's tensors, and a line about its quality on people that it has not seen."""
    people, words, end = load_people(path)
    held_out = min(HELD_OUT, max(1, len(people) // 20))
    model = clip.CLIP(**clip.TINY_SIZES)

    def loss_of_step():
        chosen = torch.randperm(len(people) - held_out, generator=generator)[:64] + held_out
        which = torch.randint(EACH, chosen.shape, generator=generator)
        frames = photographed(cropped(people[chosen, 0, which], generator), generator)
        return contrastive_loss(
            image_features(model, frames), text_features(model, words[chosen], end[chosen]),
            model.logit_scale.exp().clamp(max=100))

    optimizer = optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    # The learning rate rises for a tenth of the steps, then falls along a cosine.
    schedule = optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    fit(optimizer, schedule, steps, loss_of_step)
    # By night too, though it has learned from daytime frames alone.
    with torch.no_grad():
        text = text_features(model, words[:held_out], end[:held_out])
        image = image_features(model, people[:held_out, :, 0].flatten(0, 1) / 255)
        nearest = (image @ text.t()).argmax(1).view(held_out, 2)
        day, night = (nearest == torch.arange(held_out)[:, None]).float().mean(0)
    return model.state_dict(), (f"of {held_out} other people, the own sentence is the nearest for "
                                f"{day:.0%} by day, {night:.0%} by night")


def write(path, tensors, words):
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    write_atomic(path, lambda file: torch.save(tensors, file))
    print(f"{path}: {words}")


def main():
    parser = Parser(description="Make the tiny CLIP of the offline demo.")
    parser.add_argument("--data", required=True, help="folder of walkers")
    parser.add_argument("--out", default="tiny.pt", help="the file to write (tiny.pt)")
    parser.add_argument("--steps", type=int, default=6000, help="(6000)")
    args = parser.parse_args()
    torch.manual_seed(1)
    write(args.out, *make_clip(args.data, args.steps, torch.Generator().manual_seed(1)))


if __name__ == "__main__":
    cli(main)
