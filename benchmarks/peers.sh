#!/usr/bin/env bash
# Builds the programs that qvl is measured against, from the llama.cpp source inside the pinned
# llama-cpp-python source package, so that both sides run the same ggml:
#
#     benchmarks/peers.sh            prints the folder of llama-server, llama-mtmd-cli, llama-bench,
#                                    llama-quantize; the first time it takes some minutes
#
# PEERS_DIR      where to build (default: ${XDG_CACHE_HOME:-~/.cache}/qvl/peers)
# PEERS_SOURCE   an unpacked source package to use instead of downloading one
set -euo pipefail
cd "$(dirname "$0")/.."

version=$(sed -n 's/^llama_cpp_python==//p' constraints.txt)
dir=${PEERS_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/qvl/peers}/$version
bin=$dir/build/bin
programs=(llama-server llama-mtmd-cli llama-bench llama-quantize)

built() { for program in "${programs[@]}"; do [ -x "$bin/$program" ] || return 1; done; }

if ! built; then
    mkdir -p "$dir"
    source=${PEERS_SOURCE:-$dir/llama_cpp_python-$version}
    if [ ! -d "$source/vendor/llama.cpp" ]; then
        echo "Fetching the source of llama-cpp-python $version ..." >&2
        "${PYTHON:-python3}" -m pip download --quiet --no-deps --no-binary :all: -d "$dir" "llama-cpp-python==$version" >&2
        tar -xzf "$dir"/llama_cpp_python-"$version".tar.gz -C "$dir"
    fi
    echo "Compiling ${programs[*]} ..." >&2
    # As llama-cpp-python itself is compiled: for this processor, with OpenMP where there is one.
    cmake -S "$source/vendor/llama.cpp" -B "$dir/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF \
        -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF \
        -DLLAMA_ALL_WARNINGS=OFF >"$dir/configure.log"
    nice -n 10 cmake --build "$dir/build" --parallel "${JOBS:-$(getconf _NPROCESSORS_ONLN)}" \
        --target "${programs[@]}" >"$dir/build.log" 2>&1 || { tail -n 20 "$dir/build.log" >&2; exit 1; }
    built
fi
echo "$bin"
