"""OpenRLHF's trainers: the driver that checks every process, and what the mismatch monitor sees."""
