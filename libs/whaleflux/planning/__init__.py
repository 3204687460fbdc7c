"""How a model is split over GPUs: what a split needs in memory and how long its steps take. Pure, without I/O; NumPy arrays in and out.

    shape = model_named("llama-3.1-70b")                       # models.py: also config.json and YAML
    machine = Machine.of(CATALOGUE.types["H200"])              # machine.py: GPU and fabric as the cost model sees them
    plans = Plans.of(tp=[8, 4], pp=[2, 4], dp=8, micro_batch=1, global_batch=128, sequence=8192)   # plans.py: any number at once
    needed = memory(shape, plans, Training())                  # memory.py: bytes on a GPU by component, of the fullest stage
    needed.total_bytes <= machine.usable_bytes
    step = step_time(shape, machine, plans, Training())        # step.py: seconds by component
    step.total_s; step.exposed_s
    price = lambda groups: step_time(shape, machine, plan, Training(), groups=groups).total_s
    best_map(cluster, Split.of(plan), price).gpus              # rank_map.py: on which GPU of cluster.py's each rank of one plan runs

    found = search(shape, machine, Asked(128, 8192, batch=512))   # search.py: the best plan, runners-up, what binds
    found.best.split.words(); found.binding.words
    reasons(shape, machine, found.best.split, Training())         # why.py: what would be with less of each part
    emit("megatron", Planned.of(shape, found.best.split.plans(), Training())).text   # emit/: what runs it; validity.py reads it back

Arrays have one element for each plan, or are single values that hold for all. Nothing is checked here: `plans.faults` says of each plan
whether it is a valid one. NumPy is no dependency of agents: whoever imports this package has it from `whaleflux[plan]` or `[scheduler]`.
"""
