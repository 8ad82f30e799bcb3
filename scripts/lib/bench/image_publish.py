"""Makes a pushed squashfs a registry image that the site packed: image_publish.py PATH NAME DIGEST UID.

What `bootseer image push NAME` would leave in the store, without its minutes of unpacking and packing: the
image of alice's file PATH gets the name and the site's signature. Runs as root, which has packed the file.
"""

import os
import sys
from dataclasses import replace

from bootseer_slurm.blob.names import read_name, write_name
from bootseer_slurm.config import load
from bootseer_slurm.image.signing import make_key, read_key, sign
from bootseer_slurm.store import open_store

path, name, digest, uid = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
if not read_key():
    make_key()
key = read_key()
os.setgroups([])
os.setgid(uid)
os.setuid(uid)
store = open_store(load().store.uri)
record = read_name(store, uid, path)
assert record is not None, f"{path} was not pushed"
write_name(store, uid, replace(record, name=name, fingerprint=digest, signature=sign(key, uid, record.blob)))
