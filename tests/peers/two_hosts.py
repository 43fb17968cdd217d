"""Two hosts (or `--hosts` N) on a shaped network: Tributary beside PyTorch's DDP, in rounds, one after the other in each.

    sudo python3 tests/peers/two_hosts.py --hosts-sh ../shared/peers/hosts.sh --peer ../shared/peers/torch_ddp.py \
        --tributary target/release/tributary --python .venv/bin/python

Needs root and iproute2: hosts.sh makes network namespaces. For each rate and each contender: the median step of each
run (`--steps` after `--warmup`) and its median over the rounds, tokens a second of both hosts, and the bytes that the kernel
counted at rank 0's interface for a step, everything of the run included. `alone_ratio` is the step of one host alone
(two of them at once, each on its core, so that both share the machine's memory as two ranks do) over the step of two
together: 1 would be communication that costs nothing. `slowest_ratio` has in place of it the median of the slower of the two steps
of the hosts alone, one by one: ranks that step together wait for the slower one whatever connects them. `quiet_ratio` is the same of the
first quartiles of a run's steps, for a machine that other work shares at times. With `--hosts 4` it is four of them at once, pinned as four together.
`--at-once` is for machines with cores for all: in each round all contenders run at the same time, each on cores of its own, one
place further on in the next round, so that all of them meet the same minutes and, after as many rounds as contenders, the same cores.
`--tls` secures ours by a join secret. With `--backend libtorch`, and a binary that has it, ours computes there.
"""

import argparse
import concurrent.futures
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile

TOKENS = 4 * 256
# `+zstd` is `compression.zstd = "auto"`.
CODECS = ["fp32", "bf16", "int8", "int8+zstd", "sparse24-int8", "int4", "sparse24-int4", "auto"]
HOOKS = ["none", "bf16", "powersgd"]


def hosts(args, rate, place, alone, command, out):
    env = dict(os.environ, OUT_DIR=out)
    if args.tls:
        env["TRIBUTARY_JOIN_SECRET"] = secrets.token_hex(32)
    # hosts.sh pins rank r to core r.
    pinned = f"taskset -c $(({place * args.hosts} + RANK)) " if args.at_once else ""
    alone = "export -n RANK WORLD_SIZE; " if alone else ""
    line = [args.hosts_sh, "--hosts", str(args.hosts), "--rate", rate, "--", "bash", "-c", f"{alone}exec {pinned}{command}"]
    for attempt in range(args.tries):
        ran = subprocess.run(line, env=env, capture_output=True, text=True, timeout=900)
        if ran.returncode == 0:
            return json.loads(ran.stdout.splitlines()[-1])["0"]
        # Gloo under PowerSGD's hook ends now and then with "Received data size doesn't match expected size".
        print(f"try {attempt + 1}: {command}: exit code {ran.returncode}: {ran.stderr[-300:]}", file=sys.stderr, flush=True)
    return None


def tributary(args, rate, place, runs, codec):
    alone = codec is None
    name = "alone-$RANK" if alone else "both"
    sets = f"--set metrics.runs_dir={runs} --set data.cache_dir={runs}/cache --set train.steps={args.warmup + args.steps}"
    ranks = f" --set parallel.data={args.hosts} --set compression.codec={{}}" + ("" if args.tls else " --trusted-network")
    sets += " --set parallel.data=1" if alone else ranks.format(codec.removesuffix("+zstd"))
    sets += f" --set device.backend={args.backend} --set device.threads=1" if args.backend != "flex" else ""
    sets += "".join(f" --set {key}" for key in args.set)
    sets += " --set compression.zstd=auto" if codec and codec.endswith("+zstd") else ""
    sent = hosts(args, rate, place, alone, f"{args.tributary} train {args.recipe} --name {name} {sets}", runs)
    with open(os.path.join(runs, "alone-0" if alone else "both", "metrics.jsonl")) as file:
        lines = [json.loads(line) for line in file]
    # The last step waits for all of its sums at once, which no other does.
    steady = lines[args.warmup:-1]
    names = ["wire_bytes_sent", "overlap", "encode_s", "exposed_s"]
    medians = {name: statistics.median(line[name] for line in steady) for name in names if steady[0].get(name) is not None}
    seconds = [line["step_s"] for line in lines[args.warmup:]]
    medians["quiet_s"] = quiet(seconds)
    if alone:
        # Together every step is as long as the slower one's, whatever connects them.
        for rank in range(1, args.hosts):
            with open(os.path.join(runs, f"alone-{rank}", "metrics.jsonl")) as file:
                others = [json.loads(line)["step_s"] for line in file][args.warmup:]
            seconds = [max(pair) for pair in zip(seconds, others)]
        medians["slowest_s"], medians["quiet_s"] = statistics.median(seconds), quiet(seconds)
        seconds = [line["step_s"] for line in lines[args.warmup:]]
    return statistics.median(seconds), sent, medians


def quiet(seconds):
    """The first quartile: what other work on the machine adds to steps it adds to some of them."""
    return statistics.quantiles(seconds, n=4)[0]


def torch(args, rate, place, out, hook):
    command = f"{args.python} {args.peer} --threads 1 --hook {hook or 'none'} --steps {args.steps} --warmup {args.warmup}"
    sent = hosts(args, rate, place, hook is None, command, out)
    if sent is None:
        return None
    with open(os.path.join(out, "rank-0.log")) as file:
        line = json.loads([line for line in file if line.startswith("{")][-1])
    return line["step_s"], sent, line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts-sh", required=True)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--tributary", required=True)
    parser.add_argument("--python", required=True)
    parser.add_argument("--recipe", default="recipes/two-hosts.toml")
    parser.add_argument("--backend", default="flex")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of our recipe")
    parser.add_argument("--rates", nargs="+", default=["200mbit", "1gbit"])
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--at-once", action="store_true", help="all contenders of all rates at the same time, on cores of their own")
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3, help="steps that do not count: the first ones touch new memory")
    parser.add_argument("--who", nargs="+", default=["tributary", "torch"])
    parser.add_argument("--tries", type=int, default=3, help="of a command that fails")
    parser.add_argument("--only", nargs="+", help="of tributary and torch: alone, a codec, a hook")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps: expected at least 2, found {args.steps}")
    contenders = [("tributary", tributary, name) for name in [None, *CODECS]]
    contenders += [("torch", torch, name) for name in [None, *HOOKS]]
    contenders = [row for row in contenders if row[0] in args.who]
    if args.only:
        contenders = [row for row in contenders if (row[2] or "alone") in args.only]
    at_once = [(rate, row) for rate in args.rates for row in contenders if row[2] or rate == args.rates[0] or not args.at_once]
    if not at_once:
        parser.error("--who and --only leave nothing to measure")
    if args.at_once and (wanted := len(at_once) * args.hosts) > os.cpu_count():
        parser.error(f"--at-once: {len(at_once)} contenders of {args.hosts} hosts want {wanted} cores, and here are {os.cpu_count()}")
    found = {}

    def once(rate, contender, place):
        who, measure, how = contender
        with tempfile.TemporaryDirectory() as folder:
            result = measure(args, rate, place, folder, how)
        if result:
            found.setdefault((rate, who, how), []).append(result)

    for turn in range(args.rounds):
        with concurrent.futures.ThreadPoolExecutor(len(at_once) if args.at_once else 1) as together:
            runs = [together.submit(once, rate, row, (index + turn) % len(at_once)) for index, (rate, row) in enumerate(at_once)]
            for run in runs:
                run.result()
    for rate in args.rates:
        for (of, who, how), results in found.items():
            if of != rate:
                continue
            step = statistics.median(seconds for seconds, _, _ in results)
            row = {"hosts": args.hosts, "rate": rate, "who": who, "how": how or "alone", "step_s": round(step, 4)}
            row["steps_s"] = [round(seconds, 4) for seconds, _, _ in results]
            # A busy machine is busy for minutes: the ratios of each round say more than those of the medians.
            alone = found.get((args.rates[0] if args.at_once else rate, who, None), [])
            if alone:
                row["alone_ratios"] = [round(one / both, 3) for (one, _, _), (both, _, _) in zip(alone, results)]
            if how:
                row["tokens_per_s"] = round(args.hosts * TOKENS / step)
                if alone:
                    row["alone_ratio"] = round(statistics.median(row["alone_ratios"]), 3)
                slowest = [more.get("slowest_s") for _, _, more in alone]
                if slowest and all(slowest):
                    ratios = [round(one / both, 3) for one, (both, _, _) in zip(slowest, results)]
                    row["slowest_ratios"], row["slowest_ratio"] = ratios, round(statistics.median(ratios), 3)
                    ratios = [round(one["quiet_s"] / both["quiet_s"], 3) for (_, _, one), (_, _, both) in zip(alone, results)]
                    row["quiet_ratios"], row["quiet_ratio"] = ratios, round(statistics.median(ratios), 3)
                row["kernel_bytes_a_step"] = round(statistics.median(sent for _, sent, _ in results) / (args.warmup + args.steps))
            last = results[-1][2]
            row.update({key: last[key] for key in ["wire_bytes_sent", "overlap", "encode_s", "exposed_s"] if last.get(key)})
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
