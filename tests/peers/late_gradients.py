#!/usr/bin/env python3
"""What do gradients that come late cost AdamW? The method of `sparse24`, in PyTorch, without anything of ours.

  python3 tests/peers/late_gradients.py --text FILE [--learning-rate 1e-3] [--steps 400] [--modes dense two-largest ...]

Two ranks in one process train a small Llama on bytes of FILE's first 90 %. Each owns half of every matrix, and hears of the
other rank's half

  dense        everything, in f32
  two-largest  the two largest of every four; the others are added to the next gradient (error feedback)
  in-turns     two of every four, in every other step the other two, with error feedback: at most one step late
  forgetful    the two largest of every four, and never anything of the others

Prints one JSON object a mode: the loss on the last 10 %, in nats a byte, and in percent above `dense`.
"""
import argparse
import json
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

HIDDEN, HEADS, LAYERS, FFN, SEQ, VOCAB, BATCH = 256, 4, 3, 688, 128, 256, 4
WARMUP, FLOOR, CLIP = 40, 0.1, 1.0
HEAD = HIDDEN // HEADS
angle = torch.arange(SEQ)[:, None].float() / (10000 ** (torch.arange(0, HEAD, 2).float() / HEAD))
cos, sin = (f(angle).repeat(1, 2) for f in (torch.cos, torch.sin))


def rotate(x):
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        linear = lambda i, o: nn.Linear(i, o, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(HIDDEN, 1e-5), nn.RMSNorm(HIDDEN, 1e-5)
        self.q, self.k, self.v, self.o = (linear(HIDDEN, HIDDEN) for _ in range(4))
        self.gate, self.up, self.down = linear(HIDDEN, FFN), linear(HIDDEN, FFN), linear(FFN, HIDDEN)

    def forward(self, x):
        n = self.norm1(x)
        split = lambda m: m(n).view(*x.shape[:2], HEADS, HEAD).transpose(1, 2)
        y = F.scaled_dot_product_attention(rotate(split(self.q)), rotate(split(self.k)), split(self.v), is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(x.shape))
        n = self.norm2(x)
        return x + self.down(F.silu(self.gate(n)) * self.up(n))


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.RMSNorm(HIDDEN, 1e-5), nn.Linear(HIDDEN, VOCAB, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def loss(self, tokens):
        logits = self.head(self.norm(self.blocks(self.embed(tokens[:, :-1]))))
        return F.cross_entropy(logits.reshape(-1, VOCAB), tokens[:, 1:].reshape(-1))


def sent(y, mode, step):
    """What of `y` travels in this step."""
    groups = y.view(-1, 4)
    kept = torch.zeros_like(groups, dtype=torch.bool)
    if mode == "in-turns":
        kept[:, :2] = step % 2 == 0
        kept[:, 2:] = step % 2 == 1
    else:
        kept.scatter_(1, groups.abs().topk(2, 1).indices, True)
    return (groups * kept).view(-1)


def train(mode, text, options):
    torch.manual_seed(options.seed)
    draw = torch.Generator().manual_seed(options.seed + 1)
    cut = len(text) * 9 // 10
    model = Llama()
    parameters = list(model.parameters())
    # As ours: embeddings, the head and whatever is small are not made sparse.
    sparse = [p.dim() > 1 and p.numel() >= 65536 and p is not model.embed.weight and p is not model.head.weight for p in parameters]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, options.beta2), weight_decay=0.1)
    late = [torch.zeros(p.numel()) for p in parameters]
    for step in range(1, options.steps + 1):
        ranks = []
        for _ in range(2):
            places = torch.randint(0, cut - SEQ - 1, (BATCH,), generator=draw)
            loss = model.loss(torch.stack([text[i : i + SEQ + 1] for i in places])) / 2
            ranks.append([gradient.reshape(-1) for gradient in torch.autograd.grad(loss, parameters)])
        for index, parameter in enumerate(parameters):
            first, second = ranks[0][index], ranks[1][index]
            if mode == "dense" or not sparse[index]:
                total = first + second
            else:
                half = parameter.numel() // 2
                own, other = torch.cat((first[:half], second[half:])), torch.cat((second[:half], first[half:]))
                y = other + late[index]
                came = sent(y, mode, step)
                if mode != "forgetful":
                    late[index] = y - came
                total = own + came
            parameter.grad = total.view_as(parameter)
        nn.utils.clip_grad_norm_(parameters, CLIP)
        progress = (step - WARMUP) / (options.steps - WARMUP)
        rate = step / WARMUP if step < WARMUP else FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate
        optimizer.step()
    with torch.no_grad():
        windows = text[cut:].unfold(0, SEQ + 1, SEQ)
        losses = [model.loss(batch).item() for batch in windows[: len(windows) // 8 * 8].split(8)]
    return sum(losses) / len(losses)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--beta2", type=float, default=0.95)
    parser.add_argument("--modes", nargs="+", default=["dense", "two-largest", "in-turns", "forgetful"])
    options = parser.parse_args()
    with open(options.text, "rb") as file:
        text = torch.tensor(list(file.read()))
    dense = None
    for mode in options.modes:
        loss = train(mode, text, options)
        dense = loss if mode == "dense" else dense
        print(json.dumps({
            "mode": mode, "steps": options.steps, "learning_rate": options.learning_rate, "seed": options.seed, "loss": loss,
            "percent_above_dense": dense and 100 * (loss / dense - 1),
        }), flush=True)


if __name__ == "__main__":
    main()
