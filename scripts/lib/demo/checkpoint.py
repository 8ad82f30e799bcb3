"""Write a safetensors file of random weights: checkpoint.py FILE MEBIBYTES (runs inside the image)."""

import sys

import numpy
from safetensors.numpy import save_file

TENSOR_MIB = 16

random = numpy.random.default_rng(0)
rows = TENSOR_MIB * 2**20 // 4 // 1024
save_file(
    {
        f"layers.{number}.weight": random.standard_normal((rows, 1024), dtype=numpy.float32)
        for number in range(int(sys.argv[2]) // TENSOR_MIB)
    },
    sys.argv[1],
)
