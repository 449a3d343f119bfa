#!/usr/bin/env bash
# Installs mixlab with what its tests need into .venv and runs them. Arguments go to pytest:
#   bash launch/test.sh tests/merge -k ties
set -euo pipefail
source "$(dirname "$0")/install.sh" dev
# Two workers: the tests' time is mostly compilation, which one core cannot share.
exec .venv/bin/python -m pytest -n "${MIXLAB_TEST_WORKERS:-2}" --dist loadfile \
  --no-loadscope-reorder --durations=40 "$@"
