#!/usr/bin/env bash
# Post-training quantization on one GPU: methods and allocators on trained dense runs, within a time limit.
#
#   benchmarks/ptq_gpu.sh TOKENS OUT MINUTES RUN...
#
# TOKENS is a token store, each RUN the folder of a finished dense run. OUT receives at most seven small files:
# results.csv, table.md, methods.png, ablation.png, bit-map.png, bit-maps.json, problems.txt. What is measured is kept
# in WORK (default /tmp/qpipe-ptq), so that a second call goes on. Needs neither Snakemake nor a network.
set -euo pipefail
cd "$(dirname "$0")/.."
tokens=$1 out=$2 minutes=$3
shift 3
cores=$(nproc)
processes=${PROCESSES:-$((cores > 8 ? 6 : 1))}
mkdir -p "$out"
exec "${PYTHON:-python3}" benchmarks/ptq.py compare "$@" --tokens "$tokens" --out "$out" \
    --work "${WORK:-/tmp/qpipe-ptq}" --minutes "$minutes" --processes "$processes" \
    --threads $((cores / processes > 4 ? 4 : cores / processes)) --validation-tokens "${VALIDATION_TOKENS:-400000}"
