"""Tools that know nothing of models or facts: files, digests, interrupts, processes, plots.

Only what several rooms need and no library offers may enter. Nothing here imports from another room.
"""
