"""Captions for whole datasets: what to caption, with which prompt, and where the results are kept safe.

inputs.py       paths, folders, globs, lists, stdin     → Item
prompts.py      templates, columns, per-image prompts   → the prompt of one picture
settings.py     everything that decides what a caption says, and its fingerprint
record.py       what is known of one picture at the end
table.py        records as lines of JSONL or CSV, read back after any crash
ledger.py       the file of results: locked, append-only, durable, resumable
sidecar.py      a text file beside each picture
prepare.py      reading, hashing and resizing ahead, in threads
runner.py       ties them to a captioner, survives bad pictures, full disks and Ctrl-C
distributed.py  the same over a Ray cluster
"""
