"""The cost of job starts: events joined with accounting, analysed, kept and shown.

Each command has its module here: report, collect, overhead, answer. They use the rooms below, which import
downward only:

    render/    shows the figures                    totals/    figures of many starts
    records/   one row for each start, on disk      startup/   figures of one start
    access/    whose events a process may read      gather/    events and accounting of one run
"""
