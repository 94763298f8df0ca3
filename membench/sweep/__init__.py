"""Sweeps: many cells from one TOML file, as a graph of tasks that share what they can.

A sweep is a folder, `RESULTS/sweeps/NAME-ID/`, that any machine with access to it can ask:

    sweep.json               the manifest: cells, tasks, resources, hash of the code; written again
                             only when a target has been trained (`membench.sweep.growth`)
    code/                    the snapshot that workers run (`membench.sweep.snapshot`)
    executor                 the name of the executor that started it last
    cancelled                there while the sweep is cancelled: no task starts, running ones stop
    tasks/TASK/lock          held (flock) by the worker while it runs the task
    tasks/TASK/submitted.json  written by an executor that queued the task: job, time, executor
    tasks/TASK/attempt-N.json  written by the worker: state, cause, host, pid, times, log tail
    tasks/TASK/attempt-N.log   everything that attempt printed
    summary.json, summary.csv, board/   written by the last task

Results on disk are the truth: a task is done when its product (an artifact, parts of one, a record)
is there, whatever anybody says about the job. `Sweep.statuses` turns all this into one `Status` for
each task.

**Executors.** One decides where tasks run; `membench.sweep.executor.Executor` is its interface:

    check(sweep)             refuse, by a MembenchError, what cannot run here; nothing is queued yet
    start(sweep, tasks)      run these, or queue them; `tasks` are in an order that respects `needs`
    ask(sweep, tasks)        what the queue knows of tasks no result on disk settles: `Report`s
    cancel(sweep, tasks)     take them out of the queue, stop what runs

An attached executor (`inline`, `local`) returns from `start` when nothing is left to do. A detached
one (`slurm`) queues the whole graph at once and returns: `Task.needs` are dependencies on success
(Slurm's afterok), `Task.after` on the end, however it comes (afterany). A dependency that is not
among `tasks` is done already. A job runs

    PYTHONPATH=SWEEP/code python -P -m membench.sweep.worker SWEEP TASK

(`-P`: else a checkout in the current folder comes before the snapshot) or, in a process that has
the snapshot on its path, calls `membench.sweep.worker.work(SWEEP, TASK, redirect=True)`. Either
returns one of `membench.sweep.tasks.EXIT`: 0 done (also when there was nothing left to do), 75
stopped at a batch boundary after SIGTERM or SIGUSR2, to be run again, else by cause. A worker that
dies without a word leaves an attempt in state `running` whose lock nobody holds. An executor that
knows why says so: `Sweep.close(task, cause, reason)` ends the attempt; else it counts as killed.
`Sweep.attempts_left(task)` says whether a task may be tried again. An executor that queues calls
`Sweep.submitted(task, executor, job)` for every task, `Task.resources` says what to ask for, and
`Sweep.code` is what belongs on PYTHONPATH.
"""
