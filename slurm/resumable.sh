# Sourced by the batch scripts: runs a command as a job step that survives the job's time limit.
#
# Five minutes before the limit Slurm sends USR1 to the batch script (#SBATCH --signal=B:USR1@300), which sends TERM to
# the step. The step saves what it has and ends with exit code 75; the job is then put back into the queue, and goes on
# where it was. Any other exit code is the job's own.

set -euo pipefail

: "${1:?usage: sbatch SCRIPT CONFIG [section.name=value ...]}"
cd "$SLURM_SUBMIT_DIR" # the repository, in which `make install` has made .venv
. .venv/bin/activate

# Where the processes of a step meet.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

resumable() {
    local step code=0 stopped=
    "$@" &
    step=$!
    trap 'stopped=1; kill -TERM "$step" 2>/dev/null || true' USR1 TERM
    wait "$step" || code=$?
    if [[ -n $stopped ]]; then # the signal ended the wait, not the step
        code=0
        wait "$step" || code=$?
    fi
    trap - USR1 TERM
    # A launcher between Slurm and the trainer ends with a code of its own when it was told to stop.
    if ((code == 75)) || [[ -n $stopped && $code -ne 0 ]]; then
        echo "stopped with exit code $code and can be resumed: job $SLURM_JOB_ID goes back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
        exit 75
    fi
    ((code == 0)) || exit "$code"
}
