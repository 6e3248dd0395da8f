"""The cpu target: the reference semantics on torch, on any machine."""
