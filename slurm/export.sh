#!/usr/bin/env bash
#SBATCH --job-name=wemmu-export
#SBATCH --ntasks-per-node=1
#SBATCH --nodes=1
#SBATCH --time=04:00:00
#SBATCH --output=wemmu-export-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#
# Turns the last stage of a run into a pipeline that diffusers loads: RUN/export. From the root of the repository:
#
#   RUN=runs/mine sbatch slurm/export.sh
#
# Settings: slurm/job.sh.
set -euo pipefail
# shellcheck source=slurm/job.sh
source "${WEMMU_HOME:-.}/slurm/job.sh"
attempt export "$@"
