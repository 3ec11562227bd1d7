"""Captions for whole datasets: what to caption, with which prompt, and where the results are kept safe.

inputs.py       paths, folders, globs, lists, stdin
prompts.py      templates, columns, prompts beside pictures
wording.py      prefix, trigger words, suffix, old captions
options.py      what a run is asked for
settings.py     what of it a file of results remembers; seeds
record.py       what is known of one picture at the end
table.py        records as JSONL or CSV, read back after any crash
state.py        the locked file beside the results
ledger.py       the file of results: append-only, durable, resumable
stream.py       results to stdout
sidecar.py      a text file beside each picture
book.py         what is left to do, what has come of it
prepare.py      reading, hashing and resizing ahead, in threads
runner.py       a run on this machine
distributed.py  a run on a Ray cluster
setup.py        from a loaded model to a runner
api.py          Model.caption
"""
