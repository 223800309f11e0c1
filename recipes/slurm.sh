#!/bin/bash
# The stages of a recipe on several machines of a Slurm cluster, one torchrun on each and one process for each GPU.
#
#     sbatch recipes/slurm.sh recipes/llama2-7b.yaml distill.batch_size=16 act_calib.batch_size=16
#
# The recipe's output.dir has to be on a disk that all machines share. Keys behind it go to every command; a step has a sequence for
# each rank at least, which are 16 here. What is done already is not done again: a job that was
# stopped, by its time or by a failure, goes on where it was when it is submitted again.
#SBATCH --job-name=lbllm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# Two minutes before its time is up every rank saves what it has and ends.
#SBATCH --signal=TERM@120
#SBATCH --output=lbllm-%j.log
set -euo pipefail
recipe=${1:?"recipe.yaml is missing: sbatch recipes/slurm.sh recipe.yaml [KEY=VALUE ...]"}
shift
keys=("$@")
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

ranks() {
    # A rank that is lost ends all of them within a minute; torchrun then starts them again, up to three times.
    srun --kill-on-bad-exit=1 torchrun \
        --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" --max-restarts 3 \
        --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
        -m lbllm_cli "$@" --recipe "$recipe" "${keys[@]}"
}

ranks ptq
ranks distill
ranks act-calib
ranks eval
lbllm report --recipe "$recipe" "${keys[@]}"
lbllm export --recipe "$recipe" "${keys[@]}"
