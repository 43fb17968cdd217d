#!/bin/bash
# Two ranks whose run folder is on a file system that is really full for a while: a small tmpfs, which root may mount.
#
#   cargo build --release && sudo tests/peers/full_disk.sh [BINARY]
#
# The first checkpoint of the quickstart (80 MB with residuals) fits, the next one does not; when that was said there is room
# again. Exit code 0: training went on, the last good checkpoint stayed, a later one was written, and all that is there is whole.
set -euo pipefail
binary=$(realpath "${1:-target/release/tributary}")
place=$(mktemp -d)
mount -t tmpfs -o size=120m tmpfs "$place"
trap 'kill $run 2>/dev/null; wait; umount "$place" && rmdir "$place"' EXIT
run=""
events="$place/full/events.jsonl"
seen() { grep -q "\"$1\"" "$events" 2>/dev/null; }

"$binary" train recipes/quickstart.toml --name full --set metrics.runs_dir="$place" --set parallel.data=2 \
    --set compression.codec=int8 --set checkpoint.every=8 --set checkpoint.keep_last=1 --set train.stop_at_step=40 \
    --set eval.every=0 2>"$place.log" &
run=$!
while kill -0 $run 2>/dev/null && ! seen checkpoint_failed; do sleep 0.2; done
echo "full:      $(df --output=used,avail -m "$place" | tail -n 1 | xargs) MiB used and free, kept: $(ls "$place/full/checkpoints" | xargs)"
"$binary" verify full --runs-dir "$place"
mount -o remount,size=1g "$place"
wait $run
grep "training goes on" "$place.log" | head -n 1
rm "$place.log"
failed=$(grep '"checkpoint_failed"' "$events" | tail -n 1 | grep -o '"step":[0-9]*' | cut -d: -f2)
last=$(grep '"checkpoint"' "$events" | tail -n 1 | grep -o '"step":[0-9]*' | cut -d: -f2)
echo "room again: step $failed's was the last that failed, step $last's was written"
"$binary" verify full --runs-dir "$place"
[ "$failed" -gt 0 ] && [ "$last" -gt "$failed" ]
