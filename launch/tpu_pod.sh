#!/bin/bash
# A verb of transferlab on all workers of a TPU slice, one process per worker, each with the chips of its own. From your
# own machine, in tmux if the run is long (a worker whose connection breaks ends the run; the same command resumes it):
#
#   export PROJECT=… ZONE=… TPU=…
#   REPOSITORY=https://… SHARED=BUCKET launch/tpu_pod.sh setup      # once per slice
#   launch/tpu_pod.sh train --config=configs/folder.py:data=folder:/shared/images,method=lora --config.batch_size=256 \
#     --workdir=/shared/runs/mine
#
# `setup` mounts the bucket $SHARED at /shared on every worker. launch/README.md says how to make it, how to get a slice
# that may be preempted, and what the first lines of the output are.
set -eu
: "${PROJECT:?is not set: the Google Cloud project}" "${ZONE:?is not set: the zone of the TPU slice}"
: "${TPU:?is not set: the name of the TPU slice}"

on_all_workers() {
  gcloud compute tpus tpu-vm ssh "$TPU" --project="$PROJECT" --zone="$ZONE" --worker=all --command="$1"
}

if [ "$#" -eq 0 ]; then
  echo "error: no verb is given; expected setup, or a verb of transferlab with its flags, such as train --config=…" >&2
  exit 2
fi

if [ "$1" = setup ]; then
  : "${REPOSITORY:?is not set: where git finds this repository}" "${SHARED:?is not set: the name of a bucket}"
  # The machines may have an older Python than the package needs; uv brings the one that requirements.lock is for.
  # No metadata is cached by the mount: every worker has to see at once what another one wrote.
  on_all_workers "set -e
    test -d transferlab || git clone --quiet $(printf %q "$REPOSITORY") transferlab
    cd transferlab
    python3 -m pip install --quiet --user uv
    ~/.local/bin/uv venv --quiet --allow-existing --python 3.11 .venv
    ~/.local/bin/uv pip install --quiet --python .venv --constraint requirements.lock '.[tpu]'
    sudo mkdir -p /shared
    sudo chown \"\$USER\" /shared
    mountpoint -q /shared ||
      gcsfuse --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 $(printf %q "$SHARED") /shared"
  exit
fi

# Compiled programs are kept for the next start: the first process writes them, all read them. They are run, so nobody
# else may write to the bucket.
on_all_workers "cd transferlab && JAX_COMPILATION_CACHE_DIR=/shared/compiled .venv/bin/transferlab$(printf ' %q' "$@") \
  --distributed"
