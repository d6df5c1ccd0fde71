"""The sampler/learner log-prob mismatch.

stats        what is measured of a batch: a summary of fixed size that merges; its parts are in ``statistics/``
collection/  from the ranks that measure to the record on disk, over Ray
record       reading a run's record
diagnosis    what kind of gap it is, by the detectors in ``causes`` on the figures in ``evidence``
alerts       which thresholds it is beyond
report/      what people look at: tables, the page, the live terminal, other trainers' dumps
"""
