#!/bin/bash
# A start as it is done today, on each node: start_stock.sh IMAGE INDEX WORK MODULE...
# What enroot's import does, a mount of the result, pip, a copy of the checkpoint; then the demo's program.
# WORK: an empty folder on the node's disk. Says when each part was reached.
set -euo pipefail
image=$1 index=$2 work=$3
shift 3
trap 'fusermount3 -qu "$work/root"; rm -rf "${work:?}"/*' EXIT
host=${index#http://}

reached() {
    echo "$SLURMD_NODENAME reached $1 $EPOCHREALTIME"
}

inside() {
    bwrap --ro-bind "$work/root" / --dev /dev --proc /proc --tmpfs /tmp --ro-bind /shared /shared \
        --bind "$work/job" /tmp/job --chdir "$PWD" "$@"
}

mkdir "$work/root" "$work/job"
reached begin
skopeo --insecure-policy copy --quiet --src-tls-verify=false "docker://$image" "oci:$work/oci:1"
reached pull
umoci --log error unpack --rootless --image "$work/oci:1" "$work/bundle"
reached unpack
# enroot.conf(5): the default of ENROOT_SQUASH_OPTIONS, and what enroot itself adds.
mksquashfs "$work/bundle/rootfs" "$work/image.sqsh" -comp lzo -noD -all-root -noappend -quiet -no-progress
squashfuse "$work/image.sqsh" "$work/root"
reached mksquashfs
inside /usr/bin/python3 -m venv --without-pip /tmp/job/venv
inside env PYTHONPATH=/opt/pip /tmp/job/venv/bin/python -m pip --isolated --quiet --disable-pip-version-check \
    install --no-cache-dir --no-deps --index-url "$index" --trusted-host "${host%%:*}" -r stock_lock.txt
reached install
cp model.safetensors "$work/job/"
reached cp
inside /tmp/job/venv/bin/python train.py /tmp/job/model.safetensors "$@"
