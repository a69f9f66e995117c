"""Tools that know nothing of facts, scores or edits: files, digests, interrupts, processes, plots.

Only what several subpackages need and no library offers belongs here. Nothing here imports from another subpackage.
"""
