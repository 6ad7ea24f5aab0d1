#!/usr/bin/env bash
# One process that drives all GPUs of this machine: launch/one_machine.sh CONFIG WORKDIR [--config.x=y ...]
set -euo pipefail
config=$1 workdir=$2
shift 2
exec python -m dmax_jax.train --config="$config" --workdir="$workdir" "$@"
