#!/usr/bin/env bash
# A Cloud TPU by queued resources: bash experiments/cloud/tpu_vm.sh create|wait|install|train|grid|watch|resume|delete
#
# Needs gcloud, signed in, and run from the root of this repository. PROJECT, ZONE and BUCKET say where. DRY_RUN=1 prints
# the commands and runs none. What else can be set, with its default:
set -euo pipefail

: "${PROJECT:?your Google Cloud project}" "${ZONE:?such as us-west4-a}" "${BUCKET:?a bucket near it, without gs://}"
NAME=${NAME:-spa-jax}                                        # of the TPU
ACCELERATOR=${ACCELERATOR:-v5litepod-16}                     # 16 chips of v5e on 4 hosts
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}                      # the image that goes with it
SPOT=${SPOT:-}                                               # 1: cheaper, and may be taken away
CONFIG=${CONFIG:-configs/paper/xsum.py}                      # what to train
RUN=${RUN:-xsum}                                             # name of the run, in the bucket under runs/
OPTIONS=${OPTIONS:-}                                         # more of the train command's
RATES=${RATES:-2e-4 5e-4 1e-3}                               # grid: learning rates
SIZES=${SIZES:-small medium full}                            # grid: of Table 5
TASKS=${TASKS:-xsum cnn_dailymail coqa sciq}                 # grid: data sets
SHARED=/mnt/spa                                              # the bucket as a directory, for the tap cache

where=(--project="$PROJECT" --zone="$ZONE")

run() {
  if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@" && echo; else "$@"; fi
}

on_all_hosts() { run gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command="$1"; }

train_command() { # config, run, options
  echo "cd ~/spa && .venv/bin/python -m spa_jax.train --config=$1 --workdir=gs://$BUCKET/runs/$2" \
    "--config.distributed.enabled=True --config.tap_cache.directory=$SHARED/taps $3"
}

create() {
  run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${where[@]}" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" ${SPOT:+--spot}
}

wait_for_it() {
  local state=(gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)')
  if [ -n "${DRY_RUN:-}" ]; then run "${state[@]}" && return; fi
  until [ "$("${state[@]}")" = ACTIVE ]; do
    sleep 30
  done
}

install() {
  run git archive --output=spa_jax.tar.gz HEAD
  run gcloud compute tpus tpu-vm scp spa_jax.tar.gz "$NAME:" "${where[@]}" --worker=all
  on_all_hosts "mkdir -p ~/spa && tar -xzf spa_jax.tar.gz -C ~/spa && python3 -m pip install --user uv &&
    cd ~/spa && ~/.local/bin/uv venv --python 3.12 .venv && ~/.local/bin/uv pip install -e '.[tpu,gcs]'"
  on_all_hosts "command -v gcsfuse || (sudo apt-get update && sudo apt-get install --yes gcsfuse) &&
    sudo mkdir -p $SHARED && sudo chown \$USER $SHARED && (mountpoint $SHARED || gcsfuse --implicit-dirs $BUCKET $SHARED)"
}

train() { on_all_hosts "nohup bash -c '$(train_command "$CONFIG" "$RUN" "$OPTIONS")' >> ~/train.log 2>&1 < /dev/null &"; }

grid() { # Tables 5 to 7; the smaller sizes and other rates reuse the tap cache of the full one
  local commands=() task size rate
  for task in $TASKS; do
    for size in $SIZES; do
      for rate in $RATES; do
        commands+=("$(train_command "configs/paper/$task.py" "grid/$task-$size-$rate" \
          "--config.data.size=$size --config.optimizer.learning_rate=$rate $OPTIONS")")
      done
    done
  done
  local script
  script=$(printf '%s || exit; ' "${commands[@]}")
  on_all_hosts "nohup bash -c '$script' >> ~/train.log 2>&1 < /dev/null &"
}

watch_it() { run gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=0 --command="tail -n 40 -f ~/train.log"; }

delete() { run gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet; }

case "${1:-}" in
  create) create ;;
  wait) wait_for_it ;;
  install) install ;;
  train) train ;;
  grid) grid ;;
  watch) watch_it ;;
  resume) # after a spot TPU was taken away: another one goes on with the run, from the bucket
    delete
    create
    wait_for_it
    install
    train
    ;;
  delete) delete ;;
  *)
    sed -n '2,5p' "$0"
    exit 2
    ;;
esac
