#!/usr/bin/env bash
# Install what tests/slurm/lab.py starts (Debian, Ubuntu; root; 10 s, 13 MB). No service is started or enabled for use.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null
