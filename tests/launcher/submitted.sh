# a
PYTHON=/home/wemmu/.venv/bin/python WEMMU_HOME=/home/wemmu RUN=/shared/run MODULES='cuda/12 gcc' PROLOG=/shared/prolog.sh STAGE=a \
    sbatch \
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
    /home/wemmu/slurm/stage1.sh

# b, after a
PYTHON=/home/wemmu/.venv/bin/python WEMMU_HOME=/home/wemmu RUN=/shared/run MODULES='cuda/12 gcc' PROLOG=/shared/prolog.sh STAGE=b \
    sbatch \
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
    /home/wemmu/slurm/stage2.sh

# export, after b
PYTHON=/home/wemmu/.venv/bin/python WEMMU_HOME=/home/wemmu RUN=/shared/run MODULES='cuda/12 gcc' PROLOG=/shared/prolog.sh STAGE=export \
    sbatch \
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
    /home/wemmu/slurm/export.sh

# report, after export
PYTHON=/home/wemmu/.venv/bin/python WEMMU_HOME=/home/wemmu RUN=/shared/run MODULES='cuda/12 gcc' PROLOG=/shared/prolog.sh STAGE=report \
    sbatch \
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
    /home/wemmu/slurm/report.sh
