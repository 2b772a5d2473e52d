"""Models larger than memory: a window of transformer blocks is resident, the rest is read from disk while computing.

`figure` (what the user allows, what there is), `plan` (which blocks stay, which stream), `disk` and `reader` (bytes),
`resident` (what stands in the model), `build` (from an artifact or a plain checkpoint).
"""
