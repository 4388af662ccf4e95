# shellcheck shell=bash
# common.sh: what all scripts of this directory share. Sourced inside a job; the first two functions are theirs to call.

: "${RUN:?}" # directory of the run, or of a control arm in it
MEGATRON_BLISS_HOME=$(dirname "${MEGATRON_BLISS_LAUNCH:-$SLURM_SUBMIT_DIR/launch}")
# shellcheck source=launch/settings.sh
source "$MEGATRON_BLISS_HOME/launch/settings.sh"

CONTAINER=()
[ -z "$CONTAINER_IMAGE" ] || CONTAINER=("--container-image=$CONTAINER_IMAGE" "--container-mounts=$CONTAINER_MOUNTS")
# One task a node. A node whose task ended well before the others' has failed alone: they are given two minutes.
SRUN=(srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait=120 "${CONTAINER[@]}")
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || SRUN+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")

run_on_all_nodes() { # STAGE ARGUMENTS…: a distributed stage, one rank a GPU
    local ranks=${SLURM_GPUS_ON_NODE:-${RANKS_PER_NODE:-1}}
    local cpus=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
    # The nodes meet at the first one, at a port that other jobs on it do not have.
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > ranks ? cpus / ranks : 1))}
    STAGE=("$@")
    begin
    work "${SRUN[@]}" "$PYTHON" -m megatron_bliss.torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$ranks" \
        --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" \
        -m -- megatron_bliss.cli "$@"
    end
}

run_on_one_node() { # STAGE ARGUMENTS…: a stage that is one process
    STAGE=("$@")
    begin
    work "${SRUN[@]}" --nodes=1 --ntasks=1 "$PYTHON" -m megatron_bliss.cli "$@"
    end
}

begin() { # note in RUN/state.json that it starts; nothing more to do where it is done
    LOG=$(readlink -f /proc/$$/fd/1)
    # A stage stops at its next step, and exits with 3, when this file appears or this moment is past.
    export MEGATRON_BLISS_STOP_FILE=$RUN/.stop-$SLURM_JOB_ID MEGATRON_BLISS_STOP_AT
    MEGATRON_BLISS_STOP_AT=$(stop_at)
    rm -f "$MEGATRON_BLISS_STOP_FILE"
    # USR2 comes STOP_MARGIN seconds before the time limit, TERM when the job is pre-empted or cancelled.
    GUARD=
    trap 'INTERRUPTED=1; ask_to_stop' USR2 TERM
    case $(note begin "$LOG" "${STAGE[@]}") in
        go) ;;
        done) exit 0 ;;
        *) exit 1 ;;
    esac
}

work() { # COMMAND…: do it, and leave its exit code in CODE
    local step watch
    "$@" &
    step=$!
    # srun ends its tasks when it is ended; the stage then counts as failed, and is tried again.
    (note --hang-minutes "$HANG_MINUTES" watch "$LOG" "${STAGE[@]}" || kill "$step") &
    watch=$!
    while :; do # a signal ends `wait`, not the step
        INTERRUPTED='' CODE=0
        wait "$step" || CODE=$?
        [ -n "$INTERRUPTED" ] || break
    done
    trap - USR2 TERM
    kill "$watch" ${GUARD:+"$GUARD"} 2>/dev/null || true
    rm -f "$MEGATRON_BLISS_STOP_FILE"
}

end() { # note how it ended; try again what did not come to its end
    case $(note --exit-code "$CODE" end "$LOG" "${STAGE[@]}") in
        done) exit 0 ;;
        requeue) requeue ;;
    esac
    exit "$((CODE > 0 ? CODE : 1))"
}

note() { # what to do, in a word, as orchestration/slurm_job.py says
    local here=()
    [ -z "$CONTAINER_IMAGE" ] || here=(srun --nodes=1 --ntasks=1 --overlap "${CONTAINER[@]}")
    "${here[@]}" "$PYTHON" -m megatron_bliss.cli job --max-attempts "$MAX_ATTEMPTS" "$@"
}

stop_at() { # when to stop, in seconds since 1970; nothing without a time limit
    local end
    end=$(squeue --noheader --job "$SLURM_JOB_ID" --format %e) || return 0
    end=$(date --date "$end" +%s 2>/dev/null) || return 0
    echo $((end - STOP_MARGIN))
}

ask_to_stop() {
    touch "$MEGATRON_BLISS_STOP_FILE"
    [ -z "$GUARD" ] || return 0
    # Should it not end in time, the job goes back into the queue all the same, and on from the checkpoint before.
    (sleep $((STOP_MARGIN * 3 / 4)) && requeue) &
    GUARD=$!
}

requeue() { # under the same number; but a job that is being cancelled must not come back
    if [ "$(squeue --noheader --job "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
        echo "job $SLURM_JOB_ID goes back into the queue, to go on from the last checkpoint"
        scontrol requeue "$SLURM_JOB_ID" && exec sleep 600 # until Slurm ends it
    fi
}
