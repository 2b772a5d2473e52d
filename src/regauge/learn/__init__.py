"""The one loop for whatever is trained. It sees parts by protocol only (`base.py`); see `docs/learn.md`."""
