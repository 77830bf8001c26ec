#!/bin/bash
# A command of inference/ as a SLURM job, from the repository's folder, which all nodes see:
#
#     sbatch --nodes 2 deploy/slurm.sh generate.py --ckpt-path /path/to/DeepSeek-V3 --input-file /path/to/prompts.txt
#     CHECK=1 sbatch --nodes 2 deploy/slurm.sh generate.py …     # check_network.py first, and no further if it finds fault
#
# The command runs in inference/, once for each GPU; paths that are not absolute start there. PYTHON names another Python
# than the repository's .venv. Every rank sees all GPUs of its node (gpu-bind=none): NCCL then copies between them directly.
#
#SBATCH --job-name=deepseek
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive

set -eu
cd "${SLURM_SUBMIT_DIR:?submit with sbatch}/inference"
if [ ! -f "${1:-}" ]; then
    echo "error: name a command of inference/, such as generate.py, and its flags" >&2
    exit 2
fi
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x ../.venv/bin/python ] && PYTHON=$(realpath ../.venv/bin)/python
fi
ranks=(srun --kill-on-bad-exit=1 --gpu-bind=none --unbuffered)
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then # srun no longer takes it from sbatch
    ranks+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
fi
if [ -n "${CHECK:-}" ]; then
    "${ranks[@]}" "$PYTHON" check_network.py
fi
exec "${ranks[@]}" "$PYTHON" "$@"
