#!/usr/bin/env bash
#SBATCH --job-name=mixlab
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
# Trains under SLURM, one process a GPU; options before the script change the lines above:
#   sbatch --nodes=4 --cpus-per-task=8 launch/slurm.sh --config configs/quickstart.py --workdir runs/slurm
# Submit it from the repository, installed by `bash launch/install.sh`, on a disk that all nodes see.
# Two minutes before the time is over the run is saved; submitted again, it goes on.
set -euo pipefail
export MIXLAB_PROCESSES=auto # JAX reads the rest from SLURM
# Since SLURM 22.05 srun does not take over by itself what sbatch was told of cores.
exec srun ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=1 \
  .venv/bin/mixlab train "$@"
