#!/usr/bin/env bash
# Builds the programs that qvl is measured against, from the llama.cpp source inside the pinned
# llama-cpp-python source package and against the libraries of the installed one:
#
#     benchmarks/peers.sh            prints the folder of llama-server, llama-mtmd-cli, llama-bench,
#                                    llama-quantize, llama-imatrix; the first time it takes some minutes
#
# PYTHON         of the environment that qvl is installed in (default: .venv/bin/python)
# PEERS_DIR      where to build (default: ${XDG_CACHE_HOME:-~/.cache}/qvl/peers)
# PEERS_SOURCE   an unpacked source package to use instead of downloading one
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
version=$(sed -n 's/^llama_cpp_python==//p' constraints.txt)
dir=${PEERS_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/qvl/peers}/$version
bin=$dir/build/bin
programs=(llama-server llama-mtmd-cli llama-bench llama-quantize llama-imatrix)

built() { for program in "${programs[@]}"; do [ -x "$bin/$program" ] || return 1; done; }

if ! built; then
    mkdir -p "$dir"
    source=${PEERS_SOURCE:-$dir/llama_cpp_python-$version}
    if [ ! -d "$source/vendor/llama.cpp" ]; then
        echo "Fetching the source of llama-cpp-python $version ..." >&2
        "$python" -m pip download --quiet --no-deps --no-binary :all: -d "$dir" "llama-cpp-python==$version" >&2
        tar -xzf "$dir"/llama_cpp_python-"$version".tar.gz -C "$dir"
    fi
    lib=$("$python" -c 'import importlib.util, pathlib as p
print(p.Path(importlib.util.find_spec("llama_cpp").origin).parents[1] / "lib")')
    echo "Compiling ${programs[*]} ..." >&2
    cmake -S benchmarks/peers -B "$dir/build" -DCMAKE_BUILD_TYPE=Release -DSOURCE="$source" -DLIB="$lib" \
        >"$dir/configure.log"
    cmake --build "$dir/build" --parallel "${JOBS:-$(getconf _NPROCESSORS_ONLN)}" \
        >"$dir/build.log" 2>&1 || { tail -n 20 "$dir/build.log" >&2; exit 1; }
    built
fi
echo "$bin"
