#!/bin/bash
#SBATCH --job-name=triptych
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#
#   sbatch docs/launch/slurm.sh RECIPE.yaml key=value ...
#
# from the project's folder, which all machines see, as they do `out` of the recipe. 120 seconds before the time is up
# Slurm sends SIGUSR1 to this script. It hands it on to the training processes, which end their step, save and exit
# with 0; then the job goes back into the queue, and goes on from that checkpoint. 120 seconds have to suffice for a
# step and a checkpoint.
#
# One task is one training process, with neither torchrun nor accelerate launch between Slurm and it: those would take
# the signal for themselves, and end without a checkpoint.

set -u
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR=$first
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # two jobs on one machine have two ports
export OMP_NUM_THREADS=1 # of the processes that read; the GPU does the rest
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun no longer takes this from the job itself

# What torchrun would set. `exec`: the process that Slurm signals is Python itself.
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
    exec "${PYTHON:-.venv/bin/python}" pretrain/run.py "$@"
' bash "$@" &
training=$!

stopped=no
trap 'stopped=yes; kill -USR1 "$training"' USR1 # srun hands it on to all its tasks

wait "$training"
status=$?
if [ "$stopped" = yes ]; then # it was the signal that ended `wait`, not training's end
    wait "$training"
    echo "out of time, training ended with $?: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
