"""Python processes that start warm: forked from one that has imported torch and all else that is slow to import.

`servers` starts the process that is forked, `server`, and writes an executable that stands for `python`, by way of
`interpreter`: whoever starts it gets a process like any other, in less than a second.
"""
