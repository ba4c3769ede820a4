"""Guides for people: switching from other trainers, and what to do when something looks wrong.

``make docs`` makes pages of them and of every docstring.
"""
