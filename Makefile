# The ways to look whether all is well, from the quickest to the slowest. `make unit` needs Python, git and
# squashfs-tools; the others install what they need, as root on Debian or Ubuntu (scripts/setup).
.PHONY: unit check node cluster test demo

unit:
	scripts/setup --venv
	.venv/bin/python -m pytest -q tests/unit

check:
	scripts/check

node:
	scripts/test tests/unit tests/hooks tests/spank tests/integration

cluster:
	scripts/test tests/slurm

test:
	scripts/test

demo:
	scripts/demo
