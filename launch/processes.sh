#!/usr/bin/env bash
# N processes on this machine, each with its share of the GPUs: launch/processes.sh N CONFIG WORKDIR [--config.x=y ...]
# On a machine without GPUs every process brings one CPU device, to try a multi-process run out.
set -euo pipefail
count=$1 config=$2 workdir=$3
shift 3
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
port=${PORT:-$((20000 + RANDOM % 10000))}
pids=()
# Each process gets one signal: a second one would end it before it has saved. Ctrl-C reaches them by itself.
trap 'trap "" TERM; kill -TERM "${pids[@]}"' TERM
trap : INT
for ((process = 0; process < count; process++)); do
  if ((gpus > 0)); then
    share=$((gpus / count))
    CUDA_VISIBLE_DEVICES=$(seq -s, $((process * share)) $((process * share + share - 1)))
    export CUDA_VISIBLE_DEVICES
  fi
  python -m dmax_jax.train --config="$config" --workdir="$workdir" --distributed \
    --coordinator="localhost:$port" --processes="$count" --process="$process" "$@" &
  pids[process]=$!
done
status=0 code=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" && code=0 || code=$?; done # a signal interrupts wait
  if ((code > 0)); then status=$code; fi
done
exit "$status"
