"""
.. include:: troubleshooting.md
"""

__all__: list[str] = []
