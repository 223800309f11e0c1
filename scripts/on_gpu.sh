#!/usr/bin/env bash
# What only a GPU can tell, on a machine with torch, Triton and numpy: no network, nothing of this project needs to be there.
#
#     scripts/on_gpu.sh wheels              here, after `make`, with a network: wheels of what torch does not bring, into wheels/
#     scripts/on_gpu.sh run OUT             there: every slice, one after the other
#     scripts/on_gpu.sh run OUT linear      there: one slice; none takes more than nine minutes
#     scripts/on_gpu.sh table OUT           OUT/*.json as one Markdown table, OUT/gpu.md
#
# Slices: suite (tests with real CUDA), linear (GEMV and GEMM beside torch), decode (7B- and 8B-shaped models beside transformers),
# blocks (ptq, distill and act-calib of one real block, peaks beside forecasts), pipeline (the toy through every command, and
# SmolLM2-135M where models/smollm2-135m is there). Each writes OUT/SLICE.json as it goes; a slice that is there is not run again, one
# in which something failed is, and `run` ends with 1.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
slices="suite linear decode blocks pipeline"

# Of the machine's own torch and Triton nothing is replaced: wheels are installed without what they depend on, all of which
# scripts/gpu_wheels.py names.
wheels() {
    local wanted platform=()
    wanted=$(.venv/bin/python scripts/gpu_wheels.py)
    for tag in 2_28 2_27 2_17; do platform+=(--platform "manylinux_${tag}_x86_64"); done
    # shellcheck disable=SC2086 - a word for each
    $python -m pip download --quiet --no-deps --only-binary=:all: --python-version "${1:-3.12}" --implementation cp \
        "${platform[@]}" --platform manylinux2014_x86_64 --dest wheels $wanted
    du -sh wheels
}

# An environment that sees the machine's torch, with what is missing beside it.
prepare() {
    [ -e .venv-gpu/.ready ] && return
    $python -m venv --system-site-packages .venv-gpu
    if [ -d wheels ]; then
        .venv-gpu/bin/python -m pip install --quiet --no-index --no-deps wheels/*.whl
    fi
    local site
    site=$(.venv-gpu/bin/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
    # Not an install: that would build the CPU's library, for which a compiler may be missing.
    echo "$PWD/src" > "$site/lbllm.pth"
    touch .venv-gpu/.ready
}

run() {
    local out=$1 failed=0
    shift
    mkdir -p "$out"
    prepare
    for slice in ${*:-$slices}; do
        if [ -e "$out/$slice.json" ]; then
            echo "$slice: there already"
            continue
        fi
        timeout 540 .venv-gpu/bin/python scripts/bench/gpu.py "$slice" --out "$out" || { echo "$slice: exit $?" && failed=1; }
    done
    .venv-gpu/bin/python scripts/bench/gpu.py table --out "$out"
    return $failed
}

case "${1:-}" in
    wheels) wheels "${2:-}" ;;
    run) shift && run "$@" ;;
    table) "$(ls -d .venv-gpu/bin/python .venv/bin/python 2>/dev/null | head -1)" scripts/bench/gpu.py table --out "$2" ;;
    *) sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' && exit 2 ;;
esac
