#!/usr/bin/env bash
# `make demo`: the whole path, from a checkpoint to answers, on sample pictures. Writes into demo/.
set -euo pipefail
cd "$(dirname "$0")/.."

export PATH="$PWD/${VENV:-.venv}/bin:$PATH"
samples=models/samples
started=$SECONDS
exec 3>&1 # commands are shown even where their own output goes to a file

say() { printf '\n# %s\n' "$*"; }
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
    say "The checkpoint: models/nano, a small Qwen2-VL of our own, trained on drawn shapes and digits."
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

say "What is in the picture? It shows a small red star at the top."
run qvl chat "${model[@]}" --image $samples/one.png -p "Describe this image."

say "Where is it? At [94, 13, 128, 47]. The box is drawn into demo/boxes.png."
run qvl chat "${model[@]}" --image $samples/one.png -p "Find the red star." --draw demo/boxes.png || say "No box this time."

say "Read a picture of digits: 865."
run qvl chat "${model[@]}" --image $samples/number.png -p "Read the text."

say "Two pictures in one question: an orange square became a star. (Right about every second time.)"
run qvl chat "${model[@]}" --image $samples/before.png --image $samples/after.png -p "What differs?"

say "A video: a white star moves down. (Right about every second time.)"
run qvl chat "${model[@]}" --video $samples/moves.mp4 -p "What moves where?"

say "Captions for a folder, one JSON object a line."
run qvl caption "${model[@]}" "$samples" >demo/captions.jsonl
head -n 3 demo/captions.jsonl | cut -c 1-150

say "Done in $((SECONDS - started)) s. Next: qvl chat -m demo --image $samples/two.jpg"
