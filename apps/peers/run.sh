#!/bin/sh
# vesper and its peers on one machine, in turns, in one table: ROUNDS rounds of vesper bench, a PyTorch decode step,
# PyTorch's attention and FlashInfer's, each over the same contexts and batches. A peer that is not installed says so
# and is left out.
#   apps/peers/run.sh --model synthetic:llama-3.1-8b --context 1k,32k --batch 1 > peers.csv
# Environment: VESPER (build/bin/vesper), PYTHON (python3), ROUNDS (3).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
vesper=${VESPER:-$here/../../build/bin/vesper}
python=${PYTHON:-python3}
rounds=${ROUNDS:-3}

if [ $# -eq 0 ]; then
  echo "usage: run.sh --model synthetic:NAME [--context LIST] [--batch LIST] [--max-tokens N] [--repeats N]" >&2
  exit 2
fi
round=1
while [ "$round" -le "$rounds" ]; do
  if [ "$round" -eq 1 ]; then
    "$vesper" bench "$@" --fill synthetic --attention dense --csv
  else
    "$vesper" bench "$@" --fill synthetic --attention dense --csv | tail -n +2
  fi
  for peer in torch_decode sdpa flashinfer_decode; do
    "$python" "$here/$peer.py" "$@" --no-head || echo "round $round: $peer left out" >&2
  done
  round=$((round + 1))
done
