"""Hosts on a shaped network, in turns of seconds: what two that train together cost beside two that train alone.

    sudo python3 tests/peers/hosts_in_turns.py --hosts-sh ../shared/peers/hosts.sh --tributary target/release/tributary \
        --rate 1gbit --turns 40 int8 sparse24-int8

Needs root and iproute2, as `two_hosts.py` does, which runs its contenders one after the other for a minute each; other work on
the machine comes and goes in minutes too, and counts as the contender's. Here all of them are started at once on the same cores,
and all but one are stopped (SIGSTOP) at any time: each takes `--warm-steps` steps, and then runs for `--turn-s` seconds, then the next. The step that a stop
fell into is left out. A ratio is that of the medians of a turn of the hosts alone, of the slower of them step by
step, over that of the turn after or before it of the hosts together; what is printed is the median over all turns and its standard
error. `mean_ratio` is the sum of all steps of the one over that of the other.
Ranks ask for CUBIC: with `--set parallel.congestion_control=bbr` the steps after a stop pay for it, which BBR takes for a slow line.
`null`, as a contender, is the hosts alone a second time, without a network between them: what it misses to 1 is the method's own error.
"""

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import tempfile
import time

POLL_S = 0.05


class Contender:
    """Hosts that train together with a codec, or each alone (`alone`, `null`)."""

    def __init__(self, args, name, folder, port):
        self.name, self.folder = name, os.path.join(folder, name)
        os.makedirs(self.folder)
        self.alone = name in ("alone", "null")
        self.ranks = args.hosts if self.alone else 1
        self.turns = []
        sets = f"--set metrics.runs_dir={self.folder} --set data.cache_dir={self.folder}/cache --set train.steps=1000000"
        if self.alone:
            sets += " --name rank-$RANK --set parallel.data=1"
        else:
            sets += f" --name rank-0 --set parallel.data={args.hosts} --set compression.codec={name}"
            # No peer is given up because it was stopped.
            sets += " --set parallel.peer_timeout_s=3600 --trusted-network"
        sets += f" --set device.backend={args.backend} --set device.threads=1" if args.backend != "flex" else ""
        sets += "".join(f" --set {key}" for key in args.set)
        # hosts.sh pins rank r to core r.
        pinned = f"cores=({' '.join(args.cores)}); exec taskset -c ${{cores[$RANK]}} " if args.cores else "exec "
        command = ("export -n RANK WORLD_SIZE; " if self.alone else "") + f"{pinned}{args.tributary} train {args.recipe} {sets}"
        line = [args.hosts_sh, "--hosts", str(args.hosts), "--rate", args.rate, "--port", str(port), "--", "bash", "-c", command]
        env = dict(os.environ, OUT_DIR=self.folder)
        self.process = subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def send(self, signal_number):
        """To all processes of its session: a rank that was joined is a child with a process group of its own."""
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/stat") as file:
                    # After the name, which may have spaces: state, parent, group, session.
                    session = int(file.read().rpartition(")")[2].split()[3])
                if session == self.process.pid:
                    os.kill(int(pid), signal_number)
            except (FileNotFoundError, ProcessLookupError):
                pass  # It has ended.

    def lines(self):
        """Seconds of all steps so far, of each process that writes them."""
        found = []
        for rank in range(self.ranks):
            try:
                with open(os.path.join(self.folder, f"rank-{rank}", "metrics.jsonl")) as file:
                    found.append([json.loads(line)["step_s"] for line in file if line.endswith("\n")])
            except FileNotFoundError:
                found.append([])
        return found

    def until(self, over):
        """Waits; a contender that ends before is an error."""
        while not over():
            if self.process.poll() is not None:
                with open(os.path.join(self.folder, "rank-0.log")) as file:
                    raise SystemExit(f"{self.name} has ended with {self.process.returncode}: {file.read()[-600:]}")
            time.sleep(POLL_S)

    def turn(self, seconds):
        before = [len(steps) for steps in self.lines()]
        self.send(signal.SIGCONT)
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= end)
        self.send(signal.SIGSTOP)
        # The first line of the turn is of a step that was stopped.
        steps = [steps[start + 1 :] for start, steps in zip(before, self.lines())]
        self.turns.append([max(together) for together in zip(*steps)])

    def end(self):
        if self.process.poll() is None:
            self.send(signal.SIGCONT)
            self.send(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.send(signal.SIGKILL)
                self.process.wait()


def error_of_median(values):
    """If they are normally distributed; turns that follow one another share a neighbour, which this leaves out."""
    return math.sqrt(math.pi / 2 * statistics.variance(values) / len(values))


def ratios(alone, together):
    """Of turn k together beside the two turns alone around it."""
    around = [before + after for before, after in zip(alone, alone[1:])]
    return [statistics.median(steps) / statistics.median(turn) for steps, turn in zip(around, together)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts-sh", required=True)
    parser.add_argument("--tributary", required=True)
    parser.add_argument("--recipe", default="recipes/two-hosts.toml")
    parser.add_argument("--backend", default="flex")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--cores", nargs="+", help="of each host, if not the first ones: such as share no core with each other")
    parser.add_argument("--turns", type=int, default=20, help="of each contender")
    parser.add_argument("--warm-steps", type=int, default=12, help="of each contender, before the first turn")
    parser.add_argument("--turn-s", type=float, default=12.0)
    parser.add_argument("contenders", nargs="+", metavar="CODEC", help="or null")
    args = parser.parse_args()
    if args.cores and len(args.cores) != args.hosts:
        parser.error(f"--cores: expected one for each of {args.hosts} hosts, found {len(args.cores)}")
    if args.turns < 2:
        parser.error(f"--turns: expected at least 2, found {args.turns}")
    with tempfile.TemporaryDirectory() as folder:
        contenders = []
        try:
            for index, name in enumerate(["alone", *args.contenders]):
                contenders.append(Contender(args, name, folder, 29500 + index))
                contenders[-1].until(lambda: all(len(steps) >= args.warm_steps for steps in contenders[-1].lines()))
                contenders[-1].send(signal.SIGSTOP)
            for _ in range(args.turns):
                for contender in contenders:
                    contender.turn(args.turn_s)
            contenders[0].turn(args.turn_s)
        finally:
            for contender in contenders:
                contender.end()
    if not all(turn for contender in contenders for turn in contender.turns):
        raise SystemExit("--turn-s: expected so many seconds that each turn has a step of its own, found a turn without one")
    alone, *others = [contender.turns for contender in contenders]
    for name, turns in zip(args.contenders, others):
        found = ratios(alone, turns)
        sums = [statistics.mean(step for turn in each for step in turn) for each in (alone, turns)]
        row = {"hosts": args.hosts, "rate": args.rate, "how": name, "turns": len(found), "steps": sum(map(len, turns))}
        row["alone_s"] = round(statistics.median(step for turn in alone for step in turn), 4)
        row["step_s"] = round(statistics.median(step for turn in turns for step in turn), 4)
        row["ratio"], row["ratio_error"] = round(statistics.median(found), 4), round(error_of_median(found), 4)
        row["mean_ratio"] = round(sums[0] / sums[1], 4)
        row["ratios"] = [round(ratio, 3) for ratio in found]
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    # Whoever is stopped or in turn ends with it, also when time is up.
    signal.signal(signal.SIGTERM, lambda *_: exit(143))
    main()
