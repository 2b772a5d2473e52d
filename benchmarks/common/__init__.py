"""What the benchmarks share: shapes and checkpoints, peers, the probe, rounds, records, tables and plots."""
