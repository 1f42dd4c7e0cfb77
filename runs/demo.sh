#!/usr/bin/env bash
# The method on a laptop: no GPU, no network, some five minutes on two cores. `make demo` runs it in its own environment.
#   bash runs/demo.sh
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && own=.venv/bin/python
python=${PYTHON:-${own:-python3}}

# Data: the documentation and the source files that every CPython carries, as bytes, into data/python/{train,val}.bin.
"$python" prepare.py

# The method: 4 of the 8 blocks of a trained reference, trained for 160 steps; then 6, as 4 do not reach its loss (nor do
# 6); then random init for as many steps. After an interruption run it again: finished parts are skipped.
"$python" grow.py config/demo.py

for model in results/mini/reference out/demo/final; do
  echo
  echo "A sample from $model:"
  "$python" sample.py --ckpt "$model" --max_new_tokens 300
done
echo
echo "The picture: out/demo/loss.png"
