#!/usr/bin/env bash
# A TPU slice on Kubernetes by JobSet: bash experiments/cloud/gke.sh create|image|train|watch|stop|delete
#
# Needs gcloud, kubectl and envsubst. PROJECT, REGION, ZONE and BUCKET say where. DRY_RUN=1 prints the commands and runs
# none. What else can be set, with its default:
set -euo pipefail

: "${PROJECT:?your Google Cloud project}" "${REGION:?such as us-west4}" "${ZONE:?such as us-west4-a}"
: "${BUCKET:?a bucket near it, without gs://}"
export NAME=${NAME:-spa-jax}                                 # of cluster, node pool and job
export MACHINE=${MACHINE:-ct5lp-hightpu-4t}                  # 4 chips of v5e a host
export ACCELERATOR=${ACCELERATOR:-tpu-v5-lite-podslice}
export TOPOLOGY=${TOPOLOGY:-4x4}                             # 16 chips
export HOSTS=${HOSTS:-4}
export CHIPS=${CHIPS:-4}                                     # of a host
export CONFIG=${CONFIG:-configs/paper/xsum.py}
export RUN=${RUN:-xsum}
export OPTIONS=${OPTIONS:-}                                  # more of the train command's
export IMAGE=${IMAGE:-$REGION-docker.pkg.dev/$PROJECT/spa/spa_jax}
export BUCKET
JOBSET=${JOBSET:-v0.8.1}

here=$(dirname "$0")
where=(--project="$PROJECT" --region="$REGION")

run() {
  if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@" && echo; else "$@"; fi
}

create() {
  run gcloud container clusters create "$NAME" "${where[@]}" --node-locations="$ZONE" --num-nodes=1 \
    --workload-pool="$PROJECT.svc.id.goog" --addons=GcsFuseCsiDriver
  run gcloud container node-pools create "$NAME" "${where[@]}" --cluster="$NAME" --node-locations="$ZONE" \
    --machine-type="$MACHINE" --tpu-topology="$TOPOLOGY" --num-nodes="$HOSTS" --spot \
    --workload-metadata=GKE_METADATA
  run kubectl apply --server-side \
    --filename="https://github.com/kubernetes-sigs/jobset/releases/download/$JOBSET/manifests.yaml"
}

image() {
  run gcloud artifacts repositories create spa --project="$PROJECT" --location="$REGION" --repository-format=docker
  run docker build --file="$here/Dockerfile" --tag="$IMAGE" .
  run docker push "$IMAGE"
}

train() { # the cluster starts the job again after every failure and preemption, and the run goes on
  local job
  job=$(envsubst < "$here/jobset.yaml")
  if [ -n "${DRY_RUN:-}" ]; then echo "$job"; fi
  run kubectl apply --filename=- <<< "$job"
}

case "${1:-}" in
  create) create ;;
  image) image ;;
  train) train ;;
  watch) run kubectl logs --follow --prefix --selector="jobset.sigs.k8s.io/jobset-name=$NAME" ;;
  stop) run kubectl delete jobset "$NAME" ;;
  delete) run gcloud container clusters delete "$NAME" "${where[@]}" --quiet ;;
  *)
    sed -n '2,5p' "$0"
    exit 2
    ;;
esac
