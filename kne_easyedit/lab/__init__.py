"""The page of `kne lab`: facts are typed, watched while they train, asked, and switched on and off.

What a page does with a loaded model and a store belongs here (`session`), and the page itself (`page`, `server`,
`guard`). Only `page` and `server` know Gradio, and they compute nothing.
"""

from kne_easyedit.lab.session import Finished, LabSession, Step, Training

__all__ = ["Finished", "LabSession", "Step", "Training"]
