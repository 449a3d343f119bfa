#!/usr/bin/env bash
# Makes .venv and installs mixlab in it, editable, with the extras that are named, in the versions of
# launch/constraints.txt. The other scripts source it.
#   bash launch/install.sh data tensorboard
#   MIXLAB_ACCELERATOR=cpu|cuda|tpu   which JAX to install (default: what is there)
#   MIXLAB_CONSTRAINTS=FILE           other versions; an empty value takes the newest
#   PYTHON=python3.12                 the interpreter to make .venv from
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="$*"

# A Google PCI device with the number of a TPU chip; the vendor makes network cards too.
has_tpu() {
  local device
  for device in /sys/bus/pci/devices/*; do
    [ "$(cat "$device/vendor" 2>/dev/null)" = 0x1ae0 ] || continue
    case "$(cat "$device/device")" in
      0x0027 | 0x0056 | 0x005e | 0x0062 | 0x0063 | 0x006f | 0x0076) return 0 ;;
    esac
  done
  return 1
}

accelerator="${MIXLAB_ACCELERATOR:-}"
if [ -z "$accelerator" ]; then
  if has_tpu; then
    accelerator=tpu
  elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    accelerator=cuda
  else
    accelerator=cpu
  fi
fi
case "$accelerator" in
  cpu) ;;
  cuda | tpu) extras="$extras $accelerator" ;;
  *)
    echo "MIXLAB_ACCELERATOR is '$accelerator'; accepted are cpu, cuda, tpu" >&2
    exit 2
    ;;
esac

target="."
# shellcheck disable=SC2086
[ -z "${extras// /}" ] || target=".[$(echo $extras | tr ' ' ',')]"
constraints="${MIXLAB_CONSTRAINTS-launch/constraints.txt}"
options=()
[ -z "$constraints" ] || options=(--constraint "$constraints")

echo "Installing mixlab for $accelerator into .venv"
if command -v uv >/dev/null 2>&1; then
  [ -x .venv/bin/python ] || uv venv --quiet --python "${PYTHON:->=3.11,<3.14}" .venv
  uv pip install --quiet --python .venv/bin/python "${options[@]}" --editable "$target"
else
  if [ ! -x .venv/bin/python ]; then
    python="${PYTHON:-python3}"
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || {
      echo "$python is not Python 3.11 to 3.13: name one in PYTHON, or install uv, which fetches one" >&2
      exit 2
    }
    "$python" -m venv .venv
  fi
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "${options[@]}" --editable "$target"
fi
