#!/usr/bin/env bash
# A run that outlives its time limit: one node of 8 GPUs, requeued until its model is exported. See docs/reliability.md.
#SBATCH --job-name=dvpo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# 10 minutes before the limit, to the step's processes: longer than a training step and a checkpoint
#SBATCH --signal=USR1@600
set -uo pipefail

RUN=${RUN:-runs/dvpo}

# torchrun passes the signal on to its workers, and waits for them
srun torchrun --nproc_per_node=8 --shutdown-timeout 600 --signals-to-handle SIGTERM,SIGINT,SIGUSR1 \
    dvpo.py --run-dir "$RUN" --resume "$@"

# torchrun's exit code does not say whether the run was stopped or has failed. The run's own words do.
if [ -e "$RUN/model" ]; then
    echo "done: $RUN/model"
elif [ -e "$RUN/stopped" ]; then
    scontrol requeue "$SLURM_JOB_ID"
else
    echo "failed; not started again" >&2
    exit 1
fi
