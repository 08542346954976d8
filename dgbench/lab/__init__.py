"""The state-space lab: what Mamba rests on, computed and shown (docs/ssm.md).

`matrices` computes what `lab hippo`, `lab discretize` and `lab conv` show, `scanning` what `lab scan` shows, `fusing` and
`speeds` measure. Selective copying has its settings and published figures in `settings`, its data in `task`, one training in
`training`, its step on a GPU in `graphs`, and the table of all trainings in `copying`.
"""
