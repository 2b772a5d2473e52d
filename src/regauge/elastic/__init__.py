"""Families: one model whose parts are models too, each chosen by a value.

`subnet.py` is the value, `family.py` what an artifact offers, `dimensions.py` what may be chosen along each dimension,
`stages.py` which blocks a model in stages keeps, `legal.py` which subnets are legal in a model and what they come to,
`order.py` by what streams are sorted so that a prefix is the best part.
"""
