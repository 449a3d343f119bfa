#!/usr/bin/env bash
# From nothing to a result: installs mixlab into .venv and trains eight agents on a ring, five ways,
# on data that comes with the installation. Arguments go to `mixlab train`:
#   bash launch/quickstart.sh --config.agents=16
# Run it again after an interruption, and it goes on from there.
#   MIXLAB_ACCELERATOR=cpu|cuda|tpu   which JAX to install (default: what is there)
#   MIXLAB_WORKDIR=DIR                where the run is kept (default: runs/quickstart)
set -euo pipefail
source "$(dirname "$0")/install.sh" "" # no extras: without an argument it would take this script's
workdir="${MIXLAB_WORKDIR:-runs/quickstart}"
.venv/bin/mixlab train --config configs/quickstart.py --workdir "$workdir" "$@"
cat <<EOF

What to try next
  .venv/bin/mixlab train --config configs/quickstart.py --workdir runs/cutmix \\
    --config.augment='cutmix(alpha=1.0)' --config.topology=exponential
  .venv/bin/mixlab train --config configs/cifar10_dimat.py:smoke --workdir runs/cifar10
    (CIFAR-10 by TensorFlow Datasets: bash launch/install.sh data first)
  bash launch/test.sh
EOF
