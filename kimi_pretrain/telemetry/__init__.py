"""What a run writes and shows: sinks for metrics, the console, the report.

Rows are plain dictionaries of numbers, strings and nested lists, so nothing here knows
torch. ``sinks.open_sinks`` records a run, ``console.open_console`` shows it while it
runs, ``report.write_report`` draws it afterwards from its files alone.
"""
