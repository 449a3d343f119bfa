#!/usr/bin/env bash
# Trains on a Cloud TPU: makes the TPU VM if it is missing, copies this repository to all its
# workers, installs there and runs one process a worker. Arguments after NAME go to `mixlab train`:
#   TPU_ZONE=us-central2-b bash launch/tpu_vm.sh pod --config configs/quickstart.py --workdir runs/pod
# What is copied is what is committed. Run it again after an interruption, and it goes on from there.
# Process 0 alone writes the workdir, on worker 0, whose disk goes with a TPU that is deleted or was
# preempted: attach another for it, or copy it in time. The TPU stays, and costs, until:
#   gcloud compute tpus tpu-vm delete NAME
#   TPU_ZONE=ZONE (needed)   TPU_TYPE=v4-32   TPU_VERSION=tpu-ubuntu2204-base   TPU_OPTIONS="--spot"
set -euo pipefail
if [ $# -lt 1 ]; then
  echo "usage: TPU_ZONE=ZONE bash launch/tpu_vm.sh NAME --config FILE --workdir DIR ..." >&2
  exit 2
fi
name="$1"
zone="${TPU_ZONE:?the zone of the TPU, for example us-central2-b}"
shift
cd "$(dirname "$0")/.."
tpu() { gcloud compute tpus tpu-vm "$@" --zone "$zone"; }

# shellcheck disable=SC2086
tpu describe "$name" >/dev/null 2>&1 ||
  tpu create "$name" --accelerator-type "${TPU_TYPE:-v4-32}" \
    --version "${TPU_VERSION:-tpu-ubuntu2204-base}" ${TPU_OPTIONS:-}

[ -z "$(git status --porcelain)" ] || echo "What is not committed is not copied to $name" >&2
archive="$(mktemp -d)/mixlab.tar.gz"
trap 'rm -r "$(dirname "$archive")"' EXIT
git archive --format=tar.gz --output="$archive" HEAD
tpu scp "$archive" "$name:" --worker all
# Images for TPUs have Python 3.10; uv, where it is missing, fetches a newer one.
# shellcheck disable=SC2016
tpu ssh "$name" --worker all --command \
  'mkdir -p mixlab && tar -xzf mixlab.tar.gz -C mixlab && export PATH="$HOME/.local/bin:$PATH" &&
  { command -v uv >/dev/null || python3 -m pip install --quiet --user uv; } &&
  MIXLAB_ACCELERATOR=tpu bash mixlab/launch/install.sh'
# JAX finds the other workers by itself.
tpu ssh "$name" --worker all --command \
  "cd mixlab && MIXLAB_PROCESSES=auto .venv/bin/mixlab train $(printf '%q ' "$@")"
