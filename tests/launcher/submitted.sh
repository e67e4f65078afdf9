#!/usr/bin/env bash
set -euo pipefail
cd /
[[ -e /shared/run/curriculum.yaml ]] || { echo 'no /shared/run/curriculum.yaml: `wemmu submit` writes it' >&2; exit 1; }
# The last line that is an id; a site may print more lines.
id() { grep -oE '^[0-9]+(;|$)' | tail -n 1 | tr -d ';'; }

# a
mkdir -p /shared/run/a
job1=$(PYTHON=/home/wemmu/.venv/bin/python WEMMU_HOME=/home/wemmu RUN=/shared/run MODULES='cuda/12 gcc' PROLOG=/shared/prolog.sh STAGE=a \
    sbatch --parsable --export=ALL \
    --job-name=run/a \
    --output=/shared/run/a/log.txt \
    '--comment=wemmu /shared/run' \
    --open-mode=append \
    --requeue \
    --kill-on-invalid-dep=yes \
    --partition=gpu \
    --account=lab \
    --nodes=1 \
    --ntasks-per-node=1 \
    --time=24:00:00 \
    --gres=gpu:1 \
    --cpus-per-task=64 \
    --signal=B:USR1@600 \
    --exclusive \
    --reservation=mine \
    /home/wemmu/slurm/stage.sh | id)
echo "a: $job1"

# b, after a
mkdir -p /shared/run/b
job2=$(PYTHON=/home/wemmu/.venv/bin/python WEMMU_HOME=/home/wemmu RUN=/shared/run MODULES='cuda/12 gcc' PROLOG=/shared/prolog.sh STAGE=b \
    sbatch --parsable --export=ALL \
    --job-name=run/b \
    --output=/shared/run/b/log.txt \
    '--comment=wemmu /shared/run' \
    --open-mode=append \
    --requeue \
    --kill-on-invalid-dep=yes \
    --partition=gpu \
    --account=lab \
    --nodes=1 \
    --ntasks-per-node=1 \
    --time=24:00:00 \
    --gres=gpu:1 \
    --cpus-per-task=64 \
    --signal=B:USR1@600 \
    --exclusive \
    --reservation=mine \
    "--dependency=afterok:$job1" \
    /home/wemmu/slurm/stage.sh | id)
echo "b: $job2"

# export, after b
mkdir -p /shared/run
job3=$(PYTHON=/home/wemmu/.venv/bin/python WEMMU_HOME=/home/wemmu RUN=/shared/run MODULES='cuda/12 gcc' PROLOG=/shared/prolog.sh STAGE=export \
    sbatch --parsable --export=ALL \
    --job-name=run/export \
    --output=/shared/run/export.log \
    '--comment=wemmu /shared/run' \
    --open-mode=append \
    --requeue \
    --kill-on-invalid-dep=yes \
    --partition=cpu \
    --account=lab \
    --nodes=1 \
    --ntasks-per-node=1 \
    --time=04:00:00 \
    --gres=none \
    --cpus-per-task=8 \
    --reservation=mine \
    "--dependency=afterok:$job2" \
    /home/wemmu/slurm/export.sh | id)
echo "export: $job3"

# report, after export
mkdir -p /shared/run
job4=$(PYTHON=/home/wemmu/.venv/bin/python WEMMU_HOME=/home/wemmu RUN=/shared/run MODULES='cuda/12 gcc' PROLOG=/shared/prolog.sh STAGE=report \
    sbatch --parsable --export=ALL \
    --job-name=run/report \
    --output=/shared/run/report.log \
    '--comment=wemmu /shared/run' \
    --open-mode=append \
    --requeue \
    --kill-on-invalid-dep=yes \
    --partition=cpu \
    --account=lab \
    --nodes=1 \
    --ntasks-per-node=1 \
    --time=04:00:00 \
    --gres=none \
    --cpus-per-task=8 \
    --reservation=mine \
    "--dependency=afterok:$job3" \
    /home/wemmu/slurm/report.sh | id)
echo "report: $job4"
