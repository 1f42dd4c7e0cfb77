#!/usr/bin/env bash
# The paper's GPT-2 medium experiment, start to end: from 24 blocks to as few as match them. For a machine with 8 GPUs of
# 40 GB or more: some days. Every line can be interrupted and run again; preparation and training go on where they were.
#   bash runs/gpt2_medium.sh
# On several machines, replace `torchrun --nproc_per_node=8` as docs/training.md says under "Several machines".
set -euo pipefail
cd "$(dirname "$0")/.."

# What it will cost: parameters, batch, FLOPs, memory, time. Reads no data and trains nothing.
python train.py config/train_gpt2_medium.py --dry_run

# Data, once: OpenWebText, 9B tokens in GPT-2's vocabulary, 18 GB in data/openwebtext, 54 GB in the hub's cache. Hours.
python prepare_owt.py

# The reference: 24 blocks from random init, 100K steps, into out-gpt2-medium. The longest part. To start from OpenAI's
# weights instead, skip this and give grow.py below --reference=gpt2-medium --reference_config=
torchrun --nproc_per_node=8 train.py config/train_gpt2_medium.py --resume=auto

# Why it should work: which of the reference's layers are lazy (attention of rank one). Minutes, into analysis/.
python analyze.py --ckpt out-gpt2-medium --data data/openwebtext --out analysis

# The method: 12 blocks, and 14, 16, ... if they do not match the reference, each round started from its blocks; then
# the controls from random init. Uses all GPUs by itself.
python grow.py config/grow_gpt2_medium.py

# The result: loss over the whole validation split, the paper's tasks, and some text.
python score.py --ckpt out-grow-gpt2-medium/final --data data/openwebtext
python -m pip install --quiet -r requirements-extra.txt
python score.py --ckpt out-grow-gpt2-medium/final --tasks arc_easy,piqa,sciq,hellaswag,lambada_openai,winogrande,boolq
python sample.py --ckpt out-grow-gpt2-medium/final

# All arms and seeds of the paper's comparison, one table: weeks. --dry_run says what it would cost.
python replicate.py config/replicate_gpt2_medium.py --dry_run
