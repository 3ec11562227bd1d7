#!/usr/bin/env bash
# `make demo`: the whole path, from a checkpoint to answers, on sample pictures. Writes into demo/.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
export PATH="$PWD/$venv/bin:$PATH"
samples=models/samples

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}

if compgen -G 'models/nano/*.safetensors' >/dev/null; then
    checkpoint=models/nano
    echo "The checkpoint is models/nano: a small Qwen2-VL of our own, trained on drawn shapes and digits."
else
    checkpoint=demo/random
    echo "No trained checkpoint is here yet, so this uses a tiny one with RANDOM weights: its answers mean nothing."
    PYTHONPATH=tests python -c 'from pathlib import Path; from support.checkpoint import *
write_checkpoint(Path("demo/random"), style=Style(chat_template="chatml"))'
fi

run qvl convert "$checkpoint" -o demo --type q4_k_m --vision-type q8_0 --force
