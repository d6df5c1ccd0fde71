"""The mismatch of sampler and learner: d = log π_learner − log μ_sampler of every sampled token.

statistics/  what is measured of a batch: a summary of fixed size that merges
record/      the files of a run
collection/  from the ranks that measure to the record on disk, over Ray
diagnosis/   what kind of gap it is, and which thresholds it is beyond
report/      what people look at: tables, the page, the live terminal, other trainers' dumps
run_monitor  all of it in a framework's driver
"""
