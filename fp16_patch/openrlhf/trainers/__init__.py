"""OpenRLHF's trainers: the driver that judges every process, and what the mismatch monitor sees."""
