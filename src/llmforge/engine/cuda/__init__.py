"""The cuda target: our kernels, compiled for the model at build time."""
