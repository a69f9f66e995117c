"""Shipped settings; installed as `kne_easyedit.shipped_hparams`. A regular package, so that its files have one path."""
