"""Decoder-only transformers in Flax NNX. This package knows axis names, never a mesh.

Dim letters, used as suffixes (`q_RTNH`) and in einsums:

    R rows      T query time   S key time   B rows*time, flattened
    D model     N query heads  K kv heads   G query heads per kv head   H head size
    F ffn       V vocab        L layers
"""
