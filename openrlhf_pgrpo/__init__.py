"""Many preferences instead of one: P-GRPO and its relatives as a plug-in for OpenRLHF.

Importing this package loads neither Ray nor OpenRLHF; it is imported in every Ray worker.
"""

__version__ = "0.1.0"
