"""The tensorrt and tensorrt-rtx targets: TensorRT networks of the same graph, built and run."""
