#!/usr/bin/env bash
#SBATCH --job-name=wemmu-report
#SBATCH --ntasks-per-node=1
#SBATCH --nodes=1
#SBATCH --time=01:00:00
#SBATCH --output=wemmu-report-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#
# Makes the report of a run: RUN/report.html, RUN/samples.png. From the root of the repository:
#
#   RUN=runs/mine sbatch slurm/report.sh
#
# Settings: slurm/job.sh.
set -euo pipefail
# shellcheck source=slurm/job.sh
source "${WEMMU_HOME:-.}/slurm/job.sh"
attempt report "$@"
