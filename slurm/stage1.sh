#!/usr/bin/env bash
#SBATCH --job-name=wemmu-stage1
#SBATCH --ntasks-per-node=1
#SBATCH --nodes=8
#SBATCH --exclusive
#SBATCH --gres=gpu:8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --output=wemmu-stage1-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#
# Stage 1 of the paper: the bridge learns to speak to the frozen DiT, at 512 px, by contrastive flow matching. From the root
# of the repository:
#
#   sbatch slurm/stage1.sh
#   RUN=/shared/mine CURRICULUM=my.yaml sbatch --nodes=2 slurm/stage1.sh --set parallel.ranks=16
#
# Whatever ended the job, the same command goes on from its last checkpoint; after pre-emption and at the time limit it
# does so by itself. `wemmu submit` sends all stages and what is between them. Settings: slurm/job.sh.
set -euo pipefail
# shellcheck source=slurm/job.sh
source "${WEMMU_HOME:-.}/slurm/job.sh"
attempt "${STAGE:-stage1}" "$@"
