"""Views of a run: its events counted, recorded and drawn.

progress.py      events -> the state of the run
record.py        events as lines of JSON, and the log
plan_lines.py    a plan as lines for people
sweep_lines.py   a plan of a sweep, or of a search, as lines for people
doctor_lines.py  the report of `doctor` as lines for people
plain_lines.py   a run as plain lines, or as lines of JSON
wrapping.py      long lines, broken at spaces for a terminal
point_rows.py    the rows of the screen that show a sweep: the best points, and the front
layer_rows.py    the rows of the screen with a cell for each layer
screen.py        a run as one picture
terminal.py      the terminal while a dashboard is shown
dashboard.py     the live picture, and the choice among all of these
summary.py       the end of a run: closing lines, next commands, run.json
feed.py          the path of every event: to a view and into the log
status.py        the state of a run, from its journal
replay.py        a recorded run, shown again
"""
