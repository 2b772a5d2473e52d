"""The checker that jaxtyping applies to every annotation under pytest: beartype, with int accepted as float."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

checker = beartype(conf=BeartypeConf(is_pep484_tower=True))
