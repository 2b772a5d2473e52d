"""Artifacts: what bytes on disk mean. Written atomically (`staging`), read strictly (`files`, `header`, `codec`)."""
