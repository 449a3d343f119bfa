#!/usr/bin/env bash
# Trains with N processes on this machine; each holds its part of the agents. Arguments after N go to
# `mixlab train`:
#   bash launch/processes.sh 2 --config configs/quickstart.py --workdir runs/two
# The result is that of one process. SIGTERM or Ctrl-C stops all of them, saved; where one fails, the
# others are ended.
#   MIXLAB_COORDINATOR=HOST:PORT   where process 0 is found (default: a free port of this machine)
#   MIXLAB=COMMAND                 (default: .venv/bin/mixlab)
set -euo pipefail
if [[ ! "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: bash launch/processes.sh N --config FILE --workdir DIR ..." >&2
  exit 2
fi
export MIXLAB_PROCESSES="$1"
shift
mixlab=("$(dirname "$0")/../.venv/bin/mixlab") # the path may hold spaces, which part a command's words
[ -z "${MIXLAB:-}" ] || read -ra mixlab <<<"$MIXLAB"
port=$((20000 + $$ % 10000))
while (: <"/dev/tcp/localhost/$port") 2>/dev/null; do port=$((port + 1)); done
export MIXLAB_COORDINATOR="${MIXLAB_COORDINATOR:-localhost:$port}"
gpus=0
command -v nvidia-smi >/dev/null 2>&1 && gpus="$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)"

pids=()
for ((process = 0; process < MIXLAB_PROCESSES; process++)); do
  export MIXLAB_PROCESS="$process"
  # One GPU a process, where there are enough; JAX would give each process all of them.
  ((gpus < MIXLAB_PROCESSES)) || export JAX_LOCAL_DEVICE_IDS="$process"
  "${mixlab[@]}" train "$@" &
  pids+=($!)
done
# The processes agree on the step at which they stop, whichever of them hears of it.
told=0
trap 'told=1; kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
status=0
left="$MIXLAB_PROCESSES"
while ((left > 0)); do
  code=0
  wait -n || code=$?
  if ((told)); then # the signal ended the wait, not a process
    told=0
    continue
  fi
  left=$((left - 1))
  if ((code != 0 && status == 0)); then
    status=$code
    sleep 5 # for the others to say why, if they know
    kill -KILL "${pids[@]}" 2>/dev/null || true
  fi
done
exit "$status"
