#!/usr/bin/env bash
# submit.sh: sbatch with what settings.sh gives a stage.
#
#   launch/submit.sh [--print] SCRIPT RUN [ROUND] [SBATCH OPTION…]
#
#   launch/submit.sh pretrain runs/my 1 --dependency=afterok:123
#   launch/submit.sh --print score runs/my 1      # only print the command's words, one a line
set -euo pipefail
MEGATRON_BLISS_LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
MEGATRON_BLISS_HOME=$(dirname "$MEGATRON_BLISS_LAUNCH")
# shellcheck source=launch/settings.sh
source "$MEGATRON_BLISS_LAUNCH/settings.sh"

submit="env"
[ "${1:-}" != --print ] || { submit='print'; shift; }
if [ $# -lt 2 ] || [ ! -e "$MEGATRON_BLISS_LAUNCH/$1.sbatch" ]; then
    sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0" >&2
    exit 2
fi
script=$1 arguments=("$2")
shift 2
case ${1:-} in [0-9]*) arguments+=("$1"); shift ;; esac

case $script in
    bilevel | influence | fit-influence) group=SIDE ;;
    score) group=SCORE ;;
    pretrain) group=PRETRAIN ;;
    evaluate | cache-target | fidelity) group=EVALUATE ;;
    *) group=CPU ;;
esac
setting() { # NAME [DEFAULT]: that of the group
    local name=${group}_$1
    echo "${!name:-${2:-}}"
}

options=("--time=$(setting TIME)" "--signal=B:USR2@$STOP_MARGIN")
option() { [ -z "$2" ] || options+=("$1=$2"); }
option --account "$ACCOUNT"
option --partition "$(setting PARTITION "$PARTITION")"
option --qos "$(setting QOS "$QOS")"
option --cpus-per-task "$(setting CPUS)"
if [ "$group" != CPU ]; then
    option --nodes "$(setting NODES)"
    RANKS_PER_NODE=$(setting GPUS 1)
    # shellcheck disable=SC2059 # the format is the setting
    [ -z "$GPU_OPTION" ] || options+=("$(printf -- "$GPU_OPTION" "$RANKS_PER_NODE")")
fi
[ "$script" != score ] || options+=("--array=0-$((SCORE_TASKS - 1))")
read -r -a further <<<"$(setting SBATCH)"

# What settings.sh is to find inside the job as it is here.
variables=("MEGATRON_BLISS_LAUNCH=$MEGATRON_BLISS_LAUNCH" "RANKS_PER_NODE=${RANKS_PER_NODE:-1}" "STOP_MARGIN=$STOP_MARGIN"
    "MAX_ATTEMPTS=$MAX_ATTEMPTS" "HANG_MINUTES=$HANG_MINUTES")
for name in CUDA_DEVICE_MAX_CONNECTIONS OMP_NUM_THREADS; do
    [ -z "${!name:-}" ] || variables+=("$name=${!name}")
done
print() { printf '%s\n' env "$@"; }
"$submit" "${variables[@]}" sbatch "${options[@]}" ${further[@]+"${further[@]}"} "$@" \
    "$MEGATRON_BLISS_LAUNCH/$script.sbatch" "${arguments[@]}"
