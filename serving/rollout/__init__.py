"""Staged roll-outs: a candidate earns its users step by step, and loses them by itself when it does harm."""
