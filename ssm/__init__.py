"""State space models from HiPPO to Mamba-3, as short pure functions that share one discretisation."""
