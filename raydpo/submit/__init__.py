"""``raydpo submit`` and ``raydpo jobs``: the verbs as jobs of a Ray cluster.

Needs pydantic and PyYAML; to talk to a cluster, ``ray[default]``.
"""
