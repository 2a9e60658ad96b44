#!/bin/bash
# A run on several hosts of a Slurm cluster: one torchrun on each host, one process a GPU.
#   sbatch --nodes 4 scripts/slurm.sh andromeda data.corpus=/shared/corpus --out /shared/runs/large
# Queued again after a failure, the same command resumes the run: --resume is added where --out holds one.
#SBATCH --job-name=andromeda
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=B:TERM@300   # before the time limit the run saves a checkpoint and ends (torchrun gives it 30 seconds)
#SBATCH --requeue
set -euo pipefail

arguments=("$@")
for ((i = 0; i < ${#arguments[@]} - 1; i++)); do
    if [[ ${arguments[i]} == --out && -e ${arguments[i + 1]}/config.toml ]]; then
        arguments+=(--resume)
    fi
done

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m andromeda train "${arguments[@]}" &
# The batch script gets the signal; srun passes it on to every torchrun, and torchrun to its processes.
trap 'kill -TERM $!; wait $!' TERM
wait $!
