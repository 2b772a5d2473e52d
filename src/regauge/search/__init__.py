"""The search, in the order in which one reads it.

options.py      what each place may become
profile.py      what each option costs on this machine
losses/         what each option loses: rounded once (shelf), predicted (fisher), measured (trials), corrected
allocation.py   which option each place takes, every budget a row; the frontier and its knee
loop/           start, choose, build, measure, correct, until every budget is met by measurement; finish
record.py       what a search found, as it is kept
fit.py          `fit` and `pick`, which call these
"""
