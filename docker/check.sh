#!/usr/bin/env bash
# Builds Dockerfile.cpu for real and trains in it, without a container engine: buildah with chroot
# isolation on a base that debootstrap makes. Needs root, buildah and debootstrap. docs/docker.md
#
#   docker/check.sh [FOLDER]      FOLDER keeps the base and the layers for the next time
#
# By environment: DEBIAN_MIRROR for debootstrap; BUILDAH_ARGS, more words for `buildah bud` and
# `buildah run`, such as -v for a site's certificates and pip.conf; TORCH as in the Makefile.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:-$(mktemp -d)}
mkdir -p "$folder"
read -ra more <<<"${BUILDAH_ARGS:-}"
build() { buildah --storage-driver vfs --root "$folder/root" --runroot "$folder/run" "$@"; }
base=localhost/debian:bookworm image=localhost/kimi-pretrain:cpu

if ! build inspect --type image $base >/dev/null 2>&1; then
    debootstrap --variant=minbase bookworm "$folder/base" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"}
    empty=$(build from scratch)
    build add -q "$empty" "$folder/base" /
    build commit -q --rm "$empty" $base
fi

# --format docker: OCI's images have no health check.
build bud --format docker --isolation chroot --layers "${more[@]}" --build-arg BASE=$base \
    ${TORCH:+--build-arg "TORCH=$TORCH"} -f docker/Dockerfile.cpu -t $image .

container=$(build from --pull-never $image)
trap 'build rm "$container" >/dev/null' EXIT
inside() { build run --isolation chroot "${more[@]}" "$container" -- "$@"; }
[ "$(inside id -u)" != 0 ] || { echo "the image runs as root" >&2; exit 1; }
inside make train ARGS="schedule.max_steps=5 run_dir=runs/check"
inside test -s runs/check/metrics.jsonl
inside kimi-pretrain doctor run_dir=runs/check
echo "built, trained and examined: $image in $folder"
