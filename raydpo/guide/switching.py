"""
.. include:: switching.md
"""

__all__: list[str] = []
