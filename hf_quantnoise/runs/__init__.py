"""Complete runs: finetune with noise, evaluate, compress, save, reload, print a table.

``hf-quantnoise finetune`` and the scripts in ``examples/`` start the modules ``glue``, ``clm`` and
``images``. They require ``pip install 'hf-quantnoise[examples]'``. The rest of the package imports
nothing from here.
"""
