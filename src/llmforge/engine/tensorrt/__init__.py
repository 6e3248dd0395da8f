"""The tensorrt and tensorrt-rtx targets: a TensorRT network of the same graph, built and executed."""
