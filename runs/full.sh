#!/usr/bin/env bash
# The whole recipe from nothing, on the demo's text: trains the reference too. An hour on two cores.
#   bash runs/full.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -x .venv/bin/python ] && python=.venv/bin/python

# Data: the documentation and the source files that every CPython carries, as bytes.
"$python" prepare.py

# Trains the reference, 8 blocks for 2,000 steps; then 4 of them for as long, and more until it is matched; then random
# init for as many steps, and for the compute of all of it.
"$python" grow.py config/demo.py --out_dir=out/full --reference= --reference_config=config/replicate_mini_reference.py \
  --max_iters=2000 --warmup_iters=100 --optimizer=adamw --learning_rate=6e-3 --min_lr=6e-4

# Shows which layers of both models are lazy, and what they write.
for model in reference final; do
  "$python" analyze.py --ckpt "out/full/$model" --data data/python --out "out/full/analysis_$model"
  "$python" sample.py --ckpt "out/full/$model" --max_new_tokens 300
done
