"""CUDA C++ kernels: their sources (csrc), compiling them (compile), describing launches of them
(launch) and executing those on a GPU (driver). Nothing here knows torch."""
