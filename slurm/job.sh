# Sourced by the scripts of this folder: prepares the environment and becomes the launcher's process for one job.
# shellcheck shell=bash
#
# Environment, all of it optional:
#   RUN       run folder; else runs/NAME, NAME being the curriculum's
#   CURRICULUM, CLUSTER   configs for a run folder that does not exist yet (CURRICULUM: configs/curriculum/paper.yaml)
#   STAGE     name of the stage in the curriculum; of one with several resolutions, one of them, as stage2@512, or else
#             the first that has not ended is run
#   BENCHMARK name of a benchmark of the stage, for evaluate.sh
#   PYTHON    another Python than .venv/bin/python
#   MODULES   names for `module load`, separated by spaces
#   PROLOG    a file that is sourced then

# Load MODULES and source PROLOG. Both are a site's: they may read variables that are not set.
prepare() {
    local init module
    set +u
    if [[ -n ${MODULES-} ]] && ! declare -F module >/dev/null; then
        # A batch shell is no login shell.
        for init in "${LMOD_PKG-}/init/bash" "${MODULESHOME-}/init/bash" /etc/profile.d/{z00_lmod,lmod,modules}.sh \
            /usr/share/{lmod/lmod,modules,Modules}/init/bash; do
            [[ -r $init ]] || continue
            # shellcheck disable=SC1090
            source "$init"
            ! declare -F module >/dev/null || break
        done
        declare -F module >/dev/null || {
            echo "modules: $MODULES: no init file of \`module\` is here; load them in a prolog instead" >&2
            exit 78
        }
    fi
    for module in ${MODULES-}; do
        module load "$module"
    done
    if [[ -n ${PROLOG-} ]]; then
        # shellcheck disable=SC1090
        source "$PROLOG"
    fi
    set -u
}

# Run one job of a chain: attempt NAME [options of `python -m launcher attempt`]. Does not return.
attempt() {
    local process code
    prepare
    "${PYTHON:-.venv/bin/python}" -m launcher attempt "$@" &
    process=$!
    # Slurm's warnings go to the process of the script.
    trap 'kill -USR1 "$process" 2>/dev/null || true' USR1
    trap 'kill -TERM "$process" 2>/dev/null || true' TERM
    while :; do
        code=0
        wait "$process" || code=$?
        # A signal that is passed on ends the wait and not the process.
        kill -0 "$process" 2>/dev/null || break
    done
    wait "$process" || code=$?
    # Killed, it could not go back into the queue by itself. The next attempt counts the crash. Slurm kills, too, but then
    # it no longer says that the job is running.
    if ((code == 137)) && scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
        echo "--- the attempt was killed; the job goes back into the queue" >&2
        scontrol requeue "$SLURM_JOB_ID" && sleep 3600
    fi
    exit "$code"
}
