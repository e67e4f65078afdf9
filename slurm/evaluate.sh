#!/usr/bin/env bash
#SBATCH --job-name=wemmu-evaluate
#SBATCH --ntasks-per-node=1
#SBATCH --nodes=1
#SBATCH --gres=gpu:1
#SBATCH --time=04:00:00
#SBATCH --output=wemmu-evaluate-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#
# Scores a stage on held-out requests, and draws them: RUN/STAGE/evaluation.json. With BENCHMARK=NAME, one that the
# curriculum names for the stage: RUN/STAGE/benchmarks/NAME. From the root of the repository:
#
#   RUN=runs/mine STAGE=stage3 sbatch slurm/evaluate.sh
#
# Settings: slurm/job.sh.
set -euo pipefail
# shellcheck source=slurm/job.sh
source "${WEMMU_HOME:-.}/slurm/job.sh"
attempt "${STAGE:?which? STAGE=stage3 sbatch slurm/evaluate.sh}/${BENCHMARK:-evaluation}" "$@"
