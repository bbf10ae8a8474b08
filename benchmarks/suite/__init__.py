"""The whole benchmark suite: what runs, and one HTML report of a folder of results.

subjects.py: which benchmark files run, in which order, and how long they take; runner.py: runs them. rows.py: results
files as rows of one kind; compare.py: against a stored run; plots.py, page.py: the report.
"""
