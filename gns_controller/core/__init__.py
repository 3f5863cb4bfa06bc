"""The part that service and trainer share: nouns, batch arithmetic, policies and replay.

No clock, no files, no network, no torch: every function here is pure and needs pydantic only. The one exception looks
up which installed packages add policies (policies/plug_ins.py).
"""
