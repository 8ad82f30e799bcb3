#!/bin/bash
# What enroot does with a squashfs: image_enter.sh SQUASHFUSE IMAGE ROOT COMMAND...
# In a user and mount namespace of the user's, SQUASHFUSE (enroot's way of calling it) mounts IMAGE at ROOT, and
# COMMAND runs there.
set -euo pipefail
if [ "${1-}" != --inside ]; then
    exec unshare --user --map-root-user --mount -- "$0" --inside "$@"
fi
shift
squashfuse=$1 image=$2 root=$3
shift 3
"$squashfuse" -f -o "uid=0,gid=0" "$image" "$root" >&2 &
until mountpoint -q "$root"; do
    kill -0 $! || { echo "$squashfuse ended without a mount" >&2; exit 1; }
    sleep 0.005
done
"$@"
kill $!
wait || true
