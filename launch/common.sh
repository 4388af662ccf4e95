# shellcheck shell=bash
# common.sh: what all scripts of this directory share. Sourced inside a job; the functions below end the script.

MEGATRON_BLISS_HOME=$(dirname "${MEGATRON_BLISS_LAUNCH:-$SLURM_SUBMIT_DIR/launch}")
# shellcheck source=launch/settings.sh
source "$MEGATRON_BLISS_HOME/launch/settings.sh"

# One task a node. A node whose task ended well before the others' has failed alone: they are given two minutes.
SRUN=(srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait=120)
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || SRUN+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
[ -z "$CONTAINER_IMAGE" ] || SRUN+=("--container-image=$CONTAINER_IMAGE" "--container-mounts=$CONTAINER_MOUNTS")

run_on_all_nodes() { # RUN STAGE ARGUMENTS…: a distributed stage, one rank a GPU
    local ranks=${SLURM_GPUS_ON_NODE:-${RANKS_PER_NODE:-1}}
    local cpus=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
    # The nodes meet at the first one, at a port that other jobs on it do not have.
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > ranks ? cpus / ranks : 1))}
    run "$1" "${SRUN[@]}" "$PYTHON" -m megatron_bliss.torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$ranks" \
        --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" \
        -m -- megatron_bliss.cli "${@:2}"
}

run_on_one_node() { # RUN STAGE ARGUMENTS…: a stage that is one process
    run "$1" "${SRUN[@]}" --nodes=1 --ntasks=1 "$PYTHON" -m megatron_bliss.cli "${@:2}"
}

run() { # RUN COMMAND…: do it; requeue this job if it stopped before its end; exit with its exit code
    local run=$1 code=0 step interrupted
    shift
    # A stage stops at its next step, and exits with 3, when this file appears or this moment is past.
    export MEGATRON_BLISS_STOP_FILE=$run/.stop-$SLURM_JOB_ID MEGATRON_BLISS_STOP_AT
    MEGATRON_BLISS_STOP_AT=$(stop_at)
    rm -f "$MEGATRON_BLISS_STOP_FILE"
    # USR2 comes STOP_MARGIN seconds before the time limit, TERM when the job is pre-empted or cancelled.
    trap 'interrupted=1; touch "$MEGATRON_BLISS_STOP_FILE"' USR2 TERM
    "$@" &
    step=$!
    while :; do # a signal ends `wait`, not the step
        interrupted='' code=0
        wait "$step" || code=$?
        [ -n "$interrupted" ] || break
    done
    trap - USR2 TERM
    rm -f "$MEGATRON_BLISS_STOP_FILE"
    [ "$code" != 3 ] || requeue
    exit "$code"
}

stop_at() { # when to stop, in seconds since 1970; nothing without a time limit
    local end
    end=$(squeue --noheader --job "$SLURM_JOB_ID" --format %e) || return 0
    end=$(date --date "$end" +%s 2>/dev/null) || return 0
    echo $((end - STOP_MARGIN))
}

requeue() { # under the same number; but one that is being cancelled must not come back
    if [ "$(squeue --noheader --job "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
        echo "stopped before the end: job $SLURM_JOB_ID goes back into the queue and goes on from its checkpoint"
        scontrol requeue "$SLURM_JOB_ID" && exec sleep 600 # until Slurm ends it
    fi
}
