"""What PowerSGD and bf16 cost torch's DDP in loss at equal steps: a Llama of 2.6 M parameters on the bytes of a text, two
processes over Gloo on this machine, different data on each; the loss over the last tenth, beside that of fp32.

    .venv/bin/python tests/peers/powersgd_losses.py --text ../shared/data/tinyshakespeare/input.txt

Needs torch. Prints one JSON object a run: hook, seed, steps, held-out loss in nats a byte, and percent above fp32 of the
same seed.
"""

import argparse
import json
import multiprocessing
import os
import socket

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

HIDDEN, FEED_FORWARD, HEADS, LAYERS, VOCABULARY = 256, 688, 4, 3, 256
ROWS, LENGTH, RANKS = 4, 128, 2


class Block(nn.Module):
    """Attention with rotated queries and keys, and a gated feed-forward, each behind a norm."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.RMSNorm(HIDDEN, 1e-5), nn.RMSNorm(HIDDEN, 1e-5)
        self.queries, self.keys, self.values, self.out = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(HIDDEN, FEED_FORWARD, bias=False) for _ in range(2))
        self.down = nn.Linear(FEED_FORWARD, HIDDEN, bias=False)

    def forward(self, x):
        rows, length, _ = x.shape
        heads = lambda y: y.view(rows, length, HEADS, -1).transpose(1, 2)
        n = self.before(x)
        q, k, v = rotated(heads(self.queries(n))), rotated(heads(self.keys(n))), heads(self.values(n))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        n = self.after(x)
        return x + self.down(F.silu(self.gate(n)) * self.up(n))


def rotated(x):
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[-2]), 10000.0 ** (-torch.arange(half) / half))
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.RMSNorm(HIDDEN, 1e-5), nn.Linear(HIDDEN, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens):
        return self.head(self.norm(self.blocks(self.table(tokens))))


def loss_of(model, windows):
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def train(rank, port, hook, seed, steps, path, told):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    text = torch.frombuffer(bytearray(open(path, "rb").read()), dtype=torch.uint8).long()
    cut = len(text) * 9 // 10
    torch.manual_seed(seed)
    model = Llama()
    # One bucket: with several of them at a time Gloo ends most runs of PowerSGD's hook with "Received data size doesn't match
    # expected size".
    ddp = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=64)
    if hook == "bf16":
        ddp.register_comm_hook(None, default_hooks.bf16_compress_hook)
    elif hook.startswith("powersgd"):
        k = int(hook.removeprefix("powersgd"))
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=k, start_powerSGD_iter=10)
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    optimizer = torch.optim.AdamW(ddp.parameters(), 1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = steps // 10
    rate = lambda step: min((step + 1) / warmup, 1 - 0.9 * max(step - warmup, 0) / (steps - warmup))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    draw = torch.Generator().manual_seed(1000 * seed + rank)
    for _ in range(steps):
        starts = torch.randint(cut - LENGTH - 1, (ROWS,), generator=draw)
        loss_of(ddp, torch.stack([text[at : at + LENGTH + 1] for at in starts])).backward()
        nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    if rank == 0:
        windows = text[cut : cut + (len(text) - cut - 1) // LENGTH * LENGTH + 1].unfold(0, LENGTH + 1, LENGTH)
        with torch.no_grad():
            told.put(sum(loss_of(model, part).item() * len(part) for part in windows.split(32)) / len(windows))
    dist.barrier()
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--hooks", nargs="+", default=["fp32", "bf16", "powersgd4", "powersgd1"])
    arguments = parser.parse_args()
    processes = multiprocessing.get_context("spawn")
    for seed in arguments.seeds:
        reference = None
        for hook in arguments.hooks:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            told = processes.Queue()
            of = lambda rank: processes.Process(
                target=train, args=(rank, port, hook, seed, arguments.steps, arguments.text, told)
            )
            ranks = [of(rank) for rank in range(RANKS)]
            [rank.start() for rank in ranks]
            loss = told.get()
            [rank.join() for rank in ranks]
            reference = loss if hook == "fp32" else reference
            line = {"hook": hook, "seed": seed, "steps": arguments.steps, "held_out_loss": round(loss, 5)}
            if reference is not None:
                line["percent_above_fp32"] = round(100 * (loss / reference - 1), 3)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
