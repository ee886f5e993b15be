#!/usr/bin/env bash
# Many small runs in one Slurm job: a node is asked for once, and Snakemake inside the job shares it out among the runs.
#   sbatch --partition=gpu --gres=gpu:8 profiles/gpu-box/slurm-job.sh config/<study>.yaml [targets and options]
# Start it in the folder of the checkout, with `snakemake` on the PATH. Options of sbatch win over the lines below.
# Two minutes before its time limit the job goes back into the queue: trainers write a checkpoint on the SIGTERM that
# Slurm then sends, and resume when the job starts again.
#SBATCH --job-name=qpipe --nodes=1 --ntasks=1 --exclusive --mem=0 --time=12:00:00
#SBATCH --requeue --open-mode=append --signal=B:USR1@120
set -uo pipefail
study=${1:?give a study: sbatch ... profiles/gpu-box/slurm-job.sh config/<study>.yaml}
shift
IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:?the job has no GPU: sbatch --gres=gpu:8 ...}"
per_gpu=$(sed -n 's/^ *runs_per_gpu: *\([0-9]*\).*/\1/p' profiles/gpu-box/config.yaml)
command=(snakemake "$@" --profile profiles/gpu-box --configfile "$study" --cores "$SLURM_CPUS_ON_NODE")
command+=(--resources "gpu_places=$((${#gpus[@]} * per_gpu))")
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then "${command[@]}" --unlock; fi # its first life had no time to
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
"${command[@]}" &
while kill -0 $! 2>/dev/null; do wait $!; code=$?; done # a trapped signal ends `wait`, not Snakemake
exit "${code:-1}"
