#!/bin/sh
# The demonstration on the embedded model: a literary continuation, then a needle question over a long text.
# Usage: configs/demo/run.sh [path of the vesper binary]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
vesper=${1:-$here/../../build/bin/vesper}

# Bold on a terminal.
if [ -t 1 ]; then bold='\033[1m' plain='\033[0m'; else bold='' plain=''; fi
say() { printf "\n$bold%s$plain\n" "$1"; }

say "The model"
"$vesper" info --model "$here"

say "A continuation. The embedded model has 7 million parameters: it has the sound of its novels, and babbles."
prompt="It was a dark and stormy night, and the old house upon the moor"
printf '%s' "$prompt"
"$vesper" generate --log-level warn --model "$here" --prompt "$prompt" --max-tokens 160 --temperature 0.7 --top-p 0.95 --seed 7

if "$vesper" info --model "$here" --device cuda >/dev/null 2>&1; then
  text=needle-16k
else
  text=needle-4k
fi
say "A needle. Among pages of The Hound of the Baskervilles ($text.txt) stands \"One of the special magic numbers for lantern is: 4829173.\"; the question comes at the end."
# A line of its own: a progress bar clears the line that it is drawn on.
echo "... The special magic number for lantern mentioned in the provided text is:"
"$vesper" generate --log-level warn --model "$here" --prompt-file "$here/$text.txt" --max-tokens 16 --temperature 0 --stop "."

say "The same question through decode, under each attention, after one common prefill. On a CPU, and at this size, this shows what is read, not speed."
"$vesper" compare --log-level warn --model "$here" --prompt-file "$here/$text.txt" --decode-last 32 --max-tokens 16 --stop "." \
  --attention dense --with quest:token_budget=512 --with twilight --with vattention:epsilon=0.1,delta=0.1
