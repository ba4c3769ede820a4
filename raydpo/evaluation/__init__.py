"""Any policy against any reference: preferences, answers, drift, wins.

``raydpo eval`` on the command line, ``raydpo.evaluate`` in Python.
"""
