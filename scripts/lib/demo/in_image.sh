#!/bin/bash
# What pyxis and enroot do for a squashfs image, with Debian's tools: squashfuse mounts it, the task runs inside.
set -euo pipefail
root=$(mktemp -d /dev/shm/demo.XXXXXX)
trap 'fusermount3 -qu "$root"; rmdir "$root"' EXIT
squashfuse image.sqsh "$root"
bwrap --ro-bind "$root" / --dev /dev --proc /proc --tmpfs /tmp --ro-bind /shared /shared --chdir "$PWD" "$@"
