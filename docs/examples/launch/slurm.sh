#!/bin/bash
#SBATCH --job-name=jaxdistill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# SIGTERM goes to the processes two minutes before the time is over; they save and end with 75.
#SBATCH --signal=TERM@120

# Of a folder that all nodes reach.
workdir=${WORKDIR:-$HOME/runs/cifar100}

srun --kill-on-bad-exit=0 jaxdistill --config=ncfm:dataset=cifar100,ipc=50 \
    --workdir="$workdir" --distributed=auto
code=$?
if [ $code -eq 75 ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
