#!/bin/bash
# Two ranks whose run folder is on a file system that is really full for a while: a small tmpfs, which root may mount.
#
#   cargo build --release && sudo tests/peers/full_disk.sh [BINARY]
#
# The first checkpoint of the quickstart (80 MB with residuals) fits, the next one does not; when that was said there is room
# again. Exit code 0: training went on with every step in the metrics, the last good checkpoint stayed and was whole, a later one was
# written and is whole, no left-over is there, and the run ended at the parameters of one that nobody disturbed. The control: where
# nobody makes room the run takes every step too, and fails at its end, with the last good checkpoint still whole.
set -euo pipefail
binary=$(realpath "${1:-target/release/tributary}")
steps=60
# Far longer than it takes: whatever hangs is an error.
wait_s=600
place=$(mktemp -d)
run=""
tidy() {
    [ -z "$run" ] || kill "$run" 2>/dev/null || true
    wait || true
    umount "$place/full" 2>/dev/null || true
    rm -r "$place"
}
trap tidy EXIT
mkdir "$place/full" "$place/quiet"
mount -t tmpfs -o size=120m tmpfs "$place/full"

train() { # in the folder $1
    exec timeout $wait_s "$binary" train recipes/quickstart.toml --name a --set metrics.runs_dir="$1" --set parallel.data=2 \
        --set compression.codec=int8 --set checkpoint.every=8 --set checkpoint.keep_last=1 --set train.steps=$steps \
        --set eval.every=0 >/dev/null
}
events="$place/full/a/events.jsonl"
seen() { grep -q "\"$1\"" "$events" 2>/dev/null; }
last() { grep "\"$1\"" "$events" | tail -n 1 | grep -o '"step":[0-9]*' | cut -d: -f2; }
fail() { echo "failed: $*" >&2; tail -n 5 "$place/log" >&2; exit 1; }
fill() { # until a checkpoint did not fit
    (train "$place/full") 2>"$place/log" &
    run=$!
    while kill -0 $run 2>/dev/null && ! seen checkpoint_failed; do sleep 0.2; done
    seen checkpoint_failed || fail "no checkpoint failed"
    echo "full:      $(df --output=used,avail -m "$place/full" | tail -n 1 | xargs) MiB used and free, kept: $(ls "$place/full/a/checkpoints" | xargs)"
    "$binary" verify a --runs-dir "$place/full"
}
every_step() {
    [ "$(wc -l <"$place/full/a/metrics.jsonl")" = $steps ] || fail "not every step is in the metrics"
    grep -q "training goes on" "$place/log" || fail "it did not say that training goes on"
    grep "training goes on" "$place/log" | head -n 1
}
hash_of() { grep -o '"parameter_hash": *"[0-9a-f]*"' "$1/a/run.json" || fail "no parameters in $1"; }

(train "$place/quiet") 2>"$place/log" || fail "the run that nobody disturbs"

fill
mount -o remount,size=1g "$place/full"
wait $run || fail "the run ended with $?"
every_step
failed=$(last checkpoint_failed)
written=$(last checkpoint)
echo "room again: step $failed's was the last that failed, step $written's was written"
"$binary" verify a --runs-dir "$place/full"
[ "$written" = $steps ] && [ "$failed" -lt $steps ] || fail "none was written after it"
[ "$(ls "$place/full/a/checkpoints" | xargs)" = "$(printf 'step-%08d' $steps)" ] || fail "something is left over"
found=$(hash_of "$place/full")
expected=$(hash_of "$place/quiet")
[ "$found" = "$expected" ] || fail "another end: $found, not $expected"
echo "the same:  $found"

rm -r "$place/full/a"
mount -o remount,size=120m "$place/full"
fill
if wait $run; then fail "the control: it was content without its last checkpoint"; else code=$?; fi
every_step
echo "control:   nobody made room, and the run ended with $code: $(tail -n 1 "$place/log")"
"$binary" verify a --runs-dir "$place/full"
[ "$(ls "$place/full/a/checkpoints" | xargs)" = step-00000008 ] || fail "the last good one is gone"
