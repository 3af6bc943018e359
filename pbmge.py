"""PBMGE: progressive bidirectional multi-granularity enhancement (DinoGRL, section 3.3).

Two people's coats may look alike, or their walks; rarely both. So each stream is corrected by the
other, strip by strip and from coarse to fine: what the other stream confirms is added, what it
contradicts is subtracted.

    gait parts        g_0 | g_1 g_2 | g_3 .. g_6 | g_7 .. g_14 | g_15 .. g_30      (B, 31, D)
    appearance parts  a_0 | a_1 a_2 | a_3 .. a_6 | a_7 .. a_14 | a_15 .. a_30      (B, 31, D)
                   global    n = 2       n = 4        n = 8          n = 16         granularities

    for each granularity n = 2, 4, 8, 16, over its strips i in order, from x = g_0 and y = a_0:
        x <- enhance_gait(query x, source a_i)          appearance corrects gait  } bidirectional,
        y <- enhance_appearance(query y, source g_i)    gait corrects appearance  } progressive
    the last x and y of each granularity are appended: (B, 35, D) and (B, 35, D).

`enhance` is a cross-attention over the D channels of a part, each channel one scalar token. The
function enhance_as_written has the paper's formulas. They lift every scalar to D dimensions, so a
pair costs D^3 operations. But all lifted tokens lie on one line. Hence the D x D affinity is
bilinear in two scalars, and what W1 reads of a source token is linear in one:

    f_ij = beta_i - alpha_i s_j,    alpha_i and beta_i linear in q_i;    v_j = W1 g(s_j)
    similar_i = sum of f_ij v_j over f_ij > 0 = beta_i (sum of v_j) - alpha_i (sum of s_j v_j)

For one query channel i, f is a straight line over s. It crosses 0 at the threshold s = beta_i /
alpha_i and is positive on one side of it. With s sorted, and v_j and s_j v_j summed up from both
ends, "the sum over all j on that side" is one look-up: O(D log D), the same value to rounding, and
over 100 times as fast at D = 256. Both streams look up at once, gait first wherever the size 2
stands for them: the tensors are small, and a GPU's time goes by their number.

Quick question: what does PBMGE compute at the first training step? (Nothing: its last BatchNorm
starts at zero, so out = q. It departs from that only where the loss falls by it.)

Ours, not the paper's: the sorted evaluation; float32 throughout under autocast (sums over sorted
values lose too much in bfloat16).
"""
import torch
import torch.nn.functional as F
from torch import nn

# ------------------------------------------------------ the paper's formulas ----

def enhance_as_written(query, source, theta, phi, g, W1, W2):
    """The paper's enhancement, one tracklet and one channel as one token: query (B, D), source
    (B, D) -> (B, D). theta, phi, g: 1x1 convolutions 1 -> D; W1, W2: D -> 1 and a batch norm. The
    reference for Enhance, in training and in evaluation."""
    D = query.shape[1]
    q = theta(query[:, None]).transpose(1, 2)    # (B, D tokens, D)
    k = phi(source[:, None])    # (B, D, D tokens)
    v = g(source[:, None]).transpose(1, 2)    # (B, D tokens, D)
    f = q @ k / D    # (B, D, D): how far does channel j of the source agree with channel i?
    similar = W1((F.relu(f) @ v).transpose(1, 2))    # (B, 1, D)
    dissimilar = W2((F.relu(-f) @ v).transpose(1, 2))
    return query + (similar - dissimilar)[:, 0]


# ------------------------------------------------------------ the fast form ----

class Enhance(nn.Module):
    """The weights of enhance_as_written. theta, phi and g are kept as the 1x1 convolutions they are
    (the released tensors fit), though the sorted form only needs products of their weights."""

    def __init__(self, dim):
        super().__init__()
        # Each lifts a scalar to D dimensions.
        self.theta, self.phi, self.g = (nn.Conv1d(1, dim, 1) for _ in range(3))
        self.W1 = nn.Sequential(nn.Conv1d(dim, 1, 1), nn.BatchNorm1d(1))
        self.W2 = nn.Sequential(nn.Conv1d(dim, 1, 1), nn.BatchNorm1d(1))
        for batch_norm in (self.W1[1], self.W2[1]):
            nn.init.zeros_(batch_norm.weight)    # so that PBMGE starts as the identity
            nn.init.zeros_(batch_norm.bias)

    def products(self):
        """-> slope and offset, (2, 2, 2), of what is linear in one scalar: alpha and beta in the
        query's, v1 = W1 g and v2 = -W2 g in the source's. Once computed, they serve every strip."""
        theta, phi, g = (torch.stack([conv.weight.flatten(), conv.bias])    # (2, D)
                         for conv in (self.theta, self.phi, self.g))
        W = torch.cat([self.W1[0].weight, -self.W2[0].weight]).squeeze(2)    # (2, D)
        alpha_beta = torch.stack([-phi[0], phi[1]]) @ theta.t() / len(phi[0])
        return torch.stack([alpha_beta, W @ g.t()])


def prepare(parts, slope, offset):
    """Source parts (P, 2, B, D), slope and offset of v1 and v2 -> of each part, for attend: its
    values (2, B, D), sorted, and sums of -s v and of v, for v1 and v2, (2, 2, 2, B, 2D + 2)."""
    values = parts.sort(dim=-1).values.contiguous()
    s = values.unsqueeze(2)
    v = torch.addcmul(offset, slope, s)    # (P, 2, 2, B, D)
    # Over the j smallest s, j = 0 .. D, and over all others: (P, 2, 2, 2, B, 2 sides, D + 1).
    left = F.pad(torch.stack([-s * v, v], 2).cumsum(-1), (1, 0))
    sides = torch.stack([left, left[..., -1:] - left], -2)
    # W1 reads the side where f > 0, W2 the other: with its sides swapped, one index serves both.
    of_v1, of_v2 = sides.unbind(3)
    return zip(values, torch.stack([of_v1, of_v2.flip(-2)], 3).flatten(-2), strict=True)


def attend(query, values, sums, slope, offset):
    """query (2, B, D), values and sums of one source part, slope and offset of alpha and beta ->
    the sums of relu(f) W1 g and of relu(-f) W2 g, (2, 2, B, D)."""
    D = query.shape[-1]
    lines = torch.addcmul(offset, slope, query.unsqueeze(1))    # alpha and beta, (2, 2, B, D)
    # No gradient is lost: f is 0 at the threshold, so the sums of relu(f) do not jump there.
    with torch.no_grad():
        alpha, beta = lines.unbind(1)
        # How many s lie below each query's threshold. alpha = 0: it is inf or -inf, all or none.
        below = torch.searchsorted(values, beta / alpha)
        # There f > 0, but for negative alpha (-0 is negative) it is f > 0 on the other side.
        index = below + (D + 1) * alpha.signbit()
    index = index[:, None, None].expand(-1, 2, 2, -1, -1)
    return (lines.unsqueeze(2) * sums.gather(-1, index)).sum(1)


class PBMGE(nn.Module):
    """Gait and appearance parts (B, P, D) -> the same with one refined part per granularity
    appended.

    dim: channels D of a part. strips: the pyramid of the parts, (1, 2, 4, 8, 16) in the paper, the
    first being the global part. One enhance_gait and one enhance_appearance serve all
    granularities."""

    def __init__(self, *, dim, strips):
        super().__init__()
        assert strips[0] == 1, f"the first granularity must be the global part: {strips}"
        self.strips = strips
        self.enhance_gait = Enhance(dim)
        self.enhance_appearance = Enhance(dim)

    def forward(self, gait, appearance):
        with torch.autocast(gait.device.type, enabled=False):
            wide = torch.promote_types(gait.dtype, torch.float32)
            parts = torch.stack([gait, appearance]).to(wide)
            return torch.cat([parts, self.refine(parts)], dim=2).unbind()

    def refine(self, parts):
        """Parts of both (2, B, P, D) -> the refined ones (2, B, granularities, D)."""
        both = self.enhance_gait, self.enhance_appearance
        products = torch.stack([e.products() for e in both])[..., None, None]
        alpha_beta, v = (pairs.unbind(2) for pairs in products.unbind(1))
        # Of gait's W1 and W2, then of appearance's: four numbers each.
        convs, norms = zip(*(W for e in both for W in (e.W1, e.W2)), strict=True)
        bias = torch.cat([conv.bias for conv in convs]).view(2, 2, 1, 1)
        gain, shift, mean, var = (torch.cat([getattr(norm, name) for norm in norms])
                                  for name in ("weight", "bias", "running_mean", "running_var"))

        # Part by part in memory, (P, 2, B, D): each is read on its own, by the other stream.
        sources = prepare(parts.permute(2, 0, 1, 3)[1:].flip(1), *v)
        refined = []
        for n in self.strips[1:]:
            x = parts[:, :, 0]
            for _ in range(n):
                y = attend(x, *next(sources), *alpha_beta) + bias
                # The four batch norms, each with its own statistics, as channels of one.
                y = F.batch_norm(y.view(1, 4, -1), mean, var, gain, shift, self.training,
                                 norms[0].momentum, norms[0].eps).view_as(y)
                similar, dissimilar = y.unbind(1)
                x = x + similar - dissimilar
            refined.append(x)
        if self.training:
            for norm, *statistics in zip(norms, mean, var, strict=True):
                norm.running_mean[0], norm.running_var[0] = statistics
                norm.num_batches_tracked += parts.shape[2] - 1
        return torch.stack(refined, dim=2)


def main():
    """PBMGE starts as the identity, and its two forms are equal."""
    torch.manual_seed(1)
    gait, appearance = torch.randn(2, 8, 2, 64)
    pbmge = PBMGE(dim=64, strips=(1, 1))    # a single enhancement
    refined, _ = pbmge(gait, appearance)
    print(f"at first g_2 - g_0 = {(refined[:, 2] - gait[:, 0]).abs().max():.1g}")
    e = pbmge.enhance_gait
    nn.init.ones_(e.W1[1].weight)
    fast, _ = pbmge(gait, appearance)
    slow = enhance_as_written(gait[:, 0], appearance[:, 1], e.theta, e.phi, e.g, e.W1, e.W2)
    print(f"with a gain of 1 the two forms differ by {(fast[:, 2] - slow).abs().max():.1g}")


if __name__ == "__main__":
    main()
