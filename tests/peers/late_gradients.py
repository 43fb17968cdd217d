#!/usr/bin/env python3
"""What do gradients that come late cost AdamW? The method of `sparse24`, in PyTorch, without anything of ours.

  python3 tests/peers/late_gradients.py [--text FILE] [--seeds 0 1 2] [--steps 400] [--device cuda] [--modes dense slow ...]

Two ranks in one process train a small Llama on bytes of FILE's first 90 %; without FILE, of the topics of Python's own
documentation. Each owns half of every matrix, and hears of the other rank's half what the mode says: see MODES. `dense` is the
first of the modes that train. All seeds of all modes train side by side, stacked in one tensor, on the same batches.

Prints one JSON object a mode: the loss on the last 10 %, in nats a byte, in percent above `dense` of the same seed; the mean and
its standard error; and how much of the gradient, with each element in units of its root mean square, is in the gradients of
1, 2, ... steps before, over the last three quarters of the run: below zero, the weights swing.
"""
import argparse
import json
import math
import pathlib
import statistics
from dataclasses import dataclass, replace
from pydoc_data import topics

import torch
import torch.nn.functional as F

HIDDEN, HEADS, LAYERS, FFN, SEQ, VOCAB, BATCH = 256, 4, 3, 688, 128, 256, 4
WARMUP, FLOOR, CLIP, DECAY, BETA1, BETA2, EPS, BLOCK, LAGS = 40, 0.1, 1.0, 0.1, 0.9, 0.95, 1e-8, 128, 10
HEAD = HIDDEN // HEADS
LAYER = {"q": (HIDDEN, HIDDEN), "k": (HIDDEN, HIDDEN), "v": (HIDDEN, HIDDEN), "o": (HIDDEN, HIDDEN)}
LAYER |= {"gate": (FFN, HIDDEN), "up": (FFN, HIDDEN), "down": (HIDDEN, FFN)}
# Only the matrices of layers are made sparse. As ours: embeddings, the head and whatever is small are not.
SHAPES = {f"{layer}.{name}": shape for layer in range(LAYERS) for name, shape in LAYER.items()}
SPARSE = sum(math.prod(shape) for shape in SHAPES.values())
SHAPES |= {"embed": (VOCAB, HIDDEN), "head": (VOCAB, HIDDEN)}
MATRICES = sum(math.prod(shape) for shape in SHAPES.values())
SHAPES |= {f"{layer}.norm{i}": (HIDDEN,) for layer in range(LAYERS) for i in (1, 2)} | {"norm": (HIDDEN,)}
SIZES = [math.prod(shape) for shape in SHAPES.values()]


@dataclass(frozen=True)
class Mode:
    """What of the other rank's half arrives, and what the optimiser makes of it."""

    keeps: str = "largest"  # two of every four; or all, in turns
    release: float = 1.0  # the share of what was left out that is added to the next gradient; 1 is error feedback
    remembers: bool = True
    warmup: int = 0  # so many steps at the beginning keep everything
    q_max: int = 0  # of the first stage, and 127 of the second; 0: nothing is quantised
    every_half: bool = False  # the owner's own half goes the same way: what many ranks come to
    m_in_time: bool = False  # the first moment sees everything in time, only the second does not
    v_in_time: bool = False  # and the other way round


SLOW = Mode(release=1 / 32, warmup=WARMUP)
MODES = {
    "dense": Mode(keeps="all"),
    "two-largest": Mode(),
    "in-turns": Mode(keeps="in turns"),
    "forgetful": Mode(remembers=False),
    "m-in-time": Mode(m_in_time=True),
    "v-in-time": Mode(v_in_time=True),
    "warm": Mode(warmup=WARMUP),
    "slow-cold": replace(SLOW, warmup=0),
    "slow": SLOW,
    "slow-8": replace(SLOW, release=1 / 8),
    "slow-16": replace(SLOW, release=1 / 16),
    "slow-int8": replace(SLOW, q_max=127),
    "slow-int4": replace(SLOW, q_max=7),
    "slow-many": replace(SLOW, every_half=True),
}


def losses(weights, tokens):
    """The mean loss of each run: `weights` are [run, parameter], `tokens` [run, batch, SEQ + 1]."""
    runs, batch, _ = tokens.shape
    device = tokens.device
    w = {name: part.view(runs, *shape) for (name, shape), part in zip(SHAPES.items(), weights.split(SIZES, 1))}
    angle = torch.arange(SEQ, device=device)[:, None].float() / (10000 ** (torch.arange(0, HEAD, 2, device=device).float() / HEAD))
    cos, sin = (f(angle).repeat(1, 2) for f in (torch.cos, torch.sin))

    def rotate(x):
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat((-right, left), -1) * sin

    norm = lambda x, name: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w[name][:, None]
    linear = lambda x, name: torch.bmm(x, w[name].transpose(1, 2))
    split = lambda x: x.view(runs * batch, SEQ, HEADS, HEAD).transpose(1, 2)
    first = VOCAB * torch.arange(runs, device=device)[:, None]
    x = F.embedding(tokens[:, :, :-1].reshape(runs, -1) + first, w["embed"].reshape(runs * VOCAB, HIDDEN))
    for i in range(LAYERS):
        n = norm(x, f"{i}.norm1")
        q, k, v = (split(linear(n, f"{i}.{name}")) for name in "qkv")
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + linear(y.transpose(1, 2).reshape(x.shape), f"{i}.o")
        n = norm(x, f"{i}.norm2")
        x = x + linear(F.silu(linear(n, f"{i}.gate")) * linear(n, f"{i}.up"), f"{i}.down")
    logits = linear(norm(x, "norm"), "head")
    return F.cross_entropy(logits.reshape(-1, VOCAB), tokens[:, :, 1:].reshape(-1), reduction="none").view(runs, -1).mean(1)


def two_largest(y):
    """1 at the two largest of every four, 0 elsewhere; ties go to the lower index."""
    size = y.abs().view(len(y), -1, 4).unbind(-1)
    beats = lambda i, j: (size[i] >= size[j] if i < j else size[i] > size[j]).int()
    beaten_by = [sum(beats(j, i) for j in range(4) if j != i) for i in range(4)]
    return torch.stack([count < 2 for count in beaten_by], -1).view(y.shape).float()


def quantised(y, q_max):
    """Whole multiples of one bfloat16 scale a block, rounded up."""
    blocks = y.view(len(y), -1, BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True) / q_max
    scale = ((scale.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32).clamp_min(2.0**-100)
    return ((blocks / scale).round().clamp(-q_max, q_max) * scale).view(y.shape)


def encode(gradient, residual, release, kept, q_max):
    """What arrives of a gradient, and what is remembered. `kept` is a mask, or None for the two largest of every four."""
    held = residual * (1 - release)
    y = gradient + (residual - held)
    came = y * (two_largest(y) if kept is None else kept)
    if q_max:
        came = quantised(came, q_max)
    return came, (y - came) + held


def adamw(w, m, v, for_m, for_v, clip, decay, rate, step):
    m.lerp_(for_m * clip, 1 - BETA1)
    v.lerp_((for_v * clip).square(), 1 - BETA2)
    w.sub_(rate * (m / (1 - BETA1**step) / ((v / (1 - BETA2**step)).sqrt() + EPS) + decay * w))


class Mesh:
    """Two ranks of every seed of one mode."""

    def __init__(self, mode, seeds, device):
        self.mode = mode
        self.senders = [torch.zeros(seeds, SPARSE, device=device) for _ in range(1 + mode.every_half)]
        self.owner = torch.zeros(seeds, SPARSE, device=device)
        self.place = torch.arange(SPARSE, device=device) % 4
        sizes = SIZES[: LAYERS * len(LAYER)]
        self.first_owns = torch.cat([torch.arange(size, device=device) < size // 2 for size in sizes])

    def send(self, gradient, sender, step):
        mode, residual = self.mode, self.senders[sender]
        warm = step <= mode.warmup
        kept = {"in turns": (self.place // 2 == step % 2).float(), "all": torch.ones_like(self.place)}.get("all" if warm else mode.keeps)
        number = lambda x: torch.tensor(x, device=gradient.device)
        q_max = 127 if warm and mode.q_max else mode.q_max
        # In the warm-up ours sends all of a residual; here the little that quantising leaves comes slowly too.
        came, left = encode(gradient, residual, number(mode.release), kept, q_max)
        self.senders[sender] = left * mode.remembers
        return came

    def reduce(self, first, second, step):
        if self.mode.keeps == "all":
            return first + second
        if self.mode.every_half:
            total = self.send(first, 0, step) + self.send(second, 1, step)
        else:
            total = torch.where(self.first_owns, first, second) + self.send(torch.where(self.first_owns, second, first), 0, step)
        if self.mode.q_max:
            total, self.owner = encode(total, self.owner, 1.0, torch.ones_like(self.place), 127)
        return total


def gradients(w, tokens):
    leaf = w.detach().requires_grad_()
    return torch.autograd.grad(losses(leaf, tokens).sum() / 2, leaf)[0]


def learning_rate(step, options):
    progress = (step - WARMUP) / (options.steps - WARMUP)
    return options.learning_rate * (step / WARMUP if step < WARMUP else FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * progress)) / 2)


def start(seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randn(MATRICES, generator=draw) * 0.02, torch.ones(sum(SIZES) - MATRICES)])


def train(modes, text, options):
    """The held-out losses, [mode, seed], and the correlations, [mode, lag]."""
    device, seeds = options.device, options.seeds
    count, cut = len(modes), len(text) * 9 // 10
    draws = [torch.Generator().manual_seed(1000 + seed) for seed in seeds]
    places = torch.stack([torch.randint(0, cut - SEQ - 1, (options.steps, 2, BATCH), generator=draw) for draw in draws], 2).to(device)
    window = torch.arange(SEQ + 1, device=device)
    w = torch.stack([start(seed) for seed in seeds]).to(device).repeat(count, 1)
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    decay = DECAY * (torch.arange(w.shape[1], device=device) < MATRICES)
    meshes = [Mesh(mode, len(seeds), device) for mode in modes]
    # Every 61st element of the matrices is watched.
    past = torch.zeros(LAGS + 1, len(w), len(range(0, SPARSE, 61)), device=device)
    common = torch.zeros(LAGS + 1, len(w), device=device)
    for step in range(1, options.steps + 1):
        first, second = (gradients(w, text[places[step - 1, rank][..., None] + window].repeat(count, 1, 1)) for rank in range(2))
        for at, mesh in enumerate(meshes):
            rows, mode = slice(at * len(seeds), (at + 1) * len(seeds)), mesh.mode
            exact = first[rows] + second[rows]
            total = torch.cat((mesh.reduce(first[rows, :SPARSE], second[rows, :SPARSE], step), exact[:, SPARSE:]), 1)
            clip = (CLIP / (total.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0)
            for_m, for_v = exact if mode.m_in_time else total, exact if mode.v_in_time else total
            rate, number = torch.tensor(learning_rate(step, options), device=device), torch.tensor(float(step), device=device)
            adamw(w[rows], m[rows], v[rows], for_m, for_v, clip, decay, rate, number)
            past[step % (LAGS + 1), rows] = exact[:, :SPARSE:61] / (v[rows, :SPARSE:61].sqrt() + EPS)
        if step > options.steps // 4:
            for lag in range(LAGS + 1):
                common[lag] += (past[(step - lag) % (LAGS + 1)] * past[step % (LAGS + 1)]).mean(-1)
    with torch.no_grad():
        windows = text[cut:].unfold(0, SEQ + 1, SEQ).split(16)
        held_out = sum(losses(w, part.expand(len(w), *part.shape)) * len(part) for part in windows) / sum(map(len, windows))
    return held_out.view(count, -1), (common / common[0]).view(LAGS + 1, count, -1).mean(-1).T


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--at-once", type=int, default=6, help="modes that train side by side")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    if options.device != "cpu":
        global encode, adamw
        encode, adamw = (torch.compile(function, dynamic=False) for function in (encode, adamw))
        torch._dynamo.config.recompile_limit = 64
    # In the order of their names' last letters, so that what is held out is of all kinds.
    topic = lambda name: topics.topics[name]
    read = pathlib.Path(options.text).read_bytes() if options.text else "\n".join(map(topic, sorted(topics.topics, key=lambda name: name[::-1]))).encode()
    text = torch.tensor(list(read)).to(options.device)
    dense = None
    for at in range(0, len(options.modes), options.at_once):
        names = options.modes[at : at + options.at_once]
        results = train([MODES[name] for name in names], text, options)
        for name, held_out, lags in zip(names, *(result.tolist() for result in results)):
            dense = held_out if name == "dense" else dense
            above = [100 * (loss / other - 1) for loss, other in zip(held_out, dense or held_out)]
            print(json.dumps({
                "mode": name, "steps": options.steps, "learning_rate": options.learning_rate, "seeds": options.seeds,
                "loss": held_out, "percent_above_dense": above if dense else None, "mean_percent": statistics.mean(above) if dense else None,
                "standard_error_percent": statistics.stdev(above) / math.sqrt(len(above)) if dense and len(above) > 1 else None,
                "correlations": [round(lag, 4) for lag in lags[1:]],
            }), flush=True)


if __name__ == "__main__":
    main()
