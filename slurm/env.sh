# The environment of every process of a job, in one place: sourced by the job's script, passed on by srun. Each line says
# why it is there. What is set already, by the cluster's modules or slurm.setup, stays. No hyper-parameter belongs here.

# A rank that prints is read in its log at once, and one that dies says where.
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"
export PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER:-1}"

# The tokenizer's own threads would fork beside the reward workers, and warn on every rank.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

# Since Slurm 22.05 srun takes the job's environment only where it is told to; sbatch --export=NONE would say NONE.
export SRUN_EXPORT_ENV="${SRUN_EXPORT_ENV:-ALL}"

# NCCL: warnings name the rank and the interface of what went wrong; INFO would be a page for each rank.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# A rank whose peer is gone ends with an error instead of waiting: the launcher then names the one that failed first.
# (torch 2.13: 1 is CleanUp and abort.)
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# The last collectives of each rank are dumped when one of them runs out of time: who waited, and for whom.
export TORCH_NCCL_TRACE_BUFFER_SIZE="${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
# Names of variables that older libraries know are not set here: NCCL_ASYNC_ERROR_HANDLING is ignored by torch 2.13.

# Memory that grows in place: sequences of 32k tokens beside short ones fragment torch's fixed segments.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

# Weights are loaded once, from where model.hf says, and never asked of the network by thousands of ranks.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
export TRANSFORMERS_OFFLINE="${TRANSFORMERS_OFFLINE:-1}"

# A core file of a rank with 80 GB would take the shared disk with it.
ulimit -c 0
# RDMA registers memory by locking it; a limit shows as "cannot allocate memory" from inside NCCL. Not ours to raise
# everywhere, so a refusal is no fault: slurm/health_check.sh reports what is in force.
ulimit -l unlimited 2>/dev/null || true
