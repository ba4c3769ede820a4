"""``raydpo submit`` and ``raydpo jobs``: run the verbs as jobs on a Ray cluster.

Checks and packing need pydantic, PyYAML and rich only; connecting to a cluster needs ``ray[default]``.
"""
