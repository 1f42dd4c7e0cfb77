#!/usr/bin/env bash
# The whole method on a laptop: no GPU, no network, some minutes on two cores. `make demo` runs it in its own environment.
#   bash runs/demo.sh
set -euo pipefail
cd "$(dirname "$0")/.."

# Data: the documentation that every CPython carries, as bytes, into data/pydocs/{train,val}.bin. Seconds.
python prepare.py

# The method: trains a reference of 8 blocks, inherits 4 of them, trains, compares, and grows by 2 until the reference's
# loss is reached; then the controls from random init. After an interruption run it again: finished parts are skipped.
python grow.py config/demo.py

echo
echo "A sample from the grown model:"
python sample.py --ckpt out/demo/final --max_new_tokens 300
echo
echo "The picture: out/demo/loss.png"
