#!/usr/bin/env bash
# torchrun by hand, once on each node: FIRST=node-0 NODES=2 launch/torchrun.sh parallel.ep=8 parallel.dp=16 ...
#
# FIRST is a node's name, the same on all of them: the others meet there. RANKS, 8, is the ranks of a node;
# ID and PORT name the start and its port.
set -euo pipefail
: "${FIRST:?the name of the first node}" "${NODES:?the number of nodes}"

exec torchrun \
    --nnodes="$NODES" --nproc-per-node="${RANKS:-8}" \
    --rdzv-backend=c10d --rdzv-endpoint="$FIRST:${PORT:-29400}" --rdzv-id="${ID:-kimi}" \
    --max-restarts="${RESTARTS:-3}" \
    -m kimi_pretrain.train "$@"
