#!/usr/bin/env bash
# How the gain of inheriting moves with depth: references of 4 and 12 blocks beside the 8 of config/replicate_mini.py,
# with the same data, steps and seed, and models of half their blocks for half of the steps -> results/depth. An hour and
# a half on one core; interrupted, it goes on.
#   bash runs/depth.sh
# results/depth holds rows from another machine's references, which replicate.py does not mix with yours: move it away first.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -x .venv/bin/python ] && python=.venv/bin/python

[ -f data/python/meta.json ] || "$python" prepare.py
for depth in ${*:-4 12}; do
  "$python" train.py config/replicate_mini_reference.py --n_layer="$depth" --seed=1 --device=cpu --threads=1 \
    --out_dir="out/depth/$depth/reference" --resume=auto
  "$python" replicate.py config/replicate_mini.py --reference_config= --reference="out/depth/$depth/reference" \
    --layers=$((depth / 2)) --arms="random@max_iters=1000 inheritune@max_iters=1000" --jobs=1 \
    --out_dir="out/depth/$depth" --results="results/depth/$depth"
done
