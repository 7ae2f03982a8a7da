"""All that a minute on a Hopper GPU should do, in one command: `python -m perf.device --out DIR`.

A step is a row of `steps.STEPS` and a function `work(log, folder)`, which runs in a process of its
own and hands its items to `Log`; a kernel or pass is a row of `passes.PASSES`.
"""
