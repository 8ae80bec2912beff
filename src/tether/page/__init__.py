"""The page of a run: a server over the run folder, and the same page as one offline file. Knows no torch.

    server.py   `tether ui`: socket, address, browser      app.py      the routes
    library.py  which runs there are, each in its thread   reading.py  rows and cursors of one run
    report.py   `tether report`                            security.py who may do what

It reads `run.db` and writes `control.db`; a crash of it cannot touch training. Read next: docs/page-api.md.
"""
