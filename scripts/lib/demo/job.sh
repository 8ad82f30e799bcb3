#!/bin/bash
#SBATCH --job-name=demo --nodes=3 --ntasks-per-node=1 --output=%j.out
srun ./in_image.sh venv/bin/python train.py model.safetensors
