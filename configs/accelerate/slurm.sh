#!/bin/bash
# Training on two machines with eight GPUs each under Slurm, which may take them away at any time; a process a GPU:
#   sbatch configs/accelerate/slurm.sh stage2_prior/train.py --run NAME
# Five minutes before the time is over all processes get SIGUSR1: they finish their step, save, and end with code 138. The job is put
# back into the queue then, after SIGTERM (143) and --stop_after (75); and, up to 20 times, where a process was lost: of it comes 128 + the
# signal, of those that noticed 70. It goes on from its last checkpoint.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=4:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
srun bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
    exec python "$@" --resume' train "$@"
code=$?
case $code in
    75 | 138 | 143) scontrol requeue "$SLURM_JOB_ID" ;;
    70 | 134 | 137 | 139) [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ] && scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit $code
