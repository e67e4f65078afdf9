# Sourced by the scripts of this folder: prepares the environment and becomes the launcher's process for one job.
# shellcheck shell=bash
#
# Environment, all of it optional:
#   RUN       run folder; else runs/NAME, NAME being the curriculum's
#   CURRICULUM, CLUSTER   configs for a run folder that does not exist yet (CURRICULUM: configs/curriculum/paper.yaml)
#   STAGE     name of the stage in the curriculum; of one with a ladder of resolutions, the rung, as stage2@512, or else
#             the first that has not ended is run
#   PYTHON    another Python than .venv/bin/python
#   MODULES   names for `module load`, separated by spaces
#   PROLOG    a file that is sourced then

# Run one job of a chain: attempt NAME [options of `python -m launcher attempt`]. Does not return.
attempt() {
    local module
    for module in ${MODULES-}; do
        module load "$module"
    done
    if [[ -n ${PROLOG-} ]]; then
        # shellcheck disable=SC1090
        source "$PROLOG"
    fi
    # Slurm's warnings go to the process of the script.
    exec "${PYTHON:-.venv/bin/python}" -m launcher attempt "$@"
}
