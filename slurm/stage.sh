#!/usr/bin/env bash
#SBATCH --ntasks-per-node=1
#SBATCH --nodes=8
#SBATCH --exclusive
#SBATCH --gres=gpu:8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --output=wemmu-%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#
# Trains one stage: stage1.sh to stage4.sh are links to this script, for the stages of configs/curriculum/paper.yaml.
# From the root of the repository:
#
#   sbatch slurm/stage1.sh
#   RUN=/shared/mine CURRICULUM=my.yaml sbatch --nodes=2 slurm/stage1.sh --set parallel.ranks=16
#   RUN=/shared/mine STAGE=warmup sbatch slurm/stage.sh
#
# Whatever ended the job, the same command goes on from its last checkpoint; after pre-emption and at the time limit it
# does so by itself. `wemmu submit` sends all stages and what is between them. Settings: slurm/job.sh.
set -euo pipefail
# shellcheck source=slurm/job.sh
source "${WEMMU_HOME:-.}/slurm/job.sh"
# The script is a copy; the controller knows the name by which it was submitted.
submitted() {
    scontrol show job "$SLURM_JOB_ID" | sed -nE 's#^ *Command=.*/(stage[0-9]+)\.sh.*#\1#p'
}
attempt "${STAGE:-$(submitted)}" "$@"
