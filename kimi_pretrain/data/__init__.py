"""Where tokens come from and in which order a run reads them (design 4.8)."""
