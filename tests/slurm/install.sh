#!/usr/bin/env bash
# Install what tests/slurm/lab.py starts (Debian, Ubuntu; root; 10 s, 13 MB). No service is started or enabled for use.
set -euo pipefail
PATH=$PATH:/usr/sbin
if command -v slurmctld slurmd srun munged >/dev/null; then exit 0; fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "installing Slurm needs root and apt-get" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null
