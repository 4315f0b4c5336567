#!/usr/bin/env bash
# Fills in scripts/launch/kubernetes_job.yaml and creates its Job: several pods, one run.
#
#   export NAME=... IMAGE=... CLAIM=... PROCESSES=2 GPUS=8 CONFIG=configs/dpo_sd15.py
#   bash scripts/launch/launch_kubernetes.sh            # the same again, after kubectl delete job NAME, resumes
#   bash scripts/launch/launch_kubernetes.sh --print    # only shows what would be created
#
# Needs kubectl with access to a cluster, and envsubst (package gettext-base).
set -euo pipefail

: "${NAME:?the name of the Job and its Service, such as dpo-sd15}"
: "${IMAGE:?a container image in whose working directory this repository lies, with jaxpref[cuda] installed}"
: "${CLAIM:?a persistent volume claim that all pods can write to (ReadWriteMany)}"
: "${PROCESSES:?how many pods make one run}"
: "${GPUS:?GPUs of each pod}"
: "${CONFIG:?the recipe, such as configs/dpo_sd15.py}"
export NAME IMAGE CLAIM PROCESSES GPUS CONFIG

# The variables of the pod's own shell, such as $code, stay as they are.
# shellcheck disable=SC2016
manifest=$(envsubst '$NAME $IMAGE $CLAIM $PROCESSES $GPUS $CONFIG' \
  < "$(dirname "${BASH_SOURCE[0]}")/kubernetes_job.yaml")
if [[ "${1:-}" == --print ]]; then
  printf '%s\n' "$manifest"
else
  kubectl apply -f - <<< "$manifest"
fi
