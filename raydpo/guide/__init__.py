"""Guide: pages for people, as Markdown files in this folder. ``index.md`` is the first.

``make docs`` turns them, and every docstring, into web pages (``raydpo.guide.build``).
"""
