"""Whole runs from a command line: finetune with noise, evaluate, compress, save, reload, table.

``glue``, ``clm`` and ``images`` are what ``hf-quantnoise finetune`` and the scripts of
``examples/`` start. They need ``pip install 'hf-quantnoise[examples]'``; the package itself imports
nothing of this.
"""
