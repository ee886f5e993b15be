#!/usr/bin/env bash
# Print running, success or failed for one PBS job (-x: also for jobs that have ended).
state=$(qstat -x -f "$1" | sed -n 's/^ *job_state = //p')
code=$(qstat -x -f "$1" | sed -n 's/^ *Exit_status = //p')
case $state in
  F|C) if [ "$code" = 0 ]; then echo success; else echo failed; fi ;;
  "") echo failed ;;
  *) echo running ;;
esac
