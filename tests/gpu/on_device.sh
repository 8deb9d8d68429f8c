#!/usr/bin/env bash
# Everything that waits for a GPU, unattended, on a machine without Rust.
#
# Where Rust is:    tests/gpu/on_device.sh pack FOLDER      builds and gathers what the other machine needs, about 100 MB
# Where a GPU is:   FOLDER/on_device.sh run [RESULTS]       tests against the real driver, sanitizers, benchmarks
#                   FOLDER/on_device.sh rehearse            the same on the fake driver in FOLDER, small: where no GPU is
#
# Needs bash and the NVIDIA driver; the trainer needs cuBLASLt (python3 with torch has it). compute-sanitizer, and python3 with torch,
# transformers and peft, are used where they are found. 44 GB of disk are used for 8B checkpoints (CHECKPOINT_FOLDER, by default a
# temporary folder). SMOLLM2, a folder with SmolLM2-135M, and COMMONSENSE, one with commonsense_15k_train.json and
# commonsense_15k_validation.jsonl, are trained and judged where they are given. The exit code is 0 where every check passed.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

pack() {
    local to=$1 root
    root=$(cd "$here/../.." && pwd)
    mkdir -p "$to/fake" "$to/fixtures"
    cd "$root" || exit 1
    # The paths of what was built, from cargo itself.
    executable() {
        "$@" --message-format=json 2>/dev/null | grep -o '"executable":"[^"]*"' | tail -1 | cut -d'"' -f4
    }
    cargo build --locked --release || exit 1
    cargo test --locked --release --test gpu --no-run || exit 1
    cargo bench --locked --bench gpu --bench gpu_train --no-run || exit 1
    cp target/release/neuroada-ckpt "$to/"
    cp "$(executable cargo test --locked --release --test gpu --no-run)" "$to/gpu-tests"
    cp "$(executable cargo bench --locked --bench gpu --no-run)" "$to/gpu-bench"
    cp "$(executable cargo bench --locked --bench gpu_train --no-run)" "$to/gpu-train-bench"
    cp tests/gpu/on_device.sh tests/gpu/torch_*.py "$to/"
    cp -r fixtures/tiny-llama fixtures/reference fixtures/data/commonsense-options.jinja "$to/fixtures/"
    # For the rehearsal: the driver that the tests build.
    c++ -std=c++17 -O2 -fPIC -shared -ffp-contract=off -Wno-unknown-pragmas -Wl,-soname,libcuda.so -o "$to/fake/libcuda.so" \
        tests/gpu/fake_driver.cpp || echo "no C++ compiler: no rehearsal"
    c++ -std=c++17 -O2 -fPIC -shared -ffp-contract=off -Wno-unknown-pragmas -Wl,-soname,libcublasLt.so.12 \
        -o "$to/fake/libcublasLt.so.12" tests/gpu/fake_cublaslt.cpp -ldl
    echo "packed: $to"
}

n_failed=0
# check NAME COMMAND...: runs it, keeps what it says, goes on.
check() {
    local name=$1 code
    shift
    printf '\n== %s\n+ %s\n' "$name" "$*"
    "$@" 2>&1 | tee "$results/$name.txt"
    code=${PIPESTATUS[0]}
    if ((code)); then
        echo "FAILED ($code): $name"
        n_failed=$((n_failed + 1))
    fi
}

same_masks() {
    local ckpt=$here/neuroada-ckpt line n=0
    local base=$here/fixtures/tiny-llama
    while read -r line; do
        "$ckpt" mask "$base" $line --force -q -o "$results/cpu" --device cpu || return 1
        "$ckpt" mask "$base" $line --force -v -o "$results/gpu" --device cuda --check=1 >/dev/null || return 1
        cmp "$results/cpu" "$results/gpu" || return 1
        n=$((n + 1))
    done <<LINES
--k 1
--k 20
--k 50
--k 3 --score smallest
--k 3 --score gradient --gradients $base
--k 3 --score snip --gradients $base
--k 40 --score fisher --gradients $base
LINES
    echo "$n masks are the CPU's, byte for byte"
}

# The mask of a large checkpoint, from the page cache, on both.
large_masks() {
    local ckpt=$here/neuroada-ckpt k
    for k in 1 20 256; do
        "$ckpt" mask "$1" --k $k --force -v -o "$results/cpu" --device cpu >/dev/null || return 1
        "$ckpt" mask "$1" --k $k --force -v -o "$results/gpu" --device cuda --check >/dev/null || return 1
        cmp "$results/cpu" "$results/gpu" || return 1
    done
    echo "masks of the large checkpoint are the CPU's, byte for byte"
}

# LoRA merges of the large checkpoint in $1, on both; dry runs compute the same and write nothing.
large_merges() {
    local ckpt=$here/neuroada-ckpt rank device line
    local TIMEFORMAT="%R s"
    for rank in 16 256; do
        for device in cpu cuda; do
            line="merge $1/8b.safetensors --adapter $1/8b-lora-r$rank --device $device --no-ledger --max-memory 4G --gpu-memory 4G -v"
            echo "rank $rank, $device, computing alone:"
            time "$ckpt" $line -o "$1/none.safetensors" --dry-run >/dev/null || return 1
            echo "rank $rank, $device:"
            time "$ckpt" $line -o "$1/merged-$device.safetensors" --force >/dev/null || return 1
        done
        cmp "$1/merged-cpu.safetensors" "$1/merged-cuda.safetensors" || return 1
        rm -f "$1/merged-cpu.safetensors" "$1/merged-cuda.safetensors"
    done
    echo "merges into the large checkpoint are the CPU's, byte for byte"
}

# Three epochs, and how many held-out answers are right before and after: labels, as the paper has it, and the options' texts.
smollm2() {
    local ckpt=$here/neuroada-ckpt k template adapter data=$COMMONSENSE/commonsense_15k held_out
    for template in commonsense "$here/fixtures/commonsense-options.jinja"; do
        held_out=(--data "${data}_validation.jsonl" --template "$template" --device cuda)
        "$ckpt" eval "$SMOLLM2" "${held_out[@]}" || return 1
        for k in 1 8; do
            adapter=$results/smollm2-k$k-$(basename "$template" .jinja)
            "$ckpt" train "$SMOLLM2" --k $k --lr "$([ $k = 1 ] && echo 2e-2 || echo 5e-3)" --data "${data}_train.json" --template "$template" \
                --eval-data "${data}_validation.jsonl" --eval-limit 200 --seed 1 --force -o "$adapter" --device cuda || return 1
            "$ckpt" eval "$SMOLLM2" -a "$adapter" "${held_out[@]}" || return 1
        done
    done
}

run() {
    results=${1:-$here/results}
    mkdir -p "$results"
    export NEUROADA_TEST_FIXTURES=$here/fixtures
    local folder made=""
    folder=${CHECKPOINT_FOLDER:-}
    if [ -z "$folder" ]; then
        folder=$(mktemp -d)
        made=$folder
    fi
    check devices "$here/neuroada-ckpt" inspect --devices
    check tests "$here/gpu-tests" kernels:: products:: attention:: operations:: conformance:: --test-threads=1
    check masks same_masks
    if command -v compute-sanitizer >/dev/null && [ -z "$small" ]; then
        for tool in memcheck racecheck synccheck initcheck; do
            check "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$here/gpu-tests" kernels:: attention:: --test-threads=1 \
                --skip=greatest_length
        done
    else
        echo "skipped: compute-sanitizer is not on the PATH"
    fi
    check bench "$here/gpu-bench" $small "$folder"
    check large-masks large_masks "$folder/8b.safetensors"
    check large-merges large_merges "$folder"
    if [ -z "$small" ] && python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
        check torch python3 "$here/torch_topk.py" "$results/bench.txt"
    else
        echo "skipped: no torch with CUDA to compare with"
    fi
    check train "$here/gpu-train-bench" $small "$folder"
    if [ -z "$small" ] && python3 -c 'import sys, torch, transformers; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
        check train-rivals python3 "$here/torch_train.py" "$results/train.txt" "$folder/1b"
    else
        echo "skipped: no torch and transformers with CUDA to compare with"
    fi
    if [ -n "${SMOLLM2:-}" ] && [ -n "${COMMONSENSE:-}" ]; then
        check smollm2 smollm2
    else
        echo "skipped: SMOLLM2 and COMMONSENSE are not given"
    fi
    [ -z "$made" ] || rm -rf "$made"
    rm -f "$results/cpu" "$results/gpu"
    printf '\n%s checks failed; what was said is in %s\n' "$n_failed" "$results"
    ((n_failed == 0))
}

small=""
case ${1:-} in
pack) pack "${2:?pack FOLDER}" ;;
run)
    export NEUROADA_TEST_GPU=real
    run "${2:-}"
    ;;
rehearse)
    # Found before any other driver, and by its name once it is loaded.
    export NEUROADA_TEST_DRIVER=$here/fake LD_LIBRARY_PATH=$here/fake
    small=--small
    run "${2:-}"
    ;;
*)
    sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
    ;;
esac
