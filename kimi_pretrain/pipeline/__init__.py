"""The pipeline: schedules as data that is generated, checked, simulated, drawn and executed."""
