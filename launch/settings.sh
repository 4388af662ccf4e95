# shellcheck shell=bash
# settings.sh: the one file to edit. Read by submit.sh where jobs are submitted, and by common.sh inside them.
# Whatever is set in the environment wins:  PRETRAIN_NODES=16 launch/submit.sh pretrain runs/my 1
# What `megatron-bliss submit` is told as launch.slurm.… wins over both.

# ---- who pays, where it runs; leave empty what your site does without
ACCOUNT=${ACCOUNT:-}
PARTITION=${PARTITION:-}
QOS=${QOS:-}

# ---- what each kind of stage asks for: nodes, GPUs a node (one rank each), CPU cores a node, time limit.
# PARTITION, QOS and further sbatch options (words, split at blanks) may differ as well: SIDE_PARTITION=…, SIDE_SBATCH="--exclusive".
# A stage that is longer than its time limit goes on in the same job, which is requeued; see STOP_MARGIN.
CPU_CPUS=${CPU_CPUS:-8} # inventory, select, prepare, ngrams, report: one process on one node, without a GPU
CPU_TIME=${CPU_TIME:-04:00:00}

SIDE_NODES=${SIDE_NODES:-1} # warm-up of the proxy, bilevel loop, influence
SIDE_GPUS=${SIDE_GPUS:-8}
SIDE_CPUS=${SIDE_CPUS:-}
SIDE_TIME=${SIDE_TIME:-24:00:00}

SCORE_TASKS=${SCORE_TASKS:-4} # jobs that share the scoring; each has what follows. They come and go as there is room.
SCORE_NODES=${SCORE_NODES:-1}
SCORE_GPUS=${SCORE_GPUS:-8}
SCORE_CPUS=${SCORE_CPUS:-}
SCORE_TIME=${SCORE_TIME:-08:00:00}

PRETRAIN_NODES=${PRETRAIN_NODES:-1} # the LLM
PRETRAIN_GPUS=${PRETRAIN_GPUS:-8}
PRETRAIN_CPUS=${PRETRAIN_CPUS:-}
PRETRAIN_TIME=${PRETRAIN_TIME:-24:00:00}

EVALUATE_NODES=${EVALUATE_NODES:-1} # the LLM's decay branch and losses; cache-target, fidelity
EVALUATE_GPUS=${EVALUATE_GPUS:-8}
EVALUATE_CPUS=${EVALUATE_CPUS:-}
EVALUATE_TIME=${EVALUATE_TIME:-08:00:00}

# How your Slurm is asked for GPUs; %s is their number a node. Empty where nodes are given whole and GPUs are not counted.
GPU_OPTION=${GPU_OPTION---gpus-per-node=%s}

# Seconds before the time limit at which a stage is asked to write a checkpoint and end: the time of one step and one
# checkpoint, doubled. The job is then requeued under its own number, so that jobs that depend on it keep waiting.
STOP_MARGIN=${STOP_MARGIN:-300}

# `megatron-bliss submit` takes the next two from launch.max_attempts and launch.hang_minutes.
# A stage that fails is tried again. After so many attempts in a row that came no further, the chain ends with the reason.
MAX_ATTEMPTS=${MAX_ATTEMPTS:-3}
# A stage that wrote neither to its log nor to its files for so many minutes hangs: it is ended, and counts as failed. 0: never.
HANG_MINUTES=${HANG_MINUTES:-120}

# ---- the software on the nodes: a virtual environment on the shared file system …
PYTHON=${PYTHON:-$MEGATRON_BLISS_HOME/.venv/bin/python}
# module load cuda nccl # … with the modules it needs
# … or a container, by pyxis and enroot. It needs this repository (PYTHONPATH below), RUN and the shards among its mounts.
CONTAINER_IMAGE=${CONTAINER_IMAGE:-} # as docker://nvcr.io#nvidia/pytorch:25.10-py3 or /shared/images/pytorch.sqsh; then PYTHON=python
CONTAINER_MOUNTS=${CONTAINER_MOUNTS:-$MEGATRON_BLISS_HOME:$MEGATRON_BLISS_HOME}
export PYTHONPATH=$MEGATRON_BLISS_HOME${PYTHONPATH:+:$PYTHONPATH}

# ---- network. NETWORK_INTERFACE is that which the nodes reach each other by (`ip -br address`); empty: NCCL and gloo choose.
NETWORK_INTERFACE=${NETWORK_INTERFACE:-}
if [ -n "$NETWORK_INTERFACE" ]; then
    export NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE GLOO_SOCKET_IFNAME=$NETWORK_INTERFACE
fi
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# export NCCL_IB_HCA=mlx5 NCCL_IB_TIMEOUT=22 NCCL_NVLS_ENABLE=0 # as your site advises

# Megatron demands 1 with tensor or context parallelism on GPUs before Blackwell, so that kernels start in the order they
# were queued in. It must not be 1 with FSDP. `megatron-bliss submit` sets it where the run is model-parallel.
# export CUDA_DEVICE_MAX_CONNECTIONS=1
