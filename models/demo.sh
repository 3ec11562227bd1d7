#!/usr/bin/env bash
# `make demo`: the whole path, from a checkpoint to answers, on sample pictures. Writes into demo/.
set -euo pipefail
cd "$(dirname "$0")/.."

export PATH="$PWD/${VENV:-.venv}/bin:$PATH"
samples=models/samples
started=$SECONDS
exec 3>&1 # commands are shown even where their own output goes to a file

say() { printf '\n# %s\n' "$*"; }
# What answers.json says of a sample, so that every answer can be judged: FILE QUESTION
truth() {
    python -c 'import json, sys
for r in json.load(open("models/samples/answers.json")):
    for q, a in r["turns"] + [[g["question"], g["pixels"]] for g in [r.get("ground")] if g]:
        if sys.argv[1] in (r.get("file"), r.get("video"), *r.get("files", ())) and q == sys.argv[2]:
            print(str(a).replace("\n", " "))' "$1" "$2"
}
# Ask about one sample: WHAT OPTION FILE QUESTION [MORE OPTIONS]
ask() {
    say "$1 The truth: $(truth "$3" "$4")"
    run qvl chat "${model[@]}" "$2" "$samples/$3" "${@:5}" -p "$4" || say "No answer this time."
}
run() {
    printf '$' >&3
    for word in "$@"; do
        case $word in *\ *) printf ' "%s"' "$word" >&3 ;; *) printf ' %s' "$word" >&3 ;; esac
    done
    printf '\n' >&3
    "$@"
}

mkdir -p demo
if [ -f models/nano/model.safetensors ]; then
    say "The checkpoint: models/nano, a small Qwen2-VL of our own, trained on drawn shapes, digits and words."
    checkpoint=models/nano
else
    say "No trained checkpoint is here, so this is a tiny one with RANDOM weights: its answers mean nothing."
    checkpoint=demo/random
    rm -rf "$checkpoint"
    PYTHONPATH=tests python -c 'from pathlib import Path
from support.checkpoint import Style, write_checkpoint
write_checkpoint(Path("demo/random"), style=Style(chat_template="chatml"))'
fi
model=(-m demo -n 48)

say "Convert it to two GGUF files: 4 bits for the decoder, 8 for the image encoder."
run qvl convert "$checkpoint" -o demo --name demo --type q4_k_m --vision-type q8_0 --force

ask "What is in the picture?" --image one.png "Describe this image."
ask "A JPEG that is stored on its side." --image rotated.jpg "Describe this image."
ask "Where is it? The box is drawn into demo/boxes.png." --image one.png "Find the red star." --draw demo/boxes.png --force
ask "Read digits." --image number.png "Read the text."
ask "Two pictures in one question." --image before.png "What differs?" --image "$samples/after.png"
ask "A video." --video moves.mp4 "What moves where?"
ask "Another one." --video order.avi "In what order do the shapes appear?"

say "Captions for a folder, one JSON object a line."
run qvl caption "${model[@]}" "$samples" >demo/captions.jsonl
head -n 3 demo/captions.jsonl | cut -c 1-150

say "Done in $((SECONDS - started)) s. Next, a conversation:"
printf '%s/bin/qvl chat -m demo %s\n' "${VENV:-.venv}" "$samples/two.jpg"
