"""Fused CPU kernels for the operations of a cell: their source, how they are compiled, how they are called."""
