"""OpenRLHF's command line under a plan: which arguments are made, checked and refused."""
