#!/usr/bin/env bash
# Installs jaxpref on every host of a Cloud TPU slice and starts the same training command on each.
#
#   export TPU_NAME=... ZONE=... WORKDIR=...
#   bash scripts/launch/launch_tpu_pod.sh --config=configs/dpo_sd15.py [MORE FLAGS ...]    # the same again resumes
#   bash scripts/launch/launch_tpu_pod.sh --watch                                          # what process 0 says
#   bash scripts/launch/launch_tpu_pod.sh --stop                                           # all save and exit
#
# WORKDIR is a folder that all hosts mount at the same path (Filestore, or a bucket through gcsfuse). The hosts find each
# other by themselves. What a process prints is in ~/jaxpref.log of its host. Needs gcloud, logged in.
# What stands in single quotes is for the shells of the hosts.
# shellcheck disable=SC2016
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

: "${TPU_NAME:?the name of the TPU slice (gcloud compute tpus tpu-vm list)}"
: "${ZONE:?the zone of the TPU slice, such as europe-west4-b}"

on() {  # on WORKER COMMAND: runs a command on one host, or on all
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker="$1" --command="$2"
}

case "${1:?the flags of the training, such as --config=configs/dpo_sd15.py; or --watch or --stop}" in
  --watch)
    on 0 'tail -n +1 -f ~/jaxpref.log'
    exit
    ;;
  --stop)
    on all 'kill -TERM "$(cat ~/jaxpref.pid)"'
    exit
    ;;
esac

: "${WORKDIR:?a folder that all hosts mount at the same path}"
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:jaxpref.tar.gz" --zone="$ZONE" --worker=all
on all 'set -e; rm -rf ~/jaxpref; mkdir ~/jaxpref; tar -xzf ~/jaxpref.tar.gz -C ~/jaxpref
  test -d ~/jaxpref-venv || python3 -m venv ~/jaxpref-venv
  ~/jaxpref-venv/bin/pip install --quiet --upgrade "$HOME/jaxpref[tpu]"'

flags=$(printf '%q ' "$@" --workdir="$WORKDIR")
on all "cd ~/jaxpref; nohup ~/jaxpref-venv/bin/python -m jaxpref.main $flags > ~/jaxpref.log 2>&1 < /dev/null &
  echo \$! > ~/jaxpref.pid"
echo "started on all hosts of $TPU_NAME; bash scripts/launch/launch_tpu_pod.sh --watch shows what process 0 says."
