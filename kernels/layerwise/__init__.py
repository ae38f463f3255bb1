"""Routing that each layer decides anew: its kernels, and what launches them."""
