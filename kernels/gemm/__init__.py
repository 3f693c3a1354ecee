"""Matrix multiplications with epilogues: linear, QKV, projector and patch projection."""
