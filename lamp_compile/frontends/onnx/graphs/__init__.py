"""Graphs that are changed in place.

``graph`` with its index, ``values``, ``walk`` (looking through nodes), ``emit`` (new nodes), ``sites``.
"""
