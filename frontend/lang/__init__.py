"""The program language: text, ``gen``, ``select``, roles, ``fork`` and ``join`` on a state of tokens.

The names people use are those of ``import branchwise as bw``; see ``docs/language.md``.
"""
