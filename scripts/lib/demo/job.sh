#!/bin/bash
#SBATCH --job-name=demo --ntasks-per-node=1 --mem=3G --output=%j.out
mapfile -t modules < imports
srun --kill-on-bad-exit=1 ./in_image.sh venv/bin/python train.py model.safetensors "${modules[@]}"
