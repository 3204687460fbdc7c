"""The simulator: the production planner and lifecycle under a virtual clock, from any fleet and any workload.

    from whaleflux_scheduler.simulation.runner import Simulation
    from whaleflux_scheduler.simulation.workload import Delays, NodeEvent, Submission, Workload

    jobs = [Submission("queues/a/jobs/j1", Spec(command=("true",), gpus=8), at_s=0.0, run_s=3600.0), ...]  # sorted by at_s
    result = Simulation(nodes, Workload(jobs, {"a": Queue("queues/a", weight=2.0)}, Delays(start_s=20.0))).run()
    for outcome in result.outcomes: ...       # `records.Outcome`: wait_s, completion_s, suspensions, ...
    result.held.total                         # GPU-seconds held; `held.means()` over time
    result.moves.digest                       # equal for equal lists of moves
    results.summary_of(result)                # all figures; `results.groups_of(result.outcomes, key)` by what you like

* `jobs` may be a generator: it is read as time goes on. `nodes` are `whaleflux.fleet.Node`s; `cluster_file.machine(profile)` makes one of the
  catalogue's machines, `traces.read(path, most_gpus)` the jobs of a trace, `estimates` what users say of run times.
* Same input, same moves, byte by byte: nothing in here looks at a clock, at an order of a set, or at random numbers that are not seeded.
* Time: `timeline`. What is shared: `state`. What happens to jobs and nodes: `happenings`, a function each. What becomes of the planner's moves:
  `moves`, a function for each kind. One job: `running`. What is written down: `records`; figures of it: `results`, `tables`, `pictures`. Files:
  `cluster_file`, `workload_file`, `traces`, `fleet_file`. The door: `__main__` and `scenario`, called by `whaleflux simulate`.
* What is simulated is said in `runner.SIMULATED`, and printed with every result.
"""
